"""Reductions, scans and sorts.

`axes` are non-negative and sorted or not; with `keepdim` a reduced axis stays with size 1. Sums of
16-bit floats accumulate in float32, of float32 in float32 or better, as torch does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Trait, aten, define
from accel.ir.types import Dim, TensorType, is_float, normalize_axis

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value

REDUCTION = Trait.PURE | Trait.REDUCTION


def _reduced(x: TensorType, axes: tuple[int, ...], keepdim: bool) -> TensorType:
    gone = {normalize_axis(a, x.rank) for a in axes}
    if len(gone) != len(axes):
        raise TypeInferenceError(f"axes {axes} repeat an axis")
    if keepdim:
        return x.with_shape(1 if i in gone else d for i, d in enumerate(x.shape))
    return x.with_shape(d for i, d in enumerate(x.shape) if i not in gone)


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point or dtype.is_complex else torch.int64


@define("sum", REDUCTION)
class Sum:
    """Sum over `axes`. Integers and bool add up in int64."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        return _reduced(x, axes, keepdim).with_dtype(_accumulated(x.dtype))

    @staticmethod
    def evaluate(x: Tensor, *, axes: tuple[int, ...], keepdim: bool = False) -> Tensor:
        return x.sum(axes, keepdim) if axes else x.to(_accumulated(x.dtype))


@define("mean", REDUCTION)
class Mean:
    """Arithmetic mean over `axes`."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        return _reduced(x, axes, keepdim)

    @staticmethod
    def evaluate(x: Tensor, *, axes: tuple[int, ...], keepdim: bool = False) -> Tensor:
        return x.mean(axes, keepdim) if axes else x

    @staticmethod
    def decompose(b: Builder, x: Value, *, axes: tuple[int, ...], keepdim: bool = False) -> Value:
        wide = b.widen(x)
        total = b.sum(wide, axes=axes, keepdim=keepdim)
        count: Dim = 1
        for a in axes:
            count = count * x.shape[a]
        return b.cast_to(b.div(total, b.size_like(count, wide.dtype)), x.dtype)


@define("prod", REDUCTION)
class Prod:
    """Product over one axis. Integers and bool multiply in int64."""

    @staticmethod
    def infer(x: TensorType, *, axis: int, keepdim: bool = False) -> TensorType:
        return _reduced(x, (axis,), keepdim).with_dtype(_accumulated(x.dtype))

    evaluate = aten("prod.dim_int", "x", "axis", "keepdim")


@define("amax", REDUCTION)
class Amax:
    """Largest element over `axes`; NaN if any is."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        return _reduced(x, axes, keepdim)

    @staticmethod
    def evaluate(x: Tensor, *, axes: tuple[int, ...], keepdim: bool = False) -> Tensor:
        return torch.amax(x, axes, keepdim) if axes else x


@define("amin", REDUCTION)
class Amin:
    """Smallest element over `axes`; NaN if any is."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        return _reduced(x, axes, keepdim)

    @staticmethod
    def evaluate(x: Tensor, *, axes: tuple[int, ...], keepdim: bool = False) -> Tensor:
        return torch.amin(x, axes, keepdim) if axes else x


@define("any", REDUCTION)
class Any:
    """Whether any element over `axes` is nonzero."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        return _reduced(x, axes, keepdim).with_dtype(torch.bool)

    @staticmethod
    def evaluate(x: Tensor, *, axes: tuple[int, ...], keepdim: bool = False) -> Tensor:
        return torch.any(x, axes, keepdim) if axes else x.to(torch.bool)


@define("all", REDUCTION)
class All:
    """Whether all elements over `axes` are nonzero."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        return _reduced(x, axes, keepdim).with_dtype(torch.bool)

    @staticmethod
    def evaluate(x: Tensor, *, axes: tuple[int, ...], keepdim: bool = False) -> Tensor:
        return torch.all(x, axes, keepdim) if axes else x.to(torch.bool)


@define("argmax", REDUCTION)
class ArgMax:
    """Index (int64) of the largest element along `axis`; the first, where several are."""

    @staticmethod
    def infer(x: TensorType, *, axis: int, keepdim: bool = False) -> TensorType:
        return _reduced(x, (axis,), keepdim).with_dtype(torch.int64)

    evaluate = aten("argmax", "x", "axis", "keepdim")


@define("argmin", REDUCTION)
class ArgMin:
    """Index (int64) of the smallest element along `axis`; the first, where several are."""

    @staticmethod
    def infer(x: TensorType, *, axis: int, keepdim: bool = False) -> TensorType:
        return _reduced(x, (axis,), keepdim).with_dtype(torch.int64)

    evaluate = aten("argmin", "x", "axis", "keepdim")


@define("var", REDUCTION)
class Var:
    """Variance over `axes`, divided by (count - correction)."""

    @staticmethod
    def infer(
        x: TensorType, *, axes: tuple[int, ...], correction: float = 1, keepdim: bool = False
    ) -> TensorType:
        if not is_float(x.dtype):
            raise TypeInferenceError(f"accel.var: {x.dtype} is not floating")
        return _reduced(x, axes, keepdim)

    @staticmethod
    def evaluate(
        x: Tensor, *, axes: tuple[int, ...], correction: float = 1, keepdim: bool = False
    ) -> Tensor:
        return torch.var(x, axes, correction=correction, keepdim=keepdim)

    @staticmethod
    def decompose(
        b: Builder, x: Value, *, axes: tuple[int, ...], correction: float = 1, keepdim: bool = False
    ) -> Value:
        wide = b.widen(x)
        centered = b.sub(wide, b.mean(wide, axes=axes, keepdim=True))
        total = b.sum(b.mul(centered, centered), axes=axes, keepdim=keepdim)
        count: Dim = 1
        for a in axes:
            count = count * x.shape[a]
        divisor = b.sub(b.size_like(count, wide.dtype), b.scalar(float(correction), wide.dtype))
        divisor = b.maximum(divisor, b.scalar(0.0, wide.dtype))
        return b.cast_to(b.div(total, divisor), x.dtype)


@define("logsumexp", REDUCTION)
class LogSumExp:
    """log(sum(exp(x))) over `axes`, without overflow."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        return _reduced(x, axes, keepdim)

    evaluate = aten("logsumexp", "x", "axes", "keepdim")


@define("cumsum", Trait.PURE)
class CumSum:
    """Running sum along `axis`; integers and bool in int64."""

    @staticmethod
    def infer(x: TensorType, *, axis: int) -> TensorType:
        normalize_axis(axis, x.rank)
        return x.with_dtype(_accumulated(x.dtype))

    evaluate = aten("cumsum", "x", "axis")


@define("cumprod", Trait.PURE)
class CumProd:
    """Running product along `axis`; integers and bool in int64."""

    @staticmethod
    def infer(x: TensorType, *, axis: int) -> TensorType:
        normalize_axis(axis, x.rank)
        return x.with_dtype(_accumulated(x.dtype))

    evaluate = aten("cumprod", "x", "axis")


@define("sort", Trait.PURE)
class Sort:
    """Sorted values and their indices (int64) along `axis`; stable."""

    @staticmethod
    def infer(
        x: TensorType, *, axis: int, descending: bool = False
    ) -> tuple[TensorType, TensorType]:
        normalize_axis(axis, x.rank)
        return x, x.with_dtype(torch.int64)

    @staticmethod
    def evaluate(x: Tensor, *, axis: int, descending: bool = False) -> tuple[Tensor, Tensor]:
        values, indices = torch.sort(x, dim=axis, descending=descending, stable=True)
        return values, indices


@define("topk", Trait.PURE)
class TopK:
    """The k largest (or smallest) elements along `axis`, in order, and their indices (int64)."""

    @staticmethod
    def infer(
        x: TensorType, *, k: Dim, axis: int, largest: bool = True
    ) -> tuple[TensorType, TensorType]:
        axis = normalize_axis(axis, x.rank)
        values = x.with_shape((*x.shape[:axis], k, *x.shape[axis + 1 :]))
        return values, values.with_dtype(torch.int64)

    evaluate = aten("topk", "x", "k", "axis", "largest")
