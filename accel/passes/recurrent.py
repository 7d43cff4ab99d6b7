"""State other than keys and values: what `NextTokens` keeps of convolutions, shifts, sums, loops.

`plan(tokens, value, axes)` makes the next tokens' part of a value from a state, where the value is

    a causal convolution, or a shift, along the text: of its operand the last few tokens are kept
    a running sum, product or extreme: the last one is kept
    a loop over the tokens (`accel.scan`): what it hands on is kept, and its body runs once more

None where the value is nothing of this kind. The state is in `accel.passes.state`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.patterns import splat_value
from accel.ir.types import TensorType, same_dim, simplify_dim
from accel.passes.narrow import WHOLE, Axes, Plan, made_by
from accel.passes.state import Item

if TYPE_CHECKING:
    from accel.passes.windows import NextTokens


def plan(tokens: NextTokens, value: Value, axes: Axes) -> Plan | None:
    """The plan of a value through a state; see the module."""
    op = made_by(value)
    if len(axes) != 1:
        return None
    (axis,) = axes
    if op.name == "scan":
        return _scan(tokens, value, op, axis)
    if not same_dim(value.shape[axis], tokens.length):
        return None
    if op.name in _RUNNING and value.index == 0:  # an extreme's place is its second result
        return _running(tokens, op, axis)
    window = _window(tokens, value, axis)
    return None if window is None else _windowed(tokens, window)


# -- convolutions and shifts ---------------------------------------------------------------------


@dataclass
class _Window:
    """Token t of the result reads source[t - kept : t - kept + taps * dilation] along an axis."""

    source: Value
    axis: int
    kept: int
    conv: Op | None = None


def _window(tokens: NextTokens, value: Value, axis: int) -> _Window | None:
    """Follows slices, padding and at most one convolution up to a value with a token a place."""
    first, reach = 0, 0
    conv: Op | None = None
    x = value
    while x is value or not same_dim(x.shape[axis], tokens.length):
        op = x.op
        if op is None:
            return None
        moved = _moved(op, axis)
        if op.name == "conv" and conv is None:
            conv, place = op, axis - 2
            if place < 0 or op.attribute("layout") != "nchw" or op.attribute("stride")[place] != 1:
                return None
            taps = op.operands[1].shape[axis]
            if not isinstance(taps, int):
                return None
            moved = -op.attribute("padding")[place]
            reach = (taps - 1) * op.attribute("dilation")[place]
        if moved is None:
            return None
        first += moved
        x = op.operands[-1] if op.name == "cat" else op.operands[0]
    if first >= 0 or first + reach > 0:
        return None  # it reads nothing before the token, or something after it
    return _Window(x, axis, -first, conv)


def _moved(op: Op, axis: int) -> int | None:
    """By how much a result's place is ahead of its operand's; None if that is not known."""
    found: object = None
    if op.name == "slice":
        own = op.attribute("axis") % op.result.type.rank == axis and op.attribute("step") == 1
        found = op.attribute("start") if own else None
    elif op.name == "pad" and op.attribute("value") == 0:
        low, high = op.attribute("low"), op.attribute("high")
        others = [*low[:axis], *low[axis + 1 :], *high[:axis], *high[axis + 1 :]]
        found = None if any(others) else _negative(low[axis])
    elif op.name == "cat" and len(op.operands) == 2:
        own = op.attribute("axis") % op.result.type.rank == axis
        zeros = splat_value(op.operands[0]) == 0
        found = _negative(op.operands[0].shape[axis]) if own and zeros else None
    return found if isinstance(found, int) else None


def _negative(amount: object) -> int | None:
    return -amount if isinstance(amount, int) else None


def _windowed(tokens: NextTokens, window: _Window) -> Plan:
    axis, kept, conv = window.axis, window.kept, window.conv

    def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
        new = values[0]
        item = tokens.items.find("window", window.source, kept)
        if item is None:
            shape = list(tokens.shape(window.source.shape))
            shape[axis] = kept
            type_ = TensorType(tuple(shape), new.dtype)
            name = tokens.items.name("window")
            item = tokens.items.add(Item(name, "window", window.source, type_, axis), kept)
        joined = b.cat(tokens.held.argument(item), new, axis=axis)
        stop = simplify_dim(kept + tokens.count)
        if item not in tokens.held.results:
            last = b.slice(joined, axis=axis, start=tokens.count, stop=stop)
            tokens.held.results[item] = last
        made: Value = joined
        if conv is not None:
            padding = tuple(
                0 if i == axis - 2 else p for i, p in enumerate(conv.attribute("padding"))
            )
            attributes = tokens.attributes(conv, padding=padding)
            made = b.op("conv", [joined, *values[1:]], attributes).result
        if not same_dim(made.shape[axis], tokens.count):
            made = b.slice(made, axis=axis, start=0, stop=tokens.count)
        return [made]

    others = [] if conv is None else [(v, WHOLE) for v in conv.operands[1:]]
    return Plan([(window.source, frozenset((axis,))), *others], emit)


# -- running sums --------------------------------------------------------------------------------


def _log_add(b: Builder, x: Value, y: Value) -> Value:
    """log(exp(x) + exp(y)), also of minus infinity."""
    high, low = b.maximum(x, y), b.minimum(x, y)
    nothing = b.scalar(float("-inf"), x.dtype)
    made: Value = b.add(high, b.log1p(b.exp(b.sub(low, high))))
    return b.where(b.eq(low, nothing), high, made)


# A reduction along the text -> what makes the next of the last and a token's own.
_RUNNING: dict[str, Callable[[Builder, Value, Value], Value]] = {
    "cumsum": lambda b, x, y: b.add(x, y),
    "cumprod": lambda b, x, y: b.mul(x, y),
    "cummax": lambda b, x, y: b.maximum(x, y),
    "cummin": lambda b, x, y: b.minimum(x, y),
    "logcumsumexp": _log_add,
}


def _running(tokens: NextTokens, op: Op, axis: int) -> Plan | None:
    result = op.results[0]
    if op.attribute("axis") % result.type.rank != axis or any(r.uses for r in op.results[1:]):
        return None

    def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
        item = tokens.items.find("sum", result)
        if item is None:
            shape = list(tokens.shape(result.shape))
            shape[axis] = 1
            type_ = TensorType(tuple(shape), result.dtype)
            item = tokens.items.add(Item(tokens.items.name("sum"), "sum", result, type_, axis))
        seen = b.op(op.name, values, {"axis": axis}).results[0]
        made = _RUNNING[op.name](b, seen, tokens.held.argument(item))
        last = simplify_dim(tokens.count - 1)
        tokens.held.results[item] = (
            made if same_dim(last, 0) else b.slice(made, axis=axis, start=last, stop=tokens.count)
        )
        return [made]

    return Plan([(op.operands[0], frozenset((axis,)))], emit)


# -- loops ---------------------------------------------------------------------------------------


def _scan(tokens: NextTokens, value: Value, op: Op, axis: int) -> Plan | None:
    count, axes, stacks = (op.attribute(n) for n in ("carries", "axes", "stacks"))
    if value.index < count or stacks[value.index - count] != axis:
        return None
    parts = op.operands[count : count + len(axes)]
    if any(not same_dim(x.shape[a], tokens.length) for x, a in zip(parts, axes)):
        return None
    rest = op.operands[count + len(axes) :]
    needs = [*((x, frozenset((a,))) for x, a in zip(parts, axes)), *((x, WHOLE) for x in rest)]

    def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
        items = []
        for result in op.results[:count]:
            item = tokens.items.find("carry", result)
            if item is None:
                type_ = TensorType(tokens.shape(result.shape), result.dtype)
                item = tokens.items.add(Item(tokens.items.name("carry"), "carry", result, type_))
            items.append(item)
        given = [*(tokens.held.argument(item) for item in items), *values]
        if same_dim(tokens.count, 1):
            made = tokens.inline(op.regions[0], given)
        else:
            types = [TensorType(tokens.shape(r.shape), r.dtype) for r in op.results[:count]]
            types += [
                TensorType(tokens.shape(r.shape, frozenset((a,))), r.dtype)
                for r, a in zip(op.results[count:], stacks)
            ]
            region = tokens.copy_region(op.regions[0])
            attributes = tokens.attributes(op)
            made = b.op("scan", given, attributes, types=types, regions=[region]).results
        for item, new in zip(items, made):
            tokens.held.results[item] = new
        return made

    return Plan(needs, emit)
