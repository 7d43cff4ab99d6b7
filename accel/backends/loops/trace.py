"""What one element of a value is made of: the walk shared by analysis and code generation.

`Tracer.element(value, index)` goes from a region's result towards its arguments. VIEW ops only
change the index; cat, pad and updates choose between sources; gathers compute an index first;
elementwise ops combine elements at the same place. What happens at the leaves (a load, a number, a
reduction's result) is up to the subclass: `analysis.Survey` takes notes, `code.Emitter` writes TIR.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from accel.backends.loops.index import Affine, Indexer, at_least
from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.types import Dim, Shape, is_float

Index: TypeAlias = tuple[Affine, ...]
Scalar: TypeAlias = Any
Key: TypeAlias = tuple[Value, Index]

_ZERO = Affine()


# Elementwise ops worth keeping in memory rather than computing twice.
COSTLY = frozenset((
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cos", "cosh", "div", "erf",
    "erfc", "exp", "exp2", "expm1", "gelu", "lgamma", "log", "log10", "log1p", "log2", "pow",
    "reciprocal", "rsqrt", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh",
))  # fmt: skip


class Tracer(ABC):
    """Elements of a region's values, by index."""

    def __init__(self, indexer: Indexer) -> None:
        self.indexer = indexer

    # -- leaves, by subclass -----------------------------------------------------------------

    @abstractmethod
    def known_element(self, value: Value, index: Index) -> Scalar:
        """The element; calls `compute` unless it is known already."""

    @abstractmethod
    def load(self, value: Value, index: Index) -> Scalar:
        """An element of a region argument."""

    @abstractmethod
    def arithmetic(self, op: Op, args: list[Scalar]) -> Scalar:
        """An elementwise op."""

    @abstractmethod
    def number(self, op: Op) -> Scalar:
        """The value of a `full`."""

    @abstractmethod
    def position(self, value: Affine, dtype: torch.dtype) -> Scalar:
        """An index as a value."""

    @abstractmethod
    def condition(self, nonnegative: Sequence[Affine]) -> Scalar:
        """Whether all are >= 0, as a bool."""

    @abstractmethod
    def choose(
        self,
        nonnegative: Sequence[Affine],
        yes: Callable[[], Scalar],
        no: Callable[[], Scalar],
        dtype: torch.dtype,
    ) -> Scalar:
        """`yes` where all are >= 0, else `no`; only the one that is chosen is computed."""

    @abstractmethod
    def lookup(
        self, value: Value, index: Index, low: Dim, high: Dim, *, wrap: Dim, clamp: bool
    ) -> Affine:
        """An integer element as an index that lies in [low, high].

        Negative ones get `wrap` added. With `clamp` others are moved into the range, else they are
        an error that the kernel reports (and read as `low`).
        """

    @abstractmethod
    def reduction(self, op: Op, index: Index) -> Scalar:
        """An element of a reduction's result."""

    # -- the walk ----------------------------------------------------------------------------

    def element(self, value: Value, index: Index) -> Scalar:
        """The element of `value` at `index`, named. The index on an axis of size 1 is 0."""
        if any(d == 1 and i != _ZERO for d, i in zip(value.shape, index)):
            index = tuple(_ZERO if d == 1 else i for d, i in zip(value.shape, index))
        return self.known_element(value, index)

    def compute(self, value: Value, index: Index) -> Scalar:
        op = value.op
        if op is None:
            return self.load(value, index)
        rule = _RULES.get(op.name)
        if rule is not None:
            return rule(self, op, index)
        if op.has(Trait.REDUCTION):
            return self.reduction(op, index)
        if op.has(Trait.ELEMENTWISE):
            args = [
                self.element(v, broadcast_index(index, op.result.shape, v.shape))
                for v in op.operands
            ]
            return self.arithmetic(op, args)
        raise BackendError(f"accel.{op.name} in a kernel region", where=str(op.location or ""))

    def decide(
        self,
        nonnegative: Sequence[Affine],
        yes: Callable[[], Scalar],
        no: Callable[[], Scalar],
        dtype: torch.dtype,
    ) -> Scalar:
        """`choose`, without the conditions that are known at compile time."""
        open_ones: list[Affine] = []
        for c in nonnegative:
            low, high = self.indexer.range(c)
            if high is not None and at_least(-1, high):
                return no()
            if low is None or not at_least(low, 0):
                open_ones.append(c)
        return self.choose(open_ones, yes, no, dtype) if open_ones else yes()


def broadcast_index(index: Index, shape: Shape, operand: Shape) -> Index:
    """The index of an operand that was broadcast to `shape`."""
    lead = len(shape) - len(operand)
    return tuple(Affine() if d == 1 else index[lead + i] for i, d in enumerate(operand))


def _axis(op: Op, rank: int, name: str = "axis") -> int:
    return int(op.attribute(name)) % rank if rank else 0


def _replaced(index: Index, axis: int, value: Affine) -> Index:
    return (*index[:axis], value, *index[axis + 1 :])


def _reshape(t: Tracer, op: Op, index: Index) -> Scalar:
    x = op.operands[0]
    return t.element(x, t.indexer.reshape(index, op.result.shape, x.shape))


def _permute(t: Tracer, op: Op, index: Index) -> Scalar:
    source: list[Affine] = [Affine()] * len(index)
    for i, axis in enumerate(op.attributes["axes"]):  # type: ignore[arg-type]
        source[axis] = index[i]
    return t.element(op.operands[0], tuple(source))


def _broadcast_to(t: Tracer, op: Op, index: Index) -> Scalar:
    x = op.operands[0]
    return t.element(x, broadcast_index(index, op.result.shape, x.shape))


def _slice(t: Tracer, op: Op, index: Index) -> Scalar:
    axis = _axis(op, len(index))
    place = index[axis].times(op.attribute("step")).plus(op.attribute("start"))
    return t.element(op.operands[0], _replaced(index, axis, place))


def _flip(t: Tracer, op: Op, index: Index) -> Scalar:
    x = op.operands[0]
    for axis in op.attribute("axes"):
        axis %= len(index)
        last = Affine(x.shape[axis]).plus(-1)
        index = _replaced(index, axis, last.plus(index[axis], -1))
    return t.element(x, index)


def _diagonal(t: Tracer, op: Op, index: Index) -> Scalar:
    x = op.operands[0]
    first, second = _axis(op, x.type.rank, "axis1"), _axis(op, x.type.rank, "axis2")
    offset = op.attribute("offset")
    rest = iter(index[:-1])
    places = {
        first: index[-1].plus(max(-offset, 0)),
        second: index[-1].plus(max(offset, 0)),
    }
    return t.element(x, tuple(places[i] if i in places else next(rest) for i in range(x.type.rank)))


def _unfold(t: Tracer, op: Op, index: Index) -> Scalar:
    axis = _axis(op, len(index) - 1)
    place = index[axis].times(op.attribute("step")).plus(index[-1])
    return t.element(op.operands[0], _replaced(index[:-1], axis, place))


def _iota(t: Tracer, op: Op, index: Index) -> Scalar:
    axis = _axis(op, len(index))
    place = index[axis].times(op.attribute("step")).plus(op.attribute("start"))
    return t.position(place, op.result.dtype)


def _arange(t: Tracer, op: Op, index: Index) -> Scalar:
    place = index[0].times(op.attribute("step")).plus(op.attribute("start"))
    return t.position(place, op.result.dtype)


def _size(t: Tracer, op: Op, index: Index) -> Scalar:
    return t.position(Affine(op.attribute("value")), torch.int64)


def _full(t: Tracer, op: Op, index: Index) -> Scalar:
    return t.number(op)


def _tri_mask(t: Tracer, op: Op, index: Index) -> Scalar:
    distance = index[1].plus(index[0], -1)
    conditions = [Affine(op.attribute("diagonal")).plus(distance, -1)]
    lower = op.attribute("lower")
    if lower is not None:
        conditions.append(distance.plus(lower, -1).plus(-1))
    return t.condition(conditions)


def _cat(t: Tracer, op: Op, index: Index) -> Scalar:
    axis = _axis(op, len(index))

    def part(number: int, start: Dim) -> Scalar:
        x = op.operands[number]
        place = index[axis].plus(start, -1)
        end = start + x.shape[axis]

        def here() -> Scalar:
            return t.element(x, _replaced(index, axis, place))

        if number == len(op.operands) - 1:
            return here()
        inside = Affine(end).plus(-1).plus(index[axis], -1)
        return t.decide([inside], here, lambda: part(number + 1, end), op.result.dtype)

    return part(0, 0)


def _pad(t: Tracer, op: Op, index: Index) -> Scalar:
    x = op.operands[0]
    places = tuple(i.plus(low, -1) for i, low in zip(index, op.attribute("low")))
    conditions: list[Affine] = []
    for place, extent in zip(places, x.shape):
        conditions += [place, Affine(extent).plus(-1).plus(place, -1)]
    return t.decide(conditions, lambda: t.element(x, places), lambda: t.number(op), op.result.dtype)


def _slice_update(t: Tracer, op: Op, index: Index) -> Scalar:
    x, source = op.operands
    axis, step = _axis(op, len(index)), op.attribute("step")
    distance = index[axis].plus(op.attribute("start"), -1)
    place, rest = t.indexer.divide(distance, step)
    inside = [place, Affine(source.shape[axis]).plus(-1).plus(place, -1), rest.times(-1)]
    return t.decide(
        inside,
        lambda: t.element(source, _replaced(index, axis, place)),
        lambda: t.element(x, index),
        op.result.dtype,
    )


def _dynamic_slice(t: Tracer, op: Op, index: Index) -> Scalar:
    x, start = op.operands
    axis = _axis(op, len(index))
    room = x.shape[axis] - op.attribute("size")
    first = t.lookup(start, (), 0, room, wrap=0, clamp=True)
    return t.element(x, _replaced(index, axis, index[axis].plus(first)))


def _dynamic_update(t: Tracer, op: Op, index: Index) -> Scalar:
    x, source, start = op.operands
    axis = _axis(op, len(index))
    length = source.shape[axis]
    each = index[:1] if start.shape else ()  # a position for each row
    first = t.lookup(start, each, 0, x.shape[axis] - length, wrap=0, clamp=False)
    place = index[axis].plus(first, -1)
    return t.decide(
        [place, Affine(length).plus(-1).plus(place, -1)],
        lambda: t.element(source, _replaced(index, axis, place)),
        lambda: t.element(x, index),
        op.result.dtype,
    )


def _embedding(t: Tracer, op: Op, index: Index) -> Scalar:
    table, indices = op.operands
    row = t.lookup(indices, index[:-1], 0, table.shape[0] - 1, wrap=0, clamp=False)
    return t.element(table, (row, index[-1]))


def _gather(t: Tracer, op: Op, index: Index) -> Scalar:
    x, indices = op.operands
    axis = _axis(op, x.type.rank)
    middle = index[axis : axis + indices.type.rank]
    extent = x.shape[axis]
    place = t.lookup(indices, middle, 0, extent - 1, wrap=extent, clamp=False)
    return t.element(x, (*index[:axis], place, *index[axis + indices.type.rank :]))


def _take_along(t: Tracer, op: Op, index: Index) -> Scalar:
    x, indices = op.operands
    axis = _axis(op, x.type.rank)
    place = t.lookup(indices, index, 0, x.shape[axis] - 1, wrap=0, clamp=False)
    return t.element(x, _replaced(index, axis, place))


def _index(t: Tracer, op: Op, index: Index) -> Scalar:
    x, *indices = op.operands
    axes: tuple[int, ...] = op.attribute("axes")
    rank = max(i.type.rank for i in indices)
    start = axes[0] if all(b - a == 1 for a, b in pairwise(axes)) else 0
    common = index[start : start + rank]
    shape = op.result.shape[start : start + rank]
    rest = iter((*index[:start], *index[start + rank :]))
    places: list[Affine] = []
    for i in range(x.type.rank):
        if i in axes:
            table = indices[axes.index(i)]
            inner = broadcast_index(common, shape, table.shape)
            extent = x.shape[i]
            places.append(t.lookup(table, inner, 0, extent - 1, wrap=extent, clamp=False))
        else:
            places.append(next(rest))
    return t.element(x, tuple(places))


_RULES: dict[str, Callable[[Tracer, Op, Index], Scalar]] = {
    "reshape": _reshape,
    "permute": _permute,
    "broadcast_to": _broadcast_to,
    "slice": _slice,
    "flip": _flip,
    "diagonal": _diagonal,
    "unfold": _unfold,
    "iota": _iota,
    "arange": _arange,
    "size": _size,
    "full": _full,
    "tri_mask": _tri_mask,
    "cat": _cat,
    "pad": _pad,
    "slice_update": _slice_update,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update": _dynamic_update,
    "embedding": _embedding,
    "gather": _gather,
    "take_along": _take_along,
    "index": _index,
}
INDEX_OPS = frozenset(_RULES)
# Ops that read integers as positions, with the operands that hold them.
_LOOKUPS = {"embedding": (1,), "gather": (1,), "take_along": (1,), "dynamic_slice": (1,),
           "dynamic_update": (2,)}  # fmt: skip


def lookup_reason(op: Op) -> str | None:
    """None if a kernel may look up what this op of `INDEX_OPS` reads, else the reason why not."""
    positions = range(1, len(op.operands)) if op.name == "index" else _LOOKUPS.get(op.name, ())
    if any(is_float(op.operands[i].dtype) for i in positions):
        return "floating indices"
    # A place out of range is replaced by the first one, which has to be there.
    if positions and 0 in op.operands[0].shape and 0 not in op.result.shape:
        return "a tensor without elements, of which some are read"
    return None
