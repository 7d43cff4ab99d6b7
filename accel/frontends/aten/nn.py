"""Normalizations, softmax, pooling, dropout in evaluation, upsampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accel.frontends.aten.reductions import at_least_1d, axis_of
from accel.frontends.calls import results_of
from accel.frontends.importer import Importer, lower, lower_write
from accel.ir.module import Value
from accel.ir.ops.training import normalize, statistics_dtype
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
    """With its statistics only if they are used, which is in training."""
    if not any(c.is_used(t) for t in c.call.result[1:]):
        return [layer_norm(c, x, shape, weight, bias, eps), None, None]
    operands = (c(x), optional(c, weight), optional(c, bias))
    saved = c.call.result[1].dtype
    if saved == statistics_dtype(*operands):
        return list(c.b.native_layer_norm(*operands, rank=len(shape), eps=float(eps)))
    # A GPU saves statistics of 16-bit floats in float32.
    wide = c.b.widen(operands[0])
    axes = tuple(range(x.dim() - len(shape), x.dim()))
    y, mean, _, rstd = normalize(c.b, wide, axes, float(eps))
    if operands[1] is not None:
        y = c.b.mul(y, c.b.cast_to(operands[1], wide.dtype))
    if operands[2] is not None:
        y = c.b.add(y, c.b.cast_to(operands[2], wide.dtype))
    return [c.b.cast_to(y, x.dtype), c.b.cast_to(mean, saved), c.b.cast_to(rstd, saved)]


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
    if not any(c.is_used(t) for t in c.call.result[1:]):
        return [group_norm(c, x, groups, weight, bias, eps), None, None]
    return list(
        c.b.native_group_norm(
            c(x), optional(c, weight), optional(c, bias), groups=int(groups), eps=float(eps)
        )
    )


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
    if mean is None or variance is None:
        return batch_statistics(c, x, weight, bias, eps)
    y, _, _, new_mean, new_variance = batch_norm_training(
        c, x, weight, bias, mean, variance, momentum, eps
    )
    c.write(mean, new_mean)
    c.write(variance, new_variance)
    return y


def batch_norm_training(
    c: Importer, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    variance: Tensor, momentum: float, eps: float,
) -> list[Value]:  # fmt: skip
    return list(
        c.b.native_batch_norm(
            c(x), c(mean), c(variance), optional(c, weight), optional(c, bias),
            momentum=float(momentum), eps=float(eps),
        )
    )  # fmt: skip


def batch_statistics(
    c: Importer, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Value:
    """Batch norm with the batch's own statistics, and none kept."""
    value = c.b.widen(c(x))
    axes = (0, *range(2, x.dim()))
    mean = c.b.mean(value, axes=axes)
    centered = c.b.sub(value, c.b.mean(value, axes=axes, keepdim=True))
    variance = c.b.mean(c.b.mul(centered, centered), axes=axes)
    extra = [None if t is None else c.b.cast_to(c(t), value.dtype) for t in (weight, bias)]
    y = c.b.batch_norm(value, mean, variance, *extra, eps=float(eps))
    return c.b.cast_to(y, x.dtype)


@lower_write("_native_batch_norm_legit", "_batch_norm_with_update")
def batch_norm_writing(
    c: Importer, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    variance: Tensor, *options: Any,
) -> Any:  # fmt: skip
    """Also writes the running statistics: (training,) momentum, eps."""
    *training, momentum, eps = options
    if training and not training[0]:
        y = _normalized(c, x, weight, bias, mean, variance, eps)
        return [y, *(None for _ in results_of(c.call)[1:])]
    made = batch_norm_training(c, x, weight, bias, mean, variance, momentum, eps)
    c.write(mean, made[3])
    c.write(variance, made[4])
    return [*made[:3], *(None for _ in results_of(c.call)[3:])]


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
    y, *rows = batch_norm_training(c, x, weight, bias, mean, variance, momentum, eps)
    # A GPU saves statistics of 16-bit floats in float32.
    return [y, *(c.b.cast_to(row, t.dtype) for row, t in zip(rows, results_of(c.call)[1:]))]


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


def _within(x: Tensor, kernel: tuple[int, ...], padding: tuple[int, ...]) -> tuple[int, ...]:
    """Windows cut to the padded input: a larger one, as ceil mode allows, sees no more."""
    sizes = x.shape[x.dim() - len(kernel) :]
    if not all(isinstance(s, int) for s in sizes):
        return kernel
    return tuple(min(k, int(s) + 2 * p) for k, s, p in zip(kernel, sizes, padding))


@lower("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(
    c: Importer, x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor: int | None = None,
) -> Value:  # fmt: skip
    rank = int(c.call.target._schema.name[-2])
    options = pool_options(rank, kernel, stride, padding)
    del options["dilation"]
    if ceil_mode and divisor is None:
        options["kernel"] = _within(x, options["kernel"], options["padding"])
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
