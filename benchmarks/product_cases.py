"""Linears to time beside cuBLAS: what is around them, how their weight is stored, their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accel.backends.triton import gemv, skinny
from accel.ir import Builder, Op, TensorType, definition
from accel.ir.module import Region, Value
from accel.ir.types import SUB_BYTE_BITS

EPS = 1e-5
GROUP = 128  # of 4-bit codes: they share a scale and a zero
_NIBBLES: torch.dtype = torch.uint4  # type: ignore[attr-defined]
_FEW_ROWS = 2  # up to here on CUDA cores


@dataclass(frozen=True)
class Case:
    """One linear: `rows` of x, a weight [columns, depth], and what is around it.

    `before`: "" or "norm"; `after`: "", "gelu", "residual" or "gate" (silu(half) * half); `codes`:
    "" for a weight in `dtype`, else "int8" or "fp8" with a scale a row, or "int4" in groups.
    """

    name: str
    rows: int
    columns: int
    depth: int
    before: str = ""
    after: str = ""
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    codes: str = ""

    @property
    def kind(self) -> str:
        if self.rows <= (gemv.MOST_ROWS if self.codes else _FEW_ROWS):
            return "gemv"
        return "skinny" if self.rows <= skinny.MOST_ROWS else "matmul"

    @property
    def results(self) -> int:
        return self.columns // 2 if self.after == "gate" else self.columns

    @property
    def weight_bytes(self) -> int:
        """Of the weight as it is stored, scales included."""
        bits = (
            int(t.shape[0]) * int(t.shape[1]) * SUB_BYTE_BITS.get(t.dtype, 8 * t.dtype.itemsize)
            for t in self.weight_types()
        )
        return sum(bits) // 8

    def weight_types(self) -> list[TensorType]:
        n, k = self.columns, self.depth
        if not self.codes:
            return [TensorType((n, k), self.dtype)]
        if self.codes == "int4":
            groups = (n, k // GROUP)
            return [TensorType((n, k), _NIBBLES), TensorType(groups, self.dtype),
                    TensorType(groups, torch.uint8)]  # fmt: skip
        stored = torch.int8 if self.codes == "int8" else torch.float8_e4m3fn
        return [TensorType((n, k), stored), TensorType((n, 1), self.dtype)]

    def types(self) -> list[TensorType]:
        """x, the weight, what is around."""
        shapes: list[tuple[int, ...]] = [(self.depth,)] if self.before else []
        shapes += [(self.columns,)] if self.bias else []
        shapes += [(self.rows, self.columns)] if self.after == "residual" else []
        x = TensorType((self.rows, self.depth), self.dtype)
        return [x, *self.weight_types(), *(TensorType(s, self.dtype) for s in shapes)]

    def inputs(self, seed: int) -> list[Tensor]:
        """Random tensors; 4-bit codes as they are stored, two a byte."""
        generator = torch.Generator("cuda").manual_seed(seed)

        def made(t: TensorType) -> Tensor:
            shape = tuple(int(d) for d in t.shape)
            if t.dtype == _NIBBLES:
                shape = (shape[0], shape[1] // 2)
            if t.dtype == torch.int8:
                return torch.randint(-127, 128, shape, generator=generator, device="cuda",
                                     dtype=torch.int8)  # fmt: skip
            if t.dtype in (_NIBBLES, torch.uint8):
                most = 256 if t.dtype == _NIBBLES else 16
                return torch.randint(0, most, shape, generator=generator, device="cuda",
                                     dtype=torch.uint8)  # fmt: skip
            values = torch.randn(shape, generator=generator, device="cuda", dtype=self.dtype)
            return values.to(t.dtype)

        return [made(t) for t in self.types()]

    def dense(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs with the weight as one matrix of float64 codes times scales, or as it is."""
        x, *rest = inputs
        count = len(self.weight_types())
        weight, around = rest[:count], rest[count:]
        if not self.codes:
            return [x, weight[0], *around]
        codes, scale = weight[0], weight[1].double()
        if self.codes != "int4":
            return [x, codes.double() * scale, *around]
        nibbles = torch.stack([codes & 15, codes >> 4], -1).reshape(self.columns, -1, GROUP)
        wide = (nibbles.double() - weight[2].double()[:, :, None]) * scale[:, :, None]
        return [x, wide.reshape(self.columns, self.depth), *around]

    def build(self, b: Any, x: Value, *operands: Value) -> Value:
        left = list(operands)
        weight = left.pop(0)
        if self.codes:
            scale = left.pop(0)
            zero = left.pop(0) if self.codes == "int4" else None
            group = GROUP if self.codes == "int4" else 0
            weight = b.dequantize(weight, scale, zero, axis=1, group=group)
        if self.before:
            x = b.rms_norm(x, left.pop(0), eps=EPS, cast_before_weight=True)
        y = b.linear(x, weight, left.pop(0) if self.bias else None)
        if self.after == "gelu":
            return b.gelu(y)
        if self.after == "residual":
            return b.add(y, left.pop(0))
        if self.after == "gate":
            half = self.columns // 2
            gate = b.slice(y, axis=1, start=0, stop=half)
            return b.mul(b.silu(gate), b.slice(y, axis=1, start=half, stop=2 * half))
        return y

    def torch(self, x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        left = list(rest)
        if self.before:
            x = F.rms_norm(x, (self.depth,), left.pop(0), EPS)
        y = F.linear(x, w, left.pop(0) if self.bias else None)
        if self.after == "gelu":
            return F.gelu(y)
        if self.after == "residual":
            return y + left.pop(0)
        if self.after == "gate":
            return F.silu(y[:, : self.columns // 2]) * y[:, self.columns // 2 :]
        return y

    def kernel(self) -> Op:
        """The kernel op; all operands but x and the residual are weights of the program."""
        region = Region(self.types())
        made = self.build(Builder(region), *region.args)
        Builder(region).op("yield", [made])
        outer = Region(self.types())
        changing = {0, len(outer.args) - 1} if self.after == "residual" else {0}
        operands = [
            arg if i in changing else Builder(outer).constant(f"w{i}", arg.type)
            for i, arg in enumerate(outer.args)
        ]
        attributes = {"backend": "triton", "kind": self.kind}
        return Op(definition("kernel"), operands, attributes, [made.type], regions=[region])


def _decode(name: str, hidden: int, inner: int, qkv: int, vocabulary: int) -> list[Case]:
    return [
        Case(f"{name}_qkv", 1, qkv, hidden, before="norm"),
        Case(f"{name}_o", 1, hidden, hidden, after="residual"),
        Case(f"{name}_gate_up", 1, 2 * inner, hidden, before="norm", after="gate"),
        Case(f"{name}_down", 1, hidden, inner, after="residual"),
        Case(f"{name}_head", 1, vocabulary, hidden, before="norm"),
    ]


def _coded(name: str, codes: str, hidden: int, inner: int, qkv: int) -> list[Case]:
    shapes = {"qkv": (qkv, hidden), "o": (hidden, hidden), "gate_up": (2 * inner, hidden),
              "down": (hidden, inner)}  # fmt: skip
    return [Case(f"{name}_{codes}_{k}", 1, n, d, codes=codes) for k, (n, d) in shapes.items()]


def _prefill(name: str, rows: int, hidden: int, inner: int, qkv: int) -> list[Case]:
    return [
        Case(f"{name}_qkv", rows, qkv, hidden),
        Case(f"{name}_o", rows, hidden, hidden, after="residual"),
        Case(f"{name}_gate_up", rows, 2 * inner, hidden, after="gate"),
        Case(f"{name}_down", rows, hidden, inner, after="residual"),
    ]


def _encoder(name: str, rows: int) -> list[Case]:
    half = torch.float16
    return [
        Case(f"{name}_qkv", rows, 2304, 768, bias=True, dtype=half),
        Case(f"{name}_o", rows, 768, 768, after="residual", bias=True, dtype=half),
        Case(f"{name}_up", rows, 3072, 768, after="gelu", bias=True, dtype=half),
        Case(f"{name}_down", rows, 768, 3072, after="residual", bias=True, dtype=half),
    ]


CASES = {
    case.name: case
    for case in (
        *_decode("1b", 2048, 8192, 3072, 128256),
        *_decode("8b", 4096, 14336, 6144, 128256),
        *_coded("8b", "int8", 4096, 14336, 6144),
        *_coded("8b", "int4", 4096, 14336, 6144),
        *_coded("8b", "fp8", 4096, 14336, 6144),
        *_prefill("8b_b8", 8, 4096, 14336, 6144),
        *_prefill("8b_b32", 32, 4096, 14336, 6144),
        *_prefill("8b_b64", 64, 4096, 14336, 6144),
        *_encoder("bert_b1", 128),
        *_encoder("bert_b32", 4096),
        *_encoder("vit_b1", 197),
        *_encoder("vit_b64", 12608),
        *_prefill("8b_2048", 2048, 4096, 14336, 6144),
    )
}
