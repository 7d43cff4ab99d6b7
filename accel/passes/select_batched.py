"""Gives products of two computed tensors to the kernel generator, with what is around them.

Elementwise ops behind the product ride along, views that turn the result become addresses of its
stores, and operands are read through their views. The generator says where the library and a kernel
for the rest are faster. Contract: exact (the kernel's region is the ops it replaces).

    %1 = "accel.matmul"(%q, %k)             %4 = "accel.kernel"(%q, %k, %m) ({
    %2 = "accel.mul"(%1, %scale)      ->      matmul, mul, add, permute
    %3 = "accel.add"(%2, %m)                }) {kind = "batched", ...}
    %4 = "accel.permute"(%3)
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

KIND = "batched"


@register_pass
@dataclass
class SelectBatched(AnchoredPass):
    """Outlines matmul. `max_epilogue` bounds the ops taken along after one."""

    name: ClassVar[str] = "select_batched"
    contract: ClassVar[Contract] = EXACT
    anchors: ClassVar[tuple[str, ...]] = ("matmul",)
    kind: ClassVar[str] = KIND

    max_epilogue: int = 6

    def _select(
        self, op: Op, context: Context, generator: KernelGenerator, order: dict[Op, int]
    ) -> None:
        ops = [op, *elementwise_epilogue(op, generator, self.max_epilogue)]
        ops += _turns(ops[-1].result, generator)
        before = [v for value in op.operands for v in _maps(value, generator)]
        kind, reason = generator.product_kind(op, [*before, *ops])
        if reason is not None:
            context.miss(self.name, op, reason)
            return
        if not context.rewrite(self.name, op):
            return
        self._outline(ops, kind, generator, order, duplicate=before)


def _maps(value: Value, generator: KernelGenerator) -> list[Op]:
    """The index maps that an operand is read through; copies of repeated rows stay outside."""
    found: list[Op] = []
    while (op := value.op) is not None and op.has(Trait.VIEW) and len(op.operands) == 1:
        if generator.supports(op) is not None:
            break
        found.append(op)
        value = op.operands[0]
    return found


def _turns(value: Value, generator: KernelGenerator) -> list[Op]:
    """Views behind a value that reorder it, and reshapes among them; none without a permutation."""
    found: list[Op] = []
    while (user := value.single_user) is not None and user.name in ("permute", "reshape"):
        if generator.supports(user) is not None:
            break
        found.append(user)
        value = user.result
    while found and found[-1].name == "reshape":
        found.pop()
    return found
