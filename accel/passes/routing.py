"""Groups of ops that treat tokens one by one only together, such as the routing of experts.

A mixture of experts sorts its tokens by expert, multiplies them in groups and puts them back in
order: no op of that is token by token, the whole is. `plan(tokens, value, axes)` walks back from a
value, last op first, until the ops it has gathered give the same for one token as for several,
which evaluating them on small random data tells (as `accel.passes.token_wise` does for one op).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.passes.narrow import WHOLE, Axes, Plan, made_by
from accel.passes.token_wise import are_token_wise

if TYPE_CHECKING:
    from accel.passes.windows import NextTokens

_MOST_OPS = 96
_STOPS = ("attention", "cached_attention", "scan")


def plan(tokens: NextTokens, value: Value, axes: Axes) -> Plan | None:
    """The plan of a value through a group of ops that is token by token; None if there is none."""
    if axes != tokens.sequence_axes(value):
        return None
    order = {op: i for i, op in enumerate(tokens.main.ops)}
    group = {made_by(value)}
    while len(group) < _MOST_OPS:
        group |= _sizes(tokens, group)
        inputs = _inputs(sorted(group, key=order.__getitem__))
        moving = [v for v in inputs if v in tokens.from_tokens]
        fixed = [v for v in inputs if v not in tokens.from_tokens]
        if not any(tokens.sequence_axes(v) for v in fixed):
            ops = sorted(group, key=order.__getitem__)
            if are_token_wise(ops, inputs, value, tokens.length):
                return _plan(tokens, ops, value, moving, fixed)
        makers = [v.op for v in moving if v.op is not None]
        inner = [op for op in makers if op.name not in _STOPS]  # others stay inputs
        if not inner or len(makers) < len(moving):
            return None
        group.add(max(inner, key=order.__getitem__))
    return None


def _inputs(group: Sequence[Op]) -> list[Value]:
    """What the ops read of others, in the program's order: trials draw data for them in turn."""
    inner = set(group)
    return list(dict.fromkeys(v for op in group for v in op.operands if v.op not in inner))


def _sizes(tokens: NextTokens, group: set[Op]) -> set[Op]:
    """Numbers, and what only follows from how many tokens there are (iota, full): made anew."""
    found: set[Op] = set()
    for value in _inputs(list(group)):
        op = value.op
        if op is None or value in tokens.from_tokens or op.name == "constant":
            continue
        plain = op.has(Trait.VIEW) or op.has(Trait.ELEMENTWISE)
        if not op.operands or (plain and tokens.sequence_axes(value)):
            found.add(op)
    return found | (_sizes(tokens, group | found) if found else set())


def _plan(
    tokens: NextTokens, ops: list[Op], value: Value, moving: list[Value], fixed: list[Value]
) -> Plan:
    needs = [(v, tokens.sequence_axes(v)) for v in moving] + [(v, WHOLE) for v in fixed]

    def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
        mapping = dict(zip((*moving, *fixed), values))
        for op in ops:
            b.location = op.location
            made = tokens.clone(op, narrowed=True)(b, [mapping[v] for v in op.operands])
            mapping.update(zip(op.results, made))
        return [mapping[value]]

    return Plan(needs, emit)
