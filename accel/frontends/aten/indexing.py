"""Reading and writing at positions: embedding, index, gather, scatter and their relatives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from accel.frontends.aten.elementwise import as_dtype
from accel.frontends.aten.reductions import at_least_1d, axis_of
from accel.frontends.aten.views import broadcast, first_of_slice, permute_to, position_of
from accel.frontends.importer import Importer, lower
from accel.ir.module import Value
from accel.ir.types import simplify_dim


def index_value(c: Importer, index: Tensor) -> Value:
    """An index tensor in a dtype that the IR indexes with."""
    value = c(index)
    return value if value.dtype == torch.int32 else c.b.cast_to(value, torch.int64)


@lower("embedding")
def embedding(c: Importer, table: Tensor, indices: Tensor, *ignored: Any, **also: Any) -> Value:
    result: Value = c.b.embedding(c(table), index_value(c, indices))
    return result


@lower("_embedding_bag_forward_only", "_embedding_bag")
def embedding_bag(
    c: Importer, table: Tensor, indices: Tensor, offsets: Tensor, by_frequency: bool = False,
    mode: int = 0, sparse: bool = False, weights: Tensor | None = None, last: bool = False,
    padding: int = -1,
) -> Any:  # fmt: skip
    """Sums (mode 0) or means (1) of bags of rows, where only those are used: no backward."""
    if mode > 1 or any(c.is_used(t) for t in c.call.result[1:]) or indices.dim() != 1:
        return NotImplemented
    count, bags = c.dim(indices.shape[0]), c.out_shape[0]
    where = index_value(c, indices)
    place = c.b.iota(shape=(count,), axis=0, dtype=torch.int64)
    starts = c.b.cast_to(c(offsets), torch.int64)
    bag = c.b.sub(c.b.searchsorted(starts, place, right=True), c.scalar(1, torch.int64))
    rows = c.b.widen(c.b.embedding(c(table), where))
    dtype = rows.dtype
    share = c.b.full_of((count,), 1.0, dtype)
    if 0 <= padding < table.shape[0]:
        kept = c.b.ne(where, c.scalar(padding, where.dtype))
        share = c.b.where(kept, share, c.scalar(0.0, dtype))
    scale = share if weights is None else c.b.mul(share, c.b.cast_to(c(weights), dtype))
    rows = c.b.mul(rows, c.b.reshape(scale, shape=(count, 1)))
    zeros = c.b.full_of(c.out_shape, 0.0, dtype)
    total = c.b.index_put(zeros, rows, bag, axes=(0,), accumulate=True)
    if mode == 1:
        none = c.b.full_of((bags,), 0.0, dtype)
        sizes = c.b.index_put(none, share, bag, axes=(0,), accumulate=True)
        sizes = c.b.maximum(sizes, c.scalar(1.0, dtype))
        total = c.b.div(total, c.b.reshape(sizes, shape=(bags, 1)))
    total = c.b.cast_to(total, c.out_dtype)
    return [total, *(None for _ in c.call.result[1:])]


@lower("index_select")
def index_select(c: Importer, x: Tensor, dim: int, index: Tensor) -> Value:
    picked = c.b.gather(at_least_1d(c, x), index_value(c, index), axis=axis_of(x, dim))
    return c.b.reshape_to(picked, c.out_shape)


@lower("gather")
def gather(c: Importer, x: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Value:
    where = c.b.cast_to(at_least_1d(c, index), torch.int64)
    made = c.b.take_along(at_least_1d(c, x), where, axis=axis_of(x, dim))
    return c.b.reshape_to(made, c.out_shape)


@lower("index.Tensor", "_unsafe_index.Tensor")
def index(c: Importer, x: Tensor, indices: Sequence[Tensor | None]) -> Value:
    """Integer indices; with boolean ones the result's size would depend on data."""
    axes = tuple(i for i, t in enumerate(indices) if t is not None)
    given = [t for t in indices if t is not None]
    if any(t.dtype in (torch.bool, torch.uint8) for t in given):
        return NotImplemented
    values = [index_value(c, t) for t in given]
    if len(axes) == 1:
        made: Value = c.b.gather(c(x), values[0], axis=axes[0])
        return made
    result: Value = c.b.index(c(x), *values, axes=axes)
    return result


@lower("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(
    c: Importer, x: Tensor, indices: Sequence[Tensor | None], values: Tensor,
    accumulate: bool = False, unsafe: bool = False,
) -> Value:  # fmt: skip
    axes = tuple(i for i, t in enumerate(indices) if t is not None)
    given = [t for t in indices if t is not None]
    source = c.b.cast_to(c(values), c.out_dtype)
    if any(t.dtype in (torch.bool, torch.uint8) for t in given):
        # x[mask] = one value: the mask chooses element by element.
        if len(given) != 1 or values.numel() != 1 or axes != (0,) or accumulate:
            return NotImplemented
        mask, rank = c.b.cast_to(c(given[0]), torch.bool), given[0].dim()
        mask = c.b.reshape_to(mask, (*mask.shape, *(1 for _ in range(x.dim() - rank))))
        made: Value = c.b.where(mask, c.b.reshape_to(source, ()), c(x))
        return made
    positions = [index_value(c, t) for t in given]
    adjacent = all(b - a == 1 for a, b in pairwise(axes))
    result: Value = c.b.index_put(c(x), source, *positions, axes=axes, accumulate=accumulate)
    return result if adjacent or axes else NotImplemented


@lower("scatter.src", "scatter.value", "scatter_add")
def scatter(c: Importer, x: Tensor, dim: int, index: Tensor, source: Any) -> Value:
    reduce = "add" if c.call.target._schema.name == "aten::scatter_add" else "none"
    return _scatter(c, x, dim, index, source, reduce, True)


@lower("scatter.reduce", "scatter.value_reduce")
def scatter_with(
    c: Importer, x: Tensor, dim: int, index: Tensor, source: Any, *, reduce: str
) -> Value:
    return _scatter(c, x, dim, index, source, {"multiply": "mul"}.get(reduce, reduce), True)


@lower("scatter_reduce.two")
def scatter_reduce(
    c: Importer, x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *,
    include_self: bool = True,
) -> Value:  # fmt: skip
    name = {"sum": "add", "prod": "mul"}.get(reduce, reduce)
    return _scatter(c, x, dim, index, source, name, include_self)


def _scatter(
    c: Importer, x: Tensor, dim: int, index: Tensor, source: Any, reduce: str, include_self: bool
) -> Value:
    where = c.b.cast_to(at_least_1d(c, index), torch.int64)
    if isinstance(source, Tensor):
        values = c.b.cast_to(at_least_1d(c, source), c.out_dtype)
        for axis, size in enumerate(where.shape):  # ATen reads only the part that index covers
            if values.shape[axis] != size:
                values = c.b.slice(values, axis=axis, start=0, stop=size)
    else:
        values = broadcast(c, c.scalar(source, c.out_dtype), where.shape)
    made = c.b.scatter(
        at_least_1d(c, x), where, values, axis=axis_of(x, dim), reduce=reduce,
        include_self=include_self,
    )  # fmt: skip
    return c.b.reshape_to(made, c.out_shape)


@lower("index_add")
def index_add(
    c: Importer, x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1
) -> Value:
    values = c.b.cast_to(at_least_1d(c, source), c.out_dtype)
    if alpha != 1:
        values = c.b.mul(values, c.scalar(alpha, c.out_dtype))
    return _put_along(c, x, dim, index, values, True)


@lower("index_copy")
def index_copy(c: Importer, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Value:
    return _put_along(c, x, dim, index, c.b.cast_to(at_least_1d(c, source), c.out_dtype), False)


@lower("index_fill.int_Scalar", "index_fill.int_Tensor")
def index_fill(c: Importer, x: Tensor, dim: int, index: Tensor, value: Any) -> Value:
    axis = axis_of(x, dim)
    base = at_least_1d(c, x)
    count = c.dim(index.numel())
    shape = (*base.shape[:axis], count, *base.shape[axis + 1 :])
    values = broadcast(c, as_dtype(c, value, c.out_dtype), shape)
    return _put_along(c, x, dim, index, values, False)


def _put_along(
    c: Importer, x: Tensor, dim: int, index: Tensor, values: Value, accumulate: bool
) -> Value:
    axis = axis_of(x, dim)
    where = c.b.reshape_to(index_value(c, index), (c.dim(index.numel()),))
    made = c.b.index_put(at_least_1d(c, x), values, where, axes=(axis,), accumulate=accumulate)
    return c.b.reshape_to(made, c.out_shape)


@lower("slice_scatter")
def slice_scatter(
    c: Importer, x: Tensor, source: Tensor, dim: int = 0, start: Any = None, end: Any = None,
    step: int = 1,
) -> Value:  # fmt: skip
    axis = axis_of(x, dim)
    values = c.b.cast_to(c(source), c.out_dtype)
    length = c.dim(source.shape[axis])
    first = first_of_slice(c, x.shape[axis], start, length)
    if length == 0:
        return c(x)
    stop = simplify_dim(first + (length - 1) * step + 1)
    shape = (*c.out_shape[:axis], length, *c.out_shape[axis + 1 :])
    values = broadcast(c, values, shape)
    result: Value = c.b.slice_update(c(x), values, axis=axis, start=first, stop=stop, step=step)
    return result


@lower("select_scatter")
def select_scatter(c: Importer, x: Tensor, source: Tensor, dim: int, index: Any) -> Value:
    axis = axis_of(x, dim)
    first = position_of(c, x.shape[axis], index)
    shape = (*c.out_shape[:axis], 1, *c.out_shape[axis + 1 :])
    values = c.b.reshape_to(c.b.cast_to(c(source), c.out_dtype), shape)
    stop = simplify_dim(first + 1)
    result: Value = c.b.slice_update(c(x), values, axis=axis, start=first, stop=stop)
    return result


@lower("masked_scatter")
def masked_scatter(c: Importer, x: Tensor, mask: Tensor, source: Tensor) -> Value:
    values = c.b.cast_to(c(source), c.out_dtype)
    full = broadcast(c, c(mask), c.out_shape)
    result: Value = c.b.masked_scatter(broadcast(c, c(x), c.out_shape), full, values)
    return result


@lower("take")
def take(c: Importer, x: Tensor, index: Tensor) -> Value:
    flat = c.b.reshape_to(c(x), (c.dim(x.numel()),))
    result: Value = c.b.gather(flat, index_value(c, index), axis=0)
    return result


@lower("im2col")
def im2col(
    c: Importer, x: Tensor, kernel: Sequence[int], dilation: Sequence[int],
    padding: Sequence[int], stride: Sequence[int],
) -> Value:  # fmt: skip
    """Sliding windows [B, C * kh * kw, L] of [B, C, H, W]."""
    if x.dim() != 4 or tuple(dilation) != (1, 1):
        return NotImplemented
    value = c(x)
    if any(padding):
        low = (0, 0, padding[0], padding[1])
        value = c.b.pad(value, low=low, high=low)
    for axis in (2, 3):
        value = c.b.unfold(value, axis=axis, size=kernel[axis - 2], step=stride[axis - 2])
    # [B, C, rows, columns, kh, kw]
    return c.b.reshape_to(permute_to(c, value, (0, 1, 4, 5, 2, 3)), c.out_shape)
