"""Attention for training: the output with its logsumexp, and the gradients from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Lit, aten, define
from accel.ir.ops.contract import CONTRACTION
from accel.ir.ops.elementwise import check_dtype
from accel.ir.ops.norm_backward import check_grad
from accel.ir.types import TensorType, broadcast_shapes, format_shape, same_dim, same_shape

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value


def check_flash(
    name: str,
    q: TensorType,
    k: TensorType,
    v: TensorType,
    mask: TensorType | None,
    window: int | None,
) -> None:
    """TypeInferenceError unless q [B, H, S, D], k [B, G, T, D], v like k and the mask fit."""
    check_dtype(name, "f", q, k, v)
    if q.rank != 4 or not same_shape(k.shape, v.shape) or k.rank != 4:
        raise TypeInferenceError(f"accel.{name}: {q}, {k}, {v}")
    if 0 in (*q.shape, *k.shape):  # torch's kernel divides by these
        raise TypeInferenceError(f"accel.{name}: {q} and {k} are empty")
    heads, groups = q.shape[1], k.shape[1]
    both = isinstance(heads, int) and isinstance(groups, int)
    shared = heads % groups == 0 if both else same_dim(heads, groups)
    if not shared or not same_shape((q.shape[0], q.shape[3]), (k.shape[0], k.shape[3])):
        raise TypeInferenceError(f"accel.{name}: {q}, {k}, {v}")
    if window is not None and window < 1:
        raise TypeInferenceError(f"accel.{name}: window = {window}")
    if mask is not None:
        full = (*q.shape[:3], k.shape[2])
        dtype_fits = mask.dtype == q.dtype or mask.dtype == torch.float32
        if not dtype_fits or not same_shape(broadcast_shapes(mask.shape, full), full):
            raise TypeInferenceError(f"accel.{name}: mask {mask} for {format_shape(full)}")


def spread_groups(b: Builder, x: Value, heads: Any) -> Value:
    """x [B, G, ...] with each of its heads as often as query heads share it: [B, H, ...]."""
    batch, groups = x.shape[:2]
    if same_dim(groups, heads):
        return x
    one = b.reshape(x, shape=(batch, groups, 1, *x.shape[2:]))
    five = (batch, groups, heads // groups, *x.shape[2:])
    made: Value = b.reshape(b.broadcast_to(one, shape=five), shape=(batch, heads, *x.shape[2:]))
    return made


def flash_scores(
    b: Builder,
    q: Value,
    k: Value,
    mask: Value | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[Value, Value | None]:
    """The scores of `flash_attention` in the wide dtype, what is hidden at -inf; and tanh(s / c)
    of those that were capped."""
    wide_q, wide_k = b.widen(q), b.widen(spread_groups(b, k, q.shape[1]))
    scores = b.matmul(wide_q, b.permute(wide_k, axes=(0, 1, 3, 2)))
    scores = b.mul(scores, b.scalar(scale, wide_q.dtype))
    bent: Value | None = None
    if softcap is not None:
        cap = b.scalar(softcap, wide_q.dtype)
        bent = b.tanh(b.div(scores, cap))
        scores = b.mul(bent, cap)
    if mask is not None:
        scores = b.add(scores, b.cast_to(mask, wide_q.dtype))
    if causal or window is not None:
        rows, columns = q.shape[2], k.shape[2]
        lower = None if window is None else -window
        keep = b.tri_mask(
            rows=rows, columns=columns, diagonal=0 if causal else columns, lower=lower
        )
        scores = b.where(keep, scores, b.scalar(float("-inf"), wide_q.dtype))
    return scores, bent


def is_plain(values: Mapping[str, Any]) -> bool:
    """Whether torch's kernel takes this attention: no window, no cap, a key head a query head."""
    heads = same_dim(values["q"].shape[1], values["k"].shape[1])
    return heads and values["window"] is None and values["softcap"] is None


@define("flash_attention", CONTRACTION)
class FlashAttention:
    """Attention for training (Dao et al., 2022): the output, and log(sum(exp(scores))) [B, H, S].

    q [B, H, S, D], k and v [B, G, T, D], query head h uses key head h // (H / G); `mask` is added
    to the scores; with `causal`, query i sees keys j <= i, with `window` only j > i - window;
    `softcap` c makes c * tanh(s / c) of scores s before masking. The logsumexp of 16-bit floats is
    float32. A query that sees no key has an output of 0, and a logsumexp of 0.
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
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[TensorType, TensorType]:
        check_flash("flash_attention", q, k, v, mask, window)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q, TensorType(q.shape[:3], wide)

    call = aten(
        "_scaled_dot_product_flash_attention_for_cpu", "q", "k", "v", Lit(0.0), "causal",
        attn_mask="mask", scale="scale", when=is_plain,
    )  # fmt: skip

    @staticmethod
    def evaluate(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        *,
        scale: float,
        causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
    ) -> list[Tensor]:
        if is_plain({"q": q, "k": k, "window": window, "softcap": softcap}):
            made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
                q, k, v, 0.0, causal, attn_mask=mask, scale=scale
            )
            return list(made)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        keys, values = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores, _ = torch_scores(q.to(wide), keys, mask, scale, causal, window, softcap)
        total = torch.logsumexp(scores, -1)
        total = torch.where(total == float("-inf"), 0.0, total)
        return [((scores - total[..., None]).exp() @ values).to(q.dtype), total]

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
        window: int | None = None,
        softcap: float | None = None,
    ) -> list[Value]:
        scores, _ = flash_scores(b, q, k, mask, scale, causal, window, softcap)
        total = b.logsumexp(scores, axes=(3,), keepdim=True)
        lowest, zero = (b.scalar(number, total.dtype) for number in (float("-inf"), 0.0))
        total = b.where(b.eq(total, lowest), zero, total)
        values = b.widen(spread_groups(b, v, q.shape[1]))
        y = b.matmul(b.exp(b.sub(scores, total)), values)
        return [b.cast_to(y, q.dtype), b.reshape(total, shape=q.shape[:3])]


def torch_scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """`flash_scores` of tensors; k has q's heads and dtype."""
    scores, bent = q @ k.transpose(-1, -2) * scale, None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores = bent * softcap
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    rows, columns = scores.shape[-2:]
    distance = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    keep = torch.ones(rows, columns, dtype=torch.bool)
    if causal:
        keep &= distance <= 0
    if window is not None:
        keep &= distance > -window
    return scores.masked_fill(~keep, float("-inf")), bent


@define("flash_attention_backward", CONTRACTION)
class FlashAttentionBackward:
    """Gradients of `flash_attention` for q, k and v, from its output and logsumexp."""

    @staticmethod
    def infer(
        grad: TensorType,
        q: TensorType,
        k: TensorType,
        v: TensorType,
        output: TensorType,
        logsumexp: TensorType,
        mask: TensorType | None = None,
        *,
        scale: float,
        causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[TensorType, TensorType, TensorType]:
        name = "flash_attention_backward"
        check_flash(name, q, k, v, mask, window)
        check_grad(name, grad, q)
        check_grad(name, output, q)
        if not same_shape(logsumexp.shape, q.shape[:3]):
            raise TypeInferenceError(f"accel.{name}: logsumexp {logsumexp} for {q}")
        return q, k, v

    call = aten(
        "_scaled_dot_product_flash_attention_for_cpu_backward", "grad", "q", "k", "v", "output",
        "logsumexp", Lit(0.0), "causal", attn_mask="mask", scale="scale", when=is_plain,
    )  # fmt: skip

    @staticmethod
    def evaluate(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        mask: Tensor | None = None,
        *,
        scale: float,
        causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
    ) -> list[Tensor]:
        if is_plain({"q": q, "k": k, "window": window, "softcap": softcap}):
            made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
                grad, q, k, v, output, logsumexp, 0.0, causal, attn_mask=mask, scale=scale
            )
            return list(made)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        g, queries = grad.to(wide), q.to(wide)
        share = q.shape[1] // k.shape[1]
        keys, values = (x.to(wide).repeat_interleave(share, 1) for x in (k, v))
        scores, bent = torch_scores(queries, keys, mask, scale, causal, window, softcap)
        p = (scores - logsumexp.to(wide)[..., None]).exp()
        delta = (g * output.to(wide)).sum(-1, keepdim=True)
        s_grad = p * (g @ values.transpose(-1, -2) - delta) * scale
        if bent is not None:
            s_grad = s_grad * (1 - bent * bent)
        each = (s_grad.transpose(-1, -2) @ queries, p.transpose(-1, -2) @ g)
        summed = (x.unflatten(1, (-1, share)).sum(2) for x in each)
        return [x.to(q.dtype) for x in (s_grad @ keys, *summed)]

    @staticmethod
    def decompose(
        b: Builder,
        grad: Value,
        q: Value,
        k: Value,
        v: Value,
        output: Value,
        logsumexp: Value,
        mask: Value | None = None,
        *,
        scale: float,
        causal: bool = False,
        window: int | None = None,
        softcap: float | None = None,
    ) -> list[Value]:
        g, wide_q = b.widen(grad), b.widen(q)
        wide_k, wide_v = (b.widen(spread_groups(b, x, q.shape[1])) for x in (k, v))
        swap = (0, 1, 3, 2)
        scores, bent = flash_scores(b, q, k, mask, scale, causal, window, softcap)
        total = b.reshape(b.cast_to(logsumexp, wide_q.dtype), shape=(*q.shape[:3], 1))
        p = b.exp(b.sub(scores, total))
        v_grad = b.matmul(b.permute(p, axes=swap), g)
        delta = b.sum(b.mul(g, b.widen(output)), axes=(3,), keepdim=True)
        inner = b.sub(b.matmul(g, b.permute(wide_v, axes=swap)), delta)
        s_grad = b.mul(b.mul(p, inner), b.scalar(scale, wide_q.dtype))
        if bent is not None:
            s_grad = b.mul(s_grad, b.sub(b.scalar(1.0, wide_q.dtype), b.mul(bent, bent)))
        q_grad = b.matmul(s_grad, wide_k)
        k_grad = b.matmul(b.permute(s_grad, axes=swap), wide_q)
        if not same_shape(k.shape[:2], q.shape[:2]):
            five = (*k.shape[:2], q.shape[1] // k.shape[1], *k.shape[2:])
            k_grad, v_grad = (b.sum(b.reshape(x, shape=five), axes=(2,)) for x in (k_grad, v_grad))
        return [b.cast_to(m, q.dtype) for m in (q_grad, k_grad, v_grad)]
