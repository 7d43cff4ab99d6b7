"""Cases of benchmarks/gpu_attention.py: shapes, inputs, the region of each, float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from accel.ir import Builder, Op, TensorType, definition
from accel.ir.module import Region, Value

BF16, FP16 = torch.bfloat16, torch.float16
BORDERS = (0, 500, 2000, 2300, 3500, 4400, 5500, 6200, 7500, 8192)  # of texts packed into one row


@dataclass(frozen=True)
class Case:
    """One attention: `groups` key heads; `mask` is "", "keys" (padding), "alibi", or
    "texts": those between `BORDERS` see nothing of each other."""

    name: str
    batch: int
    heads: int
    length: int
    size: int
    groups: int = 0
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    mask: str = ""
    dtype: torch.dtype = BF16

    @property
    def scale(self) -> float:
        return self.size**-0.5

    @property
    def plain(self) -> bool:
        """Whether PyTorch's libraries take it; texts by a mask of all pairs."""
        return self.window is None and self.softcap is None and self.mask != "alibi"

    @property
    def flops(self) -> float:
        sizes = [self.length]
        if self.mask == "texts":
            sizes = [b - a for a, b in pairwise(BORDERS)]
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in sizes)
        if self.window is not None:
            pairs -= (self.length - self.window) * (self.length - self.window + 1) // 2
        return 4 * pairs * self.size * self.heads * self.batch

    def types(self) -> list[TensorType]:
        groups = self.groups or self.heads
        shapes = [(self.batch, self.length, n * self.size) for n in (self.heads, groups, groups)]
        types = [TensorType(s, self.dtype) for s in shapes]
        if self.mask == "keys":
            types.append(TensorType((self.batch, self.length), torch.bool))
        if self.mask == "texts":
            types.append(TensorType((self.length,), torch.int32))
        return types

    def inputs(self, seed: int) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        made = [
            torch.randn(t.shape, generator=generator, device="cuda", dtype=self.dtype)
            for t in self.types()[:3]
        ]
        if self.mask == "keys":
            shape, half = (self.batch, 1), self.length // 2
            lengths = torch.randint(half, self.length, shape, generator=generator, device="cuda")
            made.append(torch.arange(self.length, device="cuda") < lengths)
        if self.mask == "texts":
            place = torch.arange(self.length, device="cuda")
            ends = torch.tensor(BORDERS[1:], device="cuda")
            made.append((place[:, None] >= ends).sum(1, dtype=torch.int32))
        return made

    def build(self, b: Any, q: Value, k: Value, v: Value, more: Value | None = None) -> Value:
        def split(x: Value) -> Value:
            four = (self.batch, self.length, x.shape[2] // self.size, self.size)
            return b.permute(b.reshape(x, shape=four), axes=(0, 2, 1, 3))

        mask = None
        if more is not None and self.mask == "keys":
            mask = b.reshape(more, shape=(self.batch, 1, 1, self.length))
        elif more is not None:
            sides = ((self.length, 1), (1, self.length))
            mask = b.eq(*(b.reshape(more, shape=side) for side in sides))
        elif self.mask == "alibi":
            mask = self._alibi(b)
        y = b.attention(split(q), split(k), split(v), mask, scale=self.scale, causal=self.causal,
                        window=self.window, softcap=self.softcap)  # fmt: skip
        merged = (self.batch, self.length, self.heads * self.size)
        return b.reshape(b.permute(y, axes=(0, 2, 1, 3)), shape=merged)

    def _alibi(self, b: Any) -> Value:
        """slope(head) * (key - query), in the region."""
        f32, n = torch.float32, self.length
        head = b.iota(shape=(1, self.heads, 1, 1), axis=1, dtype=f32)
        slope = b.exp2(b.mul(b.add(head, b.scalar(1.0, f32)), b.scalar(-8.0 / self.heads, f32)))
        key = b.iota(shape=(1, 1, 1, n), axis=3, dtype=f32)
        query = b.iota(shape=(1, 1, n, 1), axis=2, dtype=f32)
        return b.cast(b.mul(slope, b.sub(key, query)), dtype=self.dtype)

    def split(self, x: Tensor) -> Tensor:
        return x.view(self.batch, self.length, -1, self.size).transpose(1, 2)

    def exact(self, inputs: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Rows of the last batch's result in float64, [rows, heads * size]."""
        q, k, v = (self.split(x)[-1].double() for x in inputs[:3])
        share = self.heads // k.shape[0]
        k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
        scores = q[:, rows] @ k.transpose(1, 2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        column = torch.arange(self.length, device="cuda")
        distance = column - rows[:, None]
        if self.mask == "alibi":
            slopes = self.slopes().double()
            scores = scores + (slopes[:, None, None] * distance).to(self.dtype).double()
        keep = torch.ones_like(distance, dtype=torch.bool)
        keep &= (distance <= 0) if self.causal else keep
        keep &= (distance > -self.window) if self.window is not None else keep
        keep &= inputs[3][-1] if self.mask == "keys" else keep
        if self.mask == "texts":
            keep &= inputs[3][rows][:, None] == inputs[3]
        weights = torch.softmax(scores.masked_fill(~keep, -math.inf), -1)
        return (weights @ v).transpose(0, 1).reshape(len(rows), -1)

    def slopes(self) -> Tensor:
        return torch.exp2(-8.0 / self.heads * torch.arange(1, self.heads + 1, device="cuda"))


CASES = {
    case.name: case
    for case in (
        Case("causal_8k", 2, 16, 8192, 128),
        Case("causal_16k", 2, 16, 16384, 128),
        Case("causal_8k_d64", 2, 32, 8192, 64),
        Case("causal_4k_d256", 2, 8, 4096, 256),
        Case("full_8k", 2, 16, 8192, 128, causal=False),
        Case("window_16k", 1, 16, 16384, 128, window=4096),
        Case("softcap_8k", 2, 16, 8192, 128, softcap=50.0),
        Case("alibi_8k", 2, 16, 8192, 128, mask="alibi"),
        Case("llama_8b_2k", 1, 32, 2048, 128, groups=8),
        Case("texts_8k", 1, 16, 8192, 128, mask="texts"),
        Case("texts_8k_full", 1, 16, 8192, 128, causal=False, mask="texts"),
        Case("llama_1b_2k", 1, 32, 2048, 64, groups=8),
        Case("gpt2_b8", 8, 12, 1024, 64),
        Case("heads_of_80", 8, 16, 1024, 80),
        Case("bert_b32_f32", 32, 12, 128, 64, causal=False, dtype=torch.float32),
        Case("bert_b1", 1, 12, 128, 64, causal=False, dtype=FP16),
        Case("bert_b32", 32, 12, 128, 64, causal=False, dtype=FP16),
        Case("bert_b32_keys", 32, 12, 128, 64, causal=False, mask="keys", dtype=FP16),
        Case("vit_b1", 1, 12, 197, 64, causal=False, dtype=FP16),
        Case("vit_b64", 64, 12, 197, 64, causal=False, dtype=FP16),
    )
}

FLEX = (
    "causal_8k",
    "window_16k",
    "softcap_8k",
    "alibi_8k",
    "texts_8k",
)  # it compiles for seconds each


def kernel_of(case: Case) -> Op:
    region = Region(case.types())
    made = case.build(Builder(region), *region.args)
    Builder(region).op("yield", [made])
    outer = Region(case.types())
    attributes = {"backend": "triton", "kind": "attention"}
    return Op(definition("kernel"), outer.args, attributes, [made.type], regions=[region])
