"""Forward ops that also return what their backward needs, and losses: what AOTAutograd's graphs
hold. Names follow ATen. Their backward ops are in `accel.ir.ops.backward`.

Saved statistics have the parameters' dtype (x's, if there are none), as on the CPU in torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from accel.errors import TypeInferenceError
from accel.ir.op import Arg, Lit, aten, define
from accel.ir.ops.elementwise import check_dtype
from accel.ir.ops.norm import NORM, check_groups, check_parameters, trailing_shape
from accel.ir.types import (
    TensorType,
    product,
    same_shape,
)

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value


def statistics_dtype(x: Any, *parameters: Any) -> torch.dtype:
    """The dtype of saved statistics; x and the parameters are types or values."""
    found: torch.dtype = next((p.dtype for p in parameters if p is not None), x.dtype)
    return found


def channel_shape(x: Any) -> tuple[Any, ...]:
    """[C, 1, ...]: what a per-channel parameter of x [B, C, ...] broadcasts as."""
    return (x.shape[1], *(1 for _ in x.shape[2:]))


def normalize(b: Builder, wide: Value, axes: tuple[int, ...], eps: float) -> tuple[Value, ...]:
    """(x - mean) * rstd over `axes`, mean, variance and rstd, all with the axes kept."""
    mean = b.mean(wide, axes=axes, keepdim=True)
    centered = b.sub(wide, mean)
    variance = b.mean(b.mul(centered, centered), axes=axes, keepdim=True)
    rstd = b.rsqrt(b.add(variance, b.scalar(eps, wide.dtype)))
    return b.mul(centered, rstd), mean, variance, rstd


@define("native_layer_norm", NORM)
class NativeLayerNorm:
    """`layer_norm`, and the mean and 1 / sqrt(var + eps) of each row, with the axes kept as 1."""

    @staticmethod
    def infer(
        x: TensorType,
        weight: TensorType | None = None,
        bias: TensorType | None = None,
        *,
        rank: int,
        eps: float,
    ) -> tuple[TensorType, ...]:
        if not 1 <= rank <= x.rank:
            raise TypeInferenceError(f"accel.native_layer_norm: {rank} axes of {x}")
        check_parameters("native_layer_norm", x, x.shape[x.rank - rank :], weight, bias)
        if product(x.shape[x.rank - rank :]) == 0:
            raise TypeInferenceError(f"accel.native_layer_norm: rows of {x} are empty")
        shape = (*x.shape[: x.rank - rank], *(1 for _ in range(rank)))
        row = TensorType(shape, statistics_dtype(x, weight, bias))
        return x, row, row

    evaluate = aten("native_layer_norm", "x", Arg(trailing_shape), "weight", "bias", "eps")

    @staticmethod
    def decompose(
        b: Builder,
        x: Value,
        weight: Value | None = None,
        bias: Value | None = None,
        *,
        rank: int,
        eps: float,
    ) -> list[Value]:
        wide = b.widen(x)
        axes = tuple(range(len(x.shape) - rank, len(x.shape)))
        y, mean, _, rstd = normalize(b, wide, axes, eps)
        if weight is not None:
            y = b.mul(y, b.cast_to(weight, wide.dtype))
        if bias is not None:
            y = b.add(y, b.cast_to(bias, wide.dtype))
        saved = statistics_dtype(x, weight, bias)
        return [b.cast_to(y, x.dtype), b.cast_to(mean, saved), b.cast_to(rstd, saved)]


def group_sizes(values: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """ATen's N, C and HxW of x."""
    batch, channels, *rest = values["x"].shape
    return batch, channels, product(rest)


N = Arg(lambda v: group_sizes(v)[0])
C = Arg(lambda v: group_sizes(v)[1])
HXW = Arg(lambda v: group_sizes(v)[2])


@define("native_group_norm", NORM)
class NativeGroupNorm:
    """`group_norm`, and the mean and 1 / sqrt(var + eps) of each group, [B, groups]."""

    @staticmethod
    def infer(
        x: TensorType,
        weight: TensorType | None = None,
        bias: TensorType | None = None,
        *,
        groups: int,
        eps: float,
    ) -> tuple[TensorType, ...]:
        check_groups("native_group_norm", x, groups)
        check_parameters("native_group_norm", x, x.shape[1:2], weight, bias)
        if product(x.shape[1:]) == 0:
            raise TypeInferenceError(f"accel.native_group_norm: groups of {x} are empty")
        row = TensorType((x.shape[0], groups), statistics_dtype(x, weight, bias))
        return x, row, row

    evaluate = aten("native_group_norm", "x", "weight", "bias", N, C, HXW, "groups", "eps")

    @staticmethod
    def decompose(
        b: Builder,
        x: Value,
        weight: Value | None = None,
        bias: Value | None = None,
        *,
        groups: int,
        eps: float,
    ) -> list[Value]:
        batch, channels, *rest = x.shape
        wide = b.widen(x)
        grouped = b.reshape(wide, shape=(batch, groups, channels // groups * product(rest)))
        y, mean, _, rstd = normalize(b, grouped, (2,), eps)
        y = b.reshape(y, shape=x.shape)
        shape = channel_shape(x)
        if weight is not None:
            y = b.mul(y, b.reshape(b.cast_to(weight, wide.dtype), shape=shape))
        if bias is not None:
            y = b.add(y, b.reshape(b.cast_to(bias, wide.dtype), shape=shape))
        saved = statistics_dtype(x, weight, bias)
        rows = [b.reshape(b.cast_to(v, saved), shape=(batch, groups)) for v in (mean, rstd)]
        return [b.cast_to(y, x.dtype), *rows]


@define("native_batch_norm", NORM)
class NativeBatchNorm:
    """Batch norm of [B, C, ...] in training (Ioffe & Szegedy, 2015).

    Results: y, the batch's mean and 1 / sqrt(var + eps), and the running mean and variance after
    this batch: (1 - momentum) * old + momentum * new, with the unbiased variance.
    """

    @staticmethod
    def infer(
        x: TensorType,
        mean: TensorType,
        variance: TensorType,
        weight: TensorType | None = None,
        bias: TensorType | None = None,
        *,
        momentum: float,
        eps: float,
    ) -> tuple[TensorType, ...]:
        if x.rank < 2 or product(x.shape) == 0:
            raise TypeInferenceError(f"accel.native_batch_norm: no values per channel in {x}")
        check_parameters("native_batch_norm", x, x.shape[1:2], mean, variance, weight, bias)
        return x, mean, mean, mean, mean

    evaluate = aten(
        "_native_batch_norm_legit_functional", "x", "weight", "bias", "mean", "variance", Lit(True),
        "momentum", "eps",
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
        momentum: float,
        eps: float,
    ) -> list[Value]:
        wide = b.widen(x)
        axes = (0, *range(2, len(x.shape)))
        y, new_mean, new_variance, rstd = normalize(b, wide, axes, eps)
        shape = channel_shape(x)
        if weight is not None:
            y = b.mul(y, b.reshape(b.cast_to(weight, wide.dtype), shape=shape))
        if bias is not None:
            y = b.add(y, b.reshape(b.cast_to(bias, wide.dtype), shape=shape))

        count = b.size_like(product(x.shape[a] for a in axes), wide.dtype)
        unbiased = b.div(count, b.sub(count, b.scalar(1.0, wide.dtype)))

        def flat(v: Value) -> Value:
            return b.reshape(v, shape=(x.shape[1],))

        def moved(old: Value, new: Value) -> Value:
            kept = b.mul(b.cast_to(old, wide.dtype), b.scalar(1 - momentum, wide.dtype))
            return b.cast_to(b.add(kept, b.mul(new, b.scalar(momentum, wide.dtype))), old.dtype)

        return [
            b.cast_to(y, x.dtype),
            b.cast_to(flat(new_mean), mean.dtype),
            b.cast_to(flat(rstd), mean.dtype),
            moved(mean, flat(new_mean)),
            moved(variance, b.mul(flat(new_variance), unbiased)),
        ]


REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def class_axis(name: str, x: TensorType, target: TensorType, weight: TensorType | None) -> int:
    """The axis of the classes: x [C], [B, C] or [B, C, H, W], `target` (int64) without it."""
    check_dtype(name, "f", x, weight)
    axis = 0 if x.rank == 1 else 1
    fits = x.rank in (1, 2, 4) and target.dtype == torch.int64
    if not fits or not same_shape(target.shape, (*x.shape[:axis], *x.shape[axis + 1 :])):
        raise TypeInferenceError(f"accel.{name}: {x} with target {target}")
    if weight is not None and not same_shape(weight.shape, (x.shape[axis],)):
        raise TypeInferenceError(f"accel.{name}: weight {weight} for {x}")
    return axis


def nll_weights(
    b: Builder, x: Value, target: Value, weight: Value | None, ignore_index: int
) -> tuple[Value, Value]:
    """The weight of each target (0 where ignored), wide, and the target with 0 where ignored."""
    wide = b.widen(x).dtype
    zero = b.scalar(0.0, wide)
    keep = b.ne(target, b.scalar(ignore_index, torch.int64))
    safe = b.where(keep, target, b.scalar(0, torch.int64))
    if weight is None:
        return b.where(keep, b.scalar(1.0, wide), zero), safe
    return b.where(keep, b.cast_to(b.gather(weight, safe), wide), zero), safe


@define("nll_loss", NORM)
class NllLoss:
    """Negative log likelihood of `target` under log probabilities x, and the total weight.

    x [C], [B, C] or [B, C, H, W]; `target` int64 without the class axis; targets equal to
    `ignore_index` do not count. `reduction` none, mean (over the weights) or sum. The total weight
    is 0 without a reduction, as in torch.
    """

    @staticmethod
    def infer(
        x: TensorType,
        target: TensorType,
        weight: TensorType | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> tuple[TensorType, TensorType]:
        class_axis("nll_loss", x, target, weight)
        if reduction not in REDUCTIONS:
            raise TypeInferenceError(f"accel.nll_loss: reduction = '{reduction}'")
        loss = x.with_shape(target.shape if reduction == "none" else ())
        return loss, x.with_shape(())

    evaluate = tuple(
        aten(
            name,
            "x",
            "target",
            "weight",
            Arg(lambda v: REDUCTIONS[v["reduction"]]),
            "ignore_index",
            when=when,
        )
        for name, when in (
            ("nll_loss2d_forward", lambda v: len(v["x"].shape) == 4),
            ("nll_loss_forward", None),
        )
    )

    @staticmethod
    def decompose(
        b: Builder,
        x: Value,
        target: Value,
        weight: Value | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> list[Value]:
        axis = 0 if len(x.shape) == 1 else 1
        weights, safe = nll_weights(b, x, target, weight, ignore_index)
        one = (*target.shape[:axis], 1, *target.shape[axis:])
        picked = b.take_along(x, b.reshape(safe, shape=one), axis=axis)
        picked = b.cast_to(b.reshape(picked, shape=target.shape), weights.dtype)
        # Where the weight is 0 the loss is 0, whatever the log probability is.
        zero = b.scalar(0.0, weights.dtype)
        loss = b.where(b.eq(weights, zero), zero, b.neg(b.mul(picked, weights)))
        if reduction == "none":
            return [b.cast_to(loss, x.dtype), b.scalar(0.0, x.dtype)]
        axes = tuple(range(len(target.shape)))
        total = b.sum(weights, axes=axes)
        loss = b.sum(loss, axes=axes)
        if reduction == "mean":
            loss = b.div(loss, total)
        return [b.cast_to(loss, x.dtype), b.cast_to(total, x.dtype)]
