"""Raises composites that models (or other frontends) write as arithmetic.

rms_norm and layer_norm (`accel.passes.norm_rules`), gelu, silu, hardswish, softmax
(`activation_rules`), linear and rope (`linear_rules`). A composite that keeps its name can be given
to a kernel made for it, and is what other passes look for. Contract: exact. Before and after:

    %0 = "accel.mul"(%x, %x) : (tensor<2x8xf32>, tensor<2x8xf32>) -> tensor<2x8xf32>
    %1 = "accel.mean"(%0) {axes = [1], keepdim = true} : (tensor<2x8xf32>) -> tensor<2x1xf32>
    %2 = "accel.add"(%1, %eps) : (tensor<2x1xf32>, tensor<f32>) -> tensor<2x1xf32>
    %3 = "accel.rsqrt"(%2) : (tensor<2x1xf32>) -> tensor<2x1xf32>
    %4 = "accel.mul"(%x, %3) : (tensor<2x8xf32>, tensor<2x1xf32>) -> tensor<2x8xf32>
    %5 = "accel.mul"(%w, %4) : (tensor<8xf32>, tensor<2x8xf32>) -> tensor<2x8xf32>

    %5 = "accel.rms_norm"(%x, %w) {eps = 1.0e-06 : f64} : ... -> tensor<2x8xf32>
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.module import Module
from accel.ir.rewrite import RuleSet, rewrite
from accel.passes.activation_rules import activation_rules
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.linear_rules import linear_rules
from accel.passes.norm_rules import norm_rules
from accel.passes.view_rules import view_rules

RULES = RuleSet([*view_rules(), *norm_rules(), *activation_rules(), *linear_rules()])


@register_pass
@dataclass
class RaiseComposites(Pass):
    """Applies all raising rules until none fires. Run it on canonical programs."""

    name: ClassVar[str] = "raise_composites"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        rewrite(module, RULES, context)
