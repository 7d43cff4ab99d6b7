"""Backward ops of the normalizations, as AOTAutograd's graphs hold them.

`grad` is the gradient of the forward op's result; `mask` says which gradients are wanted (of x,
weight, bias): the op has only those results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from accel.errors import TypeInferenceError
from accel.ir.op import Arg, aten, define
from accel.ir.ops.norm import NORM, check_groups, check_parameters, trailing_shape
from accel.ir.ops.training import HXW, C, N, channel_shape, statistics_dtype
from accel.ir.types import TensorType, product, same_shape

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value

Mask = tuple[bool, ...]


def check_grad(name: str, grad: TensorType, like: TensorType) -> None:
    if grad.dtype != like.dtype or not same_shape(grad.shape, like.shape):
        raise TypeInferenceError(f"accel.{name}: gradient {grad} for {like}")


def wanted(name: str, mask: Mask, types: Sequence[TensorType | None]) -> tuple[TensorType, ...]:
    if len(mask) != len(types) or any(m and t is None for m, t in zip(mask, types)):
        raise TypeInferenceError(f"accel.{name}: mask {mask} asks for what there is not")
    return tuple(t for m, t in zip(mask, types) if m and t is not None)


def _made(mask: Mask, *makers: Callable[[], Value]) -> list[Value]:
    return [make() for m, make in zip(mask, makers) if m]


def _centered_grad(
    b: Builder, scaled: Value, x_hat: Value, rstd: Value, axes: tuple[int, ...]
) -> Value:
    """Gradient through (x - mean) * rstd: rstd * (g - mean(g) - x_hat * mean(g * x_hat))."""
    first = b.mean(scaled, axes=axes, keepdim=True)
    second = b.mean(b.mul(scaled, x_hat), axes=axes, keepdim=True)
    return b.mul(rstd, b.sub(b.sub(scaled, first), b.mul(x_hat, second)))


@define("native_layer_norm_backward", NORM)
class NativeLayerNormBackward:
    """Gradients of `native_layer_norm` for x, weight and bias, from its saved mean and rstd."""

    @staticmethod
    def infer(
        grad: TensorType,
        x: TensorType,
        mean: TensorType,
        rstd: TensorType,
        weight: TensorType | None = None,
        bias: TensorType | None = None,
        *,
        rank: int,
        mask: tuple[bool, ...] = (True, True, True),
    ) -> tuple[TensorType, ...]:
        name = "native_layer_norm_backward"
        check_grad(name, grad, x)
        if not 1 <= rank <= x.rank:
            raise TypeInferenceError(f"accel.{name}: {rank} axes of {x}")
        check_parameters(name, x, x.shape[x.rank - rank :], weight, bias)
        rows = (*x.shape[: x.rank - rank], *(1 for _ in range(rank)))
        check_parameters(name, x, rows, mean, rstd)
        if mean.dtype != statistics_dtype(x, weight, bias):
            raise TypeInferenceError(f"accel.{name}: statistics {mean} for {x}")
        return wanted(name, mask, (x, weight, bias))

    evaluate = aten(
        "native_layer_norm_backward", "grad", "x", Arg(trailing_shape), "mean", "rstd", "weight",
        "bias", "mask",
    )  # fmt: skip

    @staticmethod
    def decompose(
        b: Builder,
        grad: Value,
        x: Value,
        mean: Value,
        rstd: Value,
        weight: Value | None = None,
        bias: Value | None = None,
        *,
        rank: int,
        mask: tuple[bool, ...] = (True, True, True),
    ) -> list[Value]:
        lead = len(x.shape) - rank
        inner, outer = tuple(range(lead, len(x.shape))), tuple(range(lead))
        g, wide = b.widen(grad), b.widen(x)
        wide_rstd = b.cast_to(rstd, wide.dtype)
        x_hat = b.mul(b.sub(wide, b.cast_to(mean, wide.dtype)), wide_rstd)
        scaled = g if weight is None else b.mul(g, b.cast_to(weight, wide.dtype))
        made = statistics_dtype(x, weight, bias)
        return _made(
            mask,
            lambda: b.cast_to(_centered_grad(b, scaled, x_hat, wide_rstd, inner), x.dtype),
            lambda: b.cast_to(b.sum(b.mul(g, x_hat), axes=outer), made),
            lambda: b.cast_to(b.sum(g, axes=outer), made),
        )


@define("native_group_norm_backward", NORM)
class NativeGroupNormBackward:
    """Gradients of `native_group_norm` for x, weight and bias, from its saved mean and rstd."""

    @staticmethod
    def infer(
        grad: TensorType,
        x: TensorType,
        mean: TensorType,
        rstd: TensorType,
        weight: TensorType | None = None,
        *,
        groups: int,
        mask: tuple[bool, ...] = (True, True, True),
    ) -> tuple[TensorType, ...]:
        name = "native_group_norm_backward"
        check_grad(name, grad, x)
        check_groups(name, x, groups)
        check_parameters(name, x, x.shape[1:2], weight)
        check_parameters(name, x, (x.shape[0], groups), mean, rstd)
        if mean.dtype != statistics_dtype(x, weight):
            raise TypeInferenceError(f"accel.{name}: statistics {mean} for {x}")
        row = TensorType(x.shape[1:2], mean.dtype)
        return wanted(name, mask, (x, None if weight is None else row, row))

    evaluate = aten(
        "native_group_norm_backward", "grad", "x", "mean", "rstd", "weight", N, C, HXW, "groups",
        "mask",
    )  # fmt: skip

    @staticmethod
    def decompose(
        b: Builder,
        grad: Value,
        x: Value,
        mean: Value,
        rstd: Value,
        weight: Value | None = None,
        *,
        groups: int,
        mask: tuple[bool, ...] = (True, True, True),
    ) -> list[Value]:
        batch, channels, *rest = x.shape
        split = (batch, groups, channels // groups, product(rest))
        g = b.reshape(b.widen(grad), shape=split)
        wide = b.reshape(b.widen(x), shape=split)

        def row(v: Value) -> Value:
            return b.reshape(b.cast_to(v, wide.dtype), shape=(batch, groups, 1, 1))

        x_hat = b.mul(b.sub(wide, row(mean)), row(rstd))
        scaled = g
        if weight is not None:
            per_channel = b.cast_to(weight, wide.dtype)
            per_channel = b.reshape(per_channel, shape=(groups, channels // groups, 1))
            scaled = b.mul(g, per_channel)

        def summed(v: Value) -> Value:
            total = b.sum(v, axes=(0, 3))
            return b.cast_to(b.reshape(total, shape=(channels,)), mean.dtype)

        def x_grad() -> Value:
            made = _centered_grad(b, scaled, x_hat, row(rstd), (2, 3))
            return b.cast_to(b.reshape(made, shape=x.shape), x.dtype)

        return _made(mask, x_grad, lambda: summed(b.mul(g, x_hat)), lambda: summed(g))


@define("native_batch_norm_backward", NORM)
class NativeBatchNormBackward:
    """Gradients of batch norm for x, weight and bias.

    In training (`train`) from the saved mean and rstd of the batch, else from the running mean and
    variance; the others are not read and may be absent.
    """

    @staticmethod
    def infer(
        grad: TensorType,
        x: TensorType,
        weight: TensorType | None = None,
        running_mean: TensorType | None = None,
        running_variance: TensorType | None = None,
        mean: TensorType | None = None,
        rstd: TensorType | None = None,
        *,
        train: bool,
        eps: float,
        mask: tuple[bool, ...] = (True, True, True),
    ) -> tuple[TensorType, ...]:
        name = "native_batch_norm_backward"
        check_grad(name, grad, x)
        if x.rank < 2 or product(x.shape) == 0:
            raise TypeInferenceError(f"accel.{name}: no values per channel in {x}")
        rows = (running_mean, running_variance, mean, rstd)
        check_parameters(name, x, x.shape[1:2], weight, *rows)
        used = rows[2:] if train else rows[:2]
        if any(v is None for v in used):
            raise TypeInferenceError(f"accel.{name}: statistics are missing")
        row = TensorType(x.shape[1:2], statistics_dtype(x, weight, *used))
        return wanted(name, mask, (x, None if weight is None else row, row))

    evaluate = aten(
        "native_batch_norm_backward", "grad", "x", "weight", "running_mean", "running_variance",
        "mean", "rstd", "train", "eps", "mask",
    )  # fmt: skip

    @staticmethod
    def decompose(
        b: Builder,
        grad: Value,
        x: Value,
        weight: Value | None = None,
        running_mean: Value | None = None,
        running_variance: Value | None = None,
        mean: Value | None = None,
        rstd: Value | None = None,
        *,
        train: bool,
        eps: float,
        mask: tuple[bool, ...] = (True, True, True),
    ) -> list[Value]:
        axes = (0, *range(2, len(x.shape)))
        g, wide = b.widen(grad), b.widen(x)

        def row(v: Value | None) -> Value:
            assert v is not None  # `infer` saw to it
            return b.reshape(b.cast_to(v, wide.dtype), shape=channel_shape(x))

        center = row(mean if train else running_mean)
        if train:
            factor = row(rstd)
        else:
            factor = b.rsqrt(b.add(row(running_variance), b.scalar(eps, wide.dtype)))
        x_hat = b.mul(b.sub(wide, center), factor)
        scaled = g if weight is None else b.mul(g, row(weight))
        saved = statistics_dtype(x, weight, *((mean,) if train else (running_mean,)))

        def x_grad() -> Value:
            made = b.mul(scaled, factor)
            if train:
                made = _centered_grad(b, scaled, x_hat, factor, axes)
            return b.cast_to(made, x.dtype)

        return _made(
            mask,
            x_grad,
            lambda: b.cast_to(b.sum(b.mul(g, x_hat), axes=axes), saved),
            lambda: b.cast_to(b.sum(g, axes=axes), saved),
        )
