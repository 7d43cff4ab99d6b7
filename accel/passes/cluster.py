"""Weight clustering: every weight becomes an index into a small codebook of shared values.

Values are found by k-means, so unlike a grid they lie where the weights are; the decode is one
`gather`. In one dimension clusters are intervals of the sorted weights, so an iteration of k-means
needs only prefix sums: it costs one binary search for each cluster.

Paper: Han et al., 2016 ("Deep Compression", section 3), with its linear initialization.

Contract: approximate. Before and after `cluster{bits=4}`:

    %w = "accel.constant"() {name = "fc.weight"} : () -> tensor<64x128xf32>
    %y = "accel.linear"(%x, %w) : (...) -> tensor<?x64xf32>

    %c = "accel.constant"() {name = "fc.weight.codebook"} : () -> tensor<16xf32>
    %i = "accel.constant"() {name = "fc.weight.index"} : () -> tensor<64x128xui4>
    %w = "accel.gather"(%c, %i) {axis = 0} : (...) -> tensor<64x128xf32>
    %y = "accel.linear"(%x, %w) : (...) -> tensor<?x64xf32>
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
from accel.passes.weights import (
    Encoding,
    MatrixForm,
    Part,
    WeightPass,
    WeightSite,
    check_option,
)


@register_pass
@dataclass
class Cluster(WeightPass):
    """Replaces each weight by the nearest of 2^bits values found by k-means.

    Options (besides those of `WeightPass`):
        bits: 8, 4, 3, 2 or 1: bits of an index.
        iterations: at most this many steps of k-means (it stops when no center moves).
    """

    name: ClassVar[str] = "cluster"
    contract: ClassVar[Contract] = approximate("relative_error", 0.7)

    bits: int = 4
    iterations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option(self, "bits", (8, 4, 3, 2, 1))
        if self.iterations < 0:
            raise OptionError(f"{self.name}: iterations = {self.iterations}")

    def default_bound(self) -> float:
        return {8: 0.1, 4: self.contract.bound}.get(self.bits, 1.0)

    def refuse(self, site: WeightSite, form: MatrixForm, tensor: Tensor) -> str:
        if tensor.numel() <= 2**self.bits:
            return f"it has only {tensor.numel()} elements"
        if tensor.dtype.itemsize == 1:
            return f"it is stored as {tensor.dtype} already"
        return ""

    def encode(self, matrix: Tensor, name: str, weights: WeightStore) -> Encoding:
        book = kmeans(matrix, 2**self.bits, self.iterations).to(matrix.dtype)
        wide = book.double()
        index = torch.bucketize(matrix.double(), (wide[1:] + wide[:-1]) / 2).to(torch.uint8)
        codebook = Part(weights.add(f"{name}.codebook", book), per_row=False)
        if self.bits == 8:
            stored = weights.add(f"{name}.index", index)
        else:
            dtype = getattr(torch, f"uint{self.bits}")
            stored = weights.add_sub_byte(f"{name}.index", index, dtype)
        return Encoding((codebook, Part(stored)), _gather)


def _gather(b: Builder, values: Sequence[Value]) -> Value:
    result: Value = b.gather(*values, axis=0)
    return result


def kmeans(values: Tensor, clusters: int, iterations: int) -> Tensor:
    """Centers of a 1-d k-means over all elements of `values`: float64, ascending.

    They start evenly spaced over the range of the values. An empty cluster keeps its center.
    """
    ordered = values.reshape(-1).double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    low, high = float(ordered[0]), float(ordered[-1])
    centers = torch.linspace(low, high, clusters, dtype=torch.float64)
    for _ in range(iterations):
        inner = torch.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), ordered.numel())])
        counts = edges.diff()
        means = (sums[edges[1:]] - sums[edges[:-1]]) / counts.clamp(min=1)
        moved = torch.where(counts > 0, means, centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers
