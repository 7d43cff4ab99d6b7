"""Canonicalization: one spelling for what can be written in many ways, and nothing superfluous.

Scalar identities (`accel.passes.algebra`: x + 0, -(-x), x ** 2, casts that lose nothing...) and
views (`accel.passes.view_rules`: chains of reshapes and permutes, slices, broadcasts, cat) are
rewritten to a fixpoint, so that later passes look for one form only. Contract: exact. Before and
after:

    %0 = "accel.permute"(%x) {axes = [0, 2, 1]} : (tensor<2x3x4xf32>) -> tensor<2x4x3xf32>
    %1 = "accel.permute"(%0) {axes = [0, 2, 1]} : (tensor<2x4x3xf32>) -> tensor<2x3x4xf32>
    %2 = "accel.full"() {value = 1.0 : f64, dtype = f32} : () -> tensor<f32>
    %3 = "accel.mul"(%2, %1) : (tensor<f32>, tensor<2x3x4xf32>) -> tensor<2x3x4xf32>
    "accel.return"(%3) : (tensor<2x3x4xf32>) -> ()

    "accel.return"(%x) : (tensor<2x3x4xf32>) -> ()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.module import Module
from accel.ir.rewrite import RuleSet, rewrite
from accel.passes.algebra import algebra_rules
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.position_rules import position_rules
from accel.passes.view_rules import view_rules

RULES = RuleSet([*view_rules(), *position_rules(), *algebra_rules()])


@register_pass
@dataclass
class Canonicalize(Pass):
    """Applies all canonicalization rules until none fires."""

    name: ClassVar[str] = "canonicalize"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        rewrite(module, RULES, context)
