"""Contractions, normalizations, softmax, attention, pooling: composites that keep meaning.

Accumulation is part of the meaning: contractions and reductions of 16-bit floats accumulate in
float32, of float32 in float32, of float64 in float64, of int8 in int32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Trait, aten, define
from accel.ir.types import (
    Dim,
    Shape,
    TensorType,
    broadcast_shapes,
    format_shape,
    normalize_axis,
    same_dim,
    simplify_dim,
)

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value

CONTRACTION = Trait.PURE | Trait.CONTRACTION
NORM = Trait.PURE | Trait.REDUCTION


def _same_dtype(name: str, *types: TensorType | None) -> None:
    dtypes = {t.dtype for t in types if t is not None}
    if len(dtypes) > 1:
        raise TypeInferenceError(f"accel.{name}: operands have dtypes {sorted(map(str, dtypes))}")


@define("matmul", CONTRACTION)
class MatMul:
    """[..., M, K] x [..., K, N] to [..., M, N]; leading axes broadcast. int8 gives int32."""

    @staticmethod
    def infer(x: TensorType, y: TensorType) -> TensorType:
        _same_dtype("matmul", x, y)
        if x.rank < 2 or y.rank < 2 or not same_dim(x.shape[-1], y.shape[-2]):
            raise TypeInferenceError(
                f"accel.matmul: {format_shape(x.shape)} x {format_shape(y.shape)}"
            )
        batch = broadcast_shapes(x.shape[:-2], y.shape[:-2])
        dtype = torch.int32 if x.dtype == torch.int8 else x.dtype
        return TensorType((*batch, x.shape[-2], y.shape[-1]), dtype)

    @staticmethod
    def evaluate(x: Tensor, y: Tensor) -> Tensor:
        if x.dtype == torch.int8:
            return torch.matmul(x.to(torch.int32), y.to(torch.int32))
        return torch.matmul(x, y)


@define("linear", CONTRACTION)
class Linear:
    """x [..., K] times weight [N, K] transposed, plus bias [N]."""

    @staticmethod
    def infer(x: TensorType, weight: TensorType, bias: TensorType | None = None) -> TensorType:
        _same_dtype("linear", x, weight, bias)
        if x.rank < 1 or weight.rank != 2 or not same_dim(x.shape[-1], weight.shape[1]):
            raise TypeInferenceError(
                f"accel.linear: {format_shape(x.shape)} with weight {format_shape(weight.shape)}"
            )
        if bias is not None and (bias.rank != 1 or not same_dim(bias.shape[0], weight.shape[0])):
            raise TypeInferenceError(f"accel.linear: bias {format_shape(bias.shape)}")
        return x.with_shape((*x.shape[:-1], weight.shape[0]))

    evaluate = aten("linear", "x", "weight", "bias")

    @staticmethod
    def decompose(b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Value:
        transposed = b.permute(weight, axes=(1, 0))
        if len(x.shape) == 1:
            rows = b.reshape(x, shape=(1, x.shape[0]))
            y = b.reshape(b.matmul(rows, transposed), shape=(weight.shape[0],))
        else:
            y = b.matmul(x, transposed)
        return y if bias is None else b.add(y, bias)


def _conv_output(size: Dim, kernel: Dim, stride: int, padding: int, dilation: int) -> Dim:
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    return simplify_dim(span // stride + 1)


@define("conv", CONTRACTION)
class Conv:
    """1-, 2- or 3-d convolution: x [B, C, ...], weight [O, C / groups, ...], bias [O].

    `layout` "nchw" or, for a channels-last program, "nhwc": then x is [B, ..., C] and so is the
    result; the weight's layout does not change.
    """

    @staticmethod
    def infer(
        x: TensorType,
        weight: TensorType,
        bias: TensorType | None = None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int = 1,
        layout: str = "nchw",
    ) -> TensorType:
        _same_dtype("conv", x, weight, bias)
        last = layout == "nhwc"
        spatial = x.shape[1:-1] if last else x.shape[2:]
        channels = x.shape[-1] if last else x.shape[1]
        if x.rank != weight.rank or len(stride) != x.rank - 2:
            raise TypeInferenceError(
                f"accel.conv: {format_shape(x.shape)} with weight {format_shape(weight.shape)}, "
                f"stride {stride}"
            )
        if not same_dim(channels, weight.shape[1] * groups):
            raise TypeInferenceError(
                f"accel.conv: {channels} channels, weight {format_shape(weight.shape)}, "
                f"groups {groups}"
            )
        out = [
            _conv_output(s, k, *p)
            for s, k, p in zip(spatial, weight.shape[2:], zip(stride, padding, dilation))
        ]
        if last:
            return x.with_shape((x.shape[0], *out, weight.shape[0]))
        return x.with_shape((x.shape[0], weight.shape[0], *out))

    @staticmethod
    def evaluate(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int = 1,
        layout: str = "nchw",
    ) -> Tensor:
        last = layout == "nhwc"
        y = torch.ops.aten.convolution(
            x.movedim(-1, 1) if last else x,
            weight, bias, stride, padding, dilation, False, [0] * len(stride), groups,
        )  # fmt: skip
        return y.movedim(1, -1) if last else y


@define("conv_transpose", CONTRACTION)
class ConvTranspose:
    """Transposed convolution: x [B, C, ...], weight [C, O / groups, ...], bias [O]."""

    @staticmethod
    def infer(
        x: TensorType,
        weight: TensorType,
        bias: TensorType | None = None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        output_padding: tuple[int, ...],
        groups: int = 1,
    ) -> TensorType:
        _same_dtype("conv_transpose", x, weight, bias)
        out = [
            simplify_dim((s - 1) * st - 2 * p + d * (k - 1) + op + 1)
            for s, k, st, p, d, op in zip(
                x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding
            )
        ]
        return x.with_shape((x.shape[0], simplify_dim(weight.shape[1] * groups), *out))

    @staticmethod
    def evaluate(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        output_padding: tuple[int, ...],
        groups: int = 1,
    ) -> Tensor:
        return torch.ops.aten.convolution(
            x, weight, bias, stride, padding, dilation, True, output_padding, groups
        )


@define("softmax", NORM)
class Softmax:
    """exp(x - max) over its sum, along `axis`."""

    @staticmethod
    def infer(x: TensorType, *, axis: int) -> TensorType:
        normalize_axis(axis, max(x.rank, 1))
        return x

    evaluate = aten("softmax.int", "x", "axis")

    @staticmethod
    def decompose(b: Builder, x: Value, *, axis: int) -> Value:
        wide = b.widen(x)
        shifted = b.sub(wide, b.amax(wide, axes=(axis,), keepdim=True))
        e = b.exp(shifted)
        return b.cast_to(b.div(e, b.sum(e, axes=(axis,), keepdim=True)), x.dtype)


@define("log_softmax", NORM)
class LogSoftmax:
    """log(softmax(x)) along `axis`."""

    @staticmethod
    def infer(x: TensorType, *, axis: int) -> TensorType:
        normalize_axis(axis, max(x.rank, 1))
        return x

    evaluate = aten("log_softmax.int", "x", "axis")

    @staticmethod
    def decompose(b: Builder, x: Value, *, axis: int) -> Value:
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
        for t in (weight, bias):
            if t is not None and (t.rank != rank):
                raise TypeInferenceError(f"accel.layer_norm: weight {t} for {rank} axes")
        return x

    @staticmethod
    def evaluate(
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        rank: int,
        eps: float,
    ) -> Tensor:
        return F.layer_norm(x, x.shape[x.dim() - rank :], weight, bias, eps)

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
        if weight is not None and (weight.rank != 1 or not same_dim(weight.shape[0], x.shape[-1])):
            raise TypeInferenceError(f"accel.rms_norm: weight {weight} for {x}")
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
        return x

    @staticmethod
    def evaluate(
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        groups: int,
        eps: float,
    ) -> Tensor:
        return F.group_norm(x, groups, weight, bias, eps)

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
        if x.rank < 2 or not same_dim(mean.shape[0], x.shape[1]):
            raise TypeInferenceError(f"accel.batch_norm: {x} with statistics {mean}")
        return x

    @staticmethod
    def evaluate(
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        eps: float,
    ) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

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


@define("attention", CONTRACTION)
class Attention:
    """softmax(scale * q k^T, masked) v (Vaswani et al., 2017; GQA: Ainslie et al., 2023).

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, E] with H a multiple of G: query head h uses key
    head h // (H / G). `mask` broadcasts to [B, H, S, T]: bool (true: attend) or additive in q's
    dtype. With `causal`, query i sees keys j <= i + `offset`; with `window`, only j > i + offset -
    window. `softcap` c replaces scores s by c * tanh(s / c) before masking. Scores and softmax of
    16-bit floats are float32. A row with no key attended is 0 where the mask is boolean.
    """

    @staticmethod
    def infer(
        q: TensorType,
        k: TensorType,
        v: TensorType,
        mask: TensorType | None = None,
        *,
        scale: float,
        causal: bool = False,
        offset: Dim = 0,
        window: int | None = None,
        softcap: float | None = None,
    ) -> TensorType:
        _same_dtype("attention", q, k, v)
        if not q.rank == k.rank == v.rank == 4:
            raise TypeInferenceError(f"accel.attention: needs rank 4, got {q}, {k}, {v}")
        ok = same_dim(q.shape[3], k.shape[3]) and same_dim(k.shape[2], v.shape[2])
        heads, groups = q.shape[1], k.shape[1]
        if isinstance(heads, int) and isinstance(groups, int):
            ok = ok and heads % groups == 0
        if not ok or not same_dim(groups, v.shape[1]):
            raise TypeInferenceError(f"accel.attention: {q}, {k}, {v} do not fit")
        if mask is not None:
            full = (q.shape[0], heads, q.shape[2], k.shape[2])
            broadcast_shapes(mask.shape, full)
            if mask.dtype not in (torch.bool, q.dtype):
                raise TypeInferenceError(f"accel.attention: a mask of {mask.dtype}")
        return q.with_shape((q.shape[0], heads, q.shape[2], v.shape[3]))

    @staticmethod
    def evaluate(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        *,
        scale: float,
        causal: bool = False,
        offset: int = 0,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        repeat = q.shape[1] // k.shape[1]
        keys = k.to(wide).repeat_interleave(repeat, 1)
        values = v.to(wide).repeat_interleave(repeat, 1)
        scores = (q.to(wide) @ keys.transpose(-1, -2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None and mask.dtype != torch.bool:
            scores = scores + mask.to(wide)
        keep = _attention_keep(scores, mask, causal, offset, window)
        if keep is not None:
            scores = scores.masked_fill(~keep, float("-inf"))
        weights = torch.softmax(scores, -1)
        if keep is not None:
            weights = torch.where(keep.any(-1, keepdim=True), weights, 0.0)
        return (weights @ values).to(q.dtype)

    @staticmethod
    def decompose(
        b: Builder,
        q: Value,
        k: Value,
        v: Value,
        mask: Value | None = None,
        *,
        scale: float,
        causal: bool = False,
        offset: Dim = 0,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Value:
        batch, heads, queries, _ = q.shape
        groups, keys = k.shape[1], k.shape[2]

        def spread(x: Value) -> Value:
            if groups == heads:
                return x
            five = (batch, groups, heads // groups, *x.shape[2:])
            one = b.reshape(x, shape=(batch, groups, 1, *x.shape[2:]))
            return b.reshape(b.broadcast_to(one, shape=five), shape=(batch, heads, *x.shape[2:]))

        wide_q, wide_k, wide_v = b.widen(q), b.widen(spread(k)), b.widen(spread(v))
        dtype = wide_q.dtype
        scores = b.matmul(wide_q, b.permute(wide_k, axes=(0, 1, 3, 2)))
        scores = b.mul(scores, b.scalar(scale, dtype))
        if softcap is not None:
            cap = b.scalar(softcap, dtype)
            scores = b.mul(cap, b.tanh(b.div(scores, cap)))
        keep: Value | None = None
        if mask is not None and mask.dtype != torch.bool:
            scores = b.add(scores, b.cast_to(mask, dtype))
        elif mask is not None:
            keep = mask
        if causal or window is not None:
            diagonal = offset if causal else keys
            lower = None if window is None else offset - window
            band = b.tri_mask(rows=queries, columns=keys, diagonal=diagonal, lower=lower)
            keep = band if keep is None else b.logical_and(keep, band)
        if keep is not None:
            scores = b.where(keep, scores, b.scalar(float("-inf"), dtype))
        weights = b.softmax(scores, axis=3)
        if keep is not None:
            some = b.any(b.broadcast_to(keep, shape=scores.shape), axes=(3,), keepdim=True)
            weights = b.where(some, weights, b.scalar(0.0, dtype))
        return b.cast_to(b.matmul(weights, wide_v), q.dtype)


def _attention_keep(
    scores: Tensor, mask: Tensor | None, causal: bool, offset: int, window: int | None
) -> Tensor | None:
    keep = mask if mask is not None and mask.dtype == torch.bool else None
    if causal or window is not None:
        rows, columns = scores.shape[-2:]
        distance = torch.arange(columns)[None, :] - torch.arange(rows)[:, None] - offset
        band = torch.ones(rows, columns, dtype=torch.bool)
        if causal:
            band &= distance <= 0
        if window is not None:
            band &= distance > -window
        keep = band if keep is None else keep & band
    return None if keep is None else keep.expand(scores.shape)


def _pooled(
    x: TensorType,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> TensorType:
    lead = x.rank - len(kernel)
    out: list[Dim] = []
    for size, k, s, p, d in zip(x.shape[lead:], kernel, stride, padding, dilation):
        span = size + 2 * p - d * (k - 1) - 1
        if ceil_mode:
            length = (span + s - 1) // s + 1
            if isinstance(length, int) and isinstance(size, int) and (length - 1) * s >= size + p:
                length -= 1  # the last window must start inside the input or its left padding
        else:
            length = span // s + 1
        out.append(simplify_dim(length))
    return x.with_shape((*x.shape[:lead], *out))


@define("max_pool", NORM)
class MaxPool:
    """Largest element of each window over the last len(kernel) axes; padding never wins."""

    @staticmethod
    def infer(
        x: TensorType,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        ceil_mode: bool = False,
    ) -> TensorType:
        return _pooled(x, kernel, stride, padding, dilation, ceil_mode)

    @staticmethod
    def evaluate(
        x: Tensor,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        ceil_mode: bool = False,
    ) -> Tensor:
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
        return pool(x, kernel, stride, padding, dilation, ceil_mode)


@define("avg_pool", NORM)
class AvgPool:
    """Mean of each window over the last len(kernel) axes."""

    @staticmethod
    def infer(
        x: TensorType,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> TensorType:
        return _pooled(x, kernel, stride, padding, (1,) * len(kernel), ceil_mode)

    @staticmethod
    def evaluate(
        x: Tensor,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> Tensor:
        if len(kernel) == 1:
            return F.avg_pool1d(x, kernel, stride, padding, ceil_mode, count_include_pad)
        pool = F.avg_pool2d if len(kernel) == 2 else F.avg_pool3d
        return pool(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor)


@define("adaptive_avg_pool", NORM)
class AdaptiveAvgPool:
    """Mean over windows that divide the last len(size) axes into `size` parts."""

    @staticmethod
    def infer(x: TensorType, *, size: Shape) -> TensorType:
        return x.with_shape((*x.shape[: x.rank - len(size)], *size))

    @staticmethod
    def evaluate(x: Tensor, *, size: tuple[int, ...]) -> Tensor:
        return getattr(F, f"adaptive_avg_pool{len(size)}d")(x, size)


@define("upsample", Trait.PURE)
class Upsample:
    """Interpolation of [B, C, ...] to spatial `size`: nearest, linear or cubic.

    `scales` are the factors as given by the user (empty: from the sizes), as in torch.
    """

    @staticmethod
    def infer(
        x: TensorType,
        *,
        size: Shape,
        mode: str,
        align_corners: bool = False,
        scales: tuple[float, ...] = (),
    ) -> TensorType:
        return x.with_shape((*x.shape[:2], *size))

    @staticmethod
    def evaluate(
        x: Tensor,
        *,
        size: tuple[int, ...],
        mode: str,
        align_corners: bool = False,
        scales: tuple[float, ...] = (),
    ) -> Tensor:
        rank = len(size)
        given = list(scales) if scales else [None] * rank
        if mode == "nearest":
            function = getattr(torch.ops.aten, f"upsample_nearest{rank}d").default
            return function(x, size, *given)
        kind = {"linear": ("linear1d", "bilinear2d", "trilinear3d"), "cubic": ("", "bicubic2d", "")}
        function = getattr(torch.ops.aten, f"upsample_{kind[mode][rank - 1]}").default
        return function(x, size, align_corners, *given)
