"""Products in float8: activations are rounded as they come, beside weights that are float8 already.

Runs after `quantize{format=fp8}`. The input of each linear gets a scale of its own at run time, so
that its largest number is float8_e4m3fn's largest: one for each row, or one for the tensor
(Micikevicius et al., 2022). What is multiplied are codes, added up in float32; scales follow on the
sums, so that tensor cores take the codes as they are. Linears over one input share its codes.

Contract: approximate. Before and after:

    %w = "accel.dequantize"(%q, %s) {axis = 1} : ... -> tensor<64x128xbf16>
    %y = "accel.linear"(%x, %w) : ... -> tensor<9x64xbf16>

    %m = "accel.amax"("accel.abs"(%x)) {axes = [1], keepdim = true} ...     // / 448: %t
    %c = "accel.quantize"(%x, %t) {dtype = f8E4M3FN, axis = 1} : ... -> tensor<9x128xf8E4M3FN>
    %p = "accel.linear"(cast(%c), cast(%q)) : ... -> tensor<9x64xf32>
    %y = cast(%p * %t * %s) : ... -> tensor<9x64xbf16>
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from accel.ir.builder import Builder
from accel.ir.module import Module, Op, Value
from accel.passes.base import Context, Contract, Pass, approximate, register_pass
from accel.passes.weights import check_option

_CODES = torch.float8_e4m3fn
_LARGEST = float(torch.finfo(_CODES).max)
_SMALLEST = 2.0**-100  # a scale: of a row of zeros


@register_pass
@dataclass
class QuantizeActivations(Pass):
    """Rounds the inputs of linears with float8 weights to float8.

    Options:
        per: "row", or "tensor" for one scale for all rows.
        bound: the relative error of the results to promise.
    """

    name: ClassVar[str] = "quantize_activations"
    contract: ClassVar[Contract] = approximate("relative_error", 0.15)

    per: Literal["row", "tensor"] = "row"
    bound: float = 0.15

    def __post_init__(self) -> None:
        check_option(self, "per", ("row", "tensor"))

    def promise(self) -> Contract:
        return approximate("relative_error", self.bound)

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions.values():
            known: dict[Value, tuple[Value, Value]] = {}
            for op in function.ops:
                if op.name != "linear":
                    continue
                parts = _codes_of(op.operands[1])
                if parts is None:
                    context.miss(self.name, op, "the weight has no float8 codes with plain scales")
                elif context.rewrite(self.name, op):
                    self._rewrite(op, *parts, known)

    def _rewrite(
        self, op: Op, codes: Value, scale: Value, known: dict[Value, tuple[Value, Value]]
    ) -> None:
        x, _, bias = op.arguments()
        b = Builder(before=op, made_by=self.name)
        b.location = op.location
        if x not in known:
            known[x] = self._rounded(b, x)
        given, step = known[x]
        wide = torch.float32
        product = b.linear(b.cast_to(given, wide), b.cast_to(codes, wide))
        made = b.mul(product, step)
        made = b.mul(made, b.cast_to(b.reshape_to(scale, scale.shape[:-1]), wide))
        if bias is not None:
            made = b.add(made, b.cast_to(bias, wide))
        op.replace_with([b.cast_to(made, x.dtype)])

    def _rounded(self, b: Builder, x: Value) -> tuple[Value, Value]:
        """Codes of x, and what they are to be multiplied with."""
        last = len(x.shape) - 1
        axes = (last,) if self.per == "row" else tuple(range(last + 1))
        size = b.cast_to(b.abs(x), torch.float32)
        most = b.amax(size, axes=axes, keepdim=self.per == "row")
        step = b.mul(most, b.scalar(1.0 / _LARGEST, torch.float32))
        step = b.maximum(step, b.scalar(_SMALLEST, torch.float32))
        axis = last if self.per == "row" else None
        return b.quantize(x, step, dtype=_CODES, axis=axis), step


def _codes_of(weight: Value) -> tuple[Value, Value] | None:
    """The codes and scales of a float8 weight: one for each output, or one for all."""
    op = weight.op
    if op is None or op.name != "dequantize" or op.attribute("group"):
        return None
    codes, scale, zero = op.arguments()
    if codes.dtype != _CODES or zero is not None:
        return None
    axis = op.attribute("axis")
    return (codes, scale) if axis is None or int(axis) % 2 == 1 else None
