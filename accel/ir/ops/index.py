"""Reading and writing at positions that are known only at run time.

Indices are integer tensors and lie in [-size, size) unless an op says otherwise.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Trait, aten, define
from accel.ir.types import (
    Dim,
    TensorType,
    broadcast_shapes,
    is_integer,
    normalize_axis,
)


def _check_index(name: str, index: TensorType) -> None:
    if not is_integer(index.dtype):
        raise TypeInferenceError(f"accel.{name}: indices have dtype {index.dtype}, not an integer")


@define("embedding", Trait.PURE)
class Embedding:
    """Rows of a table: [V, D] and indices [...] to [..., D]. Indices lie in [0, V)."""

    @staticmethod
    def infer(table: TensorType, indices: TensorType) -> TensorType:
        _check_index("embedding", indices)
        if table.rank != 2:
            raise TypeInferenceError(f"accel.embedding: a table of rank {table.rank}")
        return TensorType((*indices.shape, table.shape[1]), table.dtype)

    evaluate = aten("embedding", "table", "indices")


@define("gather", Trait.PURE)
class Gather:
    """x at run-time positions along one axis: the index tensor's axes replace `axis`.

    With x [A, V, B] and indices [I, J], axis 1: result [A, I, J, B]. Weight clustering and the
    codebook decode are this op on a codebook.
    """

    @staticmethod
    def infer(x: TensorType, indices: TensorType, *, axis: int = 0) -> TensorType:
        _check_index("gather", indices)
        axis = normalize_axis(axis, x.rank)
        return x.with_shape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))

    @staticmethod
    def evaluate(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
        flat = torch.index_select(x, axis, indices.reshape(-1).to(torch.int64) % x.shape[axis])
        axis %= x.dim()
        return flat.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@define("take_along", Trait.PURE)
class TakeAlong:
    """torch.gather: result[i][j][k] = x[i][index[i][j][k]][k] for axis 1. No negative indices."""

    @staticmethod
    def infer(x: TensorType, index: TensorType, *, axis: int) -> TensorType:
        _check_index("take_along", index)
        normalize_axis(axis, max(x.rank, 1))
        return x.with_shape(index.shape)

    evaluate = aten("gather", "x", "axis", "index")


@define("index", Trait.PURE)
class Index:
    """x[..., i, j, ...]: integer tensors for the axes `axes`, broadcast together.

    The indexed axes become the broadcast shape at the first of them if they are adjacent, else at
    the front, as in numpy.
    """

    @staticmethod
    def infer(x: TensorType, *indices: TensorType, axes: tuple[int, ...]) -> TensorType:
        for index in indices:
            _check_index("index", index)
        if len(indices) != len(axes) or list(axes) != sorted(set(axes)):
            raise TypeInferenceError(f"accel.index: {len(indices)} indices for axes {axes}")
        common = broadcast_shapes(*(i.shape for i in indices))
        adjacent = all(b - a == 1 for a, b in pairwise(axes))
        start = axes[0] if adjacent else 0
        rest = [d for i, d in enumerate(x.shape) if i not in axes]
        return x.with_shape((*rest[:start], *common, *rest[start:]))

    @staticmethod
    def evaluate(x: Tensor, *indices: Tensor, axes: tuple[int, ...]) -> Tensor:
        where: list[Tensor | None] = [None] * x.dim()
        for axis, index in zip(axes, indices):
            where[axis] = index.to(torch.int64)
        return torch.ops.aten.index(x, where)


@define("index_put", Trait.PURE)
class IndexPut:
    """x with `values` written (or added) at x[..., i, j, ...], see `index`."""

    @staticmethod
    def infer(
        x: TensorType,
        values: TensorType,
        *indices: TensorType,
        axes: tuple[int, ...],
        accumulate: bool = False,
    ) -> TensorType:
        for index in indices:
            _check_index("index_put", index)
        if values.dtype != x.dtype:
            raise TypeInferenceError(f"accel.index_put: {values.dtype} into {x.dtype}")
        return x

    @staticmethod
    def evaluate(
        x: Tensor,
        values: Tensor,
        *indices: Tensor,
        axes: tuple[int, ...],
        accumulate: bool = False,
    ) -> Tensor:
        where: list[Tensor | None] = [None] * x.dim()
        for axis, index in zip(axes, indices):
            where[axis] = index.to(torch.int64)
        return torch.ops.aten.index_put(x, where, values, accumulate)


@define("scatter", Trait.PURE)
class Scatter:
    """torch.scatter: x with x[i][index[i][j]] = source[i][j] for axis 1.

    `reduce` is none, add, mul, amax, amin or mean (`include_self` as in torch.scatter_reduce).
    """

    @staticmethod
    def infer(
        x: TensorType,
        index: TensorType,
        source: TensorType,
        *,
        axis: int,
        reduce: str = "none",
        include_self: bool = True,
    ) -> TensorType:
        _check_index("scatter", index)
        normalize_axis(axis, max(x.rank, 1))
        if source.dtype != x.dtype:
            raise TypeInferenceError(f"accel.scatter: {source.dtype} into {x.dtype}")
        if reduce not in _SCATTER_REDUCE:
            raise TypeInferenceError(f"accel.scatter: reduce = '{reduce}'")
        return x

    @staticmethod
    def evaluate(
        x: Tensor,
        index: Tensor,
        source: Tensor,
        *,
        axis: int,
        reduce: str = "none",
        include_self: bool = True,
    ) -> Tensor:
        if reduce == "none":
            return torch.scatter(x, axis, index, source)
        if reduce == "add" and include_self:
            return torch.scatter_add(x, axis, index, source)
        kind = _SCATTER_REDUCE[reduce]
        return torch.scatter_reduce(x, axis, index, source, kind, include_self=include_self)


_SCATTER_REDUCE = {
    "none": "",
    "add": "sum",
    "mul": "prod",
    "amax": "amax",
    "amin": "amin",
    "mean": "mean",
}


@define("slice_update", Trait.PURE)
class SliceUpdate:
    """x with x[start : stop : step] along `axis` replaced by `source`, positions static."""

    @staticmethod
    def infer(
        x: TensorType, source: TensorType, *, axis: int, start: Dim, stop: Dim, step: int = 1
    ) -> TensorType:
        normalize_axis(axis, x.rank)
        if source.dtype != x.dtype or source.rank != x.rank:
            raise TypeInferenceError(f"accel.slice_update: {source} into {x}")
        return x

    evaluate = aten("slice_scatter", "x", "source", "axis", "start", "stop", "step")


@define("dynamic_slice", Trait.PURE)
class DynamicSlice:
    """`size` elements from run-time position `start` (0-d integer) along `axis`, as in XLA.

    The position is clamped so that the slice lies inside.
    """

    @staticmethod
    def infer(x: TensorType, start: TensorType, *, axis: int, size: Dim) -> TensorType:
        _check_index("dynamic_slice", start)
        axis = normalize_axis(axis, x.rank)
        if start.rank != 0:
            raise TypeInferenceError("accel.dynamic_slice: the position must be a 0-d tensor")
        return x.with_shape((*x.shape[:axis], size, *x.shape[axis + 1 :]))

    @staticmethod
    def evaluate(x: Tensor, start: Tensor, *, axis: int, size: int) -> Tensor:
        first = min(max(int(start), 0), x.shape[axis] - size)
        return x.narrow(axis, first, size)


@define("dynamic_update", Trait.PURE)
class DynamicUpdate:
    """x with `source` written at run-time position `start` (0-d integer) along `axis`.

    The write of a KV cache. Unlike XLA's, the position is not clamped: it must fit.
    """

    @staticmethod
    def infer(x: TensorType, source: TensorType, start: TensorType, *, axis: int) -> TensorType:
        _check_index("dynamic_update", start)
        normalize_axis(axis, x.rank)
        if source.dtype != x.dtype or source.rank != x.rank or start.rank != 0:
            raise TypeInferenceError(f"accel.dynamic_update: {source} into {x}")
        return x

    @staticmethod
    def evaluate(x: Tensor, source: Tensor, start: Tensor, *, axis: int) -> Tensor:
        result = x.clone()
        result.narrow(axis, int(start), source.shape[axis]).copy_(source)
        return result


@define("tri_mask", Trait.PURE)
class TriMask:
    """Boolean [rows, columns] mask, true where column - row <= diagonal (and > lower, if given).

    Lower-triangular (causal) masks and sliding windows, without reading memory.
    """

    @staticmethod
    def infer(
        *, rows: Dim, columns: Dim, diagonal: Dim = 0, lower: Dim | None = None
    ) -> TensorType:
        return TensorType((rows, columns), torch.bool)

    @staticmethod
    def evaluate(*, rows: int, columns: int, diagonal: int = 0, lower: int | None = None) -> Tensor:
        distance = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
        mask = distance <= diagonal
        return mask if lower is None else mask & (distance > lower)
