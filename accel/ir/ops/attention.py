"""Attention and rotary positions: composites that keep meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Trait, define
from accel.ir.ops.contract import CONTRACTION
from accel.ir.ops.elementwise import check_dtype
from accel.ir.types import (
    Dim,
    TensorType,
    at_least,
    broadcast_shapes,
    format_shape,
    same_dim,
    same_shape,
    simplify_dim,
)

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value


@define("attention", CONTRACTION)
class Attention:
    """softmax(scale * q k^T, masked) v (Vaswani et al., 2017; GQA: Ainslie et al., 2023).

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, E] with H a multiple of G: query head h uses key
    head h // (H / G). `mask` broadcasts to [B, H, S, T]: bool (true: attend) or additive in q's
    dtype. With `causal`, query i sees keys j <= i + `offset`; with `window`, only j > i + offset -
    window. `softcap` c replaces scores s by c * tanh(s / c) before masking. `sinks` [H], in q's
    dtype or float32, are scores of a key whose value is 0: exp(sinks[h]) joins the softmax's
    denominator (learned in gpt-oss; Xiao et al., 2024). Scores and softmax of 16-bit floats are
    float32. A row with no key attended is 0 where the mask is boolean.
    """

    @staticmethod
    def infer(
        q: TensorType,
        k: TensorType,
        v: TensorType,
        mask: TensorType | None = None,
        sinks: TensorType | None = None,
        *,
        scale: float,
        causal: bool = False,
        offset: Dim = 0,
        window: int | None = None,
        softcap: float | None = None,
    ) -> TensorType:
        check_dtype("attention", "f", q, k, v)
        if not q.rank == k.rank == v.rank == 4:
            raise TypeInferenceError(f"accel.attention: needs rank 4, got {q}, {k}, {v}")
        ok = same_dim(q.shape[3], k.shape[3]) and same_dim(k.shape[2], v.shape[2])
        ok = ok and same_dim(q.shape[0], k.shape[0]) and same_dim(q.shape[0], v.shape[0])
        heads, groups = q.shape[1], k.shape[1]
        if isinstance(heads, int) and isinstance(groups, int):
            ok = ok and groups > 0 and heads % groups == 0
        if not ok or not same_dim(groups, v.shape[1]):
            raise TypeInferenceError(f"accel.attention: {q}, {k}, {v} do not fit")
        if mask is not None:
            full = (q.shape[0], heads, q.shape[2], k.shape[2])
            if not same_shape(broadcast_shapes(mask.shape, full), full):
                raise TypeInferenceError(f"accel.attention: mask {mask} for {format_shape(full)}")
            if mask.dtype not in (torch.bool, q.dtype):
                raise TypeInferenceError(f"accel.attention: a mask of {mask.dtype}")
        if sinks is not None and (
            not same_shape(sinks.shape, (heads,)) or sinks.dtype not in (q.dtype, torch.float32)
        ):
            raise TypeInferenceError(f"accel.attention: sinks {sinks} for {q}")
        return q.with_shape((q.shape[0], heads, q.shape[2], v.shape[3]))

    @staticmethod
    def evaluate(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
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
        if sinks is None:
            weights = torch.softmax(scores, -1)
        else:
            column = sinks.to(wide).reshape(-1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
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
        sinks: Value | None = None,
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
        if sinks is None:
            weights = b.softmax(scores, axis=3)
        else:
            column = b.reshape(b.cast_to(sinks, dtype), shape=(1, heads, 1, 1))
            column = b.broadcast_to(column, shape=(batch, heads, queries, 1))
            weights = b.softmax(b.cat(scores, column, axis=3), axis=3)
            weights = b.slice(weights, axis=3, start=0, stop=keys)
        if keep is not None:
            some = b.any(b.broadcast_to(keep, shape=scores.shape), axes=(3,), keepdim=True)
            weights = b.where(some, weights, b.scalar(0.0, dtype))
        return b.cast_to(b.matmul(weights, wide_v), q.dtype)


@define("cached_attention", CONTRACTION)
class CachedAttention:
    """Attention of new queries over a key/value cache (`attention`, and the position is data).

    q [B, H, S, D], k [B, G, C, D], v [B, G, C, E], position 0-d int64 or int32, or [B] where texts
    of unequal length run together: query i stands at `position` + i and sees keys j <= position +
    i; with `window`, only j > position + i - window. What the cache holds behind that is not read.
    `mask` broadcasts to [B, H, S, C], as in `attention`; so do `sinks`, `scale` and `softcap` mean
    the same. In a `ring` the key of position j is in slot j mod C, and the newest key is the last
    query's; it takes a window of at most C - S + 1, and no mask.
    """

    @staticmethod
    def infer(
        q: TensorType,
        k: TensorType,
        v: TensorType,
        position: TensorType,
        mask: TensorType | None = None,
        sinks: TensorType | None = None,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        ring: bool = False,
    ) -> TensorType:
        each = position.rank == 1 and q.rank > 0 and same_dim(position.shape[0], q.shape[0])
        if not (each or position.rank == 0) or position.dtype not in (torch.int64, torch.int32):
            raise TypeInferenceError(f"accel.cached_attention: the position is {position}")
        if window is not None and window < 1:
            raise TypeInferenceError(f"accel.cached_attention: window = {window}")
        if ring:
            rows, slots = q.shape[2], k.shape[2]
            fits = window is not None and at_least(slots, simplify_dim(window + rows - 1))
            if mask is not None or window is None or not (fits or not isinstance(rows, int)):
                raise TypeInferenceError(
                    f"accel.cached_attention: a ring of {slots}, {rows} queries, window {window}"
                )
        return Attention.infer(q, k, v, mask, sinks, scale=scale)

    @staticmethod
    def evaluate(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        ring: bool = False,
    ) -> Tensor:
        if position.dim():
            attributes = {"scale": scale, "window": window, "softcap": softcap, "ring": ring}
            evaluate: Callable[..., Tensor] = CachedAttention.evaluate
            made = []
            for row, place in enumerate(position):
                one = [x[row : row + 1] for x in (q, k, v)]
                own = mask
                if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
                    own = mask[row : row + 1]
                made.append(evaluate(*one, place, own, sinks, **attributes))
            empty = q.new_empty(0, *q.shape[1:3], v.shape[3])
            return torch.cat([empty, *made])
        first, rows = int(position), q.shape[2]
        seen = min(max(first + rows, 0), k.shape[2])
        if ring:
            keep = _ring_keep(first, rows, seen, k.shape[2], window)
            keys, values = k[:, :, :seen], v[:, :, :seen]
            return Attention.evaluate(q, keys, values, keep, sinks, scale=scale, softcap=softcap)
        mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., :seen]
        return Attention.evaluate(
            q,
            k[:, :, :seen],
            v[:, :, :seen],
            mask,
            sinks,
            scale=scale,
            causal=True,
            offset=first,
            window=window,
            softcap=softcap,
        )

    @staticmethod
    def decompose(
        b: Builder,
        q: Value,
        k: Value,
        v: Value,
        position: Value,
        mask: Value | None = None,
        sinks: Value | None = None,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        ring: bool = False,
    ) -> Value:
        rows, columns = q.shape[2], k.shape[2]
        if position.shape:
            position = b.reshape(position, shape=(position.shape[0], 1, 1, 1))
        row = b.add(b.iota(shape=(rows, 1), axis=0, dtype=position.dtype), position)
        column = b.iota(shape=(1, columns), axis=1, dtype=position.dtype)
        if ring:  # the position in each slot: the last one that is congruent
            last = b.add(position, b.size_like(simplify_dim(rows - 1), position.dtype))
            back = b.remainder(b.sub(last, column), b.size_like(columns, position.dtype))
            column = b.sub(last, back)
        keep = b.le(column, row)
        if ring:
            keep = b.logical_and(keep, b.ge(column, b.scalar(0, position.dtype)))
        if window is not None:
            after = b.gt(column, b.sub(row, b.scalar(window, position.dtype)))
            keep = b.logical_and(keep, after)
        if mask is not None and mask.dtype == torch.bool:
            keep = b.logical_and(keep, mask)
        elif mask is not None:
            keep = b.where(keep, mask, b.scalar(float("-inf"), mask.dtype))
        made: Value = b.attention(q, k, v, keep, sinks, scale=scale, softcap=softcap)
        return made


def _ring_keep(first: int, rows: int, seen: int, slots: int, window: int | None) -> Tensor:
    """Which of the first `seen` slots each query sees, [rows, seen]."""
    last = first + rows - 1
    row = torch.arange(first, last + 1)[:, None]
    column = last - (last - torch.arange(seen)) % slots
    keep = column <= row
    return keep if window is None else keep & (column > row - window)


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


@define("rope", Trait.PURE)
class Rope:
    """Rotary position embedding (Su et al., 2021): x * cos + rotate(x) * sin, over the last axis.

    x is [..., S, D]; cos and sin broadcast to it and are full width: in style "half" (Llama)
    element i pairs with i + D / 2 and rotate(x) = cat(-x[D/2:], x[:D/2]); in style "interleaved"
    (GPT-J) 2i pairs with 2i + 1. 16-bit floats are computed in float32 and rounded once.
    """

    @staticmethod
    def infer(
        x: TensorType, cos: TensorType, sin: TensorType, *, style: str = "half"
    ) -> TensorType:
        check_dtype("rope", "f", x, cos, sin)
        if style not in ("half", "interleaved"):
            raise TypeInferenceError(f"accel.rope: style = '{style}'")
        width = x.shape[-1] if x.rank else 1
        if isinstance(width, int) and width % 2:
            raise TypeInferenceError(f"accel.rope: the last axis of {x} is odd")
        for t in (cos, sin):
            if not same_shape(broadcast_shapes(x.shape, t.shape), x.shape):
                raise TypeInferenceError(f"accel.rope: {t} does not broadcast to {x}")
        return x

    @staticmethod
    def evaluate(x: Tensor, cos: Tensor, sin: Tensor, *, style: str = "half") -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        if style == "half":
            first, second = wide.chunk(2, -1)
            rotated = torch.cat((-second, first), -1)
        else:
            pairs = torch.stack((-wide[..., 1::2], wide[..., ::2]), -1)
            rotated = pairs.reshape(x.shape)
        return (wide * cos.to(wide.dtype) + rotated * sin.to(wide.dtype)).to(x.dtype)

    @staticmethod
    def decompose(b: Builder, x: Value, cos: Value, sin: Value, *, style: str = "half") -> Value:
        wide = b.widen(x)
        axis, width = len(x.shape) - 1, x.shape[-1]
        half = width // 2
        if style == "half":
            first = b.slice(wide, axis=axis, start=0, stop=half)
            second = b.slice(wide, axis=axis, start=half, stop=width)
            rotated = b.cat(b.neg(second), first, axis=axis)
        else:
            pairs = b.reshape(wide, shape=(*x.shape[:-1], half, 2))
            even = b.slice(pairs, axis=axis + 1, start=0, stop=1)
            odd = b.slice(pairs, axis=axis + 1, start=1, stop=2)
            rotated = b.reshape(b.cat(b.neg(odd), even, axis=axis + 1), shape=x.shape)
        turned = b.mul(rotated, b.cast_to(sin, wide.dtype))
        return b.cast_to(b.add(b.mul(wide, b.cast_to(cos, wide.dtype)), turned), x.dtype)
