"""Tokens that look at each other other than by attention: products, sums and softmaxes over them.

    weights = (q @ k.transpose(-1, -2)).tril()         # linear attention, retention, Mamba-2...
    y = weights @ v / weights.sum(-1, keepdim=True)

Of such ops a token needs one row, and all of what its columns follow from: `k` and `v` here, which
are kept for every token (an item "tokens" of the state, `finite`: later rows are read, and count
for nothing). `part` finds which operands an op needs in part and which as a whole by evaluating its
definition; `keep` makes a whole value of what is kept; `check_order` evaluates, on small random
data, whether later tokens really count for nothing. A model in which they do not is a CaptureError.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

import sympy

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.storage import WeightStore
from accel.ir.types import TensorType, same_dim
from accel.passes.narrow import WHOLE, Axes, Plan, made_by
from accel.passes.state import Item
from accel.passes.token_wise import is_token_wise_in, what_follows_wrongly

if TYPE_CHECKING:
    from accel.passes.windows import NextTokens

_MOST_CHOICES = 64
_MOST_PASSED = 8


def part(tokens: NextTokens, value: Value, axes: Axes) -> Plan | None:
    """A value on some of its sequence axes, or from operands that are needed whole in part."""
    op = made_by(value)
    alike = all(len(r.shape) == len(value.shape) for r in op.results)
    if len(axes) != 1 or not alike or op.definition.infer is None:
        return None
    for choice in _choices(tokens, op):
        if is_token_wise_in(op, axes, choice, tokens.length):
            return Plan(list(zip(op.operands, choice)), tokens.clone(op))
    return None


def _choices(tokens: NextTokens, op: Op) -> Iterator[tuple[Axes, ...]]:
    """Axes of the operands to narrow: at most one each, as many operands as possible first."""
    each: list[list[Axes]] = []
    count = 1
    for operand in op.operands:
        options = [frozenset((a,)) for a in sorted(tokens.sequence_axes(operand))] + [WHOLE]
        each.append(options)
        count *= len(options)
    if count <= _MOST_CHOICES:
        yield from sorted(product(*each), key=lambda c: -sum(bool(axes) for axes in c))


def keep(tokens: NextTokens, value: Value) -> Plan | None:
    """A value of all tokens from what is kept of it; None where no axis has a token a place."""
    op = made_by(value)
    axes = tokens.sequence_axes(value)
    if len(axes) != 1:
        return None
    (axis,) = axes
    source = op.operands[0] if op.has(Trait.VIEW) else value
    views = op.name != "slice" and len(tokens.sequence_axes(source)) == 1
    if source is not value and views:  # what was repeated is kept once
        return Plan([(source, WHOLE)], tokens.clone(op))
    if not same_dim(value.shape[axis], tokens.length):
        joined = op.name == "cat" and op.attribute("axis") % value.type.rank == axis
        if not joined:
            return None
        tokens.kept.add(value)  # such as keys of no token, before those of all tokens
        return Plan([(v, WHOLE) for v in op.operands], tokens.clone(op))

    def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
        item = tokens.items.find("tokens", value)
        if item is None:
            type_ = TensorType(tokens.shape(value.shape), value.dtype)
            name = tokens.items.name("kept")
            item = tokens.items.add(Item(name, "tokens", value, type_, axis, finite=True))
        if item not in tokens.held.results:
            cache = tokens.held.argument(item)
            made = b.dynamic_update(cache, values[0], tokens.position, axis=axis)
            tokens.held.results[item] = made
        return [tokens.held.now(item)]

    tokens.kept.add(value)
    return Plan([(value, axes)], emit)


def check_order(tokens: NextTokens, weights: WeightStore) -> None:
    """Raises CaptureError where a later token, or how long the text is, has a say in what is made
    of kept values, of what changes with the length, or of attention whose mask is not known to be
    causal."""
    proven: set[Value] = set()
    passed: dict[Value, str] = {}  # what may do so, if what is made of it does not
    waiting: list[Value] = []  # those of which nothing is proven yet
    places = {op: i for i, op in enumerate(tokens.main.ops)}

    def order(value: Value) -> int:
        return places[made_by(value)]

    while True:
        left = [v for v in sorted(_ends(tokens, passed), key=order) if v not in proven]
        if not left:
            return
        for value in left:
            ops, leaves = _between(tokens, value, passed)
            why = what_follows_wrongly(ops, leaves, value, tokens.length, weights)
            inner = [v for v in leaves if v in proven]
            if why and inner:  # once more, from where those follow: an index is no random number
                passed |= dict.fromkeys(inner, why)
                proven.difference_update(inner)
                break
            if why:
                passed[value] = why
                waiting.append(value)
                if len(waiting) > _MOST_PASSED or value is tokens.main.results[0]:
                    raise tokens.refuse(waiting[0], passed[waiting[0]])
                break
            proven.add(value)
            waiting.clear()


def _ends(tokens: NextTokens, passed: Container[Value]) -> list[Value]:
    """Where what was mixed has one token a place again, and is not `passed`."""
    found: dict[Value, None] = dict.fromkeys(v for v in tokens.unproven if v not in passed)
    pending = [(v, WHOLE) for v in (*tokens.kept, *tokens.unstable)]
    pending += [(v, tokens.sequence_axes(v)) for v in tokens.unproven if v in passed]
    users: dict[tuple[Value, Axes], list[tuple[Value, Axes]]] = {}
    for key, plan in tokens.plans.items():
        for need in plan.needs:
            users.setdefault(need, []).append(key)
    seen = set(pending)
    while pending:
        for key in users.get(pending.pop(), []):
            value, axes = key
            here = axes and axes == tokens.sequence_axes(value) and _in_order(tokens, value)
            if here and value in tokens.from_tokens and value not in passed:
                found[value] = None
            elif key not in seen:
                seen.add(key)
                pending.append(key)
    return list(found)


def _between(
    tokens: NextTokens, value: Value, passed: Container[Value]
) -> tuple[list[Op], list[Value]]:
    """The ops, in order, from values that are there token by token to this one."""
    order = {op: i for i, op in enumerate(tokens.main.ops)}
    ops, leaves = {made_by(value)}, dict[Value, None]()
    pending = list(made_by(value).operands)
    while pending:
        each = pending.pop()
        axes = tokens.sequence_axes(each)
        by_token = each in tokens.from_tokens and axes and (each, axes) in tokens.plans
        by_token = by_token and _in_order(tokens, each)
        if each.op is None or (by_token and each not in passed):
            leaves[each] = None
        elif each.op not in ops:
            ops.add(each.op)
            pending.extend(each.op.operands)
    return sorted(ops, key=order.__getitem__), list(leaves)


def _in_order(tokens: NextTokens, value: Value) -> bool:
    """Whether tokens come one after the other on its axes: heads times tokens do not say so."""
    for axis in tokens.sequence_axes(value):
        factor = sympy.cancel(value.shape[axis] / tokens.length)
        if not all(f.is_Symbol for f in sympy.Mul.make_args(factor) if f != 1):
            return False
    return True
