"""What a kernel around one linear computes: its axes, what it reads where, and which matrices.

The plan does not say how: `product_loop` writes a program of plain loads, `overlapped` one that
copies matrices by TMA (`matrix` finds out whether an operand is one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from accel.backends.loops.index import Affine, Axis, Indexer
from accel.backends.loops.phases import Planner
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.types import product

_MAX_ROUNDS = 8
_MOST_TILES = 2  # accumulators of a program


@dataclass(frozen=True)
class MatmulTile:
    """Results of one program, the part of K of one step, and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int = 3
    group: int = 8


def shallower(tile: MatmulTile, dtype: torch.dtype) -> MatmulTile:
    """The tile with steps of as many bytes for operands of 4 bytes as it has for 2."""
    return tile if dtype.itemsize < 4 else replace(tile, depth=max(16, tile.depth // 2))


@dataclass(frozen=True)
class Swapped:
    """An element of the result whose column differs in one bit from that of the first place: the
    columns are cut into pieces of `distance`, and neighbours have changed places."""

    place: Index
    distance: int


@dataclass(frozen=True)
class Plan:
    """Which axes there are, and the elements of the linear's result that one result needs.

    `swapped` are needed besides `places`: a rotary embedding reads the other half of a head.
    """

    op: Op
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    left: tuple[Axis, ...]  # K as x is read
    right: tuple[Axis, ...]  # K as the weight is read
    stores: tuple[tuple[Value, Index], ...]
    places: tuple[Index, ...]
    swapped: tuple[Swapped, ...]
    x_index: Index
    weight_indices: tuple[Index, ...]
    survey: Survey


def codes_of(op: Op) -> tuple[Value, Value] | None:
    """The float8 codes whose products a linear adds up in float32: what its operands were before
    they were widened. None if it multiplies something else."""
    found: list[Value] = []
    for value in op.operands[:2]:
        made = value.op
        if value.dtype != torch.float32 or made is None or made.name != "cast":
            return None
        found.append(made.operands[0])
    codes = all(v.dtype == torch.float8_e4m3fn for v in found)
    return (found[0], found[1]) if codes else None


def tensor_core_reason(op: Op, tf32: bool = False) -> str | None:
    """None if a kernel on tensor cores may be built around this op, else the reason why not.

    With `tf32` float32 operands may be rounded to 11 bits, which tensor cores multiply."""
    if op.name != "linear":
        return f"accel.{op.name} has no generated code"
    x, weight, _ = op.arguments()
    rounded = tf32 and x.dtype == torch.float32
    if x.dtype not in (torch.float16, torch.bfloat16) and not rounded and codes_of(op) is None:
        return f"a product of {x.dtype}"
    if not all(isinstance(d, int) and d > 0 for d in weight.shape):
        return "a weight of symbolic size, or none"
    if product(x.shape[:-1]) in (0, 1) or weight.shape[0] == 1:
        return "a product of one row or column, or of none"
    return None


def plan(planner: Planner) -> Plan:
    """Plans a region with one linear whose results all have its rows."""
    region, indexer = planner.region, planner.indexer
    op = next(op for op in region.ops if op.name == "linear")
    x, weight, _ = op.arguments()
    shape = region.results[0].shape
    if any(r.shape != shape for r in region.results) or shape[:-1] != op.result.shape[:-1]:
        raise BackendError("a matmul kernel whose results differ in shape")
    lead = [indexer.axis(f"m{i}", d) for i, d in enumerate(shape[:-1])]
    column = indexer.axis("n", shape[-1])
    left, right = indexer.axis("k", x.shape[-1]), indexer.axis("k", x.shape[-1])

    def of(axis: Axis) -> tuple[Affine, tuple[Axis, ...]]:
        return planner._as_index(axis) if axis.extent != 1 else (Affine(), ())

    for _ in range(_MAX_ROUNDS):
        survey = Survey(indexer, {op.result: None})
        index = tuple(of(a)[0] for a in (*lead, column))
        for value in region.results:
            survey.element(value, index)
        places = tuple(at for value, at in survey.costly if value is op.result)
        swapped = _swapped(indexer, op, [(v, index) for v in region.results], places)
        places = tuple(p for p in places if all(p != s.place for s in swapped))
        x_index = (*index[:-1], of(left)[0])
        weights = tuple((at[-1], of(right)[0]) for at in places)
        operands = Survey(indexer, {})
        operands.element(x, x_index)
        for at in weights:
            operands.element(weight, at)
        if planner.apply_splits():
            continue
        if not 0 < len(places) <= _MOST_TILES or any(p[:-1] != index[:-1] for p in places):
            raise BackendError("a matmul kernel that reads its product at other rows")
        survey.reads += operands.reads
        survey.fixed |= operands.fixed
        rows = tuple(axis for a in lead for axis in of(a)[1])
        stores = tuple((value, index) for value in region.results)
        return Plan(op, rows, of(column)[1], of(left)[1], of(right)[1], stores, places, swapped,
                    x_index, weights, survey)  # fmt: skip
    raise BackendError("a matmul kernel whose index does not come to rest")


Guard = tuple[tuple[Affine, ...], bool]


class _Guards(Survey):
    """Notes under which conditions elements of one value are needed."""

    def __init__(self, indexer: Indexer, product: Value) -> None:
        super().__init__(indexer, {})
        self.product = product
        self.met: set[tuple[Index, tuple[Guard, ...]]] = set()
        self._guards: tuple[Guard, ...] = ()
        self._seen: set[tuple[Value, Index, tuple[Guard, ...]]] = set()

    def known_element(self, value: Value, index: Index) -> bool:
        if value is self.product:
            self.met.add((index, self._guards))
        elif (value, index, self._guards) not in self._seen:
            self._seen.add((value, index, self._guards))
            self.compute(value, index)
        return False

    def choose(
        self,
        nonnegative: Sequence[Affine],
        yes: Callable[[], Any],
        no: Callable[[], Any],
        dtype: torch.dtype,
    ) -> bool:
        before = self._guards
        for side, holds in ((yes, True), (no, False)):
            self._guards = (*before, (tuple(nonnegative), holds))
            side()
        self._guards = before
        return False


def _swapped(
    indexer: Indexer, op: Op, results: Sequence[tuple[Value, Index]], places: Sequence[Index]
) -> tuple[Swapped, ...]:
    """Of three places those two that are so far right or left of the first one that they, where
    they are needed, are in the other half of a group of columns."""
    if len(places) != 3:
        return ()
    first, *others = places
    shifts = [p[-1].plus(first[-1], -1) for p in others]
    distances = {abs(s.constant) if not s.terms and isinstance(s.constant, int) else 0
                 for s in shifts}  # fmt: skip
    distance = distances.pop()
    inner = _inner(first[-1], 2 * distance)
    if distances or distance < 1 or distance & (distance - 1) or inner is None:
        return ()
    guards = _Guards(indexer, op.result)
    for value, index in results:
        guards.element(value, index)
    below = Affine(distance - 1).plus(Affine(0, ((inner, 1),)), -1)  # >= 0 in the first half
    for place, shift in zip(others, shifts, strict=True):
        wanted = ((below,), shift.constant == distance)
        if not all(wanted in found for at, found in guards.met if at == place):
            return ()
    return tuple(Swapped(place, distance) for place in others)


def _inner(column: Affine, group: int) -> Axis | None:
    """The axis that counts the columns of a group, if all groups begin at a multiple."""
    if column.constant != 0:
        return None
    inner = [axis for axis, step in column.terms if step == 1]
    whole = all(isinstance(step, int) and step % group == 0
                for _, step in column.terms if step != 1)  # fmt: skip
    if len(inner) != 1 or not isinstance(inner[0], Axis) or inner[0].extent != group:
        return None
    return inner[0] if whole else None
