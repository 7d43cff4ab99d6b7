"""What a kernel around one `expert_linear` computes: a product's plan, an expert for each row.

The weight's first index is a variable of the program, `EXPERT`: all rows that a program multiplies
have the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.phases import Planner
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.backends.triton.product_plan import Plan
from accel.backends.triton.text import Expr
from accel.errors import BackendError
from accel.ir.module import Op
from accel.ir.types import product

_MAX_ROUNDS = 8
_MOST_SUMS = 2
EXPERT = "expert"


@dataclass(frozen=True)
class ExpertPlan(Plan):
    """Also where a row's expert is read, and the expert itself as an index."""

    chosen: Index
    expert: Affine


def reason(op: Op) -> str | None:
    """None if a kernel may be built around this op, else the reason why not."""
    x, weight, experts, _ = op.arguments()
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"a product of {x.dtype}"
    if not all(isinstance(d, int) and d > 0 for d in weight.shape):
        return "weights of symbolic size, or none"
    if product(experts.shape) in (0, 1) or weight.shape[1] == 1:
        return "a product of one row or column, or of none"
    return None


def plan(planner: Planner) -> ExpertPlan:
    """Plans a region with one expert_linear whose results all have its rows."""
    region, indexer = planner.region, planner.indexer
    op = next(op for op in region.ops if op.name == "expert_linear")
    x, weight, experts, _ = op.arguments()
    shape = region.results[0].shape
    if any(r.shape != shape for r in region.results) or shape[:-1] != op.result.shape[:-1]:
        raise BackendError("a kernel of experts whose results differ in shape")
    lead = [indexer.axis(f"m{i}", d) for i, d in enumerate(shape[:-1])]
    column = indexer.axis("n", shape[-1])
    left, right = indexer.axis("k", x.shape[-1]), indexer.axis("k", x.shape[-1])
    expert = indexer.datum(Expr(EXPERT, "int32"), frozenset())

    def of(axis: Axis) -> tuple[Affine, tuple[Axis, ...]]:
        return planner._as_index(axis) if axis.extent != 1 else (Affine(), ())

    for _ in range(_MAX_ROUNDS):
        survey = Survey(indexer, {op.result: None})
        index = tuple(of(a)[0] for a in (*lead, column))
        for value in region.results:
            survey.element(value, index)
        places = tuple(at for value, at in survey.costly if value is op.result)
        x_index = (*index[:-1], of(left)[0])
        weights = tuple((expert, at[-1], of(right)[0]) for at in places)
        operands = Survey(indexer, {})
        operands.element(x, x_index)
        operands.element(experts, index[:-1])
        for at in weights:
            operands.element(weight, at)
        if planner.apply_splits():
            continue
        if not 0 < len(places) <= _MOST_SUMS or any(p[:-1] != index[:-1] for p in places):
            raise BackendError("a kernel of experts that reads its product at other rows")
        survey.reads += operands.reads
        survey.fixed |= operands.fixed
        rows = tuple(axis for a in lead for axis in of(a)[1])
        stores = tuple((value, index) for value in region.results)
        return ExpertPlan(
            op=op,
            rows=rows,
            columns=of(column)[1],
            left=of(left)[1],
            right=of(right)[1],
            stores=stores,
            places=places,
            swapped=(),
            x_index=x_index,
            weight_indices=weights,
            survey=survey,
            chosen=index[:-1],
            expert=expert,
        )
    raise BackendError("a kernel of experts whose index does not come to rest")
