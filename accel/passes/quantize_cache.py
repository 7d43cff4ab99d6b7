"""Keys and values are stored in fewer bits: encoded where they are made, decoded for attention.

What a causal attention reads of its own text is rounded to a grid with a scale for each token and
head, or for each `group` of a head's elements, and decoded in front of the attention. The pass runs
on @main, so its error is measured on whole texts; `insert_kv_cache`, which comes after it, keeps
what decoding reads: the codes and their scales (float16).

Papers: 8 bits a token: Sheng et al., 2023 (FlexGen); 4 bits in groups with zero points: Liu et al.,
2024 (KIVI); fp8: Micikevicius et al., 2022. Contract: approximate. Before and after
`quantize_cache`:

    %3 = "accel.attention"(%q, %k, %v) {scale = 0.25, causal = true} ...

    %0 = "accel.amax"("accel.abs"(%k)) {axes = [3], keepdim = true} ...
    %s = "accel.cast"("accel.mul"(%0, %per_step)) {dtype = f16} ...
    %c = "accel.quantize"(%k, %s) {dtype = i8, axis = 3} ...
    %1 = "accel.dequantize"(%c, %s) {axis = 3} ...            // %v alike: %2
    %3 = "accel.attention"(%q, %1, %2) {scale = 0.25, causal = true} ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.ir.builder import Builder
from accel.ir.module import Module, Op, Value
from accel.passes.base import Context, Contract, Pass, approximate, register_pass
from accel.passes.weights import check_option

# Largest code of each format.
_LIMITS = {"int8": 127.0, "fp8": 448.0, "int4": 15.0}
# Relative error of logits to promise by default: about twice that of SmolLM2-135M.
_BOUNDS = {"int8": 0.05, "fp8": 0.1, "int4": 0.5}
_SMALLEST = 6e-8  # a scale that float16 still holds
_INT4_GROUP = 32


@register_pass
@dataclass
class QuantizeCache(Pass):
    """Rounds the keys and values that a generator keeps.

    Options:
        format: "int8" (around zero), "fp8" (float8_e4m3fn), or "int4" (with zero points, two codes
            a byte).
        group: elements of a head that share a scale; 0: the head (int4: 32).
        rotate: multiply queries and keys by an orthogonal matrix first (Hadamard's), where heads
            have 2^n elements: scores are the same, and no element of a key is much larger than
            the others, which is what rounding suffers from (Ashkboos et al., 2024, QuaRot).
        bound: relative error of results to promise; 0: the format's own.
    """

    name: ClassVar[str] = "quantize_cache"
    contract: ClassVar[Contract] = approximate("relative_error", 0.05)

    format: Literal["int8", "fp8", "int4"] = "int8"
    group: int = 0
    rotate: bool = True
    bound: float = 0.0

    def __post_init__(self) -> None:
        check_option(self, "format", tuple(_LIMITS))
        if self.group < 0 or self.bound < 0:
            raise OptionError(f"{self.name}: group = {self.group}, bound = {self.bound}")

    def promise(self) -> Contract:
        return approximate("relative_error", self.bound or _BOUNDS[self.format])

    def run(self, module: Module, context: Context) -> None:
        done: dict[Value, Value] = {}
        for op in list(module.main.ops):
            if op.name != "attention" or not op.attribute("causal"):
                continue
            if self.rotate and not self._refuse(op.operands[1]):
                self._rotate(op, module, context)
            for place in (1, 2):
                value = op.operands[place]
                reason = self._refuse(value)
                if reason:
                    context.miss(self.name, op, reason)
                elif value in done or context.rewrite(self.name, op):
                    if value not in done:
                        done[value] = self._rounded(value, op)
                    op.set_operand(place, done[value])
        context.notes["rounded"] = len(done)

    def _rotate(self, op: Op, module: Module, context: Context) -> None:
        """Queries and keys in another basis, in which their products are what they were."""
        q, k = op.operands[:2]
        size = q.shape[3]
        if not isinstance(size, int) or size & (size - 1):
            context.miss("rotate", op, f"{size} elements of a head are no power of two")
            return
        if not context.rewrite("rotate", op):
            return
        name = f"hadamard.{size}.{str(q.dtype).removeprefix('torch.')}"
        if name not in module.weights:
            module.weights.add(name, _hadamard(size).to(q.dtype))
        b = Builder(before=op, made_by=self.name)
        matrix = b.constant(name, module.weights.type(name))
        for place, value in enumerate((q, k)):
            op.set_operand(place, b.matmul(value, matrix))

    def _width(self, value: Value) -> int:
        size = value.shape[3]
        group = self.group or (_INT4_GROUP if self.format == "int4" else 0)
        return min(group, size) if isinstance(size, int) else group

    def _refuse(self, value: Value) -> str:
        size, group = value.shape[3], self._width(value)
        if not isinstance(size, int) or (group and size % group):
            return f"{size} elements of a head are no multiple of group = {group}"
        if self.format == "int4" and size % 2:
            return f"{size} elements of a head are no pairs"
        return ""

    def _rounded(self, value: Value, op: Op) -> Value:
        """The value as it is decoded from its codes."""
        b = Builder(before=op, made_by=self.name)
        group = self._width(value)
        wide = b.widen(value)
        parts = wide
        if group:
            *lead, size = value.shape
            parts = b.reshape(wide, shape=(*lead, size // group, group))
        axis = len(parts.shape) - 1
        if self.format == "int4":
            return self._with_zero(b, value, wide, parts, axis, group)
        most = b.amax(b.abs(parts), axes=(axis,), keepdim=not group)
        stored, scale = self._scale(b, most)
        dtype = torch.int8 if self.format == "int8" else torch.float8_e4m3fn
        codes = b.quantize(wide, scale, dtype=dtype, axis=3, group=group)
        scale = b.cast_to(stored, wide.dtype)
        return b.cast_to(b.dequantize(codes, scale, axis=3, group=group), value.dtype)

    def _with_zero(
        self, b: Builder, value: Value, wide: Value, parts: Value, axis: int, group: int
    ) -> Value:
        low = b.amin(parts, axes=(axis,), keepdim=True)
        high = b.amax(parts, axes=(axis,), keepdim=True)
        stored, scale = self._scale(b, b.sub(high, low))
        zero = b.cast(b.neg(b.div(low, scale)), dtype=torch.float16)
        codes = b.round(b.add(b.div(parts, scale), b.cast_to(zero, wide.dtype)))
        none, limit = b.scalar(0.0, wide.dtype), b.scalar(_LIMITS["int4"], wide.dtype)
        codes = b.cast(b.minimum(b.maximum(codes, none), limit), dtype=torch.uint8)
        packed = b.pack_nibbles(b.reshape_to(codes, value.shape))
        if group:
            stored, zero = (b.reshape(x, shape=x.shape[:-1]) for x in (stored, zero))
        scale, offset = b.cast_to(stored, wide.dtype), b.cast_to(zero, wide.dtype)
        made = b.dequantize(b.unpack_nibbles(packed), scale, offset, axis=3, group=group)
        return b.cast_to(made, value.dtype)

    def _scale(self, b: Builder, span: Value) -> tuple[Value, Value]:
        """The scale as it is stored, and as the codes are computed with it."""
        step = b.mul(span, b.scalar(1 / _LIMITS[self.format], span.dtype))
        stored = b.cast(b.maximum(step, b.scalar(_SMALLEST, span.dtype)), dtype=torch.float16)
        return stored, b.cast_to(stored, span.dtype)


def _hadamard(size: int) -> Tensor:
    """Orthogonal and symmetric, [size, size], all elements of one magnitude."""
    made = torch.ones(1, 1, dtype=torch.float64)
    while made.shape[0] < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made / math.sqrt(size)
