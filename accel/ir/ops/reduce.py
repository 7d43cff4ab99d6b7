"""Reductions: combine the elements along axes.

`axes` are sorted or not; with `keepdim` a reduced axis stays with size 1. Empty `axes` reduce
nothing. Sums of 16-bit floats accumulate in float32, of float32 in float32 or better, as torch
does. Largest and smallest element of an axis of size 0 do not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any as AnyType

import torch

from accel.errors import TypeInferenceError
from accel.ir.op import Arg, Lit, Trait, aten, define
from accel.ir.ops.elementwise import check_dtype
from accel.ir.types import Dim, TensorType, normalize_axis, product

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value

REDUCTION = Trait.PURE | Trait.REDUCTION


def reduced(x: TensorType, axes: tuple[int, ...], keepdim: bool) -> TensorType:
    """The type of x with `axes` gone, or 1."""
    gone = {normalize_axis(a, x.rank) for a in axes}
    if len(gone) != len(axes):
        raise TypeInferenceError(f"axes {axes} repeat an axis")
    if keepdim:
        return x.with_shape(1 if i in gone else d for i, d in enumerate(x.shape))
    return x.with_shape(d for i, d in enumerate(x.shape) if i not in gone)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and products: int64 for integers and bool."""
    return dtype if dtype.is_floating_point or dtype.is_complex else torch.int64


def _not_empty(name: str, x: TensorType, axes: tuple[int, ...]) -> None:
    for axis in axes:
        if x.shape[axis] == 0:
            raise TypeInferenceError(f"accel.{name}: axis {axis} of {x} is empty")


def _some(values: Mapping[str, AnyType]) -> bool:
    return bool(values["axes"])


def _count(x: Value, axes: tuple[int, ...]) -> Dim:
    return product(x.shape[a] for a in axes)


@define("sum", REDUCTION)
class Sum:
    """Sum over `axes`. Integers and bool add up in int64."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        check_dtype("sum", "fibc", x)
        return reduced(x, axes, keepdim).with_dtype(accumulated(x.dtype))

    evaluate = (
        aten("sum.dim_IntList", "x", "axes", "keepdim", when=_some),
        aten("_to_copy", "x", dtype=Arg(lambda v: accumulated(v["x"].dtype))),
    )


@define("mean", REDUCTION)
class Mean:
    """Arithmetic mean over `axes`."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        check_dtype("mean", "fc", x)
        return reduced(x, axes, keepdim)

    evaluate = (aten("mean.dim", "x", "axes", "keepdim", when=_some), aten("clone", "x"))

    @staticmethod
    def decompose(b: Builder, x: Value, *, axes: tuple[int, ...], keepdim: bool = False) -> Value:
        wide = b.widen(x)
        total = b.sum(wide, axes=axes, keepdim=keepdim)
        return b.cast_to(b.div(total, b.size_like(_count(x, axes), wide.dtype)), x.dtype)


@define("prod", REDUCTION)
class Prod:
    """Product over one axis. Integers and bool multiply in int64."""

    @staticmethod
    def infer(x: TensorType, *, axis: int, keepdim: bool = False) -> TensorType:
        check_dtype("prod", "fibc", x)
        return reduced(x, (axis,), keepdim).with_dtype(accumulated(x.dtype))

    evaluate = aten("prod.dim_int", "x", "axis", "keepdim")


@define("amax", REDUCTION)
class Amax:
    """Largest element over `axes`; NaN if any is."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        check_dtype("amax", "fib", x)
        _not_empty("amax", x, axes)
        return reduced(x, axes, keepdim)

    evaluate = (aten("amax", "x", "axes", "keepdim", when=_some), aten("clone", "x"))


@define("amin", REDUCTION)
class Amin:
    """Smallest element over `axes`; NaN if any is."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        check_dtype("amin", "fib", x)
        _not_empty("amin", x, axes)
        return reduced(x, axes, keepdim)

    evaluate = (aten("amin", "x", "axes", "keepdim", when=_some), aten("clone", "x"))


def _truth(name: str, x: TensorType, axes: tuple[int, ...], keepdim: bool) -> TensorType:
    if x.dtype == torch.uint8:  # torch's result would be uint8
        raise TypeInferenceError(f"accel.{name} does not take uint8", advice="insert accel.ne")
    check_dtype(name, "fibc", x)
    return reduced(x, axes, keepdim).with_dtype(torch.bool)


@define("any", REDUCTION)
class Any:
    """Whether any element over `axes` is nonzero."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        return _truth("any", x, axes, keepdim)

    evaluate = (
        aten("any.dims", "x", "axes", "keepdim", when=_some),
        aten("_to_copy", "x", dtype=Lit(torch.bool)),
    )


@define("all", REDUCTION)
class All:
    """Whether all elements over `axes` are nonzero."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        return _truth("all", x, axes, keepdim)

    evaluate = (
        aten("all.dims", "x", "axes", "keepdim", when=_some),
        aten("_to_copy", "x", dtype=Lit(torch.bool)),
    )


@define("argmax", REDUCTION)
class ArgMax:
    """Index (int64) of the largest element along `axis`; the first, where several are."""

    @staticmethod
    def infer(x: TensorType, *, axis: int, keepdim: bool = False) -> TensorType:
        check_dtype("argmax", "fi", x)
        result = reduced(x, (axis,), keepdim).with_dtype(torch.int64)
        _not_empty("argmax", x, (axis,))
        return result

    evaluate = aten("argmax", "x", "axis", "keepdim")


@define("argmin", REDUCTION)
class ArgMin:
    """Index (int64) of the smallest element along `axis`; the first, where several are."""

    @staticmethod
    def infer(x: TensorType, *, axis: int, keepdim: bool = False) -> TensorType:
        check_dtype("argmin", "fi", x)
        result = reduced(x, (axis,), keepdim).with_dtype(torch.int64)
        _not_empty("argmin", x, (axis,))
        return result

    evaluate = aten("argmin", "x", "axis", "keepdim")


@define("var", REDUCTION)
class Var:
    """Variance over `axes`, dividing by max(n - `correction`, 0)."""

    @staticmethod
    def infer(
        x: TensorType, *, axes: tuple[int, ...], correction: float = 1, keepdim: bool = False
    ) -> TensorType:
        check_dtype("var", "f", x)
        if not axes:
            raise TypeInferenceError("accel.var: no axes")
        return reduced(x, axes, keepdim)

    evaluate = aten("var.correction", "x", "axes", correction="correction", keepdim="keepdim")

    @staticmethod
    def decompose(
        b: Builder, x: Value, *, axes: tuple[int, ...], correction: float = 1, keepdim: bool = False
    ) -> Value:
        wide = b.widen(x)
        centered = b.sub(wide, b.mean(wide, axes=axes, keepdim=True))
        total = b.sum(b.mul(centered, centered), axes=axes, keepdim=keepdim)
        count = b.size_like(_count(x, axes), wide.dtype)
        divisor = b.sub(count, b.scalar(float(correction), wide.dtype))
        divisor = b.maximum(divisor, b.scalar(0.0, wide.dtype))
        return b.cast_to(b.div(total, divisor), x.dtype)


@define("logsumexp", REDUCTION)
class LogSumExp:
    """log(sum(exp(x))) over `axes`, without overflow."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...], keepdim: bool = False) -> TensorType:
        check_dtype("logsumexp", "f", x)
        if not axes:
            raise TypeInferenceError("accel.logsumexp: no axes")
        return reduced(x, axes, keepdim)

    evaluate = aten("logsumexp", "x", "axes", "keepdim")

    @staticmethod
    def decompose(b: Builder, x: Value, *, axes: tuple[int, ...], keepdim: bool = False) -> Value:
        result = reduced(x.type, axes, keepdim)
        if any(x.shape[a] == 0 for a in axes):
            return b.full_of(result.shape, float("-inf"), x.dtype)
        wide = b.widen(x)
        top = b.amax(wide, axes=axes, keepdim=True)
        # An infinite maximum is not subtracted: inf - inf would be NaN.
        top = b.where(b.isinf(top), b.scalar(0.0, wide.dtype), top)
        total = b.sum(b.exp(b.sub(wide, top)), axes=axes, keepdim=True)
        y = b.add(b.log(total), top)
        return b.cast_to(b.reshape_to(y, result.shape), x.dtype)
