"""Scans, sorts and searches along one axis."""

from __future__ import annotations

import torch

from accel.errors import TypeInferenceError
from accel.ir.op import Lit, Trait, aten, define
from accel.ir.ops.elementwise import check_dtype
from accel.ir.ops.reduce import accumulated
from accel.ir.types import Dim, TensorType, normalize_axis, same_shape


@define("cumsum", Trait.PURE)
class CumSum:
    """Running sum along `axis`; integers and bool in int64."""

    @staticmethod
    def infer(x: TensorType, *, axis: int) -> TensorType:
        check_dtype("cumsum", "fibc", x)
        normalize_axis(axis, x.rank)
        return x.with_dtype(accumulated(x.dtype))

    evaluate = aten("cumsum", "x", "axis")


@define("cumprod", Trait.PURE)
class CumProd:
    """Running product along `axis`; integers and bool in int64."""

    @staticmethod
    def infer(x: TensorType, *, axis: int) -> TensorType:
        check_dtype("cumprod", "fibc", x)
        normalize_axis(axis, x.rank)
        return x.with_dtype(accumulated(x.dtype))

    evaluate = aten("cumprod", "x", "axis")


@define("logcumsumexp", Trait.PURE)
class LogCumSumExp:
    """log(cumsum(exp(x))) along `axis`, without overflow."""

    @staticmethod
    def infer(x: TensorType, *, axis: int) -> TensorType:
        check_dtype("logcumsumexp", "f", x)
        normalize_axis(axis, x.rank)
        return x

    evaluate = aten("logcumsumexp", "x", "axis")


@define("cummax", Trait.PURE)
class CumMax:
    """Running maximum along `axis` and its index (int64; the last, where several are)."""

    @staticmethod
    def infer(x: TensorType, *, axis: int) -> tuple[TensorType, TensorType]:
        check_dtype("cummax", "fib", x)
        normalize_axis(axis, x.rank)
        return x, x.with_dtype(torch.int64)

    evaluate = aten("cummax", "x", "axis")


@define("cummin", Trait.PURE)
class CumMin:
    """Running minimum along `axis` and its index (int64; the last, where several are)."""

    @staticmethod
    def infer(x: TensorType, *, axis: int) -> tuple[TensorType, TensorType]:
        check_dtype("cummin", "fib", x)
        normalize_axis(axis, x.rank)
        return x, x.with_dtype(torch.int64)

    evaluate = aten("cummin", "x", "axis")


@define("sort", Trait.PURE)
class Sort:
    """Sorted values and their indices (int64) along `axis`; stable."""

    @staticmethod
    def infer(
        x: TensorType, *, axis: int, descending: bool = False
    ) -> tuple[TensorType, TensorType]:
        check_dtype("sort", "fib", x)
        normalize_axis(axis, x.rank)
        return x, x.with_dtype(torch.int64)

    evaluate = aten("sort.stable", "x", stable=Lit(True), dim="axis", descending="descending")


@define("topk", Trait.PURE)
class TopK:
    """The k largest (or smallest) elements along `axis`, in order, and their indices (int64)."""

    @staticmethod
    def infer(
        x: TensorType, *, k: Dim, axis: int, largest: bool = True
    ) -> tuple[TensorType, TensorType]:
        check_dtype("topk", "fi", x)
        axis = normalize_axis(axis, x.rank)
        size = x.shape[axis]
        if isinstance(k, int) and (k < 0 or (isinstance(size, int) and k > size)):
            raise TypeInferenceError(f"accel.topk: {k} of {size} elements")
        values = x.with_shape((*x.shape[:axis], k, *x.shape[axis + 1 :]))
        return values, values.with_dtype(torch.int64)

    evaluate = aten("topk", "x", "k", "axis", "largest")


@define("searchsorted", Trait.PURE)
class SearchSorted:
    """Where each of `values` belongs in ascending `edges` (int64), as torch.searchsorted.

    `edges` is one-dimensional, or has the leading axes of `values`. With `right` the place is after
    equal elements, else before.
    """

    @staticmethod
    def infer(edges: TensorType, values: TensorType, *, right: bool = False) -> TensorType:
        check_dtype("searchsorted", "fi", edges, values)
        if edges.rank == 0 or (
            edges.rank > 1 and not same_shape(edges.shape[:-1], values.shape[:-1])
        ):
            raise TypeInferenceError(f"accel.searchsorted: {values} in {edges}")
        return values.with_dtype(torch.int64)

    evaluate = aten("searchsorted.Tensor", "edges", "values", right="right")
