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
    positive_scale,
)


@register_pass
@dataclass
class Cluster(WeightPass):
    """Replaces each weight by the nearest of 2^bits values found by k-means.

    Options (besides those of `WeightPass`):
        bits: 8, 4, 3, 2 or 1: bits of an index.
        group: none is a codebook of plain values, as in the paper. A number scales each group of
            that many inputs (0: all of an output channel's) to [-1, 1] first, which costs a scale
            for each group and fits weights whose channels differ.
        iterations: at most this many steps of k-means (it stops when no center moves).
    """

    name: ClassVar[str] = "cluster"
    contract: ClassVar[Contract] = approximate("relative_error", 0.7)

    bits: int = 4
    group: int | None = None
    iterations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option(self, "bits", (8, 4, 3, 2, 1))
        if self.iterations < 0 or (self.group or 0) < 0:
            raise OptionError(f"{self.name}: iterations = {self.iterations}, group = {self.group}")

    def default_bound(self) -> float:
        return {8: 0.1, 4: self.contract.bound}.get(self.bits, 1.0)

    def refuse(self, site: WeightSite, form: MatrixForm, tensor: Tensor) -> str:
        if tensor.numel() <= 2**self.bits:
            return f"it has only {tensor.numel()} elements"
        if tensor.dtype.itemsize == 1:
            return f"it is stored as {tensor.dtype} already"
        if self.group and form.columns % self.group:
            return f"{form.columns} inputs are no multiple of group = {self.group}"
        return ""

    def encode(self, matrix: Tensor, name: str, weights: WeightStore) -> Encoding:
        values, scale = matrix.double(), None
        if self.group is not None:
            grouped = values.reshape(matrix.shape[0], -1, self.group or matrix.shape[1])
            scale = positive_scale(grouped.abs().amax(-1, keepdim=True), matrix.dtype)
            # Where a scale is large, an error of the codebook counts for more.
            spread = scale.double().expand_as(grouped)
            values = (grouped / spread).reshape(matrix.shape)
            book = kmeans(values, 2**self.bits, self.iterations, spread.square())
        else:
            book = kmeans(values, 2**self.bits, self.iterations)
        wide = book.to(matrix.dtype).double()
        index = torch.bucketize(values, (wide[1:] + wide[:-1]) / 2).to(torch.uint8)
        codebook = weights.add(f"{name}.codebook", book.to(matrix.dtype))
        if self.bits == 8:
            stored = weights.add(f"{name}.index", index)
        else:
            dtype = getattr(torch, f"uint{self.bits}")
            stored = weights.add_sub_byte(f"{name}.index", index, dtype)
        parts = [Part(codebook, per_row=False), Part(stored)]
        if scale is not None:
            parts.append(Part(weights.add(f"{name}.scale", scale.squeeze(-1).contiguous())))
        return Encoding(tuple(parts), self._decode)

    def _decode(self, b: Builder, values: Sequence[Value]) -> Value:
        result: Value = b.gather(*values[:2], axis=0)
        if len(values) > 2:
            attributes = {"group": self.group} if self.group else {}
            result = b.dequantize(result, values[2], axis=result.type.rank - 1, **attributes)
        return result


def kmeans(
    values: Tensor, clusters: int, iterations: int, importance: Tensor | None = None
) -> Tensor:
    """Centers of a 1-d k-means over all elements of `values`: float64, ascending.

    They start evenly spaced over the range of the values. An empty cluster keeps its center.
    `importance` weighs the squared error of each element (all alike without).
    """
    ordered, order = values.reshape(-1).double().sort()
    mass = torch.ones_like(ordered) if importance is None else importance.reshape(-1)[order]
    zero = ordered.new_zeros(1)
    sums = torch.cat([zero, (ordered * mass).cumsum(0)])
    masses = torch.cat([zero, mass.cumsum(0)])
    low, high = float(ordered[0]), float(ordered[-1])
    centers = torch.linspace(low, high, clusters, dtype=torch.float64)
    for _ in range(iterations):
        inner = torch.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), ordered.numel())])
        inside = masses[edges[1:]] - masses[edges[:-1]]
        means = (sums[edges[1:]] - sums[edges[:-1]]) / inside.clamp(min=1e-300)
        moved = torch.where(edges.diff() > 0, means, centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers
