"""Folds inference batch norms into the convolution or linear before them.

batch_norm(conv(x, w) + b) = conv(x, w * s) + (b - mean) * s + beta, where s is
gamma / sqrt(var + eps) of each output channel (Jacob et al., 2018, section 3.2). Also takes a batch
norm after a linear of rank 2. All operands must be constants, and nothing else may use the
convolution's result.

Contract: exact, with stored constants (computed in float64, rounded once). Before and after:

    %1 = "accel.conv"(%x, %w) {...} : (...) -> tensor<1x8x16x16xf32>
    %2 = "accel.batch_norm"(%1, %mean, %var, %gamma, %beta) {eps = 1.0e-05} : ...

    %w = "accel.constant"() {name = "w.folded"} : () -> tensor<8x4x3x3xf32>
    %b = "accel.constant"() {name = "w.folded.bias"} : () -> tensor<8xf32>
    %2 = "accel.conv"(%x, %w, %b) {...} : (...) -> tensor<1x8x16x16xf32>
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accel.ir.builder import Builder
from accel.ir.module import Module, Op, constant_name
from accel.passes.base import EXACT_CONSTANTS, Context, Contract, Pass, register_pass
from accel.passes.weights import drop_unused, stored_constant

_CARRIERS = ("conv", "linear")


@register_pass
@dataclass
class FoldBatchNorm(Pass):
    """conv + batch_norm -> conv."""

    name: ClassVar[str] = "fold_batch_norm"
    contract: ClassVar[Contract] = EXACT_CONSTANTS

    def run(self, module: Module, context: Context) -> None:
        freed: list[str] = []
        for function in module.functions.values():
            for op in function.ops:
                if op.name == "batch_norm":
                    freed.extend(self._fold(op, module, context))
        drop_unused(module, freed)

    def _fold(self, norm: Op, module: Module, context: Context) -> list[str]:
        """Folds one batch norm; returns the weights that it no longer uses."""
        carrier = norm.operands[0].op
        reason = _refusal(norm, carrier)
        if reason or carrier is None:
            if carrier is not None and carrier.name in _CARRIERS:
                context.miss(self.name, norm, reason)
            return []
        parameters = [stored_constant(v, module) if v is not None else None
                      for v in norm.arguments()[1:]]  # fmt: skip
        arguments = carrier.arguments()
        weight = stored_constant(arguments[1], module)
        bias = stored_constant(arguments[2], module) if arguments[2] is not None else None
        given = [v for v in (*norm.arguments()[1:], *arguments[1:]) if v is not None]
        if any(constant_name(v) is None for v in given) or weight is None:
            context.miss(self.name, norm, "an operand is not a constant")
            return []
        if not context.rewrite(self.name, norm):
            return []
        scale, shift = _affine(parameters, float(norm.attribute("eps")))
        weight64 = weight.double() * scale.reshape(-1, *(1 for _ in weight.shape[1:]))
        bias64 = shift if bias is None else shift + bias.double() * scale
        self._rewrite(norm, carrier, weight64, bias64, module, context)
        return [str(constant_name(v)) for v in given]

    def _rewrite(
        self,
        norm: Op,
        carrier: Op,
        weight: Tensor,
        bias: Tensor,
        module: Module,
        context: Context,
    ) -> None:
        b = Builder(before=norm, location=carrier.location, made_by=self.name)
        old = carrier.arguments()[1]
        name = f"{constant_name(old)}.folded"
        dtype = old.dtype
        made = [
            b.constant(stored, module.weights.type(stored))
            for stored in (
                context.store_constant(module, name, weight, dtype),
                context.store_constant(module, f"{name}.bias", bias, dtype),
            )
        ]
        new = b.op(carrier.name, [carrier.operands[0], *made], carrier.attributes)
        norm.replace_with(new.results)
        carrier.erase()


def _refusal(norm: Op, carrier: Op | None) -> str:
    """Why the batch norm cannot go into the op before it; "" if it can."""
    if carrier is None or carrier.name not in _CARRIERS:
        return "there is no convolution or linear before it"
    if carrier.result.single_user is not norm:
        return "the result before it has another user"
    if carrier.name == "linear" and carrier.result.type.rank != 2:
        return "channels of the linear are not on axis 1"
    if carrier.attributes.get("layout", "nchw") != "nchw":
        return "channels of the convolution are not on axis 1"
    return ""


def _affine(parameters: list[Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    """The batch norm as x * scale + shift, float64 [C]."""
    mean, variance, gamma, beta = parameters
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance.double() + eps)
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    return scale, shift if beta is None else shift + beta.double()
