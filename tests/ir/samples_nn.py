"""Samples of contractions, normalizations, attention and pooling."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from accel.ir.types import COMPLEX, FLOATS, INTEGERS
from tests.ir.sample_base import Operand, Sizes, _Case, sample, samples, t

HALVES = (torch.float16, torch.bfloat16)
BOOL = torch.bool

Cases = Iterator[_Case]


@samples("matmul", dtypes=FLOATS | COMPLEX | INTEGERS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n, d.k), t(dtype, d.b, d.k, d.m)])
    yield sample([t(dtype, d.b, 1, d.n, d.k), t(dtype, d.h, d.k, d.m)])
    yield sample([t(dtype, d.n, 300), t(dtype, 300, d.m)])


@samples("linear", dtypes=FLOATS | COMPLEX | (INTEGERS - {torch.int8}))
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    rounded = narrow(dtype)  # the decomposition rounds the product before it adds the bias
    yield sample([t(dtype, d.b, d.n, d.k), t(dtype, d.m, d.k), t(dtype, d.m)], inner=rounded)
    yield sample([t(dtype, d.b, d.k), t(dtype, d.m, d.k), None])
    yield sample([t(dtype, d.k), t(dtype, d.m, d.k), t(dtype, d.m)], inner=rounded)


def _window(rank: int, **changes: object) -> dict[str, object]:
    one = (1,) * rank
    return {"stride": one, "padding": (0,) * rank, "dilation": one, **changes}


@samples("conv", dtypes=FLOATS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    weight, bias = t(dtype, 6, 4, 3, 3), t(dtype, 6)
    yield sample([t(dtype, d.b, 4, d.n + 2, 7), weight, bias], **_window(2))
    changes = {"stride": (2, 1), "padding": (1, 2), "dilation": (2, 1)}
    yield sample([t(dtype, d.b, 4, 9, 7), weight, None], **_window(2, **changes))
    yield sample([t(dtype, d.b, 8, 7), t(dtype, 4, 2, 3), None], **_window(1, groups=4))
    yield sample([t(dtype, d.b, 3, 4, 5, 4), t(dtype, 2, 3, 2, 2, 2), None], **_window(3))
    yield sample([t(dtype, d.b, 6, d.n + 2, 4), weight, bias], **_window(2, layout="nhwc"))


@samples("conv_transpose", dtypes=FLOATS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    plain = _window(2, output_padding=(0, 0))
    yield sample([t(dtype, d.b, 4, d.n, 7), t(dtype, 4, 6, 3, 3), t(dtype, 6)], **plain)
    changes = {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 0), "groups": 2}
    weight = t(dtype, 4, 3, 3, 3)
    yield sample([t(dtype, d.b, 4, 5, 7), weight, None], **_window(2, **changes))
    one = _window(1, output_padding=(0,))
    yield sample([t(dtype, d.b, 4, 7), t(dtype, 4, 2, 3), None], **one)


@samples("cdist", dtypes=frozenset({torch.float32, torch.float64}))
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    for p in (2.0, 1.0, 0.0, 3.0, float("inf")):
        yield sample([t(dtype, d.b, d.n, 7), t(dtype, d.b, d.m, 7)], p=p)
    yield sample([t(dtype, d.n, 3), t(dtype, d.b, d.m, 3)])


@samples("softmax", "log_softmax")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n)], axis=1)
    yield sample([t(dtype, d.b, d.n, d.m)], axis=-2)
    yield sample([t(dtype)], axis=0)
    yield sample([t(dtype, 3, 10, kind="special")], axis=1, inner=narrow(dtype))


def narrow(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype itself if its kernels accumulate in another one."""
    return dtype if dtype in HALVES else None


def parameter_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes that a norm's parameters may have."""
    return (dtype, torch.float32) if dtype in HALVES else (dtype,)


def affine(dtype: torch.dtype, *shape: object) -> Iterator[tuple[Operand | None, Operand | None]]:
    """Weight and bias, present or not."""
    for parameter in parameter_dtypes(dtype):
        yield t(parameter, *shape), t(parameter, *shape)
    yield t(dtype, *shape), None
    yield None, None


@samples("layer_norm", "native_layer_norm")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    for weight, bias in affine(dtype, d.k):
        yield sample([t(dtype, d.b, d.n, d.k), weight, bias], rank=1, eps=1e-5)
    whole = (d.n, d.k)
    yield sample([t(dtype, d.b, *whole), t(dtype, *whole), None], rank=2, eps=1e-3)


@samples("rms_norm")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    for weight, _bias in affine(dtype, d.k):
        yield sample([t(dtype, d.b, d.n, d.k), weight], eps=1e-6)
    both = [t(dtype, d.b, d.k), t(dtype, d.k)]
    yield sample(both, eps=1e-6, offset=1.0)
    yield sample(both, eps=1e-6, cast_before_weight=True)


@samples("group_norm", "native_group_norm")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    for weight, bias in affine(dtype, 6):
        yield sample([t(dtype, d.b, 6, d.n, d.m), weight, bias], groups=3, eps=1e-5)
    yield sample([t(dtype, d.b, 6, d.n), None, None], groups=6, eps=1e-5)


@samples("batch_norm")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    for weight, bias in affine(dtype, d.k):
        row = weight.type.dtype if weight is not None else dtype
        statistics = [t(row, d.k), t(row, d.k, kind="positive")]
        yield sample([t(dtype, d.b, d.k, d.n), *statistics, weight, bias], eps=1e-5)
    statistics = [t(dtype, d.k), t(dtype, d.k, kind="positive")]
    yield sample([t(dtype, d.b, d.k), *statistics, None, None], eps=1e-5)


@samples("native_batch_norm")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    for weight, bias in affine(dtype, 4):
        row = weight.type.dtype if weight is not None else dtype
        statistics = [t(row, 4), t(row, 4, kind="positive")]
        operands = [t(dtype, d.h, 4, d.n), *statistics, weight, bias]
        yield sample(operands, inner=narrow(dtype), momentum=0.1, eps=1e-5)


@samples("attention")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    q = t(dtype, d.b, 4, d.n, 8)
    full = [q, t(dtype, d.b, 4, d.k, 8), t(dtype, d.b, 4, d.k, 6)]
    grouped = [q, t(dtype, d.b, 2, d.k, 8), t(dtype, d.b, 2, d.k, 8)]
    yield sample([*full, None], scale=0.35)
    yield sample([*full, t(BOOL, d.n, d.k)], scale=0.35)
    yield sample([*grouped, t(dtype, d.b, 1, d.n, d.k)], scale=0.2)
    yield sample([*grouped, None], scale=0.35, causal=True, offset=d.k - d.n)
    yield sample([*grouped, None], scale=0.35, causal=True, window=2)
    yield sample([*grouped, None], scale=0.35, window=3, offset=1, softcap=2.5)
    yield sample([*full, t(BOOL, d.b, 1, 1, d.k)], scale=0.35, causal=True)
    yield sample([*grouped, None, t(dtype, 4)], scale=0.35, causal=True, window=2)
    yield sample([*full, t(BOOL, d.n, d.k), t(dtype, 4)], scale=0.35, softcap=2.5)


@samples("cached_attention")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    q, at = t(dtype, d.b, 4, 1, 8), t(torch.int64, kind="index:5")
    full = [q, t(dtype, d.b, 4, 6, 8), t(dtype, d.b, 4, 6, 6), at]
    grouped = [q, t(dtype, d.b, 2, 6, 8), t(dtype, d.b, 2, 6, 8), at]
    several = [t(dtype, d.b, 4, 2, 8), *grouped[1:]]
    yield sample([*full, None], scale=0.35)
    yield sample([*grouped, None], scale=0.35, window=2)
    yield sample([*several, None], scale=0.35, window=3, softcap=2.5)
    yield sample([*several, t(dtype, 4, 1, 6)], scale=0.2)
    yield sample([*grouped, t(BOOL, d.b, 1, 1, 1)], scale=0.35)
    yield sample([*several, None, t(dtype, 4)], scale=0.35, window=3)
    each = t(torch.int64, d.b, kind="index:5")
    yield sample([*grouped[:3], each, None], scale=0.35, window=3)
    yield sample([*several[:3], each, t(dtype, d.b, 4, 1, 6)], scale=0.2)
    late = t(torch.int64, kind="index:40")
    yield sample([*grouped[:3], late, None], scale=0.35, window=6, ring=True)
    yield sample([*several[:3], late, None], scale=0.35, window=3, softcap=2.5, ring=True)


@samples("paged_attention")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    pools = [t(dtype, 7, 2, 4, 8), t(dtype, 7, 2, 4, 6), t(torch.int32, d.b, 3, kind="distinct:7")]
    q, at = t(dtype, d.b, 4, 1, 8), t(torch.int64, kind="index:12")
    yield sample([q, *pools, at], scale=0.35)
    two = [t(dtype, 2, 4, 1, 8), *pools[:2], t(torch.int64, 2, 3, kind="distinct:7")]
    yield sample([*two, t(torch.int64, 2, kind="index:12")], scale=0.35, window=2)
    several = t(dtype, d.b, 4, 3, 8)
    yield sample([several, *pools, t(torch.int64, kind="index:9"), None], scale=0.35, softcap=2.5)
    yield sample([several, *pools, at, t(dtype, 4, 1, 12), t(dtype, 4)], scale=0.2)


@samples("streaming_attention")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    q, k, v = t(dtype, d.b, 4, d.n, 8), t(dtype, d.b, 2, d.n, 8), t(dtype, d.b, 2, d.n, 6)
    # Real angles: with other numbers scores would depend on more than distances.
    half, pairs = (
        [t(dtype, 9, 8, kind=f"turns:{f}:{style}") for f in ("cos", "sin")]
        for style in ("half", "interleaved")
    )
    last = [t(dtype, d.b, 4, 2, 8), t(dtype, d.b, 2, 9, 8), t(dtype, d.b, 2, 9, 8)]
    yield sample([*last, *half], scale=0.35, sinks=2, window=3)
    yield sample([*last, *pairs], scale=0.35, sinks=0, window=4, style="interleaved")
    yield sample([t(dtype, d.b, 2, 9, 8), *last[1:], *half], scale=0.3, sinks=3, window=1)
    short = [t(dtype, 1, d.n, 8, kind=f"turns:{f}:half") for f in ("cos", "sin")]
    yield sample([q, k, v, *short], scale=0.35, sinks=1, window=20, softcap=2.5)


@samples("flash_attention")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    q, kv = t(dtype, d.b, 3, d.n, 8), t(dtype, d.b, 3, d.k, 8)
    rest = {"inner": narrow(dtype), "scale": 0.35}  # the probabilities are rounded
    yield sample([q, kv, kv, None], **rest)
    yield sample([q, kv, kv, t(dtype, d.n, d.k)], **rest)
    yield sample([q, kv, kv, t(torch.float32, d.b, 1, d.n, d.k)], **rest)
    yield sample([q, q, q, None], **rest, causal=True)
    grouped = t(dtype, d.b, 1, d.n, 8)
    yield sample([q, grouped, grouped, None], **rest, causal=True, window=2, softcap=1.5)


@samples("rope")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    for style in ("half", "interleaved"):
        angles = t(dtype, d.n, 8)
        yield sample([t(dtype, d.b, d.h, d.n, 8), angles, angles], style=style)
    angles = t(dtype, d.b, 1, d.n, 6)
    yield sample([t(dtype, d.b, d.h, d.n, 6), angles, angles])


def _pools(d: Sizes, dtype: torch.dtype, dilated: bool, ranks: tuple[int, ...]) -> Cases:
    for rank in ranks:
        if rank == 3 and not dilated and dtype in HALVES:
            continue  # torch has no such kernel, and `infer` says so
        x = t(dtype, d.b, 2, *(9, 8, 7)[:rank])
        rest = {"dilation": (1,) * rank} if dilated else {}
        simple = {"kernel": (2,) * rank, "stride": (2,) * rank, "padding": (0,) * rank, **rest}
        yield sample([x], **simple)
        padded = {"kernel": (3,) * rank, "stride": (2,) * rank, "padding": (1,) * rank, **rest}
        yield sample([x], **padded)
        yield sample([x], **padded, ceil_mode=True)
    two = {"dilation": (2, 1)} if dilated else {}
    if dilated:
        windows = {"kernel": (2, 3), "stride": (1, 2), "padding": (1, 0), **two}
        yield sample([t(dtype, 3, 9, 8)], **windows)
    else:
        windows = {"kernel": (2, 3), "stride": (1, 2), "padding": (1, 0)}
        x = t(dtype, 3, 9, d.n + 3)
        yield sample([x], **windows, count_include_pad=False)
        yield sample([x], **windows, divisor=5)


@samples("max_pool")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _pools(d, dtype, True, (1, 2, 3))


@samples("max_pool_with_indices")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _pools(d, dtype, True, (2, 3))


@samples("avg_pool")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _pools(d, dtype, False, (1, 2, 3))


@samples("adaptive_avg_pool", "adaptive_max_pool")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, 3, d.n)], size=(2,))
    yield sample([t(dtype, d.b, 3, 7, d.n)], size=(3, 1))
    yield sample([t(dtype, 3, 7, 5, 4)], size=(2, 5, 1))


UPSAMPLES = (
    ("nearest", (7,)),
    ("nearest", (7, 9)),
    ("nearest", (3, 4, 5)),
    ("nearest-exact", (7,)),
    ("nearest-exact", (3, 9)),
    ("nearest-exact", (3, 4, 5)),
    ("linear", (7,)),
    ("linear", (7, 3)),
    ("linear", (3, 4, 5)),
    ("cubic", (7, 9)),
)


@samples("upsample")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    for mode, size in UPSAMPLES:
        x = t(dtype, d.b, 2, *(4, 5, 3)[: len(size)])
        yield sample([x], size=size, mode=mode)
        if mode in ("linear", "cubic"):
            yield sample([x], size=size, mode=mode, align_corners=True)
    doubled = {"size": (d.h * 2, 8), "scales": (2.0, 2.0)}
    yield sample([t(dtype, d.b, 2, d.h, 4)], mode="linear", **doubled)


@samples("grid_sample")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    x, grid = t(dtype, d.b, 3, 5, 4), t(dtype, d.b, d.n, 6, 2, kind="unit")
    for mode in ("bilinear", "nearest", "bicubic"):
        yield sample([x, grid], mode=mode)
    yield sample([x, grid], padding="border", align_corners=True)
    yield sample([x, grid], padding="reflection")
    deep = [t(dtype, d.b, 2, 3, 4, 5), t(dtype, d.b, 2, 2, 2, 3, kind="unit")]
    yield sample(deep)


@samples("col2im", dtypes=FLOATS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    one = (1, 1)
    rest = {"kernel": (2, 3), "stride": one, "padding": (0, 1), "dilation": one}
    yield sample([t(dtype, d.b, 12, 15)], size=(4, 5), **rest)


@samples("expert_linear", dtypes=FLOATS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    rounded = narrow(dtype)  # as for a linear
    chosen = t(torch.int64, d.b, d.n, kind="index:3")
    yield sample([t(dtype, d.b, d.n, d.k), t(dtype, 3, d.m, d.k), chosen, None])
    one = t(torch.int32, d.n, kind="index:3")
    biased = [t(dtype, d.n, d.k), t(dtype, 3, d.m, d.k), one, t(dtype, 3, d.m)]
    yield sample(biased, inner=rounded)
