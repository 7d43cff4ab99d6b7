"""Keys and values are stored in fewer bits: encoded where they are made, decoded for attention.

What a causal attention reads of its own text is rounded to a grid with a scale for each token and
head, or for each `group` of a head's elements, and decoded in front of the attention. The pass runs
on @main, so its error is measured on whole texts; `insert_kv_cache`, which comes after it, keeps
what decoding reads: the codes and their scales (float16).

Four bits want keys of one size: what all keys have in common, which changes no softmax, is taken
off first (Zhang et al., 2025, SageAttention, do so for 8 bits), then queries and keys are rotated.

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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.ir.builder import Builder
from accel.ir.interpret import interpret
from accel.ir.module import Function, Module, Op, SymbolInfo, Value
from accel.passes.base import Context, Contract, Pass, approximate, register_pass
from accel.passes.weights import check_option

# Largest code of each format.
_LIMITS = {"int8": 127.0, "fp8": 448.0, "int4": 15.0}
# Relative error of logits to promise by default: about twice that of SmolLM2-135M.
_BOUNDS = {"int8": 0.05, "fp8": 0.1, "int4": 0.5}
_SMALLEST = 6e-8  # a scale that float16 still holds
_INT4_GROUP = 16


@register_pass
@dataclass
class QuantizeCache(Pass):
    """Rounds the keys and values that a generator keeps.

    Options:
        format: "int8" (around zero), "fp8" (float8_e4m3fn), or "int4" (with zero points, two codes
            a byte).
        group: elements of a head that share a scale; 0: the head (int4: 16).
        rotate: multiply queries and keys by an orthogonal matrix first (Hadamard's), where heads
            have 2^n elements: scores are the same, and no element of a key is much larger than
            the others, which is what rounding suffers from (Ashkboos et al., 2024, QuaRot). With
            int4 values too, and results back.
        center: int4: tokens of random text on which the mean of a head's keys is measured, which
            keys are stored without; 0: they are stored as they are.
        bound: relative error of results to promise; 0: the format's own.
    """

    name: ClassVar[str] = "quantize_cache"
    contract: ClassVar[Contract] = approximate("relative_error", 0.05)

    format: Literal["int8", "fp8", "int4"] = "int8"
    group: int = 0
    rotate: bool = True
    center: int = 256
    bound: float = 0.0

    def __post_init__(self) -> None:
        check_option(self, "format", tuple(_LIMITS))
        if self.group < 0 or self.bound < 0 or self.center < 0:
            raise OptionError(
                f"{self.name}: group = {self.group}, bound = {self.bound}, center = {self.center}"
            )

    def promise(self) -> Contract:
        return approximate("relative_error", self.bound or _BOUNDS[self.format])

    def run(self, module: Module, context: Context) -> None:
        done: dict[Value, Value] = {}
        found = [op for op in module.main.ops if op.name == "attention" and op.attribute("causal")]
        if self.format == "int4" and self.center:
            self._center(found, module, context)
        for op in found:
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

    def _center(self, ops: Sequence[Op], module: Module, context: Context) -> None:
        """Keys without their mean: every score of a query is less by the same."""
        shifted = [op for op in ops if not self._refuse(op.operands[1])]
        for op in [op for op in shifted if op.attribute("softcap") is not None]:
            context.miss("center", op, "a cap of scores makes shifted scores others")
            shifted.remove(op)
        if not shifted:
            return
        keys = list(dict.fromkeys(op.operands[1] for op in shifted))
        means = dict(zip(keys, mean_keys(module, keys, self.center)))
        made: dict[Value, Value] = {}
        for op in shifted:
            key = op.operands[1]
            if key not in made:
                if not context.rewrite("center", op):
                    return
                name = module.weights.add(f"mean_keys.{len(made)}", means[key].to(key.dtype))
                b = Builder(before=op, made_by=self.name)
                made[key] = b.sub(key, b.constant(name, module.weights.type(name)))
            op.set_operand(1, made[key])

    def _rotate(self, op: Op, module: Module, context: Context) -> None:
        """Queries and keys in another basis, in which their products are what they were."""
        q, k, v = op.operands[:3]
        for turned in ((q, k), (v,)) if self.format == "int4" else ((q, k),):
            size = turned[0].shape[3]
            if not isinstance(size, int) or size & (size - 1):
                context.miss("rotate", op, f"{size} elements of a head are no power of two")
                continue
            if not context.rewrite("rotate", op):
                return
            b = Builder(before=op, made_by=self.name)
            matrix = self._matrix(b, module, size, q.dtype)
            for value in turned:
                op.set_operand(op.operands.index(value), b.matmul(value, matrix))
            if turned == (v,):
                made, uses = op.result, list(op.result.uses)
                assert op.next is not None
                b = Builder(before=op.next, location=op.location, made_by=self.name)
                back = b.matmul(made, self._matrix(b, module, size, q.dtype))
                for user, place in uses:
                    user.set_operand(place, back)

    def _matrix(self, b: Builder, module: Module, size: int, dtype: torch.dtype) -> Value:
        """Hadamard's, which is its own inverse."""
        name = f"hadamard.{size}.{str(dtype).removeprefix('torch.')}"
        if name not in module.weights:
            module.weights.add(name, _hadamard(size).to(dtype))
        made: Value = b.constant(name, module.weights.type(name))
        return made

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


def mean_keys(module: Module, keys: Sequence[Value], count: int) -> list[Tensor]:
    """The mean over `count` random tokens of keys [B, G, S, D] of @main, each [G, 1, D]."""
    copy = module.clone()
    order = {op: i for i, op in enumerate(module.main.ops)}
    ops = list(copy.main.ops)
    b = Builder(before=ops[-1])
    wanted = []
    for key in keys:
        assert key.op is not None
        twin = ops[order[key.op]].results[key.index]
        wanted.append(b.mean(twin, axes=(0, 2), keepdim=True))
    ops[-1].set_operands(wanted)
    for op in reversed(ops[:-1]):  # what comes after the last key
        if not any(r.uses for r in op.results):
            op.erase()
    made = interpret(copy.main, _random_text(copy.main, count), copy.weights)
    return [m[0] for m in made]


def _random_text(main: Function, count: int) -> list[Tensor]:
    """Ids for every argument of @main: few rows of `count` tokens where sizes are symbols."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for argument in main.args:
        rows = [u.operands[0].shape[0] for u in argument.users if u.name == "embedding"]
        high = next((r for r in rows if isinstance(r, int)), 2)
        shape = []
        for axis, size in enumerate(argument.shape):
            info = main.symbols.get(str(size), SymbolInfo(1, None))
            most = count if info.max is None else min(count, info.max)
            wanted = info.min if axis == 0 else most
            shape.append(size if isinstance(size, int) else wanted)
        inputs.append(torch.randint(0, high, shape, generator=generator, dtype=argument.dtype))
    return inputs


def _hadamard(size: int) -> Tensor:
    """Orthogonal and symmetric, [size, size], all elements of one magnitude."""
    made = torch.ones(1, 1, dtype=torch.float64)
    while made.shape[0] < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made / math.sqrt(size)
