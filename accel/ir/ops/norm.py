"""Softmax and normalizations: composites that keep meaning.

16-bit floats are computed in float32 and rounded once. Parameters have x's dtype, or float32 where
x is a 16-bit float.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Arg, Lit, Trait, aten, define
from accel.ir.ops.elementwise import check_dtype
from accel.ir.types import Shape, TensorType, format_shape, normalize_axis, same_shape

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value

NORM = Trait.PURE | Trait.REDUCTION


def trailing_shape(values: Mapping[str, Any]) -> list[Any]:
    """ATen's normalized_shape: the last `rank` sizes of x."""
    shape = values["x"].shape
    return list(shape[len(shape) - values["rank"] :])


def check_parameters(
    name: str, x: TensorType, shape: Shape, *parameters: TensorType | None
) -> None:
    """Weights, biases and statistics have one dtype that fits x, and `shape`."""
    check_dtype(name, "f", x)
    given = [p for p in parameters if p is not None]
    for p in given:
        if p.dtype != x.dtype and (p.dtype != torch.float32 or x.dtype.itemsize != 2):
            raise TypeInferenceError(f"accel.{name}: a parameter {p} for {x}")
        if p.dtype != given[0].dtype or not same_shape(p.shape, shape):
            raise TypeInferenceError(
                f"accel.{name}: parameters {', '.join(map(str, given))} for {format_shape(shape)}"
            )


def check_groups(name: str, x: TensorType, groups: int) -> None:
    channels = x.shape[1] if x.rank >= 2 else None
    if channels is None or groups < 1 or (isinstance(channels, int) and channels % groups):
        raise TypeInferenceError(f"accel.{name}: {groups} groups of {x}")


@define("softmax", NORM)
class Softmax:
    """exp(x - max) over its sum, along `axis`."""

    @staticmethod
    def infer(x: TensorType, *, axis: int) -> TensorType:
        check_dtype("softmax", "f", x)
        normalize_axis(axis, max(x.rank, 1))
        return x

    evaluate = aten("softmax.int", "x", "axis")

    @staticmethod
    def decompose(b: Builder, x: Value, *, axis: int) -> Value:
        if not x.shape:
            row = b.reshape(x, shape=(1,))
            return b.reshape(b.softmax(row, axis=0), shape=())
        if x.shape[axis] == 0:
            return x  # nothing in it
        wide = b.widen(x)
        shifted = b.sub(wide, b.amax(wide, axes=(axis,), keepdim=True))
        e = b.exp(shifted)
        return b.cast_to(b.div(e, b.sum(e, axes=(axis,), keepdim=True)), x.dtype)


@define("log_softmax", NORM)
class LogSoftmax:
    """log(softmax(x)) along `axis`."""

    @staticmethod
    def infer(x: TensorType, *, axis: int) -> TensorType:
        check_dtype("log_softmax", "f", x)
        normalize_axis(axis, max(x.rank, 1))
        return x

    evaluate = aten("log_softmax.int", "x", "axis")

    @staticmethod
    def decompose(b: Builder, x: Value, *, axis: int) -> Value:
        if not x.shape:
            row = b.reshape(x, shape=(1,))
            return b.reshape(b.log_softmax(row, axis=0), shape=())
        if x.shape[axis] == 0:
            return x  # nothing in it
        wide = b.widen(x)
        shifted = b.sub(wide, b.amax(wide, axes=(axis,), keepdim=True))
        total = b.log(b.sum(b.exp(shifted), axes=(axis,), keepdim=True))
        return b.cast_to(b.sub(shifted, total), x.dtype)


@define("layer_norm", NORM)
class LayerNorm:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last len(weight.shape) axes.

    Statistics in float32 for 16-bit floats (Ba et al., 2016). `rank` is the number of axes.
    """

    @staticmethod
    def infer(
        x: TensorType,
        weight: TensorType | None = None,
        bias: TensorType | None = None,
        *,
        rank: int,
        eps: float,
    ) -> TensorType:
        if not 1 <= rank <= x.rank:
            raise TypeInferenceError(f"accel.layer_norm: {rank} axes of {x}")
        check_parameters("layer_norm", x, x.shape[x.rank - rank :], weight, bias)
        return x

    evaluate = aten("layer_norm", "x", Arg(trailing_shape), "weight", "bias", "eps")

    @staticmethod
    def decompose(
        b: Builder,
        x: Value,
        weight: Value | None = None,
        bias: Value | None = None,
        *,
        rank: int,
        eps: float,
    ) -> Value:
        axes = tuple(range(len(x.shape) - rank, len(x.shape)))
        wide = b.widen(x)
        centered = b.sub(wide, b.mean(wide, axes=axes, keepdim=True))
        variance = b.mean(b.mul(centered, centered), axes=axes, keepdim=True)
        y = b.mul(centered, b.rsqrt(b.add(variance, b.scalar(eps, wide.dtype))))
        if weight is not None:
            y = b.mul(y, b.cast_to(weight, wide.dtype))
        if bias is not None:
            y = b.add(y, b.cast_to(bias, wide.dtype))
        return b.cast_to(y, x.dtype)


@define("rms_norm", NORM)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich, 2019).

    Computed in float32 for 16-bit floats. With `cast_before_weight`, the normalized x is rounded to
    its own dtype before the weight multiplies (as Llama does); else after. `offset` is added to
    the weight (Gemma: 1).
    """

    @staticmethod
    def infer(
        x: TensorType,
        weight: TensorType | None = None,
        *,
        eps: float,
        cast_before_weight: bool = False,
        offset: float = 0.0,
    ) -> TensorType:
        if x.rank == 0:
            raise TypeInferenceError("accel.rms_norm: x has no axis")
        check_parameters("rms_norm", x, x.shape[-1:], weight)
        return x

    @staticmethod
    def evaluate(
        x: Tensor,
        weight: Tensor | None = None,
        *,
        eps: float,
        cast_before_weight: bool = False,
        offset: float = 0.0,
    ) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if weight is None:
            return y.to(x.dtype)
        scale = weight if cast_before_weight else weight.to(wide.dtype)
        scale = scale + offset if offset else scale
        y = y.to(x.dtype) if cast_before_weight else y
        return (scale * y).to(x.dtype)

    @staticmethod
    def decompose(
        b: Builder,
        x: Value,
        weight: Value | None = None,
        *,
        eps: float,
        cast_before_weight: bool = False,
        offset: float = 0.0,
    ) -> Value:
        wide = b.widen(x)
        mean = b.mean(b.mul(wide, wide), axes=(len(x.shape) - 1,), keepdim=True)
        y = b.mul(wide, b.rsqrt(b.add(mean, b.scalar(eps, wide.dtype))))
        if weight is None:
            return b.cast_to(y, x.dtype)
        inner = x.dtype if cast_before_weight else wide.dtype
        scale = b.cast_to(weight, inner)
        scale = b.add(scale, b.scalar(offset, inner)) if offset else scale
        return b.cast_to(b.mul(scale, b.cast_to(y, inner)), x.dtype)


@define("group_norm", NORM)
class GroupNorm:
    """Normalization of [B, C, ...] over groups of channels (Wu & He, 2018)."""

    @staticmethod
    def infer(
        x: TensorType,
        weight: TensorType | None = None,
        bias: TensorType | None = None,
        *,
        groups: int,
        eps: float,
    ) -> TensorType:
        check_groups("group_norm", x, groups)
        check_parameters("group_norm", x, x.shape[1:2], weight, bias)
        return x

    evaluate = aten("group_norm", "x", "groups", "weight", "bias", "eps")

    @staticmethod
    def decompose(
        b: Builder,
        x: Value,
        weight: Value | None = None,
        bias: Value | None = None,
        *,
        groups: int,
        eps: float,
    ) -> Value:
        batch, channels, *rest = x.shape
        wide = b.widen(x)
        grouped = b.reshape(wide, shape=(batch, groups, channels // groups, *rest))
        axes = tuple(range(2, len(x.shape) + 1))
        centered = b.sub(grouped, b.mean(grouped, axes=axes, keepdim=True))
        variance = b.mean(b.mul(centered, centered), axes=axes, keepdim=True)
        y = b.mul(centered, b.rsqrt(b.add(variance, b.scalar(eps, wide.dtype))))
        y = b.reshape(y, shape=x.shape)
        per_channel = (channels, *(1 for _ in rest))
        if weight is not None:
            y = b.mul(y, b.reshape(b.cast_to(weight, wide.dtype), shape=per_channel))
        if bias is not None:
            y = b.add(y, b.reshape(b.cast_to(bias, wide.dtype), shape=per_channel))
        return b.cast_to(y, x.dtype)


@define("batch_norm", Trait.PURE)
class BatchNorm:
    """Inference batch norm of [B, C, ...] with given statistics (Ioffe & Szegedy, 2015)."""

    @staticmethod
    def infer(
        x: TensorType,
        mean: TensorType,
        variance: TensorType,
        weight: TensorType | None = None,
        bias: TensorType | None = None,
        *,
        eps: float,
    ) -> TensorType:
        if x.rank < 2:
            raise TypeInferenceError(f"accel.batch_norm: {x} has no channels")
        if x.shape[1] == 0:
            raise TypeInferenceError(f"accel.batch_norm: {x} has no channels")
        check_parameters("batch_norm", x, x.shape[1:2], mean, variance, weight, bias)
        return x

    evaluate = aten(
        "batch_norm", "x", "weight", "bias", "mean", "variance", Lit(False), Lit(0.0), "eps",
        Lit(False),
    )  # fmt: skip

    @staticmethod
    def decompose(
        b: Builder,
        x: Value,
        mean: Value,
        variance: Value,
        weight: Value | None = None,
        bias: Value | None = None,
        *,
        eps: float,
    ) -> Value:
        wide = b.widen(x)
        shape = (x.shape[1], *(1 for _ in x.shape[2:]))

        def channel(v: Value) -> Value:
            return b.reshape(b.cast_to(v, wide.dtype), shape=shape)

        scale = b.rsqrt(b.add(channel(variance), b.scalar(eps, wide.dtype)))
        if weight is not None:
            scale = b.mul(scale, channel(weight))
        y = b.mul(b.sub(wide, channel(mean)), scale)
        y = y if bias is None else b.add(y, channel(bias))
        return b.cast_to(y, x.dtype)
