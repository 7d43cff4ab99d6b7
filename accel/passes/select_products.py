"""Gives matrix products of few rows to the kernel generator, with the decoding of their weight.

A linear over one row reads its weight once for one multiplication an element: memory is the limit,
and a generated kernel that decodes a compressed weight as it reads it moves a quarter (int8) or an
eighth (int4) of the bytes. Up to 8 rows share the decoding. An uncompressed weight goes to a
generated kernel for one row only; beyond that a vendor's blocked product is faster.
Contract: exact (the kernel's region is the ops it replaces).

    %1 = "accel.dequantize"(%q, %s)         %2 = "accel.kernel"(%x, %q, %s) ({
    %2 = "accel.linear"(%x, %1)       ->      dequantize, linear, silu
    %3 = "accel.silu"(%2)                   }) {kind = "gemv", ...}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.capability import KernelGenerator
from accel.ir.module import Function, Module, Op, Value
from accel.ir.op import Trait
from accel.ir.types import product
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.outline import elementwise_epilogue, finish_outline, is_full, outline


@register_pass
@dataclass
class SelectProducts(Pass):
    """Outlines linears of few rows. `max_epilogue` bounds the ops taken along after one."""

    name: ClassVar[str] = "select_products"
    contract: ClassVar[Contract] = EXACT

    max_epilogue: int = 6

    def run(self, module: Module, context: Context) -> None:
        if context.generator is None:
            return
        for function in module.functions.values():
            order = {op: i for i, op in enumerate(function.ops)}
            for op in function.ops:
                if op.name == "linear":
                    self._select(op, function, context, context.generator, order)

    def _select(
        self,
        op: Op,
        function: Function,
        context: Context,
        generator: KernelGenerator,
        order: dict[Op, int],
    ) -> None:
        reason = generator.supports_product(op)
        if reason is not None:
            context.miss(self.name, op, reason)
            return
        weight = op.operands[1]
        decoding = _decoding(weight)
        if decoding is None:
            context.miss(self.name, op, "the weight is not a constant, or decoded from constants")
            return
        for step in decoding:
            reason = generator.supports_decoding(step)
            if reason is not None:
                context.miss(self.name, op, f"accel.{step.name}: {reason}")
                return
        if not decoding and product(op.operands[0].shape[:-1]) != 1:
            context.miss(self.name, op, "several rows of an uncompressed weight")
            return
        if not context.rewrite(self.name, op):
            return
        ops = [op, *elementwise_epilogue(op, generator, self.max_epilogue)]
        ops.sort(key=order.__getitem__)
        attributes = {"backend": generator.name, "kind": "gemv"}
        kernel = outline(ops, "kernel", attributes, self.name, duplicate=decoding, inline=is_full)
        last = ops[-1]
        function.body.insert_before(kernel, last)
        order[kernel] = order[last]
        finish_outline(kernel, ops)


def _decoding(weight: Value) -> list[Op] | None:
    """The ops that decode a weight from constants, in order; none for a constant itself."""
    found: dict[Op, None] = {}

    def visit(value: Value) -> bool:
        op = value.op
        if op is None:
            return False
        if op.name == "constant":
            return True
        if not (op.has(Trait.DECODE) or op.name in ("cast", "gather")):
            return False
        if not all(visit(v) for v in op.operands):
            return False
        found[op] = None
        return True

    return list(found) if visit(weight) else None
