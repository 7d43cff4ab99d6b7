"""Gives matrix products of few rows to the kernel generator, with the decoding of their weight.

A linear over one row reads its weight once for one multiplication an element: memory is the limit,
and a generated kernel that decodes a compressed weight as it reads it moves a quarter (int8) or an
eighth (int4) of the bytes. A few rows share the decoding. What is around the product rides along
where the generator takes it: elementwise ops after it, the join of a merged linear's two halves
(gate times up), a norm before it, the rotary embedding of its heads (`rotated`). The generator says
when a vendor's product is faster.
Contract: exact (the kernel's region is the ops it replaces).

    %1 = "accel.dequantize"(%q, %s)         %2 = "accel.kernel"(%x, %q, %s) ({
    %2 = "accel.linear"(%x, %1)       ->      dequantize, linear, silu
    %3 = "accel.silu"(%2)                   }) {kind = "gemv", ...}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from accel.ir.capability import KernelGenerator
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.types import same_shape
from accel.passes.anchored import AnchoredPass
from accel.passes.base import EXACT, Context, Contract, register_pass
from accel.passes.outline import elementwise_epilogue
from accel.passes.rotated import rotation_of

_FEW = 16  # a factor that scales fewer elements is no small thing to read


@register_pass
@dataclass
class SelectProducts(AnchoredPass):
    """Outlines linears of few rows. `max_epilogue` bounds the ops taken along after one."""

    name: ClassVar[str] = "select_products"
    contract: ClassVar[Contract] = EXACT
    anchors: ClassVar[tuple[str, ...]] = ("linear",)

    max_epilogue: int = 6

    def _refusal(self, op: Op, generator: KernelGenerator) -> str | None:
        return generator.supports_product(op)

    def _select(
        self, op: Op, context: Context, generator: KernelGenerator, order: dict[Op, int]
    ) -> None:
        weight = op.operands[1]
        decoding = decoding_of(weight)
        if decoding is None:
            context.miss(self.name, op, "the weight is not a constant, or decoded from constants")
            return
        for step in decoding:
            reason = generator.supports_decoding(step)
            if reason is not None:
                context.miss(self.name, op, f"accel.{step.name}: {reason}")
                return
        if not decoding and self._take_rotation(op, context, generator, order):
            return
        halves = halves_of(op, generator)
        last = halves[-1] if halves else op
        ops = [op, *halves, *elementwise_epilogue(last, generator, self.max_epilogue)]
        ops.sort(key=order.__getitem__)
        norm = _norm(op, generator)
        kind, reason = generator.product_kind(op, [*norm, *ops])
        scale = _scale(op, generator)
        if scale and generator.product_kind(op, [*scale, *ops]) == ("matmul", None):
            norm, kind, reason = scale, "matmul", None
        if reason is not None:
            context.miss(self.name, op, reason)
            return
        if not context.rewrite(self.name, op):
            return
        around = [*norm, *decoding, *_widened(op)]
        self._outline(ops, kind, generator, order, duplicate=around)

    def _take_rotation(
        self, op: Op, context: Context, generator: KernelGenerator, order: dict[Op, int]
    ) -> bool:
        """Takes in the rotary embedding of the heads that a linear computes, if that pays."""
        found = rotation_of(op, order)
        if found is None:
            return False
        kind, reason = generator.product_kind(op, [op, *found.ropes])
        if kind != "matmul" or reason is not None:
            if kind == "matmul":
                context.miss(self.name, op, f"with the rotary embedding after it: {reason}")
            return False
        if not context.rewrite(self.name, op):
            return False
        ops = [op, *found.join(self.name)]
        self._outline(ops, kind, generator, order, place=found.first)
        return True


def _widened(op: Op) -> list[Op]:
    """The conversion of x from codes of a byte, which tensor cores multiply as they are."""
    made = op.operands[0].op
    codes = (
        made is not None and made.name == "cast" and made.operands[0].dtype == torch.float8_e4m3fn
    )
    return [made] if codes and made is not None else []


def _norm(op: Op, generator: KernelGenerator) -> list[Op]:
    """The norm before a product, if products are all that reads it; each computes it for itself."""
    norm = op.operands[0].op
    if norm is None or len(norm.results) != 1 or generator.supports_neighbour(op, norm) is not None:
        return []
    if any(
        user.name != "linear" or user.operands[0] is not norm.result for user in norm.result.users
    ):
        return []
    return [norm] if all(generator.supports_product(u) is None for u in norm.result.users) else []


def _scale(op: Op, generator: KernelGenerator) -> list[Op]:
    """The multiplication before a product that scales its columns by a few numbers (those of
    squeeze-excite, one for each image and channel), if nothing else reads what it makes."""
    scale = op.operands[0].op
    if scale is None or scale.name != "mul" or len(scale.result.uses) != 1:
        return []
    x, factors = scale.operands
    if not same_shape(x.shape, scale.result.shape):
        x, factors = factors, x
    whole, few = x.type.numel(), factors.type.numel()
    small = isinstance(whole, int) and isinstance(few, int) and few * _FEW <= whole
    fits = small and same_shape(x.shape, scale.result.shape) and generator.supports(scale) is None
    return [scale] if fits else []


def halves_of(op: Op, generator: KernelGenerator) -> list[Op]:
    """The two halves of a merged linear's result, an activation on either, and what joins them."""
    slices = list(op.result.users)
    if len(slices) != 2 or any(generator.supports_neighbour(op, s) is not None for s in slices):
        return []
    if not same_shape(slices[0].result.shape, slices[1].result.shape):
        return []
    found: list[Op] = list(slices)
    ends: list[Op | None] = []
    for part in slices:
        user = part.result.single_user
        if user is not None and len(user.operands) == 1 and user.has(Trait.ELEMENTWISE):
            found.append(user)
            user = user.result.single_user
        ends.append(user)
    join = ends[0]
    if join is None or join is not ends[1] or not join.has(Trait.ELEMENTWISE):
        return []
    found.append(join)
    elementwise = [o for o in found if o not in slices]
    return found if all(generator.supports(o) is None for o in elementwise) else []


def decoding_of(weight: Value) -> list[Op] | None:
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
