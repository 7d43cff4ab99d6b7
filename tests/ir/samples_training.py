"""Samples of losses and backward ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.ir.sample_base import Sizes, _Case, sample, samples, t
from tests.ir.samples_nn import HALVES, UPSAMPLES, affine, narrow, parameter_dtypes

I64 = torch.int64

Cases = Iterator[_Case]


@samples("nll_loss")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    x, target = t(dtype, d.n, 6, kind="log_probability"), t(I64, d.n, kind="index:6")
    for reduction in ("none", "mean", "sum"):
        yield sample([x, target, None], reduction=reduction)
        yield sample([x, target, t(dtype, 6, kind="positive")], reduction=reduction)
    yield sample([x, target, None], ignore_index=2)
    image = t(dtype, d.b, 6, d.n, 3, kind="log_probability")
    yield sample([image, t(I64, d.b, d.n, 3, kind="index:6"), None], ignore_index=1)
    yield sample([t(dtype, 6, kind="log_probability"), t(I64, kind="index:6"), None])


@samples("nll_loss_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    x, target = t(dtype, d.n, 6, kind="log_probability"), t(I64, d.n, kind="index:6")
    total, weight = t(dtype, kind="positive"), t(dtype, 6, kind="positive")
    for reduction in ("mean", "sum"):
        yield sample([t(dtype), x, target, total, None], reduction=reduction)
        yield sample([t(dtype), x, target, total, weight], reduction=reduction)
    yield sample([t(dtype, d.n), x, target, total, None], reduction="none", ignore_index=2)
    image = t(dtype, d.b, 6, d.n, 3, kind="log_probability")
    yield sample([t(dtype), image, t(I64, d.b, d.n, 3, kind="index:6"), total, None])


@samples("native_layer_norm_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    x = t(dtype, d.b, d.n, d.k)
    for weight, bias in affine(dtype, d.k):
        saved = weight.type.dtype if weight is not None else dtype
        rows = [t(saved, d.b, d.n, 1), t(saved, d.b, d.n, 1, kind="positive")]
        mask = (True, weight is not None, bias is not None)
        yield sample([x, x, *rows, weight, bias], inner=narrow(dtype), rank=1, mask=mask)
    rows = [t(dtype, d.b, d.n, 1), t(dtype, d.b, d.n, 1, kind="positive")]
    yield sample([x, x, *rows, None, None], rank=1, mask=(True, False, False))


@samples("native_group_norm_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    x = t(dtype, d.b, 6, d.n, d.m)
    for weight, _bias in affine(dtype, 6):
        saved = weight.type.dtype if weight is not None else dtype
        rows = [t(saved, d.b, 3), t(saved, d.b, 3, kind="positive")]
        mask = (True, weight is not None, weight is not None)
        yield sample([x, x, *rows, weight], groups=3, mask=mask)


@samples("native_batch_norm_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    x = t(dtype, d.h, 4, d.n)
    for parameter in parameter_dtypes(dtype):
        row, positive = t(parameter, 4), t(parameter, 4, kind="positive")
        for train in (True, False):
            operands = [x, x, row, row, positive, row, positive]
            yield sample(operands, train=train, eps=1e-5)
        saved = [x, x, row, None, None, row, positive]
        yield sample(saved, train=True, eps=1e-5, mask=(True, True, False))


@samples("conv_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    one, zero = (1, 1), (0, 0)
    plain = {"stride": one, "padding": zero, "dilation": one}
    operands = [t(dtype, d.b, 6, 7, 5), t(dtype, d.b, 4, 9, 7), t(dtype, 6, 4, 3, 3)]
    yield sample(operands, **plain)
    yield sample(operands, **plain, mask=(False, True, False))
    grouped = [t(dtype, d.b, 4, 5, 4), t(dtype, d.b, 8, 9, 7), t(dtype, 4, 2, 3, 3)]
    rest = {"stride": (2, 2), "padding": (1, 1), "dilation": one, "groups": 4}
    yield sample(grouped, **rest)
    upward = [t(dtype, d.b, 6, 7, 9), t(dtype, d.b, 4, 5, 7), t(dtype, 4, 6, 3, 3)]
    yield sample(upward, **plain, transposed=True, output_padding=zero)


@samples("max_pool_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    rest = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}
    y = (d.b, 3, 4, 2)
    operands = [t(dtype, *y), t(dtype, d.b, 3, 8, 5), t(I64, *y, kind="index:40")]
    yield sample(operands, **rest)
    cube = {k: (v[0],) * 3 for k, v in rest.items()}
    y = (d.b, 3, 2, 2, 2)
    operands = [t(dtype, *y), t(dtype, d.b, 3, 4, 4, 5), t(I64, *y, kind="index:80")]
    yield sample(operands, **cube)


@samples("avg_pool_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    rest = {"kernel": (3, 2), "stride": (2, 2), "padding": (1, 0)}
    operands = [t(dtype, d.b, 3, 4, 2), t(dtype, d.b, 3, 7, 5)]
    yield sample(operands, **rest)
    yield sample(operands, **rest, count_include_pad=False)
    if dtype in HALVES:
        return
    cube = {"kernel": (2, 2, 2), "stride": (2, 2, 2), "padding": (0, 0, 0)}
    yield sample([t(dtype, d.b, 3, 2, 2, 2), t(dtype, d.b, 3, 4, 4, 5)], **cube)


@samples("adaptive_avg_pool_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, 3, 2, 1), t(dtype, d.b, 3, 7, 5)])
    yield sample([t(dtype, d.b, 3, 2, 1, 2), t(dtype, d.b, 3, 7, 5, 4)], rank=3)


@samples("adaptive_max_pool_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    y = (d.b, 3, 2, 1)
    yield sample([t(dtype, *y), t(dtype, d.b, 3, 7, 5), t(I64, *y, kind="index:35")])
    y3 = (d.b, 3, 2, 1, 2)
    x3 = t(dtype, d.b, 3, 2, 3, 4)
    yield sample([t(dtype, *y3), x3, t(I64, *y3, kind="index:24")], rank=3)


@samples("upsample_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    for mode, size in UPSAMPLES:
        shape = (d.b, 2, *(4, 5, 3)[: len(size)])
        yield sample([t(dtype, d.b, 2, *size)], input_shape=shape, mode=mode)


@samples("embedding_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    operands = [t(dtype, d.b, d.n, 6), t(I64, d.b, d.n, kind="index:7")]
    rest = {"inner": narrow(dtype), "rows": 7}  # each addition is rounded
    yield sample(operands, **rest)
    yield sample(operands, **rest, padding_index=3)


@samples("flash_attention_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, kv = t(dtype, d.b, 3, d.n, 8), t(dtype, d.b, 3, d.k, 8)
    total = t(wide, d.b, 3, d.n, kind="above1")
    rest = {"inner": narrow(dtype), "scale": 0.35}
    yield sample([q, q, kv, kv, q, total, None], **rest)
    yield sample([q, q, kv, kv, q, total, t(dtype, d.n, d.k)], **rest)
    yield sample([q, q, q, q, q, total, None], **rest, causal=True)
    one = t(dtype, d.b, 1, d.n, 8)
    yield sample([q, q, one, one, q, total, None], **rest, causal=True, window=2, softcap=1.5)
