"""Rows that nobody reads are not computed: slices move up, in front of what makes the rows.

A classifier reads the first of a vision transformer's 197 tokens, or the last of a text; all that
the last block computes after its keys and values is needed of this token alone. A value of which
only a range along one axis is read (at most half of it) is computed from that range of its
operands, where its op treats the axis index by index: elementwise ops, views, products along their
rows, attention along its queries; of any other op a trial of its definition on random data tells.
What is read of an operand goes on upwards, to the first value that something else needs whole.

XLA and TVM move slices over elementwise ops; here they cross whole blocks. Contract: exact. Before
and after:

    %0 = "accel.linear"(%x, %w) : (tensor<2x197x64xf32>, tensor<32x64xf32>) -> tensor<2x197x32xf32>
    %1 = "accel.slice"(%0) {axis = 1, start = 0, stop = 1} : ... -> tensor<2x1x32xf32>

    %0 = "accel.slice"(%x) {axis = 1, start = 0, stop = 1} : ... -> tensor<2x1x64xf32>
    %1 = "accel.linear"(%0, %w) : (tensor<2x1x64xf32>, tensor<32x64xf32>) -> tensor<2x1x32xf32>
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from accel.ir.builder import Builder
from accel.ir.module import Module, Op, Value
from accel.ir.op import Trait
from accel.ir.types import Dim, same_dim, simplify_dim
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.token_wise import is_index_wise

_NEVER = Trait.CONSTANT | Trait.DECODE | Trait.RANDOM | Trait.OPAQUE | Trait.UPDATE

# For each operand, the axis along which it is narrowed; None: it is needed whole.
Needs: TypeAlias = "list[int | None]"


@dataclass(frozen=True)
class Range:
    """What is read of an axis, from `start` on and before `stop`."""

    axis: int
    start: Dim
    stop: Dim

    @property
    def size(self) -> Dim:
        return simplify_dim(self.stop - self.start)


@register_pass
@dataclass
class HoistSlices(Pass):
    """Computes only the rows that are read."""

    name: ClassVar[str] = "hoist_slices"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions.values():
            for op in function.body.reversed_ops():  # readers come before what they read
                read = _range(op)
                if read is None:
                    continue
                needs = _needs(op, read.axis)
                if needs is None:
                    context.miss(self.name, op, f"it mixes the indices of axis {read.axis}")
                elif context.rewrite(self.name, op):
                    _narrow(op, read, needs)
                else:
                    return


def _range(op: Op) -> Range | None:
    """The part of an op's result that is read, where it is at most half along one axis."""
    if len(op.results) != 1 or op.regions or not op.has(Trait.PURE) or op.has(_NEVER):
        return None
    value = op.result
    readers = value.users
    if op.name == "slice" or not readers or any(user.name != "slice" for user in readers):
        return None
    axes = {user.attribute("axis") % len(value.shape) for user in readers}
    if len(axes) != 1:
        return None
    (axis,) = axes
    starts, stops = ([user.attribute(n) for user in readers] for n in ("start", "stop"))
    start, stop = _common(starts, min), _common(stops, max)
    if start is None or stop is None:
        return None
    read, size = Range(axis, start, stop), value.shape[axis]
    if not isinstance(read.size, int) or read.size < 1:
        return None
    small = 2 * read.size <= size if isinstance(size, int) else read.size == 1
    return read if small else None


def _common(dims: Sequence[Dim], choose: Callable[[Sequence[int]], int]) -> Dim | None:
    """The smallest or largest of sizes; None where that is not known."""
    if all(same_dim(d, dims[0]) for d in dims):
        return dims[0]
    numbers = [d for d in dims if isinstance(d, int)]
    return choose(numbers) if len(numbers) == len(dims) else None


def _needs(op: Op, axis: int) -> Needs | None:
    """Which axis of each operand has the indices of the result's; None if not index by index."""
    if op.has(Trait.ELEMENTWISE):
        return [_aligned(v, op.result, axis) for v in op.operands]
    rule = _RULES.get(op.name)
    return rule(op, axis) if rule is not None else _by_trial(op, axis)


def _aligned(operand: Value, result: Value, axis: int) -> int | None:
    """The axis of an operand that is broadcast to the result."""
    own = axis - (len(result.shape) - len(operand.shape))
    return own if own >= 0 and same_dim(operand.shape[own], result.shape[axis]) else None


def _permute(op: Op, axis: int) -> Needs | None:
    return [op.attribute("axes")[axis]]


def _broadcast(op: Op, axis: int) -> Needs | None:
    return [_aligned(op.operands[0], op.result, axis)]


def _reshape(op: Op, axis: int) -> Needs | None:
    """An axis of the same size, with as many elements before it."""
    before, after = op.operands[0].shape, op.result.shape
    outer = _elements(after[:axis])
    for own, size in enumerate(before):
        if same_dim(size, after[axis]) and same_dim(_elements(before[:own]), outer):
            return [own]
    return None


def _elements(dims: Sequence[Dim]) -> Dim:
    return simplify_dim(math.prod(dims))


def _cat(op: Op, axis: int) -> Needs | None:
    return (
        None if axis == op.attribute("axis") % len(op.result.shape) else [axis] * len(op.operands)
    )


def _linear(op: Op, axis: int) -> Needs | None:
    rest: Needs = [None] * (len(op.operands) - 1)
    return None if axis == len(op.result.shape) - 1 else [axis, *rest]


def _attention(op: Op, axis: int) -> Needs | None:
    """Queries; what is attended by heads and by batches is left to the trial."""
    if axis != 2:
        return _by_trial(op, axis)
    needs: Needs = [None] * len(op.operands)
    needs[0] = 2
    mask = op.operand("mask")
    if mask is not None and len(mask.shape) >= 2 and mask.shape[-2] != 1:
        needs[3] = len(mask.shape) - 2
    return needs


def _by_trial(op: Op, axis: int) -> Needs | None:
    """Operands of the result's rank whose axis has its size, where a trial finds that so."""
    rank, size = len(op.result.shape), op.result.shape[axis]
    needs: Needs = [
        axis if len(v.shape) == rank and same_dim(v.shape[axis], size) else None
        for v in op.operands
    ]
    if all(n is None for n in needs) or not is_index_wise(op, axis, needs):
        return None
    return needs


_RULES: dict[str, Callable[[Op, int], Needs | None]] = {
    "permute": _permute,
    "broadcast_to": _broadcast,
    "reshape": _reshape,
    "cat": _cat,
    "linear": _linear,
    "attention": _attention,
}


def _narrow(op: Op, read: Range, needs: Needs) -> None:
    """The op over what is read of its operands, in place of the op."""
    b = Builder(before=op, made_by=HoistSlices.name)
    operands = [
        v if axis is None else b.slice(v, axis=axis, start=read.start, stop=read.stop)
        for v, axis in zip(op.operands, needs)
    ]
    made = b.op(op.name, _grouped(op, operands), _attributes(op, read)).result
    for user in op.result.users:
        start, stop, step = (user.attribute(n) for n in ("start", "stop", "step"))
        part = made
        if step != 1 or not (same_dim(start, read.start) and same_dim(stop, read.stop)):
            moved = {"start": simplify_dim(start - read.start), "step": step}
            moved["stop"] = simplify_dim(stop - read.start)
            part = Builder(before=user, made_by=HoistSlices.name).slice(
                made, axis=read.axis, **moved
            )
        user.replace_with([part])
    op.erase()


def _grouped(op: Op, operands: Sequence[Value]) -> list[Value | None]:
    """Operands by signature, None where an optional one is absent."""
    if op.segments is None:
        return list(operands)
    left = iter(operands)
    return [next(left) if n else None for n in op.segments for _ in range(max(n, 1))]


def _attributes(op: Op, read: Range) -> dict[str, Any]:
    attributes = dict(op.attributes)
    if "shape" in attributes:
        shape = list(op.result.shape)
        shape[read.axis] = read.size
        attributes["shape"] = tuple(shape)
    if op.name == "attention" and read.axis == 2:
        attributes |= _mask_of_queries(op, read.start)
    return attributes


def _mask_of_queries(op: Op, start: Dim) -> dict[str, Any]:
    """The mask of queries from `start` on: later ones see more keys."""
    window = op.attribute("window")
    if not op.attribute("causal") and window is None:
        return {}
    return {"offset": simplify_dim(op.attribute("offset") + start)}
