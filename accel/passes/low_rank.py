"""Low-rank factorization: one linear becomes two thin ones where that pays.

W [N, K] is replaced by U [N, r] times V [r, K], its truncated singular value decomposition: the
best approximation of that rank in the Frobenius norm (Eckart & Young, 1936). r is the smallest rank
that keeps `energy` of the sum of squared singular values. Both factors carry the square root of
the singular values, so that they are equally easy to quantize afterwards.

Papers: Denton et al., 2014 ("Exploiting Linear Structure Within Convolutional Networks for
Efficient Evaluation"); Xue et al., 2013 (rank by energy of the singular values).

Contract: approximate. Before and after `low_rank{energy=0.9}` on a weight whose first 8 singular
values hold 90 % of the energy:

    %w = "accel.constant"() {name = "fc.weight"} : () -> tensor<64x128xf32>
    %y = "accel.linear"(%x, %w, %b) : (...) -> tensor<?x64xf32>

    %v = "accel.constant"() {name = "fc.weight.v"} : () -> tensor<8x128xf32>
    %u = "accel.constant"() {name = "fc.weight.u"} : () -> tensor<64x8xf32>
    %t = "accel.linear"(%x, %v) : (...) -> tensor<?x8xf32>
    %y = "accel.linear"(%t, %u, %b) : (...) -> tensor<?x64xf32>
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.ir.builder import Builder
from accel.ir.module import Function, Module, Op, Region
from accel.ir.types import Dim, product, substitute
from accel.passes.base import Context, Contract, approximate, register_pass
from accel.passes.weights import (
    MatrixForm,
    WeightSelection,
    WeightSite,
    drop_unused,
    note_weights,
    relative_error,
)

# Rows to assume for a symbolic size without an upper bound: a long prompt.
_MANY = 2048


@dataclass(frozen=True)
class CostModel:
    """Roofline seconds of a linear: arithmetic or memory, whichever takes longer, plus a call.

    The defaults are those of a few CPU cores. Only ratios matter to the decision.
    """

    flops: float = 2e11
    bandwidth: float = 2.5e10
    call: float = 3e-6

    def linear(self, rows: int, inputs: int, outputs: int, itemsize: int) -> float:
        arithmetic = 2 * rows * inputs * outputs / self.flops
        elements = rows * inputs + inputs * outputs + rows * outputs
        return max(arithmetic, elements * itemsize / self.bandwidth) + self.call

    def gain(self, rows: int, inputs: int, outputs: int, rank: int, itemsize: int) -> float:
        """Seconds of the one linear over those of the two thin ones."""
        thin = self.linear(rows, inputs, rank, itemsize)
        thin += self.linear(rows, rank, outputs, itemsize)
        return self.linear(rows, inputs, outputs, itemsize) / thin


@register_pass
@dataclass
class LowRank(WeightSelection):
    """Factors the weights of linears (and of matmuls with a 2-d weight) by truncated SVD.

    Options (besides those of `WeightSelection`):
        energy: the share of the squared singular values to keep, in (0, 1].
        multiple: ranks are rounded up to a multiple of this, as kernels like them.
        gain: factor only where the cost model says that the two linears together are at least this
            many times faster than the one, at every size the program may be given, and smaller.
    """

    name: ClassVar[str] = "low_rank"
    contract: ClassVar[Contract] = approximate("relative_error", 0.6)

    energy: float = 0.95
    multiple: int = 8
    gain: float = 1.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.energy <= 1:
            raise OptionError(f"{self.name}: energy = {self.energy} is outside of (0, 1]")
        if self.multiple < 1 or self.gain < 0:
            raise OptionError(f"{self.name}: multiple = {self.multiple}, gain = {self.gain}")

    def run(self, module: Module, context: Context) -> None:
        rows: list[dict[str, Any]] = []
        for site in self.chosen(module):
            if not site.uses:
                continue
            reason = _unfit(site)
            tensor = module.weights.tensor(site.name)
            if not reason and not bool(torch.isfinite(tensor).all()):
                reason = "it has infinities or NaNs"
            if reason:
                context.miss(self.name, site.constants[0], f"weight '{site.name}': {reason}")
                continue
            matrix = MatrixForm(tuple(tensor.shape), site.contracted).to_matrix(tensor)
            wide = matrix.double()
            rank = rank_by_energy(torch.linalg.svdvals(wide), self.energy, self.multiple)
            reason = self._too_dear(site, matrix, rank, cost_model(context, matrix.dtype))
            if reason:
                context.miss(self.name, site.constants[0], f"weight '{site.name}': {reason}")
                continue
            if not context.rewrite(self.name, site.constants[0]):
                break
            u, s, vt = torch.linalg.svd(wide, full_matrices=False)
            root = s[:rank].sqrt()
            factors = ((root[:, None] * vt[:rank]), (u[:, :rank] * root))
            rows.append(self._factor(site, matrix, factors, module))
        drop_unused(module, [row["weight"] for row in rows])
        note_weights(context, rows)

    def _too_dear(self, site: WeightSite, matrix: Tensor, rank: int, model: CostModel) -> str:
        outputs, inputs = matrix.shape
        if rank * (inputs + outputs) >= inputs * outputs:
            return f"rank {rank} of {outputs} x {inputs} stores no fewer bytes"
        for use in site.uses:
            for count in _row_counts(use.op):
                gain = model.gain(count, inputs, outputs, rank, matrix.dtype.itemsize)
                if gain < self.gain:
                    return f"rank {rank} at {count} rows is estimated {gain:.2f}x as fast"
        return ""

    def _factor(
        self, site: WeightSite, matrix: Tensor, factors: tuple[Tensor, Tensor], module: Module
    ) -> dict[str, Any]:
        v, u = (f.to(matrix.dtype).contiguous() for f in factors)
        v_name = module.weights.add(f"{site.name}.v", v)
        u_name = module.weights.add(f"{site.name}.u", u)
        for use in site.uses:
            b = Builder(before=use.op, made_by=self.name)
            v_value = b.constant(v_name, module.weights.type(v_name))
            u_value = b.constant(u_name, module.weights.type(u_name))
            bias = use.op.operand("bias") if use.op.name == "linear" else None
            thin = b.linear(use.op.operands[0], v_value)
            use.op.replace_with([b.linear(thin, u_value, bias)])
        for use in site.uses:
            for step in reversed(use.path):
                if step.parent is not None and not step.result.uses:
                    step.erase()
        for constant in site.constants:
            if not constant.result.uses:
                constant.erase()
        outputs, inputs = matrix.shape
        rank = v.shape[0]
        return {
            "weight": site.name,
            "bytes_before": int(site.type.nbytes()),
            "bytes_after": (v.numel() + u.numel()) * matrix.dtype.itemsize,
            "flops_ratio": rank * (inputs + outputs) / (inputs * outputs),
            "rank": rank,
            "error": relative_error(u.double() @ v.double(), matrix),
        }


def cost_model(context: Context, dtype: torch.dtype) -> CostModel:
    """The target's rates where it states them, else the defaults.

    A dtype that the target does not list is taken to run at the slowest rate that it lists.
    """
    default = CostModel()
    listed = {k: v for k, v in getattr(context.target, "flops", {}).items() if v > 0}
    name = str(dtype).removeprefix("torch.")
    flops = listed.get(name, min(listed.values(), default=default.flops))
    bandwidth = getattr(context.target, "bandwidth", 0.0) or default.bandwidth
    return CostModel(flops, bandwidth, default.call)


def rank_by_energy(singular: Tensor, energy: float, multiple: int) -> int:
    """The smallest rank whose squared singular values sum to `energy` of all, rounded up."""
    kept = singular.square().cumsum(0)
    total = float(kept[-1])
    rank = 1 + int((kept < energy * total).sum())
    return min(math.ceil(min(rank, len(singular)) / multiple) * multiple, len(singular))


def _unfit(site: WeightSite) -> str:
    """Why the weight's readers cannot take factors; empty if they can."""
    rest = [*site.lookups, *site.others]
    if rest:
        return f"accel.{rest[0].name} reads it too"
    for use in site.uses:
        if use.op.name not in ("linear", "matmul") or use.operand != 1:
            return (
                f"accel.{use.op.name} takes it as operand {use.operand}, not as a linear's weight"
            )
        if use.op.operands[1].type.rank != 2 or any(s.name != "permute" for s in use.path):
            return f"accel.{use.op.name} does not take it as one matrix"
        if use.contracted != site.contracted:
            return "its readers sum over different axes"
    return ""


def _row_counts(op: Op) -> list[int]:
    """Fewest and most rows that the op may be given, by its function's symbol ranges."""
    rows: Dim = product(op.operands[0].shape[:-1])
    if isinstance(rows, int):
        return [rows]
    symbols = _function_of(op).symbols
    low = substitute(rows, {name: info.min for name, info in symbols.items()})
    high = substitute(
        rows, {name: _MANY if info.max is None else info.max for name, info in symbols.items()}
    )
    found: Sequence[Dim] = (low, high)
    return [int(count) for count in found]


def _function_of(op: Op) -> Function:
    parent: Region | Op | Function | None = op.parent
    while parent is not None and not isinstance(parent, Function):
        parent = parent.parent
    assert parent is not None
    return parent
