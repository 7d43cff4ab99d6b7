"""Elementwise overloads.

Every row of the IR's elementwise table that is one ATen overload is registered from that table;
what is left here is promotion (implicit in ATen, explicit casts in the IR) and the few overloads
whose arguments mean more than their operands.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from accel.errors import CaptureError
from accel.frontends.importer import LOWERINGS, Importer, lower, lower_write
from accel.ir.module import Value
from accel.ir.op import Aten, definitions
from accel.ir.types import is_float

Number = bool | int | float | complex
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_HALF = (torch.float16, torch.bfloat16)
# Arithmetic that ATen's CPU and CUDA kernels do with the scalar in float32 for 16-bit tensors.
_WIDE_SCALAR = ("add", "sub", "mul", "div")


def is_number(x: Any) -> bool:
    return not isinstance(x, Tensor)


@cache
def _sample(dtype: torch.dtype, rank: int) -> Tensor:
    return torch.empty((1,) * min(rank, 1), dtype=dtype, device="meta")


@cache
def _promote(kinds: tuple[Any, ...]) -> torch.dtype:
    operands = [k if isinstance(k, type) else _sample(*k) for k in kinds]
    result: Any = operands[0]
    for other in operands[1:]:
        a = result() if isinstance(result, type) else result
        b = other() if isinstance(other, type) else other
        dtype = torch.result_type(a, b)
        rank = max(x.dim() if isinstance(x, Tensor) else 0 for x in (a, b))
        result = _sample(dtype, rank)
    if isinstance(result, type):
        return torch.result_type(result(), result())
    dtype_found: torch.dtype = result.dtype
    return dtype_found


def promote(*operands: Any) -> torch.dtype:
    """The dtype in which ATen computes with these tensors and Python numbers."""
    kinds: list[Any] = []
    for x in operands:
        if isinstance(x, Tensor):
            kinds.append((x.dtype, x.dim()))
        elif isinstance(x, torch.SymInt):
            kinds.append(int)
        elif isinstance(x, torch.SymFloat):
            kinds.append(float)
        elif isinstance(x, torch.SymBool):
            kinds.append(bool)
        else:
            kinds.append(type(x))
    return _promote(tuple(kinds))


def as_dtype(c: Importer, x: Any, dtype: torch.dtype) -> Value:
    """A tensor or number as a value of `dtype`."""
    return c.scalar(x, dtype) if is_number(x) else c.b.cast_to(c(x), dtype)


def unary(c: Importer, name: str, x: Tensor) -> Value:
    """One operand: computed in the result's dtype if that is floating and the operand's is not."""
    value = c(x)
    if is_float(c.out_dtype) and not is_float(value.dtype):
        value = c.b.cast_to(value, c.out_dtype)
    result: Value = getattr(c.b, name)(value)
    return result


def binary(c: Importer, name: str, x: Any, y: Any) -> Value:
    """Two operands, promoted as ATen does."""
    dtype = c.out_dtype
    if dtype == torch.bool:
        dtype = promote(x, y)
    if dtype in _HALF and name in _WIDE_SCALAR and (_inexact(x, dtype) or _inexact(y, dtype)):
        wide = torch.float32
        made = getattr(c.b, name)(as_dtype(c, x, wide), as_dtype(c, y, wide))
        return c.b.cast_to(made, dtype)
    result: Value = getattr(c.b, name)(as_dtype(c, x, dtype), as_dtype(c, y, dtype))
    return result


def _inexact(x: Any, dtype: torch.dtype) -> bool:
    """Whether a Python number loses something in `dtype`."""
    if isinstance(x, (Tensor, complex, *_SYMBOLIC)):
        return False
    if not math.isfinite(x):
        return False
    return float(torch.tensor(x, dtype=dtype)) != float(x)


def _register_table() -> None:
    for d in definitions():
        form = d.calls[0] if d.calls else None
        if d.group != "elementwise" or d.attributes or not isinstance(form, Aten) or form.kwargs:
            continue
        base = form.overload.removeprefix("aten::").partition(".")[0]
        rows = getattr(torch.ops.aten, base)
        for overload in rows.overloads():
            full = f"aten::{base}" + ("" if overload == "default" else f".{overload}")
            schema = getattr(rows, overload)._schema
            if schema.is_mutable or full in LOWERINGS:
                continue
            operands = [a for a in schema.arguments if not a.kwarg_only]
            if len(operands) != len(d.operands) or len(operands) != len(schema.arguments):
                continue
            if len(d.operands) == 1:
                LOWERINGS[full] = lambda c, x, name=d.name: unary(c, name, x)
            elif len(d.operands) == 2:
                LOWERINGS[full] = lambda c, x, y, name=d.name: binary(c, name, x, y)


def _scaled(c: Importer, y: Any, alpha: Any) -> Any:
    """alpha * y as a value of the result's dtype, y itself for alpha = 1."""
    if alpha == 1:
        return y
    if is_number(y):
        return y * alpha
    return None


@lower("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar")
def add_or_sub(c: Importer, x: Any, y: Any, alpha: Any = 1) -> Value:
    name = "add" if "add" in c.call.target._schema.name else "sub"
    scaled = _scaled(c, y, alpha)
    if scaled is not None:
        return binary(c, name, x, scaled)
    dtype = c.out_dtype
    product = c.b.mul(as_dtype(c, y, dtype), c.scalar(alpha, dtype))
    result: Value = getattr(c.b, name)(as_dtype(c, x, dtype), product)
    return result


@lower("rsub.Tensor", "rsub.Scalar")
def rsub(c: Importer, x: Any, y: Any, alpha: Any = 1) -> Value:
    if alpha == 1:
        return binary(c, "sub", y, x)
    dtype = c.out_dtype
    product = c.b.mul(as_dtype(c, x, dtype), c.scalar(alpha, dtype))
    result: Value = c.b.sub(as_dtype(c, y, dtype), product)
    return result


@lower("div.Tensor_mode", "div.Scalar_mode")
def div_mode(c: Importer, x: Any, y: Any, rounding_mode: str | None = None) -> Value:
    names = {None: "div", "floor": "floor_div", "trunc": "trunc_div"}
    return binary(c, names[rounding_mode], x, y)


@lower("floor_divide", "floor_divide.Scalar")
def floor_divide(c: Importer, x: Any, y: Any) -> Value:
    return binary(c, "floor_div", x, y)


@lower("pow.Tensor_Tensor", "pow.Scalar", "pow.Tensor_Scalar")
def power(c: Importer, x: Any, y: Any) -> Value:
    """Small exponents as ATen computes them."""
    dtype = c.out_dtype
    if not is_number(x) and isinstance(y, (int, float)) and not isinstance(y, bool):
        value = as_dtype(c, x, dtype)
        if y == 1:
            return value
        if y == 2:
            return _times(c, value, value)
        if y == 3:
            return _times(c, _times(c, value, value), value)
        if is_float(dtype) and y in (0.5, -0.5, -1):
            result: Value = {0.5: c.b.sqrt, -0.5: c.b.rsqrt, -1: c.b.reciprocal}[y](value)
            return result
    return binary(c, "pow", x, y)


def _times(c: Importer, x: Value, y: Value) -> Value:
    result: Value = c.b.mul(x, y)
    return result


@lower("square")
def square(c: Importer, x: Tensor) -> Value:
    value = c.b.cast_to(c(x), c.out_dtype)
    return _times(c, value, value)


@lower("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(c: Importer, condition: Tensor, x: Any, y: Any) -> Value:
    dtype = c.out_dtype
    test = c.b.cast_to(c(condition), torch.bool)
    result: Value = c.b.where(test, as_dtype(c, x, dtype), as_dtype(c, y, dtype))
    return result


@lower("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(c: Importer, x: Tensor, mask: Tensor, value: Any) -> Value:
    dtype = c.out_dtype
    result: Value = c.b.where(c(mask), as_dtype(c, value, dtype), c.b.cast_to(c(x), dtype))
    return result


@lower("clamp", "clip")
def clamp(c: Importer, x: Tensor, low: Any = None, high: Any = None) -> Value:
    value = c.b.cast_to(c(x), c.out_dtype)
    if isinstance(low, _SYMBOLIC) or isinstance(high, _SYMBOLIC):
        value = value if low is None else c.b.maximum(value, c.scalar(low, c.out_dtype))
        return value if high is None else c.b.minimum(value, c.scalar(high, c.out_dtype))
    if not is_float(c.out_dtype):
        low = None if low is None else max(int(low), torch.iinfo(c.out_dtype).min)
        high = None if high is None else min(int(high), torch.iinfo(c.out_dtype).max)
    result: Value = c.b.clamp(value, min=low, max=high)
    return result


@lower("clamp.Tensor")
def clamp_tensor(
    c: Importer, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Value:
    value = c.b.cast_to(c(x), c.out_dtype)
    if low is not None:
        value = c.b.maximum(value, as_dtype(c, low, c.out_dtype))
    if high is not None:
        value = c.b.minimum(value, as_dtype(c, high, c.out_dtype))
    return value


@lower("clamp_min")
def clamp_min(c: Importer, x: Tensor, low: Any) -> Value:
    return clamp(c, x, low, None)


@lower("clamp_max")
def clamp_max(c: Importer, x: Tensor, high: Any) -> Value:
    return clamp(c, x, None, high)


@lower("hardtanh")
def hardtanh(c: Importer, x: Tensor, low: float = -1.0, high: float = 1.0) -> Value:
    return clamp(c, x, low, high)


@lower("relu6")
def relu6(c: Importer, x: Tensor) -> Value:
    return clamp(c, x, 0, 6)


@lower("relu")
def relu(c: Importer, x: Tensor) -> Value:
    result: Value = c.b.relu(c(x))
    return result


@lower("gelu")
def gelu(c: Importer, x: Tensor, approximate: str = "none") -> Value:
    result: Value = c.b.gelu(c(x), approximate=approximate)
    return result


@lower("silu", "hardsigmoid", "hardswish", "mish")
def activation(c: Importer, x: Tensor) -> Value:
    name = c.call.target._schema.name.removeprefix("aten::")
    result: Value = getattr(c.b, name)(c(x))
    return result


@lower("log_sigmoid")
def log_sigmoid(c: Importer, x: Tensor) -> Value:
    result: Value = c.b.log_sigmoid(c(x))
    return result


@lower("leaky_relu")
def leaky_relu(c: Importer, x: Tensor, slope: float = 0.01) -> Value:
    result: Value = c.b.leaky_relu(c(x), slope=float(slope))
    return result


@lower("elu")
def elu(
    c: Importer, x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Value:
    result: Value = c.b.elu(
        c(x), alpha=float(alpha), scale=float(scale), input_scale=float(input_scale)
    )
    return result


@lower("softplus")
def softplus(c: Importer, x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Value:
    result: Value = c.b.softplus(c(x), beta=float(beta), threshold=float(threshold))
    return result


@lower_write("rrelu_with_noise")
def rrelu(
    c: Importer, x: Tensor, noise: Tensor, low: Any = 1 / 8, high: Any = 1 / 3, train: bool = False,
    **ignored: Any,
) -> Value:  # fmt: skip
    """Without training, a leaky relu of the mean slope."""
    if train:
        raise CaptureError(
            "rrelu in training is not supported",
            where=str(c.location or ""),
            advice="call eval() on the model, or use leaky_relu",
        )
    return leaky_relu(c, x, (float(low) + float(high)) / 2)


@lower("fmax", "fmin")
def ignoring_nan(c: Importer, x: Tensor, y: Tensor) -> Value:
    """The larger (smaller) of both, and the other one where one is NaN."""
    name = "maximum" if c.call.target._schema.name == "aten::fmax" else "minimum"
    a, b = (c.b.cast_to(c(t), c.out_dtype) for t in (x, y))
    made = getattr(c.b, name)(a, b)
    if not is_float(c.out_dtype):
        only: Value = made
        return only
    result: Value = c.b.where(c.b.isnan(a), b, c.b.where(c.b.isnan(b), a, made))
    return result


@lower("__lshift__.Tensor", "__lshift__.Scalar", "__rshift__.Tensor", "__rshift__.Scalar")
def shift(c: Importer, x: Any, y: Any) -> Value:
    left = "lshift" in c.call.target._schema.name
    return binary(c, "shift_left" if left else "shift_right", x, y)


@lower("prims::convert_element_type")
def convert(c: Importer, x: Tensor, dtype: torch.dtype) -> Value:
    return c.b.cast_to(c(x), dtype)


_register_table()
