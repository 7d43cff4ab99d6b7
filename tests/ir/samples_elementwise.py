"""Samples of elementwise ops and activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from accel.ir.types import BOOL, COMPLEX, FLOATS, INTEGERS, SUB_BYTE_BITS
from tests.ir.sample_base import ANY, Sizes, _Case, sample, samples, t

WIDE_UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})
NUMBERS = FLOATS | INTEGERS
FIELDS = FLOATS | COMPLEX
EVERYTHING = NUMBERS | BOOL | COMPLEX

Cases = Iterator[_Case]


def _unary(d: Sizes, dtype: torch.dtype, kind: str) -> Cases:
    yield sample([t(dtype, d.b, d.n, kind=kind)])
    yield sample([t(dtype, kind=kind)])
    yield sample([t(dtype, d.n, kind="special")])


@samples("exp", "exp2", "expm1", "sin", "cos", "sinh", "cosh", "tanh", "sigmoid", dtypes=FIELDS)
@samples("tan", "atan", "asinh", dtypes=FIELDS)
@samples("erf", "erfc")
@samples("neg", dtypes=FLOATS | INTEGERS | COMPLEX)
@samples("abs", dtypes=FLOATS | INTEGERS | COMPLEX)
@samples("sign", dtypes=NUMBERS | BOOL)
@samples("ceil", "floor", "round", "trunc", dtypes=NUMBERS)
@samples("isnan", "isinf", "logical_not", dtypes=EVERYTHING)
@samples("bitwise_not", dtypes=INTEGERS | BOOL)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _unary(d, dtype, "normal")


@samples("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", dtypes=FIELDS)
@samples("lgamma", "digamma")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _unary(d, dtype, "positive")


@samples("asin", "acos", "atanh", dtypes=FIELDS)
@samples("erfinv")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _unary(d, dtype, "unit")


@samples("acosh", dtypes=FIELDS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _unary(d, dtype, "above1")


def _binary(d: Sizes, dtype: torch.dtype, x: str = "normal", y: str = "normal") -> Cases:
    yield sample([t(dtype, d.b, d.n, kind=x), t(dtype, d.b, d.n, kind=y)])
    yield sample([t(dtype, d.b, d.n, kind=x), t(dtype, d.n, kind=y)])
    yield sample([t(dtype, d.b, 1, d.n, kind=x), t(dtype, d.m, 1, kind=y)])
    yield sample([t(dtype, kind=x), t(dtype, d.b, d.n, kind=y)])
    if x == y == "normal":
        yield sample([t(dtype, 10, kind="special"), t(dtype, 10, kind="normal")])
        yield sample([t(dtype, 10, kind="normal"), t(dtype, 10, kind="special")])


@samples("add", "mul", dtypes=EVERYTHING)
@samples("sub", dtypes=NUMBERS | COMPLEX)
@samples("eq", "ne", dtypes=EVERYTHING | WIDE_UNSIGNED)
@samples("lt", "le", "gt", "ge", "maximum", "minimum", dtypes=NUMBERS | BOOL)
@samples("logical_and", "logical_or", "logical_xor", dtypes=EVERYTHING)
@samples("bitwise_and", "bitwise_or", "bitwise_xor", dtypes=INTEGERS | BOOL | WIDE_UNSIGNED)
@samples("atan2")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _binary(d, dtype)


@samples("div", dtypes=FIELDS)
@samples("remainder", "fmod", "floor_div", "trunc_div", dtypes=NUMBERS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _binary(d, dtype, "normal", "nonzero")


@samples("pow", dtypes=NUMBERS | COMPLEX)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _binary(d, dtype, "positive", "small")


@samples("shift_left", "shift_right", dtypes=INTEGERS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _binary(d, dtype, "normal", "small")


@samples("where", dtypes=ANY)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(torch.bool, d.b, d.n), t(dtype, d.b, d.n), t(dtype, d.b, d.n)])
    yield sample([t(torch.bool, d.n), t(dtype), t(dtype, d.b, 1)])
    yield sample([t(torch.bool, 10), t(dtype, 10, kind="special"), t(dtype)])


@samples("cast", dtypes=ANY)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    for target in (torch.float32, torch.float16, torch.int32, torch.uint8, torch.bool):
        # What a negative number is as an unsigned one, torch does not say.
        kind = "positive" if target == torch.uint8 else "normal"
        yield sample([t(dtype, d.b, d.n, kind=kind)], dtype=target)
    yield sample([t(torch.int64, d.n, kind="positive")], dtype=dtype)
    yield sample([t(torch.uint4, d.n)], dtype=torch.float32)
    yield sample([t(torch.int64, d.n, kind="index:2")], dtype=torch.uint4)


@samples("bitcast", dtypes=ANY - {torch.bool} - set(SUB_BYTE_BITS))
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    same_width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    yield sample([t(dtype, d.b, d.n)], dtype=same_width.get(dtype.itemsize, dtype))


@samples("clamp", dtypes=NUMBERS)
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n)], min=0, max=6)
    yield sample([t(dtype, d.n, kind="special")], min=-1)
    yield sample([t(dtype)], max=1)
    yield sample([t(dtype, d.n)])
    if dtype in FLOATS:
        yield sample([t(dtype, 9)], min=0.5, max=-0.5)
        yield sample([t(dtype, 9)], min=float("-inf"), max=0.25)


@samples("relu", dtypes=NUMBERS)
@samples("silu", "hardsigmoid", "hardswish", "mish", "log_sigmoid")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _unary(d, dtype, "normal")


@samples("gelu")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n)])
    yield sample([t(dtype, d.b, d.n)], approximate="tanh")
    if dtype == torch.float64:  # torch's vector kernels of the others make gelu(inf) NaN
        yield sample([t(dtype, d.n, kind="special")])


@samples("softplus")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _unary(d, dtype, "normal")
    yield sample([t(dtype, d.b, d.n)], beta=2.0, threshold=1.5)


@samples("leaky_relu")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _unary(d, dtype, "normal")
    yield sample([t(dtype, d.b, d.n)], slope=0.3)


@samples("elu")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _unary(d, dtype, "normal")
    yield sample([t(dtype, d.b, d.n)], alpha=1.67, scale=1.05)
    yield sample([t(dtype, d.b, d.n)], alpha=2.0, input_scale=0.5)


def _gradient(d: Sizes, dtype: torch.dtype, kind: str = "normal", **attributes: float) -> Cases:
    yield sample([t(dtype, d.b, d.n), t(dtype, d.b, d.n, kind=kind)], **attributes)
    yield sample([t(dtype), t(dtype, kind=kind)], **attributes)


@samples("silu_backward", "hardsigmoid_backward", "hardswish_backward", "mish_backward")
@samples("threshold_backward", "leaky_relu_backward", "elu_backward", "softplus_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _gradient(d, dtype)


@samples("gelu_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _gradient(d, dtype)
    yield sample([t(dtype, d.b, d.n), t(dtype, d.b, d.n)], approximate="tanh")


@samples("hardtanh_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _gradient(d, dtype, min=-0.5, max=1.0)


@samples("sigmoid_backward", "tanh_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield from _gradient(d, dtype, "unit")


@samples("softmax_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n), t(dtype, d.b, d.n, kind="probability")], axis=1)
    yield sample([t(dtype, d.b, d.n, d.m), t(dtype, d.b, d.n, d.m, kind="unit")], axis=-2)


@samples("log_softmax_backward")
def _(d: Sizes, dtype: torch.dtype) -> Cases:
    yield sample([t(dtype, d.b, d.n), t(dtype, d.b, d.n, kind="log_probability")], axis=1)
