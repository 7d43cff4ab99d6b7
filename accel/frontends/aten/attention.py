"""Attention in the training graphs of CUDA: FlashAttention, cuDNN, memory-efficient.

All three are `flash_attention` with a logsumexp of another shape; which kernel runs is the
runtime's choice. Without dropout nothing random is kept: the seeds they return are zeros. With
dropout the overload stays whole (`accel.aten`), so that forward and backward drop the same.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from accel.frontends.aten.contractions import gather_heads, spread_heads
from accel.frontends.aten.nn import optional
from accel.frontends.importer import Importer, lower
from accel.ir.module import Value

Results = list[Value | None]


def _forward(
    c: Importer, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float,
    causal: bool, scale: float | None,
) -> Any:  # fmt: skip
    """Output and logsumexp; then as many results as the overload has, zeros where they are used."""
    if dropout != 0.0 or k.shape != v.shape:
        return c.fallback(c.call)
    _, lse, *rest = c.call.result
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    keys, values = (spread_heads(c, c(t), q.shape[1]) for t in (k, v))
    y, total = c.b.flash_attention(
        c(q), keys, values, optional(c, bias), scale=factor, causal=bool(causal)
    )
    made: Results = [y, _as_torch_has_it(c, total, lse)]
    for value in rest:
        used = isinstance(value, Tensor) and c.is_used(value)
        made.append(c.b.full_of(c.shape(value.shape), 0, value.dtype) if used else None)
    return made


def _as_torch_has_it(c: Importer, total: Value, lse: Tensor) -> Value | None:
    """The logsumexp [B, H, S] in torch's shape: with a last axis of 1, or rows padded."""
    if not c.is_used(lse):
        return None
    wanted = c.shape(lse.shape)
    if len(wanted) == len(total.shape) and wanted[-1] != total.shape[-1]:
        high = (0, 0, wanted[-1] - total.shape[-1])
        padded: Value = c.b.pad(total, low=(0, 0, 0), high=high, value=float("inf"))
        return padded
    return c.b.reshape_to(total, wanted)


def _backward(
    c: Importer, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor,
    bias: Tensor | None, causal: bool, scale: float | None,
) -> Results:  # fmt: skip
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    rows = c.shape(q.shape[:3])
    total = c(lse)
    if len(total.shape) == 3 and total.shape[-1] != rows[-1]:
        total = c.b.slice(total, axis=2, start=0, stop=rows[-1], step=1)
    keys, values = (spread_heads(c, c(t), q.shape[1]) for t in (k, v))
    to_q, to_k, to_v = c.b.flash_attention_backward(
        c(grad), c(q), keys, values, c(output), c.b.reshape_to(total, rows), optional(c, bias),
        scale=factor, causal=bool(causal),
    )  # fmt: skip
    return [to_q, gather_heads(c, to_k, k.shape[1]), gather_heads(c, to_v, v.shape[1])]


@lower("_scaled_dot_product_flash_attention")
def flash(
    c: Importer, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: float | None = None,
) -> Any:  # fmt: skip
    return _forward(c, q, k, v, None, dropout, causal, scale)


@lower("_scaled_dot_product_cudnn_attention")
def cudnn(
    c: Importer, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: bool,
    dropout: float = 0.0, causal: bool = False, debug: bool = False, *, scale: float | None = None,
) -> Any:  # fmt: skip
    return _forward(c, q, k, v, bias, dropout, causal, scale)


@lower("_scaled_dot_product_efficient_attention")
def efficient(
    c: Importer, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: bool,
    dropout: float = 0.0, causal: bool = False, *, scale: float | None = None,
) -> Any:  # fmt: skip
    return _forward(c, q, k, v, bias, dropout, causal, scale)


@lower("_scaled_dot_product_flash_attention_backward")
def flash_backward(
    c: Importer, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor,
    starts: Any, also_starts: Any, queries: Any, keys: Any, dropout: float, causal: bool,
    seed: Any, offset: Any, *, scale: float | None = None,
) -> Any:  # fmt: skip
    if dropout != 0.0 or k.shape != v.shape:
        return c.fallback(c.call)
    return _backward(c, grad, q, k, v, output, lse, None, causal, scale)


@lower("_scaled_dot_product_cudnn_attention_backward")
def cudnn_backward(
    c: Importer, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor,
    seed: Any, offset: Any, bias: Tensor | None, starts: Any, also_starts: Any, queries: Any,
    keys: Any, dropout: float, causal: bool, *, scale: float | None = None,
) -> Any:  # fmt: skip
    if dropout != 0.0 or k.shape != v.shape:
        return c.fallback(c.call)
    return _backward(c, grad, q, k, v, output, lse, bias, causal, scale)


@lower("_scaled_dot_product_efficient_attention_backward")
def efficient_backward(
    c: Importer, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    output: Tensor, lse: Tensor, seed: Any, offset: Any, dropout: float, mask: Any,
    causal: bool = False, *, scale: float | None = None,
) -> Any:  # fmt: skip
    if dropout != 0.0 or k.shape != v.shape or mask[3]:
        return c.fallback(c.call)
    return [*_backward(c, grad, q, k, v, output, lse, bias, causal, scale), None]
