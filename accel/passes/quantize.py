"""Weight-only quantization: narrow integers, fp8 or NF4 with scales, and a `dequantize` in front.

Every weight that a contraction reads (linear, matmul, conv...) is rounded to the nearest of its
grid points, one scale for each output channel, or for each `group` inputs of it. Activations are
untouched, so no calibration is needed; decoding costs less than the memory traffic it saves when
few rows are multiplied.

Papers: integer grids, scales and zero points: Jacob et al., 2018 ("Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference"); scales per group of inputs:
Frantar et al., 2023 (GPTQ); fp8: Micikevicius et al., 2022; NF4: Dettmers et al., 2023 (QLoRA).

Contract: approximate. Before and after `quantize{bits=8}`, and `quantize{bits=4,group=64}` with
`symmetric=false`:

    %w = "accel.constant"() {name = "fc.weight"} : () -> tensor<64x128xf32>
    %y = "accel.linear"(%x, %w) : (...) -> tensor<?x64xf32>

    %q = "accel.constant"() {name = "fc.weight.q"} : () -> tensor<64x128xi8>
    %s = "accel.constant"() {name = "fc.weight.scale"} : () -> tensor<64x1xf32>
    %w = "accel.dequantize"(%q, %s) {axis = 1} : (...) -> tensor<64x128xf32>
    %y = "accel.linear"(%x, %w) : (...) -> tensor<?x64xf32>

    %q = ... tensor<64x128xui4>, %s = ... tensor<64x2xf32>, %z = ... tensor<64x2xui4>
    %w = "accel.dequantize"(%q, %s, %z) {axis = 1, group = 64} : (...) -> tensor<64x128xf32>

NF4 values are a codebook's, scaled by groups: `dequantize(gather(codebook, index), scale)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.ir.builder import Builder
from accel.ir.module import Value
from accel.ir.storage import WeightStore
from accel.ir.types import DTYPE_BY_NAME, SUB_BYTE_BITS
from accel.passes.base import Contract, approximate, register_pass
from accel.passes.weights import (
    Encoding,
    MatrixForm,
    Part,
    WeightPass,
    WeightSite,
    check_option,
    positive_scale,
)

_OWN_BITS = {"int": 8, "fp8": 8, "nf4": 4}
# Relative error of the results to promise by default: about twice that of a 30-layer transformer
# (SmolLM2-135M: int8 0.02, fp8 0.05, 4 bits in groups of 64 0.2 to 0.5, 3 bits 0.4).
_BOUNDS = {("int", 8): 0.05, ("fp8", 8): 0.1, ("nf4", 4): 0.5, ("int", 4): 0.7, ("int", 3): 0.9}


@register_pass
@dataclass
class Quantize(WeightPass):
    """Rounds weights to the nearest grid point and decodes them in front of their users.

    Options (besides those of `WeightPass`):
        format: "int" (two's complement or unsigned integers), "fp8" (float8_e4m3fn) or "nf4".
        bits: 8, 4, 3 or 2 for integers; 0 is the format's own (int 8, fp8 8, nf4 4).
        group: inputs of an output channel that share a scale; 0: all of them. A weight whose inputs
            are no multiple of it stays dense, and is reported as a near miss.
        symmetric: integers around zero and no zero point; else unsigned with a zero point.
        zero_point: "integer" (on the grid, stored in the same bits) or "float" (anywhere; stored
            in the weight's dtype, so a grid with an arbitrary offset is met exactly).
        per: "channel", or "tensor" for a single scale.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = approximate("relative_error", 0.05)

    bits: int = 0
    group: int = 0
    symmetric: bool = True
    format: Literal["int", "fp8", "nf4"] = "int"
    zero_point: Literal["integer", "float"] = "integer"
    per: Literal["channel", "tensor"] = "channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option(self, "format", tuple(_OWN_BITS))
        check_option(self, "zero_point", ("integer", "float"))
        check_option(self, "per", ("channel", "tensor"))
        own = _OWN_BITS[self.format]
        check_option(self, "bits", (0, 8, 4, 3, 2) if self.format == "int" else (0, own))
        if self.group < 0 or (self.group and self.per == "tensor"):
            raise OptionError(f"{self.name}: group = {self.group} with per = {self.per}")
        if not self.symmetric and (self.format != "int" or self.per == "tensor"):
            raise OptionError(
                f"{self.name}: zero points need format = int and per = channel",
                advice="leave symmetric at true",
            )

    def default_bound(self) -> float:
        return _BOUNDS.get((self.format, self.bits or _OWN_BITS[self.format]), 1.0)

    def refuse(self, site: WeightSite, form: MatrixForm, tensor: Tensor) -> str:
        if self.group and form.columns % self.group:
            return f"{form.columns} inputs are no multiple of group = {self.group}"
        if tensor.dtype.itemsize == 1:
            return f"it is stored as {tensor.dtype} already"
        return ""

    def encode(self, matrix: Tensor, name: str, weights: WeightStore) -> Encoding:
        if self.format == "nf4":
            return self._encode_nf4(matrix, name, weights)
        if self.format == "fp8":
            return self._encode_fp8(matrix, name, weights)
        bits = self.bits or _OWN_BITS[self.format]
        grouped = self._grouped(matrix)
        if self.symmetric:
            scale, zero, q = _symmetric(grouped, bits, matrix.dtype)
            dtype = getattr(torch, f"int{bits}")
        else:
            exact = self.zero_point == "integer"
            scale, zero, q = (_grid_zero if exact else _free_zero)(grouped, bits, matrix.dtype)
            dtype = getattr(torch, f"uint{bits}")
        parts = [
            Part(_store(weights, f"{name}.q", q.reshape(matrix.shape), dtype)),
            self._scale_part(weights, name, scale),
        ]
        if zero is not None:
            stored = dtype if self.zero_point == "integer" else zero.dtype
            parts.append(Part(_store(weights, f"{name}.zero", zero.squeeze(-1), stored)))
        return Encoding(tuple(parts), self._dequantize)

    def _grouped(self, matrix: Tensor) -> Tensor:
        """[rows, groups, group] in the precision that scales are computed in."""
        wide = matrix.to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
        if self.per == "tensor":
            return wide.reshape(1, 1, -1)
        return wide.reshape(matrix.shape[0], -1, self.group or max(matrix.shape[1], 1))

    def _scale_part(self, weights: WeightStore, name: str, scale: Tensor) -> Part:
        shaped = scale.reshape(()) if self.per == "tensor" else scale.squeeze(-1)
        return Part(weights.add(f"{name}.scale", shaped.contiguous()), self.per == "channel")

    def _dequantize(self, b: Builder, values: Sequence[Value]) -> Value:
        if self.per == "tensor":
            result: Value = b.dequantize(*values)
        else:
            attributes = {"group": self.group} if self.group else {}
            result = b.dequantize(*values, axis=values[0].type.rank - 1, **attributes)
        return result

    def _encode_fp8(self, matrix: Tensor, name: str, weights: WeightStore) -> Encoding:
        limit = float(torch.finfo(torch.float8_e4m3fn).max)
        grouped = self._grouped(matrix)
        scale = positive_scale(grouped.abs().amax(-1, keepdim=True) / limit, matrix.dtype)
        q = (grouped / scale.to(grouped.dtype)).clamp(-limit, limit).to(torch.float8_e4m3fn)
        parts = (
            Part(weights.add(f"{name}.q", q.reshape(matrix.shape))),
            self._scale_part(weights, name, scale),
        )
        return Encoding(parts, self._dequantize)

    def _encode_nf4(self, matrix: Tensor, name: str, weights: WeightStore) -> Encoding:
        grouped = self._grouped(matrix)
        scale = positive_scale(grouped.abs().amax(-1, keepdim=True), matrix.dtype)
        book = nf4_codebook()
        middles = ((book[1:] + book[:-1]) / 2).to(grouped.dtype)
        index = torch.bucketize(grouped / scale.to(grouped.dtype), middles)
        shared = f"nf4.{matrix.dtype}".replace("torch.", "")
        if shared not in weights:
            weights.add(shared, book.to(matrix.dtype))
        parts = (
            Part(shared, per_row=False),
            Part(_store(weights, f"{name}.q", index.reshape(matrix.shape), DTYPE_BY_NAME["ui4"])),
            self._scale_part(weights, name, scale),
        )

        def decode(b: Builder, values: Sequence[Value]) -> Value:
            return self._dequantize(b, (b.gather(values[0], values[1], axis=0), values[2]))

        return Encoding(parts, decode)


def _store(weights: WeightStore, name: str, values: Tensor, dtype: torch.dtype) -> str:
    """Stores whole numbers in `dtype`, packed if it is a sub-byte one."""
    if dtype in SUB_BYTE_BITS:
        return weights.add_sub_byte(name, values.to(torch.int16), dtype)
    return weights.add(name, values.to(dtype).contiguous())


Grid: TypeAlias = tuple[Tensor, Tensor | None, Tensor]  # scale, zero, q


def _symmetric(grouped: Tensor, bits: int, dtype: torch.dtype) -> Grid:
    """q in [-(2^(bits-1) - 1), 2^(bits-1) - 1]: the lowest value stays unused."""
    high = 2 ** (bits - 1) - 1
    scale = positive_scale(grouped.abs().amax(-1, keepdim=True) / high, dtype)
    q = (grouped / scale.to(grouped.dtype)).round().clamp(-high, high)
    return scale, None, q


def _grid_zero(grouped: Tensor, bits: int, dtype: torch.dtype) -> Grid:
    """q in [0, 2^bits - 1] and a zero point on the grid, so that 0.0 is met exactly."""
    high = 2**bits - 1
    low = grouped.amin(-1, keepdim=True).clamp(max=0)
    top = grouped.amax(-1, keepdim=True).clamp(min=0)
    scale = positive_scale((top - low) / high, dtype)
    wide = scale.to(grouped.dtype)
    zero = (-low / wide).round().clamp(0, high)
    q = ((grouped / wide).round() + zero).clamp(0, high)
    return scale, zero, q


def _free_zero(grouped: Tensor, bits: int, dtype: torch.dtype) -> Grid:
    """q in [0, 2^bits - 1] from the group's minimum to its maximum."""
    high = 2**bits - 1
    low = grouped.amin(-1, keepdim=True)
    scale = positive_scale((grouped.amax(-1, keepdim=True) - low) / high, dtype)
    wide = scale.to(grouped.dtype)
    zero = (-low / wide).to(dtype)
    q = (grouped / wide + zero.to(wide.dtype)).round().clamp(0, high)
    return scale, zero, q


@cache
def nf4_codebook() -> Tensor:
    """The 16 NormalFloat values, ascending, float64: quantiles of N(0, 1) scaled to [-1, 1].

    Eight positive quantiles, zero, and seven negative ones at equal steps of probability between
    1/2 and the mean of 1 - 1/30 and 1 - 1/32 (Dettmers et al., 2023, appendix E).
    """
    edge = 1 - (1 / 30 + 1 / 32) / 2
    half = torch.tensor(0.5, dtype=torch.float64)
    positive = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    book = torch.cat([positive, torch.special.ndtri(half).reshape(1), negative])
    return (book / book.max()).sort().values
