"""Products: matmul and its relatives, linear, convolution, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accel.frontends.aten.views import broadcast
from accel.frontends.importer import Importer, lower
from accel.ir.module import Region, Value, constant_name
from accel.ir.types import is_float


def _product(c: Importer, x: Value, y: Value, bias: Value | None = None) -> Value:
    """x @ y (+ bias); `linear` where y is a transposed weight, as autograd's graphs write it."""
    op = y.op
    if op is not None and op.name == "permute" and op.attributes["axes"] == (1, 0):
        weight = op.operands[0]
        if constant_name(weight) is not None or isinstance(weight.owner, Region):
            result: Value = c.b.linear(x, weight, bias)
            return result
    made: Value = c.b.matmul(x, y)
    return made if bias is None else c.b.add(made, bias)


@lower("linear")
def linear(c: Importer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Value:
    if weight.dim() == 1:
        return NotImplemented
    result: Value = c.b.linear(c(x), c(weight), None if bias is None else c(bias))
    return result


@lower("mm", "bmm")
def mm(c: Importer, x: Tensor, y: Tensor) -> Value:
    return _product(c, c(x), c(y)) if is_float(x.dtype) else _exact_product(c, c(x), c(y))


def _exact_product(c: Importer, x: Value, y: Value) -> Value:
    """Integer products keep their dtype; int8 would give int32."""
    if x.dtype == torch.int8:
        wide = c.b.matmul(x, y)
        return c.b.cast_to(wide, torch.int8)
    result: Value = c.b.matmul(x, y)
    return result


@lower("matmul")
def matmul(c: Importer, x: Tensor, y: Tensor) -> Value:
    """Any ranks: one-dimensional operands become a row or a column."""
    a, b = c(x), c(y)
    if x.dim() == 0 or y.dim() == 0:
        return NotImplemented
    if x.dim() == 1:
        a = c.b.reshape(a, shape=(1, *a.shape))
    if y.dim() == 1:
        b = c.b.reshape(b, shape=(*b.shape, 1))
    made = _product(c, a, b) if is_float(x.dtype) else _exact_product(c, a, b)
    return c.b.reshape_to(made, c.out_shape)


@lower("mv", "dot", "vdot")
def mv(c: Importer, x: Tensor, y: Tensor) -> Value:
    return matmul(c, x, y)


@lower("addmm", "addbmm", "baddbmm")
def addmm(
    c: Importer, bias: Tensor, x: Tensor, y: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Value:
    """beta * bias + alpha * x @ y; with beta 0 the bias is not read, not even its NaNs."""
    dtype = c.out_dtype
    if c.call.target._schema.name == "aten::addbmm":
        return _add_summed(c, bias, x, y, beta, alpha)
    plain = alpha == 1 and beta == 1
    if plain and bias.dim() == 1 and is_float(dtype):
        return _product(c, c(x), c(y), c(bias))
    made = _product(c, c(x), c(y)) if is_float(dtype) else _exact_product(c, c(x), c(y))
    if alpha != 1:
        made = c.b.mul(made, c.scalar(alpha, dtype))
    if beta == 0:
        return made
    extra = c(bias) if beta == 1 else c.b.mul(c(bias), c.scalar(beta, dtype))
    result: Value = c.b.add(extra, made)
    return result


def _add_summed(c: Importer, bias: Tensor, x: Tensor, y: Tensor, beta: Any, alpha: Any) -> Value:
    """beta * bias + alpha * the sum of x[i] @ y[i]."""
    if c.out_dtype not in (torch.float32, torch.float64):
        return NotImplemented  # ATen rounds each partial sum of 16-bit floats
    made = c.b.sum(c.b.matmul(c(x), c(y)), axes=(0,))
    made = c.b.mul(made, c.scalar(alpha, c.out_dtype)) if alpha != 1 else made
    if beta == 0:
        return broadcast(c, made, c.out_shape)
    extra = c(bias) if beta == 1 else c.b.mul(c(bias), c.scalar(beta, c.out_dtype))
    result: Value = c.b.add(extra, made)
    return result


@lower("addmv")
def addmv(
    c: Importer, bias: Tensor, x: Tensor, y: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Value:
    if beta != 1 or alpha != 1:
        return NotImplemented
    result: Value = c.b.add(matmul(c, x, y), c(bias))
    return result


def per_axis(value: Sequence[int] | int, rank: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * rank if len(values) == 1 else values))


def _conv(
    c: Importer, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any,
    dilation: Any, groups: int, transposed: bool = False, output_padding: Any = (0,),
) -> Value:  # fmt: skip
    rank = weight.dim() - 2
    value = c(x)
    single = x.dim() == rank + 1  # one example without a batch axis
    if single:
        value = c.b.reshape(value, shape=(1, *value.shape))
    options: dict[str, Any] = {
        "stride": per_axis(stride, rank),
        "padding": per_axis(padding, rank),
        "dilation": per_axis(dilation, rank),
        "groups": int(groups),
    }
    extra = None if bias is None else c(bias)
    if transposed:
        options["output_padding"] = per_axis(output_padding, rank)
        made = c.b.conv_transpose(value, c(weight), extra, **options)
    else:
        made = c.b.conv(value, c(weight), extra, **options)
    return c.b.reshape_to(made, c.out_shape) if single else made


@lower("conv1d", "conv2d", "conv3d")
def conv(
    c: Importer, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = (1,),
    padding: Any = (0,), dilation: Any = (1,), groups: int = 1,
) -> Value:  # fmt: skip
    return _conv(c, x, weight, bias, stride, padding, dilation, groups)


@lower("convolution")
def convolution(
    c: Importer, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int,
) -> Value:  # fmt: skip
    return _conv(c, x, weight, bias, stride, padding, dilation, groups, transposed, output_padding)


@lower("conv1d.padding", "conv2d.padding", "conv3d.padding")
def conv_named_padding(
    c: Importer, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = (1,),
    padding: str = "valid", dilation: Any = (1,), groups: int = 1,
) -> Value:  # fmt: skip
    rank = weight.dim() - 2
    if padding == "valid":
        return _conv(c, x, weight, bias, stride, (0,), dilation, groups)
    total = [
        d * (k - 1) for d, k in zip(per_axis(dilation, rank), (int(k) for k in weight.shape[2:]))
    ]
    if any(t % 2 for t in total):
        return NotImplemented  # padded more on one side
    return _conv(c, x, weight, bias, stride, [t // 2 for t in total], dilation, groups)


@lower("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")
def conv_transpose(
    c: Importer, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = (1,),
    padding: Any = (0,), output_padding: Any = (0,), groups: int = 1, dilation: Any = (1,),
) -> Value:  # fmt: skip
    return _conv(
        c, x, weight, bias, stride, padding, dilation, groups, True, output_padding
    )  # fmt: skip


def _attention(
    c: Importer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool,
    scale: float | None,
) -> Value:  # fmt: skip
    """`attention` over [batch, heads, length, width]; other ranks are reshaped."""
    width = q.shape[-1]
    if isinstance(width, torch.SymInt):
        return NotImplemented
    factor = 1.0 / math.sqrt(width) if scale is None else float(scale)
    values = [c(t) for t in (q, k, v)]
    keep = None if mask is None else c(mask)
    if keep is not None and keep.dtype != torch.bool:
        keep = c.b.cast_to(keep, q.dtype)
    if q.dim() == 3:
        values = [c.b.reshape(t, shape=(t.shape[0], 1, *t.shape[1:])) for t in values]
        if keep is not None and len(keep.shape) == 3:
            keep = c.b.reshape(keep, shape=(keep.shape[0], 1, *keep.shape[1:]))
    elif q.dim() == 2:
        values = [c.b.reshape(t, shape=(1, 1, *t.shape)) for t in values]
    elif q.dim() != 4:
        return NotImplemented
    made = c.b.attention(*values, keep, scale=factor, causal=bool(causal))
    return c.b.reshape_to(made, c.out_shape)


@lower("scaled_dot_product_attention")
def sdpa(
    c: Importer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
    dropout: float = 0.0, causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:  # fmt: skip
    if dropout != 0.0:
        return NotImplemented
    return _attention(c, q, k, v, mask, causal, scale)


def spread_heads(c: Importer, x: Value, heads: int) -> Value:
    """[B, G, T, D] to [B, heads, T, D]: each of the G heads serves heads / G queries in turn."""
    batch, groups, *rest = x.shape
    if not isinstance(groups, int) or groups == heads:
        return x
    one = c.b.reshape(x, shape=(batch, groups, 1, *rest))
    wide = c.b.broadcast_to(one, shape=(batch, groups, heads // groups, *rest))
    return c.b.reshape_to(wide, (batch, heads, *rest))


def gather_heads(c: Importer, grad: Value, groups: int) -> Value:
    """The gradient of `spread_heads`: a sum over the queries that share a head."""
    batch, heads, *rest = grad.shape
    if not isinstance(heads, int) or groups == heads:
        return grad
    split = c.b.reshape(grad, shape=(batch, groups, heads // groups, *rest))
    result: Value = c.b.sum(split, axes=(2,))
    return result


@lower("_scaled_dot_product_flash_attention_for_cpu")
def sdpa_cpu(
    c: Importer, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> list[Value | None]:  # fmt: skip
    """With its log-sum-exp only if that is used, which is in training."""
    if dropout != 0.0:
        return c.fallback(c.call)
    if c.is_used(c.call.result[1]):
        factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        mask = None if attn_mask is None else c(attn_mask)
        keys, values = (spread_heads(c, c(t), q.shape[1]) for t in (k, v))
        return list(
            c.b.flash_attention(c(q), keys, values, mask, scale=factor, causal=bool(causal))
        )
    result = _attention(c, q, k, v, attn_mask, causal, scale)
    return c.fallback(c.call) if result is NotImplemented else [result, None]
