"""What a kernel around one linear computes: its axes, what it reads where, and which matrices.

The plan does not say how: `product_loop` writes a program of plain loads, `overlapped` one that
copies matrices by TMA (`matrix` finds out whether an operand is one).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accel.backends.loops.index import Affine, Axis
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


@dataclass(frozen=True)
class Plan:
    """Which axes there are, and the elements of the linear's result that one result needs."""

    op: Op
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    left: tuple[Axis, ...]  # K as x is read
    right: tuple[Axis, ...]  # K as the weight is read
    stores: tuple[tuple[Value, Index], ...]
    places: tuple[Index, ...]
    x_index: Index
    weight_indices: tuple[Index, ...]
    survey: Survey


def tensor_core_reason(op: Op) -> str | None:
    """None if a kernel on tensor cores may be built around this op, else the reason why not."""
    if op.name != "linear":
        return f"accel.{op.name} has no generated code"
    x, weight, _ = op.arguments()
    if x.dtype not in (torch.float16, torch.bfloat16):
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
        return Plan(op, rows, of(column)[1], of(left)[1], of(right)[1], stores, places, x_index,
                    weights, survey)  # fmt: skip
    raise BackendError("a matmul kernel whose index does not come to rest")
