"""Samples of ops on shapes, reductions, scans, indices, random draws and encoded weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from accel.ir.types import BOOL, COMPLEX, FLOATS, INTEGERS, SUB_BYTE_BITS
from tests.ir.sample_base import ANY, Sizes, _Case, sample, samples, t

NUMBERS = FLOATS | INTEGERS
EVERYTHING = NUMBERS | BOOL | COMPLEX
MOVABLE = EVERYTHING | set(SUB_BYTE_BITS)
NO_UINT8 = EVERYTHING - {torch.uint8}
I64 = torch.int64
I32 = torch.int32

Cases = Iterator[_Case]


# -- structural and shape ----------------------------------------------------------------------


@samples("full", dtypes=ANY)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample(value=1, dtype=dtype, shape=(d.b, d.n))
    yield sample(value=True, dtype=dtype)
    if dtype in FLOATS:
        yield sample(value=float("-inf"), dtype=dtype, shape=(d.n,))
        yield sample(value=0.1, dtype=dtype)
    if dtype in COMPLEX:
        yield sample(value=1 + 2j, dtype=dtype, shape=(3,))


@samples("reshape", dtypes=ANY)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n, 4)], shape=(d.b * d.n, 2, 2))
    yield sample([t(dtype, 6, d.n)], shape=(2, 3, d.n, 1))
    yield sample([t(dtype)], shape=(1, 1))


@samples("permute", dtypes=ANY)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n, d.m)], axes=(2, 0, 1))
    yield sample([t(dtype)], axes=())


@samples("broadcast_to", dtypes=ANY)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.n, 1)], shape=(d.b, d.n, d.m))
    yield sample([t(dtype)], shape=(d.b,))


@samples("slice", dtypes=ANY)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n)], axis=1, start=0, stop=d.n)
    yield sample([t(dtype, d.b, d.n)], axis=-1, start=1, stop=d.n, step=2)
    yield sample([t(dtype, 8, d.n)], axis=0, start=2, stop=7, step=3)
    yield sample([t(dtype, d.b + d.n)], axis=0, start=d.b, stop=d.b + d.n)


@samples("flip", dtypes=MOVABLE)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n, d.m)], axes=(0, 2))
    yield sample([t(dtype, d.n)], axes=())


@samples("pad", dtypes=EVERYTHING)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n)], low=(0, 2), high=(1, 0))
    yield sample([t(dtype, d.b, d.n)], low=(d.b, 0), high=(0, d.m), value=1.0)
    yield sample([t(dtype, 4, 5)], low=(-1, 2), high=(0, -3))


@samples("cat", dtypes=ANY)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n), t(dtype, d.b, d.m), t(dtype, d.b, 1)], axis=1)
    yield sample([t(dtype, d.n)], axis=0)
    yield sample([t(dtype, d.b, d.n), t(dtype, d.m, d.n)], axis=-2)


@samples("diagonal", dtypes=ANY)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, 4, 6)])
    yield sample([t(dtype, 4, d.b, 6)], offset=-2, axis1=2, axis2=0)
    yield sample([t(dtype, 3, 3)], offset=5)


@samples("unfold", dtypes=ANY)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n)], axis=1, size=3, step=2)
    yield sample([t(dtype, 9, d.b)], axis=-2, size=3, step=3)


@samples("arange", dtypes=NUMBERS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample(length=d.n, dtype=dtype)
    yield sample(length=d.n, dtype=dtype, start=d.b, step=3)
    yield sample(length=4, dtype=dtype, start=9, step=-2)


@samples("iota", dtypes=NUMBERS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample(shape=(d.b, d.n, d.m), axis=1, dtype=dtype)
    yield sample(shape=(d.n,), axis=0, dtype=dtype, start=d.b, step=2)
    yield sample(shape=(d.b, 3), axis=-1, dtype=dtype, start=7, step=-1)
    yield sample(shape=(d.n,), axis=0, dtype=dtype, start=5, step=0)


@samples("size", dtypes=frozenset({torch.float32}))
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample(value=d.b * d.n + 1)


# -- reductions and scans ------------------------------------------------------------------------


def _reductions(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n, d.m)], axes=(1,))
    yield sample([t(dtype, d.b, d.n, d.m)], axes=(-1, 0), keepdim=True)
    yield sample([t(dtype, d.b, 10, kind="special")], axes=(0, 1))
    yield sample([t(dtype, 300)], axes=(0,))


@samples("sum", dtypes=EVERYTHING)
@samples("mean", dtypes=FLOATS | COMPLEX)
@samples("amax", "amin", dtypes=NUMBERS | BOOL)
@samples("any", "all", dtypes=NO_UINT8)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _reductions(d, dtype)
    yield sample([t(dtype, d.b, d.n)], axes=())
    yield sample([t(dtype)], axes=())


@samples("logsumexp")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _reductions(d, dtype)


@samples("var")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _reductions(d, dtype)
    yield sample([t(dtype, d.b, d.n)], axes=(1,), correction=0)
    yield sample([t(dtype, d.b, d.n)], axes=(0,), correction=0.5, keepdim=True)


@samples("prod", dtypes=EVERYTHING)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n)], axis=1)
    yield sample([t(dtype, d.b, d.n)], axis=-2, keepdim=True)


@samples("argmax", "argmin", dtypes=NUMBERS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n)], axis=1)
    yield sample([t(dtype, d.b, d.n)], axis=-2, keepdim=True)
    yield sample([t(dtype, 12, kind="special")], axis=0)


@samples("cumsum", "cumprod", dtypes=EVERYTHING)
@samples("cummax", "cummin", dtypes=NUMBERS | BOOL)
@samples("logcumsumexp")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n)], axis=1)
    yield sample([t(dtype, d.b, d.n, d.m)], axis=-2)


@samples("sort", dtypes=NUMBERS | BOOL)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n)], axis=1)
    yield sample([t(dtype, d.b, d.n)], axis=-2, descending=True)
    yield sample([t(dtype, 12, kind="special")], axis=0)


@samples("topk", dtypes=NUMBERS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n)], k=2, axis=1)
    yield sample([t(dtype, d.b, d.n)], k=d.n, axis=-1, largest=False)


@samples("searchsorted", dtypes=NUMBERS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.k, kind="ascending"), t(dtype, d.b, d.n)])
    edges = t(dtype, d.b, d.k, kind="ascending")
    yield sample([edges, t(dtype, d.b, d.n)], right=True)


# -- indices -------------------------------------------------------------------------------------


@samples("embedding", dtypes=EVERYTHING)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, 7, d.n), t(I64, d.b, d.m, kind="index:7")])
    yield sample([t(dtype, 7, d.n), t(I32, kind="index:7")])


@samples("gather", dtypes=EVERYTHING)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, 7, d.n), t(I64, d.m, 2, kind="signed_index:7")], axis=1)
    yield sample([t(dtype, 16), t(torch.uint4, d.b, d.n)])
    yield sample([t(dtype, 7, d.n), t(I32, kind="index:7")], axis=-2)
    yield sample([t(dtype, 7, d.n), t(torch.uint8, d.m, kind="index:7")])


@samples("take_along", dtypes=MOVABLE)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, 7, d.n), t(I64, d.m, d.n, kind="index:7")], axis=0)
    yield sample([t(dtype, d.b, 7), t(I64, d.b, 3, kind="index:7")], axis=-1)


@samples("index", dtypes=EVERYTHING)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    x = t(dtype, 7, 4, d.n)
    yield sample([x, t(I64, d.b, kind="signed_index:7")], axes=(0,))
    yield sample([x, t(I64, d.b, 1, kind="index:7"), t(I64, d.m, kind="index:4")], axes=(0, 1))
    yield sample([t(dtype, 4, d.n, 7), *(t(I64, d.m, kind="index:4"),) * 2], axes=(0, 2))
    yield sample([x, t(I32, d.b, kind="index:4")], axes=(1,))
    yield sample([x, t(I64, kind="index:4")], axes=(1,))


@samples("index_put", dtypes=EVERYTHING)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    x = t(dtype, 7, 4, d.n)
    yield sample([x, t(dtype, 3, 4, d.n), t(I64, 3, kind="distinct:7")], axes=(0,))
    yield sample([x, t(dtype), t(I64, 3, kind="distinct:4")], axes=(1,))
    many = t(I64, 12, kind="index:7")
    if dtype not in BOOL:
        yield sample([x, t(dtype, 12, 1, d.n), many], axes=(0,), accumulate=True)


@samples("scatter", dtypes=MOVABLE)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    x, index = t(dtype, 7, d.n), t(I64, d.n, 5, kind="distinct:7")
    yield sample([t(dtype, d.n, 7), index, t(dtype, d.n, 5)], axis=1)
    if dtype in NUMBERS:
        repeated = t(I64, 9, d.n, kind="index:7")
        for reduce in ("add", "mul", "amax", "amin", "mean"):
            yield sample([x, repeated, t(dtype, 9, d.n)], axis=0, reduce=reduce)
        rest = {"axis": -2, "reduce": "amax", "include_self": False}
        yield sample([x, repeated, t(dtype, 9, d.n)], **rest)


@samples("slice_update", dtypes=EVERYTHING)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, 8), t(dtype, d.b, 3)], axis=1, start=1, stop=7, step=2)
    source = t(dtype, d.n)
    yield sample([t(dtype, d.b + d.n), source], axis=0, start=d.b, stop=d.b + d.n)


@samples("dynamic_slice", dtypes=EVERYTHING)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, 8), t(I64, kind="signed_index:12")], axis=1, size=3)
    yield sample([t(dtype, d.b + d.n), t(I32, kind="index:9")], axis=0, size=d.b)


@samples("dynamic_update", dtypes=EVERYTHING)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, 8), t(dtype, d.b, 3), t(I64, kind="index:6")], axis=1)
    yield sample([t(dtype, d.n + 4), t(dtype, d.n), t(I32, kind="index:5")], axis=-1)
    late = t(I64, kind="index:40")
    yield sample([t(dtype, d.b, 5), t(dtype, d.b, 3), late], axis=1, ring=True)
    yield sample([t(dtype, d.b, 3), t(dtype, d.b, 8), late], axis=1, ring=True)
    each = t(I64, d.b, kind="index:6")
    yield sample([t(dtype, d.b, 2, 8), t(dtype, d.b, 2, 3), each], axis=2)
    yield sample(
        [t(dtype, d.b, 5), t(dtype, d.b, 3), t(I32, d.b, kind="index:40")], axis=1, ring=True
    )


@samples("gather_pages", dtypes=MOVABLE)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, 7, d.n, 4, 3), t(I32, d.b, 3, kind="index:7")])
    yield sample([t(dtype, 7, 2, 4), t(I64, d.b, d.m, kind="index:7")])


@samples("update_pages", dtypes=MOVABLE)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    pool, table = t(dtype, 7, 2, 4, 3), t(I32, 1, 4, kind="distinct:7")
    yield sample([pool, t(dtype, 1, 2, 1, 3), table, t(I64, kind="index:16")])
    yield sample([pool, t(dtype, 1, 2, d.n, 3), table, t(I32, kind="index:8")])
    yield sample([t(dtype, 7, 2, 4), t(dtype, 1, 2, 6), table, t(I64, 1, kind="index:10")])


@samples("tri_mask", dtypes=frozenset({torch.float32}))
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample(rows=d.n, columns=d.k)
    yield sample(rows=d.n, columns=d.k, diagonal=d.k - d.n)
    yield sample(rows=d.n, columns=d.k, diagonal=1, lower=-2)
    yield sample(rows=3, columns=6, diagonal=-1, lower=d.b - 5)


@samples("masked_scatter", dtypes=MOVABLE)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n), t(torch.bool, d.b, d.n), t(dtype, d.b * d.n)])
    yield sample([t(dtype, d.b, d.n), t(torch.bool, d.b, 1), t(dtype, d.n, d.b + 1)])


# -- random ----------------------------------------------------------------------------------------


@samples("random_uniform")
@samples("random_normal", dtypes=FLOATS | COMPLEX)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample(shape=(d.b, d.n), dtype=dtype)


@samples("random_integer", dtypes=NUMBERS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample(low=2, high=9, shape=(d.b, d.n), dtype=dtype)


@samples("random_permutation", dtypes=INTEGERS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample(length=d.n, dtype=dtype)


@samples("random_bernoulli")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n, kind="probability")])


@samples("native_dropout")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n)], p=0.3)
    yield sample([t(dtype, d.n)], p=0.0)
    yield sample([t(dtype, d.n)], p=1.0)


# -- compression -----------------------------------------------------------------------------------

SCALES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


@samples("dequantize", dtypes=SCALES)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    scale = {"kind": "positive"}
    yield sample([t(torch.int8, d.b, d.n), t(dtype, **scale), None])
    yield sample(
        [t(torch.uint4, d.b, 8), t(dtype, d.b, 1, **scale), t(torch.uint4, d.b, 1)], axis=1
    )
    group = t(dtype, d.b, 4, **scale)
    yield sample([t(torch.int4, d.b, 8), group, None], axis=-1, group=2)
    yield sample([t(torch.uint8, 8, d.n), t(dtype, 2, d.n), t(dtype, 2, d.n)], axis=0, group=4)
    yield sample([t(torch.float8_e4m3fn, d.b, d.n), t(dtype, d.b, 1), None], axis=1)


@samples("quantize", dtypes=FLOATS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    f32 = torch.float32
    scale = {"kind": "positive"}
    yield sample([t(dtype, d.b, d.n), t(f32, **scale), None], dtype=torch.int8)
    zero = t(torch.uint8, d.b, 1)
    yield sample([t(dtype, d.b, 8), t(f32, d.b, 1, **scale), zero], dtype=torch.uint8, axis=-1)
    rest = {"dtype": torch.int4, "axis": 1, "group": 4}
    yield sample([t(dtype, d.b, 8), t(f32, d.b, 2, **scale), None], **rest)
    yield sample([t(dtype, d.b, d.n), t(dtype, **scale), None], dtype=torch.float8_e4m3fn)


@samples("unpack_n_of_m", dtypes=MOVABLE | {torch.float8_e4m3fn, torch.float8_e5m2})
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    slots = t(torch.uint8, d.b, 4, 2, kind="slots:2:4")
    yield sample([t(dtype, d.b, 4, 2), slots], n=2, m=4)
    yield sample([t(dtype, d.n, 1), t(torch.uint2, d.n, 1, kind="slots:1:3")], n=1, m=3)


@samples("pack_nibbles", dtypes=frozenset({torch.uint8}))
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n, 8, kind="index:16")])
    yield sample([t(dtype, 2, kind="index:16")])


@samples("unpack_nibbles", dtypes=frozenset({torch.uint8}))
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n, 4, kind="index:256")])
