"""What AOTAutograd's joint graphs hold besides inference ops: saved statistics and gradients.

Each is one op of the IR with the same meaning; a lowering only sorts arguments into operands and
attributes. An output mask says which gradients exist: absent ones are None here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accel.frontends.aten.contractions import gather_heads, per_axis, spread_heads
from accel.frontends.aten.nn import optional, pool_options
from accel.frontends.aten.reductions import at_least_1d, axis_of
from accel.frontends.importer import Importer, lower
from accel.ir.module import Value
from accel.ir.ops.norm_backward import NativeLayerNormBackward
from accel.ir.ops.training import statistics_dtype

Results = list[Value | None]


def masked(values: Any, mask: Sequence[bool]) -> Results:
    """The op's results at the places the mask wants, None elsewhere."""
    made = iter([values] if isinstance(values, Value) else values)
    return [next(made) if m else None for m in mask]


@lower(
    "gelu_backward", "silu_backward", "hardsigmoid_backward", "hardswish_backward",
    "mish_backward", "sigmoid_backward", "tanh_backward",
)  # fmt: skip
def activation_backward(c: Importer, grad: Tensor, x: Tensor, **options: Any) -> Value:
    name = c.call.target._schema.name.removeprefix("aten::")
    result: Value = getattr(c.b, name)(c(grad), c(x), **options)
    return result


@lower("threshold_backward")
def threshold_backward(c: Importer, grad: Tensor, x: Tensor, threshold: Any) -> Value:
    result: Value = c.b.threshold_backward(c(grad), c(x), threshold=float(threshold))
    return result


@lower("hardtanh_backward")
def hardtanh_backward(c: Importer, grad: Tensor, x: Tensor, low: Any, high: Any) -> Value:
    result: Value = c.b.hardtanh_backward(c(grad), c(x), min=float(low), max=float(high))
    return result


@lower("leaky_relu_backward")
def leaky_relu_backward(
    c: Importer, grad: Tensor, x: Tensor, slope: Any, self_is_result: bool
) -> Value:
    if self_is_result:
        return NotImplemented
    result: Value = c.b.leaky_relu_backward(c(grad), c(x), slope=float(slope))
    return result


@lower("elu_backward")
def elu_backward(
    c: Importer, grad: Tensor, alpha: Any, scale: Any, input_scale: Any, is_result: bool, x: Tensor
) -> Value:
    if is_result:
        return NotImplemented
    result: Value = c.b.elu_backward(
        c(grad), c(x), alpha=float(alpha), scale=float(scale), input_scale=float(input_scale)
    )
    return result


@lower("softplus_backward")
def softplus_backward(c: Importer, grad: Tensor, x: Tensor, beta: Any, threshold: Any) -> Value:
    result: Value = c.b.softplus_backward(
        c(grad), c(x), beta=float(beta), threshold=float(threshold)
    )
    return result


@lower("_softmax_backward_data", "_log_softmax_backward_data")
def softmax_backward(c: Importer, grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Value:
    if y.dtype != dtype or grad.dtype != dtype:
        return NotImplemented
    name = "log_softmax_backward" if "log" in c.call.target._schema.name else "softmax_backward"
    made = getattr(c.b, name)(at_least_1d(c, grad), at_least_1d(c, y), axis=axis_of(y, dim))
    return c.b.reshape_to(made, c.out_shape)


@lower("native_layer_norm_backward")
def layer_norm_backward(
    c: Importer, grad: Tensor, x: Tensor, shape: Sequence[Any], mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, mask: Sequence[bool],
) -> Results:  # fmt: skip
    operands = (c(grad), c(x), c(mean), c(rstd), optional(c, weight), optional(c, bias))
    if mean.dtype == statistics_dtype(x, weight, bias):
        made = c.b.native_layer_norm_backward(*operands, rank=len(shape), mask=tuple(mask))
        return masked(made, mask)
    # A GPU saves statistics of 16-bit floats in float32: the same formula in parts.
    parts = NativeLayerNormBackward.decompose(c.b, *operands, rank=len(shape), mask=tuple(mask))
    return masked(parts, mask)


@lower("native_group_norm_backward")
def group_norm_backward(
    c: Importer, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    n: Any, channels: Any, size: Any, groups: int, mask: Sequence[bool],
) -> Results:  # fmt: skip
    made = c.b.native_group_norm_backward(
        c(grad), c(x), c(mean), c(rstd), optional(c, weight), groups=int(groups), mask=tuple(mask)
    )
    return masked(made, mask)


@lower("native_batch_norm_backward")
def batch_norm_backward(
    c: Importer, grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor | None,
    variance: Tensor | None, save_mean: Tensor | None, save_rstd: Tensor | None, train: bool,
    eps: float, mask: Sequence[bool],
) -> Results:  # fmt: skip
    rows = [optional(c, t) for t in (mean, variance)]
    if train:
        saved = [optional(c, t) for t in (save_mean, save_rstd)]
    else:
        saved = [None, None]  # inference saved nothing, which ATen passes as empty tensors
    made = c.b.native_batch_norm_backward(
        c(grad), c(x), optional(c, weight), *rows, *saved,
        train=bool(train), eps=float(eps), mask=tuple(mask),
    )  # fmt: skip
    return masked(made, mask)


@lower("convolution_backward")
def convolution_backward(
    c: Importer, grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: Any,
    padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int,
    mask: Sequence[bool],
) -> Results:  # fmt: skip
    rank = weight.dim() - 2
    made = c.b.conv_backward(
        c(grad), c(x), c(weight),
        stride=per_axis(stride, rank), padding=per_axis(padding, rank),
        dilation=per_axis(dilation, rank), transposed=bool(transposed),
        output_padding=per_axis(output_padding, rank), groups=int(groups), mask=tuple(mask),
    )  # fmt: skip
    return masked(made, mask)


@lower("max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward")
def max_pool_backward(
    c: Importer, grad: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any,
    ceil_mode: bool, indices: Tensor,
) -> Value:  # fmt: skip
    rank = 2 if "2d" in c.call.target._schema.name else 3
    options = pool_options(rank, kernel, stride, padding, dilation)
    result: Value = c.b.max_pool_backward(
        c(grad), c(x), c(indices), **options, ceil_mode=bool(ceil_mode)
    )
    return result


@lower("avg_pool2d_backward", "avg_pool3d_backward")
def avg_pool_backward(
    c: Importer, grad: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any,
    ceil_mode: bool, count_include_pad: bool, divisor: int | None,
) -> Value:  # fmt: skip
    rank = 2 if "2d" in c.call.target._schema.name else 3
    options = pool_options(rank, kernel, stride, padding)
    del options["dilation"]
    result: Value = c.b.avg_pool_backward(
        c(grad), c(x), **options, ceil_mode=bool(ceil_mode),
        count_include_pad=bool(count_include_pad), divisor=divisor,
    )  # fmt: skip
    return result


@lower("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward")
def adaptive_avg_pool_backward(c: Importer, grad: Tensor, x: Tensor) -> Value:
    rank = 2 if "2d" in c.call.target._schema.name else 3
    result: Value = c.b.adaptive_avg_pool_backward(c(grad), c(x), rank=rank)
    return result


@lower("adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward")
def adaptive_max_pool_backward(c: Importer, grad: Tensor, x: Tensor, indices: Tensor) -> Value:
    rank = 2 if "2d" in c.call.target._schema.name else 3
    result: Value = c.b.adaptive_max_pool_backward(c(grad), c(x), c(indices), rank=rank)
    return result


@lower(
    "upsample_nearest1d_backward", "upsample_nearest2d_backward", "upsample_nearest3d_backward",
    "upsample_linear1d_backward", "upsample_bilinear2d_backward",
    "upsample_trilinear3d_backward", "upsample_bicubic2d_backward",
)  # fmt: skip
def upsample_backward(c: Importer, grad: Tensor, size: Any, input_shape: Any, *rest: Any) -> Value:
    name = c.call.target._schema.name
    mode = next(m for m in ("nearest", "cubic", "linear") if m in name)
    corners = bool(rest[0]) if mode != "nearest" else False
    factors = rest if mode == "nearest" else rest[1:]
    scales = () if any(f is None for f in factors) else tuple(float(f) for f in factors)
    result: Value = c.b.upsample_backward(
        c(grad), input_shape=c.shape(input_shape), mode=mode, align_corners=corners, scales=scales
    )
    return result


@lower("embedding_dense_backward")
def embedding_backward(
    c: Importer, grad: Tensor, indices: Tensor, rows: Any, padding: Any, by_frequency: bool
) -> Value:
    if by_frequency or not isinstance(rows, int):
        return NotImplemented
    padding_index = int(padding) if 0 <= int(padding) < rows else -1
    result: Value = c.b.embedding_backward(
        c(grad), c(indices), rows=rows, padding_index=padding_index
    )
    return result


@lower("_scaled_dot_product_flash_attention_for_cpu_backward")
def flash_attention_backward(
    c: Importer, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor,
    logsumexp: Tensor, dropout: float, causal: bool, *, attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Results:  # fmt: skip
    if dropout != 0.0:
        return NotImplemented
    factor = float(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    heads = q.shape[1]
    keys, values = (spread_heads(c, c(t), heads) for t in (k, v))
    to_q, to_k, to_v = c.b.flash_attention_backward(
        c(grad), c(q), keys, values, c(output), c(logsumexp), optional(c, attn_mask),
        scale=factor, causal=bool(causal),
    )  # fmt: skip
    return [to_q, gather_heads(c, to_k, k.shape[1]), gather_heads(c, to_v, v.shape[1])]


_REDUCTIONS = ("none", "mean", "sum")


@lower("nll_loss_forward", "nll_loss2d_forward")
def nll_loss(
    c: Importer, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: Any
) -> Results:
    made = c.b.nll_loss(
        c(x), c(target), optional(c, weight), reduction=_REDUCTIONS[reduction],
        ignore_index=int(ignore),
    )  # fmt: skip
    return list(made)


@lower("nll_loss_backward", "nll_loss2d_backward")
def nll_loss_backward(
    c: Importer, grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int,
    ignore: Any, total: Tensor,
) -> Value:  # fmt: skip
    result: Value = c.b.nll_loss_backward(
        c(grad), c(x), c(target), c(total), optional(c, weight),
        reduction=_REDUCTIONS[reduction], ignore_index=int(ignore),
    )  # fmt: skip
    return result
