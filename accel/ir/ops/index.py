"""Reading and writing at positions that are known only at run time.

Indices are int64 or int32 tensors and lie in [-size, size) unless an op says otherwise; `gather`
takes any integers, codebook indices of four bits among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Arg, Trait, aten, define
from accel.ir.ops.elementwise import MOVABLE, check_dtype
from accel.ir.ops.shape import slice_length
from accel.ir.types import (
    Dim,
    Shape,
    TensorType,
    at_least,
    broadcast_shapes,
    format_shape,
    is_integer,
    normalize_axis,
    same_dim,
    same_shape,
    simplify_dim,
)

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value


def _check_index(name: str, *indices: TensorType) -> None:
    for index in indices:
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeInferenceError(
                f"accel.{name}: indices have dtype {index.dtype}, not int64 or int32",
                advice="insert accel.cast",
            )


def _check_update(name: str, x: TensorType, source: TensorType, axis: int) -> None:
    """`source` replaces part of x along one axis: same dtype, same other axes."""
    axis = normalize_axis(axis, x.rank)
    rest = x.shape[:axis] + x.shape[axis + 1 :]
    if (
        source.dtype != x.dtype
        or source.rank != x.rank
        or not same_shape(source.shape[:axis] + source.shape[axis + 1 :], rest)
    ):
        raise TypeInferenceError(f"accel.{name}: {source} into {x} along axis {axis}")


def _positions(values: Mapping[str, Any]) -> list[Any]:
    """ATen's list of indices: None for the axes that are not indexed."""
    where: list[Any] = [None] * len(values["x"].shape)
    for axis, index in zip(values["axes"], values["indices"]):
        where[axis] = index
    return where


def _indexed_shape(
    name: str, x: TensorType, indices: tuple[TensorType, ...], axes: tuple[int, ...]
) -> Shape:
    _check_index(name, *indices)
    ascending = list(axes) == sorted({normalize_axis(a, x.rank) for a in axes})
    if not axes or len(indices) != len(axes) or not ascending:
        raise TypeInferenceError(f"accel.{name}: {len(indices)} indices for axes {axes}")
    common = broadcast_shapes(*(i.shape for i in indices))
    adjacent = all(b - a == 1 for a, b in pairwise(axes))
    start = axes[0] if adjacent else 0
    rest = [d for i, d in enumerate(x.shape) if i not in axes]
    return (*rest[:start], *common, *rest[start:])


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
        if not is_integer(indices.dtype):
            raise TypeInferenceError(f"accel.gather: indices have dtype {indices.dtype}")
        axis = normalize_axis(axis, x.rank)
        return x.with_shape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))

    @staticmethod
    def evaluate(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
        axis %= x.dim()
        return torch.ops.aten.index(x, [*[None] * axis, indices.to(torch.int64)])

    @staticmethod
    def decompose(b: Builder, x: Value, indices: Value, *, axis: int = 0) -> Value:
        axis = normalize_axis(axis, len(x.shape))
        if indices.dtype != torch.int32:
            indices = b.cast_to(indices, torch.int64)
        return b.index(x, indices, axes=(axis,))


@define("take_along", Trait.PURE)
class TakeAlong:
    """torch.gather: result[i][j][k] = x[i][index[i][j][k]][k] for axis 1. No negative indices."""

    @staticmethod
    def infer(x: TensorType, index: TensorType, *, axis: int) -> TensorType:
        check_dtype("take_along", MOVABLE, x)
        if index.dtype != torch.int64:
            raise TypeInferenceError(f"accel.take_along: indices have dtype {index.dtype}")
        normalize_axis(axis, max(x.rank, 1))
        if index.rank != x.rank:
            raise TypeInferenceError(f"accel.take_along: {index} for {x}")
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
        return x.with_shape(_indexed_shape("index", x, indices, axes))

    evaluate = aten("index.Tensor", "x", Arg(_positions))


@define("index_put", Trait.PURE)
class IndexPut:
    """x with `values` written (or added) at x[..., i, j, ...], see `index`.

    `values` broadcasts to the indexed shape. Where positions repeat, one of the values stays.
    """

    @staticmethod
    def infer(
        x: TensorType,
        values: TensorType,
        *indices: TensorType,
        axes: tuple[int, ...],
        accumulate: bool = False,
    ) -> TensorType:
        check_dtype("index_put", MOVABLE, x)
        shape = _indexed_shape("index_put", x, indices, axes)
        if values.dtype != x.dtype:
            raise TypeInferenceError(f"accel.index_put: {values.dtype} into {x.dtype}")
        if not same_shape(broadcast_shapes(values.shape, shape), shape):
            raise TypeInferenceError(f"accel.index_put: {values} into {format_shape(shape)}")
        return x

    evaluate = aten("index_put", "x", Arg(_positions), "values", "accumulate")


_SCATTER_REDUCE: dict[str, str] = {
    "none": "",
    "add": "sum",
    "mul": "prod",
    "amax": "amax",
    "amin": "amin",
    "mean": "mean",
}


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
        check_dtype("scatter", MOVABLE if reduce == "none" else "fi", x)
        if index.dtype != torch.int64:
            raise TypeInferenceError(f"accel.scatter: indices have dtype {index.dtype}")
        normalize_axis(axis, max(x.rank, 1))
        if source.dtype != x.dtype or not x.rank == index.rank == source.rank:
            raise TypeInferenceError(f"accel.scatter: {source} into {x} at {index}")
        if reduce not in _SCATTER_REDUCE:
            raise TypeInferenceError(f"accel.scatter: reduce = '{reduce}'")
        return x

    evaluate = (
        aten("scatter.src", "x", "axis", "index", "source", when=lambda v: v["reduce"] == "none"),
        aten(
            "scatter_add",
            "x",
            "axis",
            "index",
            "source",
            when=lambda v: v["reduce"] == "add" and v["include_self"],
        ),
        aten(
            "scatter_reduce.two",
            "x",
            "axis",
            "index",
            "source",
            Arg(lambda v: _SCATTER_REDUCE[v["reduce"]]),
            include_self="include_self",
        ),
    )


@define("slice_update", Trait.PURE)
class SliceUpdate:
    """x with x[start : stop : step] along `axis` replaced by `source`, positions static."""

    @staticmethod
    def infer(
        x: TensorType, source: TensorType, *, axis: int, start: Dim, stop: Dim, step: int = 1
    ) -> TensorType:
        axis = normalize_axis(axis, x.rank)
        _check_update("slice_update", x, source, axis)
        length = slice_length("slice_update", x, axis, start, stop, step)
        if not same_dim(length, source.shape[axis]):
            raise TypeInferenceError(f"accel.slice_update: {source} is not {length} long")
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
        if at_least(size, x.shape[axis], more=True) or (isinstance(size, int) and size < 0):
            raise TypeInferenceError(f"accel.dynamic_slice: {size} elements of {x}, axis {axis}")
        return x.with_shape((*x.shape[:axis], size, *x.shape[axis + 1 :]))

    @staticmethod
    def evaluate(x: Tensor, start: Tensor, *, axis: int, size: int) -> Tensor:
        first = min(max(int(start), 0), x.shape[axis] - size)
        return x.narrow(axis, first, size)

    @staticmethod
    def decompose(b: Builder, x: Value, start: Value, *, axis: int, size: Dim) -> Value:
        axis = normalize_axis(axis, len(x.shape))
        last = b.size_like(simplify_dim(x.shape[axis] - size), start.dtype)
        first = b.minimum(b.maximum(start, b.scalar(0, start.dtype)), last)
        line = b.iota(shape=(size,), axis=0, dtype=start.dtype)
        return b.index(x, b.add(line, first), axes=(axis,))


@define("dynamic_update", Trait.PURE | Trait.UPDATE)
class DynamicUpdate:
    """x with `source` written at run-time position `start` (0-d integer) along `axis`.

    With `start` [B], x [B, ...] and an axis after the first, every row has a position of its own.
    The write of a KV cache. Unlike XLA's, the position is not clamped: it must fit. In a `ring`
    positions are taken modulo the size of the axis; `source` may be longer than x, and its last
    elements win.
    """

    @staticmethod
    def infer(
        x: TensorType, source: TensorType, start: TensorType, *, axis: int, ring: bool = False
    ) -> TensorType:
        _check_index("dynamic_update", start)
        _check_update("dynamic_update", x, source, axis)
        each = start.rank == 1 and x.rank > 1 and same_dim(start.shape[0], x.shape[0])
        if start.rank != 0 and not (each and normalize_axis(axis, x.rank) > 0):
            raise TypeInferenceError(
                f"accel.dynamic_update: the position is 0-d, or one for each row, not {start}"
            )
        return x

    @staticmethod
    def evaluate(
        x: Tensor, source: Tensor, start: Tensor, *, axis: int, ring: bool = False
    ) -> Tensor:
        if start.dim():
            axis = axis % x.dim() - 1
            result = x.clone()
            for row, given in enumerate(zip(x, source, start)):
                result[row] = DynamicUpdate.evaluate(*given, axis=axis, ring=ring)
            return result
        result = x.clone()
        first, count = int(start), source.shape[axis]
        if not ring:
            result.narrow(axis, first, count).copy_(source)
            return result
        size = x.shape[axis]
        for i in range(max(count - size, 0), count):
            place = (first + i) % size
            result.narrow(axis, place, 1).copy_(source.narrow(axis, i, 1))
        return result

    @staticmethod
    def decompose(
        b: Builder, x: Value, source: Value, start: Value, *, axis: int, ring: bool = False
    ) -> Value:
        axis = normalize_axis(axis, len(x.shape))
        count, size = source.shape[axis], x.shape[axis]
        if ring and not at_least(size, count):
            kept = simplify_dim(sympy.Min(count, size))
            first = simplify_dim(count - kept)
            source = b.slice(source, axis=axis, start=first, stop=count)
            start = b.add(start, b.size_like(first, start.dtype))
            count = kept
        each = bool(start.shape)
        if each:
            start = b.reshape(start, shape=(x.shape[0], 1))
        line = b.add(b.iota(shape=(count,), axis=0, dtype=start.dtype), start)
        if ring:
            line = b.remainder(line, b.size_like(size, start.dtype))
        if not each:
            return b.index_put(x, source, line, axes=(axis,))
        order = (0, axis, *(a for a in range(1, len(x.shape)) if a != axis))
        row = b.iota(shape=(x.shape[0], 1), axis=0, dtype=start.dtype)
        return b.index_put(x, b.permute(source, axes=order), row, line, axes=(0, axis))


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

    @staticmethod
    def decompose(
        b: Builder, *, rows: Dim, columns: Dim, diagonal: Dim = 0, lower: Dim | None = None
    ) -> Value:
        line = b.iota(shape=(1, columns), axis=1, dtype=torch.int64)
        distance = b.sub(line, b.iota(shape=(rows, 1), axis=0, dtype=torch.int64))
        mask: Value = b.le(distance, b.size_like(diagonal, torch.int64))
        if lower is not None:
            mask = b.logical_and(mask, b.gt(distance, b.size_like(lower, torch.int64)))
        return mask


@define("masked_scatter", Trait.PURE)
class MaskedScatter:
    """x with its masked elements replaced by those of `source`, in C order.

    `mask` (bool) broadcasts to x; `source` has at least as many elements as the mask selects.
    """

    @staticmethod
    def infer(x: TensorType, mask: TensorType, source: TensorType) -> TensorType:
        check_dtype("masked_scatter", MOVABLE, x)
        if mask.dtype != torch.bool or source.dtype != x.dtype:
            raise TypeInferenceError(f"accel.masked_scatter: {source} into {x} by {mask}")
        if not same_shape(broadcast_shapes(x.shape, mask.shape), x.shape):
            raise TypeInferenceError(f"accel.masked_scatter: {mask} for {x}")
        return x

    evaluate = aten("masked_scatter", "x", "mask", "source")

    @staticmethod
    def decompose(b: Builder, x: Value, mask: Value, source: Value) -> Value:
        if source.type.numel() == 0:
            return x
        full = b.broadcast_to(mask, shape=x.shape)
        flat = b.reshape(full, shape=(x.type.numel(),))
        # Element i of the flat x takes source[number of masked elements before it].
        rank = b.sub(b.cumsum(flat, axis=0), b.scalar(1, torch.int64))
        last = b.size_like(simplify_dim(source.type.numel() - 1), torch.int64)
        rank = b.minimum(b.maximum(rank, b.scalar(0, torch.int64)), last)
        line = b.reshape(source, shape=(source.type.numel(),))
        picked = b.reshape(b.index(line, rank, axes=(0,)), shape=x.shape)
        return b.where(full, picked, x)
