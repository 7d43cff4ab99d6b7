"""Passes for tests only: some of them break what they promise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from accel.ir.builder import Builder
from accel.ir.module import Module, constant_name
from accel.ir.rewrite import Rewrite, RuleSet, op, rewrite, var
from accel.passes.base import (
    EXACT,
    EXACT_CONSTANTS,
    Context,
    Contract,
    Pass,
    approximate,
    register_pass,
)

x = var("x")


@register_pass
@dataclass
class DoubleNegation(Pass):
    """Correct: -(-x) is x."""

    name: ClassVar[str] = "test_double_negation"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        rules = RuleSet([Rewrite("neg_neg", op("neg", op("neg", x)), x)])
        rewrite(module, rules, context)


@register_pass
@dataclass
class PlantedBug(Pass):
    """Wrong: sinh becomes sin. The other rule is right."""

    name: ClassVar[str] = "test_planted_bug"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        rules = [
            Rewrite("sinh_to_sin", op("sinh", x), op("sin", x)),
            Rewrite("neg_neg", op("neg", op("neg", x)), x),
        ]
        rewrite(module, RuleSet(rules), context)


@register_pass
@dataclass
class BrokenTypes(Pass):
    """Wrong: changes a result's type behind the definition's back."""

    name: ClassVar[str] = "test_broken_types"

    def run(self, module: Module, context: Context) -> None:
        for o in module.walk():
            if o.name == "exp":
                o.result.type = o.result.type.with_dtype(torch.float16)


@register_pass
@dataclass
class ScaleWeights(Pass):
    """Multiplies every constant by `factor` and says that it is lossy within `bound`."""

    name: ClassVar[str] = "test_scale_weights"
    contract: ClassVar[Contract] = approximate("relative_error", 0.01)

    factor: float = 1.0
    only: str | None = None
    mode: Literal["all", "none"] = "all"
    axes: tuple[int, ...] = ()

    def run(self, module: Module, context: Context) -> None:
        for o in list(module.walk()):
            name = constant_name(o.result) if o.results else None
            if name is None or self.mode == "none" or not context.rewrite("scale", o):
                continue
            made = module.weights.add(name, module.weights.tensor(name) * self.factor)
            b = Builder(before=o, made_by=self.name)
            o.replace_with([b.constant(made, o.result.type)])
        context.notes["factor"] = self.factor


@register_pass
@dataclass
class FoldHalf(Pass):
    """x * w -> x * (w / 3 * 3), stored. `sloppy` computes the constant in low precision."""

    name: ClassVar[str] = "test_fold"
    contract: ClassVar[Contract] = EXACT_CONSTANTS

    sloppy: bool = False
    undeclared: bool = False

    def run(self, module: Module, context: Context) -> None:
        for o in list(module.walk()):
            name = constant_name(o.result) if o.results else None
            if name is None or not context.rewrite("fold", o):
                continue
            exact = module.weights.tensor(name).double() / 3 * 3
            if self.undeclared:
                made = module.weights.add(name, exact.to(torch.float16).float())
            elif self.sloppy:
                made = context.store_constant(module, name, exact, torch.float32)
                module.weights.remove(made)
                module.weights.add(made, exact.to(torch.bfloat16).float())
            else:
                made = context.store_constant(module, name, exact, torch.float32)
            b = Builder(before=o, made_by=self.name)
            o.replace_with([b.constant(made, o.result.type)])
