"""Structured sparsity: the n largest of every m weights along the inputs are kept.

Halved weights in a pattern that hardware multiplies directly (2:4 on Ampere and later), stored as
the kept values and their places inside each group of m, two bits each for m = 4.

Paper: Mishra et al., 2021 ("Accelerating Sparse Deep Neural Networks"): one-shot, by magnitude;
without the fine-tuning that the paper adds, expect a real loss of quality.

Contract: approximate. Before and after `sparsify{n=2,m=4}`:

    %w = "accel.constant"() {name = "fc.weight"} : () -> tensor<64x128xf32>
    %y = "accel.linear"(%x, %w) : (...) -> tensor<?x64xf32>

    %v = "accel.constant"() {name = "fc.weight.values"} : () -> tensor<64x64xf32>
    %i = "accel.constant"() {name = "fc.weight.index"} : () -> tensor<64x64xui2>
    %w = "accel.unpack_n_of_m"(%v, %i) {n = 2, m = 4} : (...) -> tensor<64x128xf32>
    %y = "accel.linear"(%x, %w) : (...) -> tensor<?x64xf32>

The values are a weight like any other: `sparsify, quantize{bits=8}` stores them in eight bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.ir.builder import Builder
from accel.ir.module import Value
from accel.ir.storage import WeightStore
from accel.passes.base import Contract, approximate, register_pass
from accel.passes.weights import Encoding, MatrixForm, Part, WeightPass, WeightSite


@register_pass
@dataclass
class Sparsify(WeightPass):
    """Keeps `n` of every `m` weights along the inputs, by magnitude (m at most 16)."""

    name: ClassVar[str] = "sparsify"
    contract: ClassVar[Contract] = approximate("relative_error", 1.0)

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.n < self.m <= 16:
            raise OptionError(f"{self.name}: {self.n}:{self.m} is no pattern with 0 < n < m <= 16")

    def refuse(self, site: WeightSite, form: MatrixForm, tensor: Tensor) -> str:
        if form.columns % self.m:
            return f"{form.columns} inputs are no multiple of m = {self.m}"
        if any(step.name == "unpack_n_of_m" for use in site.uses for step in use.path):
            return "it is sparse already"
        return ""

    def encode(self, matrix: Tensor, name: str, weights: WeightStore) -> Encoding:
        values, index = keep_largest(matrix, self.n, self.m)
        bits = max((self.m - 1).bit_length(), 1)
        dtype = getattr(torch, f"uint{bits}")
        parts = (
            Part(weights.add(f"{name}.values", values)),
            Part(weights.add_sub_byte(f"{name}.index", index.to(torch.uint8), dtype)),
        )

        def decode(b: Builder, stored: Sequence[Value]) -> Value:
            result: Value = b.unpack_n_of_m(*stored, n=self.n, m=self.m)
            return result

        return Encoding(parts, decode)


def keep_largest(matrix: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The n largest magnitudes of every m along the last axis, and their places, ascending.

    Of equal magnitudes the first ones are kept. Both results are [rows, columns * n / m].
    """
    rows, columns = matrix.shape
    groups = matrix.reshape(rows, columns // m, m)
    order = groups.abs().argsort(dim=-1, descending=True, stable=True)
    index = order[..., :n].sort(-1).values
    values = groups.gather(-1, index)
    return values.reshape(rows, -1).contiguous(), index.reshape(rows, -1)
