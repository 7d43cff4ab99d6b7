"""Logits of the last token alone become logits of every token.

Many models are written for generation: `head(x[:, [-1], :])`, `head(x)[:, -1]`. What they compute
of the last token is computed of each; @prefill cuts the last one off again, before the head.

    %2 = "accel.slice"(%1) {axis = 1, start = length - 1, stop = length} : ... -> [1, 1, 32]
    %3 = "accel.linear"(%2, %w) : ... -> [1, 1, 128]

    %3 = "accel.linear"(%1, %w) : ... -> [1, length, 128]

What follows the cut must treat tokens one by one, which is tried on random data. Programs of which
that is not so, or that cut in another way, stay as they are.
"""

from __future__ import annotations

import sympy

from accel.errors import AccelError
from accel.ir.module import Function, Op, Value
from accel.ir.patterns import splat_value
from accel.ir.types import same_dim, simplify_dim, symbol_names
from accel.passes.token_wise import are_token_wise

_MADE_BY = "insert_kv_cache"


def every_token(main: Function, ids: Value, length: sympy.Symbol) -> None:
    """Rewrites @main, whose one result is of the last token, [B, 1, V] or [B, V]."""
    result = main.results[0]
    if len(main.results) != 1 or _has(result, length):
        return
    after = _after_cuts(main, ids, length)
    if not after:
        return
    made = _of_every_token(main, after, length)
    if made is None:
        return
    last = main.body.last
    assert last is not None
    last.set_operand(0, made)
    for op in reversed(after):
        op.erase()


def _after_cuts(main: Function, ids: Value, length: sympy.Symbol) -> list[Op]:
    """The ops, in order, that follow from the text and know nothing of how long it is."""
    found: list[Op] = []
    moving = {ids}
    for op in main.ops:
        if op is main.body.last or not any(v in moving for v in op.operands):
            continue
        moving.update(op.results)
        if not any(_has(r, length) for r in op.results):
            found.append(op)
    return found


def _of_every_token(main: Function, after: list[Op], length: sympy.Symbol) -> Value | None:
    """The result for all tokens, by copies of `after`; None where that is not known to be so."""
    returned = main.body.last
    assert returned is not None
    mapping: dict[Value, Value] = {}
    inputs: list[Value] = []
    copies: list[Op] = []

    def give_up() -> None:
        for op in reversed(copies):
            op.erase()

    for op in after:
        whole = _cut(op, length)
        if whole is not None and whole not in mapping.values():
            mapping[op.result] = whole
            inputs.append(whole)
            continue
        if op.name == "reshape" and op.operands[0] in mapping and _drops_token(op):
            mapping[op.result] = mapping[op.operands[0]]
            continue
        sequence = any(_has(v, length) for v in op.operands)
        if sequence or op.regions or op.definition.infer is None or len(op.results) != 1:
            give_up()
            return None
        try:
            new = _over(op, [mapping.get(v, v) for v in op.operands])
        except AccelError:
            give_up()
            return None
        main.body.insert_before(new, returned)
        copies.append(new)
        mapping[op.result] = new.result
    made = mapping.get(main.results[0])
    constants = [v for op in copies for v in op.operands if v.op not in copies]
    inputs = list(dict.fromkeys([*inputs, *constants]))
    right = made is not None and made.type.rank == 3 and same_dim(made.shape[1], length)
    if made is None or not right or not are_token_wise(copies, inputs, made, length):
        give_up()
        return None
    return made


def _over(op: Op, operands: list[Value]) -> Op:
    """The op over other operands. Raises AccelError where those do not fit."""
    types = [v.type for v in operands]
    results = op.definition.infer_types(types, op.attributes, op.segments)
    return Op(
        op.definition,
        operands,
        op.attributes,
        results,
        segments=op.segments,
        location=op.location,
        made_by=_MADE_BY,
    )


def _cut(op: Op, length: sympy.Symbol) -> Value | None:
    """What an op takes the last token of, along axis 1."""
    x = op.operands[0]
    if x.type.rank != 3 or not same_dim(x.shape[1], length):
        return None
    if op.name == "slice":
        last = simplify_dim(length - 1)
        one = same_dim(op.attribute("start"), last) and same_dim(op.attribute("stop"), length)
        return x if one and op.attribute("axis") % 3 == 1 else None
    if op.name == "gather" and op.attribute("axis") % 3 == 1:
        index = op.operands[1]
        return x if index.shape == (1,) and _is_last(index, length) else None
    return None


def _is_last(index: Value, length: sympy.Symbol) -> bool:
    if splat_value(index) == -1:
        return True
    op = index.op
    return op is not None and op.name == "size" and same_dim(op.attribute("value"), length - 1)


def _drops_token(op: Op) -> bool:
    """[B, 1, D] -> [B, D]."""
    before, after = op.operands[0].shape, op.result.shape
    return len(before) == 3 and len(after) == 2 and same_dim(before[0], after[0])


def _has(value: Value, length: sympy.Symbol) -> bool:
    return any(not isinstance(d, int) and length.name in symbol_names(d) for d in value.shape)
