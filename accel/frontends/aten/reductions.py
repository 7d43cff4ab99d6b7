"""Reductions, scans and sorts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from accel.frontends.importer import Importer, lower
from accel.ir.module import Value
from accel.ir.types import Dim, is_float


def axes_of(x: Tensor, dim: Any) -> tuple[int, ...]:
    """Non-negative axes; all of them for None or an empty list."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return tuple(range(x.dim()))
    dims = dim if isinstance(dim, (list, tuple)) else [dim]
    return tuple(sorted(d % x.dim() for d in dims)) if x.dim() else ()


def axis_of(x: Tensor, dim: int) -> int:
    return dim % x.dim() if x.dim() else 0


def at_least_1d(c: Importer, x: Tensor) -> Value:
    value = c(x)
    return value if value.shape else c.b.reshape(value, shape=(1,))


def _reduce(c: Importer, name: str, value: Value, axes: tuple[int, ...], keepdim: bool) -> Value:
    result: Value = getattr(c.b, name)(value, axes=axes, keepdim=keepdim)
    return result


@lower("sum", "sum.dim_IntList")
def sum_(
    c: Importer, x: Tensor, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Value:
    value = c(x)
    if dtype is not None or is_float(c.out_dtype):
        value = c.b.cast_to(value, c.out_dtype)
    made = _reduce(c, "sum", value, axes_of(x, dim), keepdim)
    return c.b.cast_to(made, c.out_dtype)


@lower("mean", "mean.dim")
def mean(
    c: Importer, x: Tensor, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Value:
    return _reduce(c, "mean", c.b.cast_to(c(x), c.out_dtype), axes_of(x, dim), keepdim)


@lower("amax", "amin")
def extreme(c: Importer, x: Tensor, dim: Any = None, keepdim: bool = False) -> Value:
    name = c.call.target._schema.name.removeprefix("aten::")
    return _reduce(c, name, c(x), axes_of(x, dim), keepdim)


@lower("max", "min")
def extreme_of_all(c: Importer, x: Tensor) -> Value:
    name = "amax" if c.call.target._schema.name == "aten::max" else "amin"
    return _reduce(c, name, c(x), axes_of(x, None), False)


@lower("max.dim", "min.dim")
def extreme_and_index(
    c: Importer, x: Tensor, dim: int, keepdim: bool = False
) -> tuple[Value, Value]:
    largest = c.call.target._schema.name == "aten::max"
    axis = axis_of(x, dim)
    value = at_least_1d(c, x)
    keep = keepdim and x.dim() > 0
    values = _reduce(c, "amax" if largest else "amin", value, (axis,), keep)
    indices = (c.b.argmax if largest else c.b.argmin)(value, axis=axis, keepdim=keep)
    return values, indices


@lower("max.other", "min.other")
def larger(c: Importer, x: Tensor, y: Tensor) -> Value:
    name = "maximum" if c.call.target._schema.name == "aten::max" else "minimum"
    dtype = c.out_dtype
    result: Value = getattr(c.b, name)(c.b.cast_to(c(x), dtype), c.b.cast_to(c(y), dtype))
    return result


@lower("any", "any.dim", "any.dims", "all", "all.dim", "all.dims")
def any_or_all(c: Importer, x: Tensor, dim: Any = None, keepdim: bool = False) -> Value:
    name = c.call.target._schema.name.removeprefix("aten::")
    made = _reduce(c, name, c(x), axes_of(x, dim), keepdim)
    return c.b.cast_to(made, c.out_dtype)


@lower("prod", "prod.dim_int")
def prod(
    c: Importer, x: Tensor, dim: int | None = None, keepdim: bool = False, dtype: Any = None
) -> Value:
    value = at_least_1d(c, x)
    if dtype is not None:
        value = c.b.cast_to(value, c.out_dtype)
    if dim is None:
        value = c.b.reshape(value, shape=(c.dim(x.numel()),))
        keepdim = False
    made = c.b.prod(value, axis=0 if dim is None else axis_of(x, dim), keepdim=keepdim)
    return c.b.reshape_to(made, c.out_shape)


@lower("argmax", "argmin")
def arg_extreme(c: Importer, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Value:
    name = c.call.target._schema.name.removeprefix("aten::")
    value = at_least_1d(c, x)
    if dim is None:
        value = c.b.reshape(value, shape=(c.dim(x.numel()),))
    axis = 0 if dim is None else axis_of(x, dim)
    made = getattr(c.b, name)(value, axis=axis, keepdim=False)
    return c.b.reshape_to(made, c.out_shape)


def _variance(c: Importer, x: Tensor, dim: Any, correction: Any, keepdim: bool) -> Value:
    scale = 1.0 if correction is None else float(correction)
    result: Value = c.b.var(c(x), axes=axes_of(x, dim), correction=scale, keepdim=keepdim)
    return result


@lower("var.correction")
def var(
    c: Importer, x: Tensor, dim: Any = None, correction: Any = None, keepdim: bool = False
) -> Value:
    return _variance(c, x, dim, correction, keepdim)


@lower("std.correction")
def std(
    c: Importer, x: Tensor, dim: Any = None, correction: Any = None, keepdim: bool = False
) -> Value:
    result: Value = c.b.sqrt(_variance(c, x, dim, correction, keepdim))
    return result


@lower("var_mean.correction")
def var_mean(
    c: Importer, x: Tensor, dim: Any = None, correction: Any = None, keepdim: bool = False
) -> tuple[Value, Value]:
    average = _reduce(c, "mean", c(x), axes_of(x, dim), keepdim)
    return _variance(c, x, dim, correction, keepdim), average


@lower("logsumexp")
def logsumexp(c: Importer, x: Tensor, dim: Any, keepdim: bool = False) -> Value:
    return _reduce(c, "logsumexp", c.b.cast_to(c(x), c.out_dtype), axes_of(x, dim), keepdim)


@lower("linalg_vector_norm")
def vector_norm(
    c: Importer, x: Tensor, order: float = 2, dim: Any = None, keepdim: bool = False,
    dtype: Any = None,
) -> Value:  # fmt: skip
    """Orders 1, 2 and infinity; others by parts. 16-bit floats are summed in float32."""
    value = c.b.widen(c.b.cast_to(c(x), c.out_dtype))
    axes = axes_of(x, dim)
    if order == 2:
        made = c.b.sqrt(_reduce(c, "sum", c.b.mul(value, value), axes, keepdim))
    elif order == 1:
        made = _reduce(c, "sum", c.b.abs(value), axes, keepdim)
    elif math.isinf(order):
        name = "amax" if order > 0 else "amin"
        made = _reduce(c, name, c.b.abs(value), axes, keepdim)
    else:
        return NotImplemented
    return c.b.cast_to(made, c.out_dtype)


@lower("cumsum", "cumprod")
def running(c: Importer, x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Value:
    name = c.call.target._schema.name.removeprefix("aten::")
    value = c.b.cast_to(at_least_1d(c, x), c.out_dtype) if dtype is not None else at_least_1d(c, x)
    made = c.b.cast_to(getattr(c.b, name)(value, axis=axis_of(x, dim)), c.out_dtype)
    return c.b.reshape_to(made, c.out_shape)


@lower("cummax", "cummin")
def running_extreme(c: Importer, x: Tensor, dim: int) -> tuple[Value, Value]:
    name = c.call.target._schema.name.removeprefix("aten::")
    values, indices = getattr(c.b, name)(at_least_1d(c, x), axis=axis_of(x, dim))
    return c.b.reshape_to(values, c.out_shape), c.b.reshape_to(indices, c.out_shape)


@lower("logcumsumexp")
def logcumsumexp(c: Importer, x: Tensor, dim: int) -> Value:
    made = c.b.logcumsumexp(at_least_1d(c, x), axis=axis_of(x, dim))
    return c.b.reshape_to(made, c.out_shape)


def _sort(c: Importer, x: Tensor, dim: int, descending: bool) -> tuple[Value, Value]:
    values, indices = c.b.sort(at_least_1d(c, x), axis=axis_of(x, dim), descending=descending)
    return c.b.reshape_to(values, c.out_shape), c.b.reshape_to(indices, c.out_shape)


@lower("sort")
def sort(c: Importer, x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Value, Value]:
    return _sort(c, x, dim, descending)


@lower("sort.stable")
def sort_stable(
    c: Importer, x: Tensor, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Value, Value]:
    return _sort(c, x, dim, descending)


@lower("argsort", "argsort.stable")
def argsort(
    c: Importer, x: Tensor, dim: int = -1, descending: bool = False, stable: bool = False
) -> Value:
    return _sort(c, x, dim, descending)[1]


@lower("topk")
def topk(
    c: Importer, x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Value, Value]:
    count: Dim = c.dim(k)
    values, indices = c.b.topk(at_least_1d(c, x), k=count, axis=axis_of(x, dim), largest=largest)
    return c.b.reshape_to(values, c.out_shape), c.b.reshape_to(indices, c.out_shape)


@lower("searchsorted.Tensor")
def searchsorted(
    c: Importer, edges: Tensor, values: Tensor, out_int32: bool = False, right: bool = False,
    side: str | None = None, sorter: Tensor | None = None,
) -> Value:  # fmt: skip
    if sorter is not None or edges.dtype != values.dtype:
        return NotImplemented
    made = c.b.searchsorted(c(edges), c(values), right=right or side == "right")
    return c.b.cast_to(made, c.out_dtype)


@lower("bucketize.Tensor")
def bucketize(
    c: Importer, x: Tensor, edges: Tensor, out_int32: bool = False, right: bool = False
) -> Value:
    if edges.dtype != x.dtype:
        return NotImplemented
    return c.b.cast_to(c.b.searchsorted(c(edges), c(x), right=right), c.out_dtype)
