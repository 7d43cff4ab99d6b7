"""Ranges along one axis: what is read of a value, what an op needs of its operands for that.

Views are index arithmetic, products and attention have rules; for what has none a trial of the op's
definition on random data tells whether it treats the axis index by index
(`accel.passes.token_wise`), so that no list of ops has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.types import Dim, at_least, product, same_dim, simplify_dim
from accel.ir.viewmap import divide
from accel.passes.token_wise import is_index_wise


@dataclass(frozen=True)
class Range:
    """A part of a value along one axis, from `start` on and before `stop`."""

    axis: int
    start: Dim
    stop: Dim

    @property
    def size(self) -> Dim:
        return simplify_dim(self.stop - self.start)

    def along(self, axis: int | None) -> Range | None:
        """The same indices of another axis."""
        return None if axis is None else Range(axis, self.start, self.stop)

    def is_small(self, size: Dim) -> bool:
        """Whether this is at most half of an axis; one of an unknown number counts as small."""
        if isinstance(size, int):
            return isinstance(self.size, int) and 2 * self.size <= size
        times = divide(size, self.size)
        return times is not None and (not isinstance(times, int) or times > 1)


# For each operand what is needed of it; None: all.
Needs: TypeAlias = "list[Range | None]"


def read_of(value: Value) -> Range | None:
    """The part of a value that slices along one axis read, all of its readers; None if no such."""
    readers = value.users
    if not readers or any(user.name != "slice" for user in readers):
        return None
    axes = {user.attribute("axis") % len(value.shape) for user in readers}
    if len(axes) != 1:
        return None
    ends = [[user.attribute(n) for user in readers] for n in ("start", "stop")]
    return hull(axes.pop(), *ends)


def hull(axis: int, starts: Sequence[Dim], stops: Sequence[Dim]) -> Range | None:
    """The range from the first start to the last stop, if these are known and it is not empty."""
    start, stop = _extreme(starts, min), _extreme(stops, max)
    if start is None or stop is None or at_least(start, stop):
        return None
    return Range(axis, start, stop)


def _extreme(dims: Sequence[Dim], choose: Callable[[Sequence[int]], int]) -> Dim | None:
    """The smallest or largest of sizes; None where that is not known."""
    if all(same_dim(d, dims[0]) for d in dims):
        return dims[0]
    numbers = [d for d in dims if isinstance(d, int)]
    return choose(numbers) if len(numbers) == len(dims) else None


def needs_of(op: Op, read: Range) -> Needs | None:
    """What `read` of the op's result needs; None if the op mixes the indices of the axis."""
    if op.has(Trait.ELEMENTWISE):
        return [read.along(_aligned(v, op.result, read.axis)) for v in op.operands]
    rule = _RULES.get(op.name)
    return rule(op, read) if rule is not None else _by_trial(op, read)


def _aligned(operand: Value, result: Value, axis: int) -> int | None:
    """The axis of an operand that is broadcast to the result."""
    own = axis - (len(result.shape) - len(operand.shape))
    return own if own >= 0 and same_dim(operand.shape[own], result.shape[axis]) else None


def _permute(op: Op, read: Range) -> Needs | None:
    return [read.along(op.attribute("axes")[read.axis])]


def _broadcast(op: Op, read: Range) -> Needs | None:
    return [read.along(_aligned(op.operands[0], op.result, read.axis))]


def _reshape(op: Op, read: Range) -> Needs | None:
    """The axis that has as many elements before it, if the range is whole indices of that."""
    before, after = op.operands[0].shape, op.result.shape
    outer, inner = product(after[: read.axis]), product(after[read.axis + 1 :])
    for own, size in enumerate(before):
        if not same_dim(product(before[:own]), outer) or same_dim(size, 1):
            continue
        step = product(before[own + 1 :])
        ends = [_quotient(simplify_dim(end * inner), step) for end in (read.start, read.stop)]
        return None if None in ends else [Range(own, *ends)]
    return None


def _quotient(over: Dim, under: Dim) -> Dim | None:
    return 0 if same_dim(over, 0) else divide(over, under)


def _cat(op: Op, read: Range) -> Needs | None:
    joined = op.attribute("axis") % len(op.result.shape)
    return None if read.axis == joined else [read] * len(op.operands)


def _embedding(op: Op, read: Range) -> Needs | None:
    return None if read.axis == len(op.result.shape) - 1 else [None, read]


def _linear(op: Op, read: Range) -> Needs | None:
    rest: Needs = [None] * (len(op.operands) - 1)
    return None if read.axis == len(op.result.shape) - 1 else [read, *rest]


def _matmul(op: Op, read: Range) -> Needs | None:
    x, y = op.operands
    rank = len(op.result.shape)
    if read.axis >= rank - 2:
        left = read.axis == rank - 2
        return (
            [read.along(len(x.shape) - 2), None] if left else [None, read.along(len(y.shape) - 1)]
        )
    return [read.along(_aligned(v, op.result, read.axis)) for v in (x, y)]


def _attention(op: Op, read: Range) -> Needs | None:
    """Queries; heads and batches are left to the trial."""
    if read.axis != 2:
        return _by_trial(op, read)
    needs: Needs = [None] * len(op.operands)
    needs[0] = read
    mask = op.operand("mask")
    if mask is not None and len(mask.shape) >= 2 and mask.shape[-2] != 1:
        needs[3] = read.along(len(mask.shape) - 2)
    return needs


def _by_trial(op: Op, read: Range) -> Needs | None:
    """The first way to narrow the operands that a trial does not refute."""
    tried: list[list[int | None]] = []
    for axes in _ways(op, read.axis):
        if axes not in tried and any(a is not None for a in axes):
            if is_index_wise(op, read.axis, axes):
                return [read.along(a) for a in axes]
            tried.append(axes)
    return None


def _ways(op: Op, axis: int) -> Iterator[list[int | None]]:
    """The axes of operands that may stand for the result's: by place, and as broadcasts align."""
    rank, size = len(op.result.shape), op.result.shape[axis]

    def fits(value: Value, own: int) -> bool:
        return 0 <= own < len(value.shape) and same_dim(value.shape[own], size)

    same = [axis if fits(v, axis) and len(v.shape) == rank else None for v in op.operands]
    yield same
    right = [axis - rank + len(v.shape) for v in op.operands]
    yield [own if fits(v, own) else None for v, own in zip(op.operands, right)]
    yield [axis if fits(v, axis) else None for v in op.operands]
    yield [axis if i == 0 and fits(v, axis) else None for i, v in enumerate(op.operands)]


_RULES: dict[str, Callable[[Op, Range], Needs | None]] = {
    "permute": _permute,
    "broadcast_to": _broadcast,
    "reshape": _reshape,
    "cat": _cat,
    "embedding": _embedding,
    "linear": _linear,
    "matmul": _matmul,
    "attention": _attention,
}


def narrow(op: Op, read: Range, needs: Needs, made_by: str) -> Op:
    """The op over what it needs of its operands, in place of the op; slices read `read` of it."""
    b = Builder(before=op, made_by=made_by)
    operands = [
        v if part is None else b.slice(v, axis=part.axis, start=part.start, stop=part.stop)
        for v, part in zip(op.operands, needs)
    ]
    made = b.op(op.name, _grouped(op, operands), _attributes(op, read))
    for user in op.result.users:
        b = Builder(before=user, made_by=made_by)
        user.replace_with([reread(b, made.result, user, read)])
    op.erase()
    return made


def reread(b: Builder, part: Value, user: Op, read: Range) -> Value:
    """What the slice `user` reads, of the part `read` of its operand."""
    start, stop, step = (user.attribute(n) for n in ("start", "stop", "step"))
    if step == 1 and same_dim(start, read.start) and same_dim(stop, read.stop):
        return part
    moved = {n: simplify_dim(end - read.start) for n, end in (("start", start), ("stop", stop))}
    result: Value = b.slice(part, axis=read.axis, step=step, **moved)
    return result


def join_slices(op: Op, made_by: str) -> None:
    """Slices of the slice `op` along its axis, none of them empty, are one slice each."""
    first, by = op.attribute("start"), op.attribute("step")
    for user in op.result.users:
        axis, start, stop, step = (user.attribute(n) for n in ("axis", "start", "stop", "step"))
        one = same_dim(start + 1, stop)
        ends = {"start": first + start * by, "stop": first + (stop - 1) * by + 1}
        ends = {name: simplify_dim(end) for name, end in ends.items()}
        b = Builder(before=user, made_by=made_by)
        made = b.slice(op.operands[0], axis=axis, step=1 if one else step * by, **ends)
        user.replace_with([made])
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
        attributes |= _mask_of_queries(op, read)
    return attributes


def _mask_of_queries(op: Op, read: Range) -> dict[str, Any]:
    """The mask of these queries: later ones see more keys, and the last one may see them all."""
    causal, window = op.attribute("causal"), op.attribute("window")
    if not causal and window is None:
        return {}
    offset = simplify_dim(op.attribute("offset") + read.start)
    keys = op.operands[1].shape[2]
    if causal and at_least(offset, keys - 1):
        causal = False
    if window is not None and at_least(window, offset + read.size):
        window = None  # the last query sees the first key
    return {
        "causal": causal,
        "window": window,
        "offset": offset if causal or window is not None else 0,
    }
