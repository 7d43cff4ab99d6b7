"""Gives the products of a mixture's experts to the kernel generator, with what is around them.

What rides along is what does with a linear: the decoding of weights, elementwise ops after the
product (the row's routing weight), the join of gate and up. Views in front of x ride along too:
tokens that are repeated for each of their experts are read, not copied. Contract: exact (the
kernel's region is the ops it replaces).

    %1 = "accel.expert_linear"(%x, %w, %e)       %2 = "accel.kernel"(%x, %w, %e, %s) ({
    %2 = "accel.mul"(%1, %s)                ->      expert_linear, mul
                                                  }) {kind = "experts", ...}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.capability import KernelGenerator
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.passes.anchored import AnchoredPass
from accel.passes.base import EXACT, Context, Contract, register_pass
from accel.passes.outline import elementwise_epilogue
from accel.passes.select_products import decoding_of, halves_of

KIND = "experts"


@register_pass
@dataclass
class SelectExperts(AnchoredPass):
    """Outlines expert_linear. `max_epilogue` bounds the ops taken along after one."""

    name: ClassVar[str] = "select_experts"
    contract: ClassVar[Contract] = EXACT
    anchors: ClassVar[tuple[str, ...]] = ("expert_linear",)
    kind: ClassVar[str] = KIND

    max_epilogue: int = 6

    def _select(
        self, op: Op, context: Context, generator: KernelGenerator, order: dict[Op, int]
    ) -> None:
        x, weight, experts, _ = op.arguments()
        decoding = _decoding(weight)
        for step in decoding:
            reason = None if step.has(Trait.VIEW) else generator.supports_decoding(step)
            if reason is not None:
                context.miss(self.name, op, f"accel.{step.name}: {reason}")
                return
        halves = halves_of(op, generator)
        last = halves[-1] if halves else op
        ops = [op, *halves, *elementwise_epilogue(last, generator, self.max_epilogue)]
        ops.sort(key=order.__getitem__)
        if not context.rewrite(self.name, op):
            return
        around = [*_views(x), *_views(experts), *decoding]
        self._outline(ops, KIND, generator, order, duplicate=around)


def _decoding(weight: Value) -> list[Op]:
    """The views that a weight is read through, and the ops that decode it, if constants do."""
    views = _views(weight)
    base = views[-1].operands[0] if views else weight
    return [*views, *(decoding_of(base) or [])]


def _views(value: Value) -> list[Op]:
    """The index maps that a value is read through."""
    found: list[Op] = []
    while (op := value.op) is not None and op.has(Trait.VIEW) and len(op.operands) == 1:
        found.append(op)
        value = op.operands[0]
    return found
