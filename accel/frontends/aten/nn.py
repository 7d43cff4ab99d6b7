"""Normalizations, softmax, pooling, dropout in evaluation, upsampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accel.frontends.aten.reductions import at_least_1d, axis_of
from accel.frontends.importer import Importer, lower
from accel.ir.module import Value
from accel.ir.types import FLOATS


def optional(c: Importer, x: Tensor | None) -> Value | None:
    return None if x is None else c(x)


@lower("softmax.int", "log_softmax.int", "special_softmax", "special_log_softmax")
def softmax(c: Importer, x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Value:
    name = "log_softmax" if "log_softmax" in c.call.target._schema.name else "softmax"
    value = c.b.cast_to(at_least_1d(c, x), c.out_dtype)
    made = getattr(c.b, name)(value, axis=axis_of(x, dim))
    return c.b.reshape_to(made, c.out_shape)


@lower("_softmax", "_log_softmax")
def softmax_kernel(c: Importer, x: Tensor, dim: int, half_to_float: bool) -> Value:
    return softmax(c, x, dim)


@lower("layer_norm")
def layer_norm(
    c: Importer, x: Tensor, shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *ignored: Any,
) -> Value:  # fmt: skip
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return NotImplemented
    result: Value = c.b.layer_norm(
        c(x), optional(c, weight), optional(c, bias), rank=len(shape), eps=float(eps)
    )
    return result


@lower("native_layer_norm")
def native_layer_norm(
    c: Importer, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> Any:  # fmt: skip
    """Whole, unless the statistics are used (training): then by parts, which shares them."""
    if c.is_used(c.call.result[1]) or c.is_used(c.call.result[2]):
        return NotImplemented
    return [layer_norm(c, x, shape, weight, bias, eps), None, None]


@lower("rms_norm")
def rms_norm(
    c: Importer, x: Tensor, shape: Sequence[int], weight: Tensor | None = None,
    eps: float | None = None,
) -> Value:  # fmt: skip
    if len(shape) != 1 or (weight is not None and weight.dtype != x.dtype):
        return NotImplemented
    small = torch.finfo(x.dtype).eps if eps is None else float(eps)
    result: Value = c.b.rms_norm(c(x), optional(c, weight), eps=small)
    return result


@lower("group_norm")
def group_norm(
    c: Importer, x: Tensor, groups: int, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *ignored: Any,
) -> Value:  # fmt: skip
    result: Value = c.b.group_norm(
        c(x), optional(c, weight), optional(c, bias), groups=int(groups), eps=float(eps)
    )
    return result


@lower("native_group_norm")
def native_group_norm(
    c: Importer, x: Tensor, weight: Tensor | None, bias: Tensor | None, n: Any, channels: Any,
    size: Any, groups: int, eps: float,
) -> Any:  # fmt: skip
    if c.is_used(c.call.result[1]) or c.is_used(c.call.result[2]):
        return NotImplemented
    return [group_norm(c, x, groups, weight, bias, eps), None, None]


def _normalized(
    c: Importer, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    variance: Tensor, eps: float,
) -> Value:  # fmt: skip
    """Inference batch norm; statistics of another dtype (16-bit inputs) are cast."""
    dtype = x.dtype
    parts = [c.b.cast_to(c(t), dtype) for t in (mean, variance)]
    extra = [None if t is None else c.b.cast_to(c(t), dtype) for t in (weight, bias)]
    result: Value = c.b.batch_norm(c(x), *parts, *extra, eps=float(eps))
    return result


@lower("batch_norm")
def batch_norm(
    c: Importer, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    variance: Tensor | None, training: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Value:  # fmt: skip
    """In training also writes the running statistics, which ATen's schema does not say."""
    if not training and mean is not None and variance is not None:
        return _normalized(c, x, weight, bias, mean, variance, eps)
    y, batch_mean, batch_variance = batch_statistics(c, x, weight, bias, eps)[:3]
    if mean is not None and variance is not None:
        count = x.numel() // x.shape[1]
        _update(c, mean, batch_mean, momentum)
        unbiased = c.b.mul(batch_variance, _bessel(c, count, batch_variance.dtype))
        _update(c, variance, unbiased, momentum)
    return y


def _bessel(c: Importer, count: Any, dtype: torch.dtype) -> Value:
    """count / (count - 1), which makes a variance unbiased."""
    if isinstance(count, int):
        return c.scalar(count / max(count - 1, 1), dtype)
    size = c.scalar(count, dtype)
    result: Value = c.b.div(size, c.b.sub(size, c.scalar(1, dtype)))
    return result


def _update(c: Importer, running: Tensor, new: Value, momentum: float) -> None:
    wide = c.b.widen(c(running))
    new = c.b.cast_to(new, wide.dtype)
    kept = c.b.mul(wide, c.scalar(1 - momentum, wide.dtype))
    c.write(running, c.b.add(kept, c.b.mul(new, c.scalar(momentum, wide.dtype))))


def batch_statistics(
    c: Importer, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Value, Value, Value, Value]:
    """Training batch norm: result, mean, (biased) variance and 1 / sqrt(variance + eps)."""
    value = c.b.widen(c(x))
    dtype = value.dtype
    axes = (0, *range(2, x.dim()))
    lead = (value.shape[1], *(1 for _ in value.shape[2:]))

    def spread(v: Value) -> Value:
        return c.b.reshape_to(c.b.cast_to(v, dtype), lead)

    mean = c.b.mean(value, axes=axes)
    centered = c.b.sub(value, spread(mean))
    variance = c.b.mean(c.b.mul(centered, centered), axes=axes)
    rstd = c.b.rsqrt(c.b.add(variance, c.scalar(float(eps), dtype)))
    y = c.b.mul(centered, spread(rstd))
    if weight is not None:
        y = c.b.mul(y, spread(c(weight)))
    if bias is not None:
        y = c.b.add(y, spread(c(bias)))
    return c.b.cast_to(y, x.dtype), mean, variance, rstd


@lower("_native_batch_norm_legit_no_training")
def batch_norm_inference(
    c: Importer, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    variance: Tensor, momentum: float, eps: float,
) -> Any:  # fmt: skip
    if any(isinstance(t, Tensor) and c.is_used(t) for t in c.call.result[1:]):
        return NotImplemented
    return [_normalized(c, x, weight, bias, mean, variance, eps), None, None]


@lower("_native_batch_norm_legit_functional")
def batch_norm_functional(
    c: Importer, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    variance: Tensor, training: bool, momentum: float, eps: float,
) -> Any:  # fmt: skip
    if not training:
        return NotImplemented
    y, batch_mean, batch_variance, rstd = batch_statistics(c, x, weight, bias, eps)
    count = x.numel() // x.shape[1]
    unbiased = c.b.mul(batch_variance, _bessel(c, count, batch_variance.dtype))
    moved = []
    for running, new in ((mean, batch_mean), (variance, unbiased)):
        old = c.b.widen(c(running))
        kept = c.b.mul(old, c.scalar(1 - momentum, old.dtype))
        fresh = c.b.mul(c.b.cast_to(new, old.dtype), c.scalar(momentum, old.dtype))
        moved.append(c.b.cast_to(c.b.add(kept, fresh), running.dtype))
    saved = [
        c.b.cast_to(v, t.dtype) for v, t in zip((batch_mean, rstd), c.call.result[1:3])
    ]
    return [y, *saved, *moved]


@lower("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(c: Importer, x: Tensor, p: float, train: bool) -> Any:
    if not train or p == 0:
        return c(x)
    if c.call.target._schema.name != "aten::dropout" or x.dtype not in FLOATS:
        return NotImplemented
    return c.b.native_dropout(c(x), p=float(p))[0]


def pool_options(
    rank: int, kernel: Any, stride: Any, padding: Any, dilation: Any = 1
) -> dict[str, Any]:
    def spread(value: Any) -> tuple[int, ...]:
        values = [value] if isinstance(value, int) else list(value)
        return tuple(int(v) for v in (values * rank if len(values) == 1 else values))

    kernels = spread(kernel)
    return {
        "kernel": kernels,
        "stride": spread(stride) if not isinstance(stride, Sequence) or len(stride) else kernels,
        "padding": spread(padding),
        "dilation": spread(dilation),
    }


@lower("max_pool1d", "max_pool2d", "max_pool3d")
def max_pool(
    c: Importer, x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:  # fmt: skip
    rank = int(c.call.target._schema.name[-2])
    options = pool_options(rank, kernel, stride, padding, dilation)
    result: Value = c.b.max_pool(c(x), **options, ceil_mode=ceil_mode)
    return result


@lower("max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool_with_indices(
    c: Importer, x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:  # fmt: skip
    rank = 2 if "2d" in c.call.target._schema.name else 3
    options = pool_options(rank, kernel, stride, padding, dilation)
    if not c.is_used(c.call.result[1]):
        return [c.b.max_pool(c(x), **options, ceil_mode=ceil_mode), None]
    return list(c.b.max_pool_with_indices(c(x), **options, ceil_mode=ceil_mode))


@lower("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(
    c: Importer, x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor: int | None = None,
) -> Value:  # fmt: skip
    rank = int(c.call.target._schema.name[-2])
    options = pool_options(rank, kernel, stride, padding)
    del options["dilation"]
    result: Value = c.b.avg_pool(
        c(x), **options, ceil_mode=ceil_mode, count_include_pad=count_include_pad, divisor=divisor
    )
    return result


@lower(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
)  # fmt: skip
def adaptive_avg_pool(c: Importer, x: Tensor, size: Sequence[Any]) -> Value:
    rank = len(size)
    if c.shape(size) == (1,) * rank:
        axes = tuple(range(x.dim() - rank, x.dim()))
        mean: Value = c.b.mean(c(x), axes=axes, keepdim=True)
        return mean
    result: Value = c.b.adaptive_avg_pool(c(x), size=c.shape(size))
    return result


@lower("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(c: Importer, x: Tensor, size: Sequence[Any]) -> Any:
    return list(c.b.adaptive_max_pool(c(x), size=c.shape(size)))


_MODES = {"linear": "linear", "cubic": "cubic", "nearest": "nearest"}


@lower(
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec",
    "upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_trilinear3d.vec",
    "upsample_bicubic2d.vec",
)  # fmt: skip
def upsample(c: Importer, x: Tensor, size: Any, *rest: Any) -> Value:
    """With and without `.vec`, which takes one list of factors."""
    name = c.call.target._schema.name
    mode = next(ours for theirs, ours in _MODES.items() if theirs in name)
    shape = c.shape(c.out.shape[2:])
    corners = bool(rest[0]) if mode != "nearest" and rest else False
    factors = rest[1:] if mode != "nearest" else rest
    if c.call.target._schema.overload_name == "vec":
        factors = tuple(factors[0]) if factors and factors[0] is not None else ()
    if any(f is None for f in factors):
        factors = ()
    result: Value = c.b.upsample(
        c(x), size=shape, mode=mode, align_corners=corners,
        scales=tuple(float(f) for f in factors),
    )  # fmt: skip
    return result


@lower("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sample(
    c: Importer, x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool
) -> Value:
    result: Value = c.b.grid_sample(
        c(x), c(grid), mode=("bilinear", "nearest", "bicubic")[mode],
        padding=("zeros", "border", "reflection")[padding], align_corners=bool(align_corners),
    )  # fmt: skip
    return result


@lower("col2im")
def col2im(
    c: Importer, x: Tensor, size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any
) -> Value:
    result: Value = c.b.col2im(
        c(x), size=c.shape(size), kernel=tuple(kernel), stride=tuple(stride),
        padding=tuple(padding), dilation=tuple(dilation),
    )  # fmt: skip
    return result


@lower("_cdist_forward", "cdist")
def cdist(c: Importer, x: Tensor, y: Tensor, p: float = 2.0, *ignored: Any) -> Value:
    result: Value = c.b.cdist(c(x), c(y), p=float(p))
    return result
