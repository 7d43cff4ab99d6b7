"""Encoded weights and activations: data plus a decode op.

A pass encodes a weight and writes one of these in front of its users; nothing else in the compiler
knows about formats. `gather` on a codebook (in `index`) is the decode of weight clustering.

Groups: `scale` (and `zero`) have the operand's shape with `axis` divided by `group`. group = 0
means one group for all of `axis`; `axis = none` means one scale for the whole tensor (0-d).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Trait, define
from accel.ir.ops.elementwise import MOVABLE, check_dtype
from accel.ir.types import (
    SUB_BYTE_BITS,
    Shape,
    TensorType,
    is_integer,
    normalize_axis,
    same_shape,
    value_dtype,
)

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value


def quantized_range(dtype: torch.dtype) -> tuple[float, float]:
    """Smallest and largest representable value."""
    if dtype in SUB_BYTE_BITS:
        bits = SUB_BYTE_BITS[dtype]
        if str(dtype).startswith("torch.uint"):
            return 0, 2**bits - 1
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return float(info.min), float(info.max)


def scale_shape(shape: Shape, axis: int | None, group: int) -> Shape:
    """The shape of the scales of a tensor of `shape`."""
    if axis is None:
        return ()
    size = shape[axis]
    if group and isinstance(size, int) and size % group:
        raise TypeInferenceError(f"axis {axis} of size {size} is not a multiple of group {group}")
    return (*shape[:axis], size // group if group else 1, *shape[axis + 1 :])


def _spread(parameter: Tensor, shape: tuple[int, ...], axis: int | None, group: int) -> Tensor:
    if axis is None or group == 0:
        return parameter
    return parameter.repeat_interleave(group, axis)


def _grouped(b: Builder, v: Value, axis: int | None, group: int) -> Value:
    """Scales or zeros with an axis of 1 after `axis`, to broadcast over the group."""
    if axis is None or not group:
        return v
    return b.reshape(v, shape=(*v.shape[: axis + 1], 1, *v.shape[axis + 1 :]))


def _split(b: Builder, v: Value, axis: int | None, group: int) -> Value:
    """v with `axis` split into groups."""
    if axis is None or not group:
        return v
    groups = v.shape[axis] // group
    return b.reshape(v, shape=(*v.shape[:axis], groups, group, *v.shape[axis + 1 :]))


def _check(
    name: str,
    x: TensorType,
    scale: TensorType,
    zero: TensorType | None,
    axis: int | None,
    group: int,
) -> None:
    check_dtype(name, "f", scale)
    if zero is not None:
        check_dtype(name, "fiq", zero)
    if group < 0:
        raise TypeInferenceError(f"accel.{name}: group {group}")
    if axis is not None:
        axis = normalize_axis(axis, x.rank)
    wanted = scale_shape(x.shape, axis, group)
    for t in (scale, zero):
        if t is not None and not same_shape(t.shape, wanted):
            raise TypeInferenceError(f"accel.{name}: parameters {t}, expected shape {wanted}")


@define("dequantize", Trait.PURE | Trait.DECODE)
class Dequantize:
    """(q - zero) * scale, in scale's dtype; a missing zero is 0."""

    @staticmethod
    def infer(
        q: TensorType,
        scale: TensorType,
        zero: TensorType | None = None,
        *,
        axis: int | None = None,
        group: int = 0,
    ) -> TensorType:
        check_dtype("dequantize", "fiueq", q)
        _check("dequantize", q, scale, zero, axis, group)
        return q.with_dtype(scale.dtype)

    @staticmethod
    def evaluate(
        q: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        *,
        axis: int | None = None,
        group: int = 0,
    ) -> Tensor:
        shape = tuple(q.shape)
        value = q.to(scale.dtype)
        if zero is not None:
            value = value - _spread(zero.to(scale.dtype), shape, axis, group)
        return value * _spread(scale, shape, axis, group)

    @staticmethod
    def decompose(
        b: Builder,
        q: Value,
        scale: Value,
        zero: Value | None = None,
        *,
        axis: int | None = None,
        group: int = 0,
    ) -> Value:
        axis = None if axis is None else normalize_axis(axis, len(q.shape))
        value = _split(b, b.cast_to(q, scale.dtype), axis, group)
        if zero is not None:
            value = b.sub(value, _grouped(b, b.cast_to(zero, scale.dtype), axis, group))
        return b.reshape_to(b.mul(value, _grouped(b, scale, axis, group)), q.shape)


@define("quantize", Trait.PURE)
class Quantize:
    """round(x / scale) + zero, clamped to the range of `dtype` (halves to even).

    Computed in float32, of float64 in float64. For a floating `dtype` the cast is what rounds.
    """

    @staticmethod
    def infer(
        x: TensorType,
        scale: TensorType,
        zero: TensorType | None = None,
        *,
        dtype: torch.dtype,
        axis: int | None = None,
        group: int = 0,
    ) -> TensorType:
        check_dtype("quantize", "f", x)
        check_dtype("quantize", "ieq", x.with_dtype(dtype))
        _check("quantize", x, scale, zero, axis, group)
        return x.with_dtype(dtype)

    @staticmethod
    def evaluate(
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        *,
        dtype: torch.dtype,
        axis: int | None = None,
        group: int = 0,
    ) -> Tensor:
        shape = tuple(x.shape)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        value = x.to(wide) / _spread(scale, shape, axis, group).to(wide)
        if not dtype.is_floating_point:
            value = torch.round(value)
        if zero is not None:
            value = value + _spread(zero.to(wide), shape, axis, group)
        low, high = quantized_range(dtype)
        return value.clamp(low, high).to(value_dtype(dtype))

    @staticmethod
    def decompose(
        b: Builder,
        x: Value,
        scale: Value,
        zero: Value | None = None,
        *,
        dtype: torch.dtype,
        axis: int | None = None,
        group: int = 0,
    ) -> Value:
        axis = None if axis is None else normalize_axis(axis, len(x.shape))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        value = _split(b, b.cast_to(x, wide), axis, group)
        value = b.div(value, _grouped(b, b.cast_to(scale, wide), axis, group))
        if not dtype.is_floating_point:
            value = b.round(value)
        if zero is not None:
            value = b.add(value, _grouped(b, b.cast_to(zero, wide), axis, group))
        low, high = quantized_range(dtype)
        value = b.clamp(value, min=float(low), max=float(high))
        return b.reshape_to(b.cast_to(value, dtype), x.shape)


@define("unpack_n_of_m", Trait.PURE | Trait.DECODE)
class UnpackNOfM:
    """n of every m elements along the last axis are stored: values and their places in the group.

    values and index are [..., K * n / m]; the result is [..., K] with zeros elsewhere
    (Mishra et al., 2021). Index values lie in [0, m) and ascend inside a group.
    """

    @staticmethod
    def infer(values: TensorType, index: TensorType, *, n: int, m: int) -> TensorType:
        check_dtype("unpack_n_of_m", MOVABLE + "e", values)
        if not is_integer(index.dtype):
            raise TypeInferenceError(f"accel.unpack_n_of_m: places of {index.dtype}")
        if not values.rank or not same_shape(values.shape, index.shape) or not 0 < n < m:
            raise TypeInferenceError(f"accel.unpack_n_of_m: {values} with {index}, {n}:{m}")
        last = values.shape[-1]
        if isinstance(last, int) and last % n:
            raise TypeInferenceError(f"accel.unpack_n_of_m: {last} is no multiple of n = {n}")
        return values.with_shape((*values.shape[:-1], last // n * m))

    @staticmethod
    def evaluate(values: Tensor, index: Tensor, *, n: int, m: int) -> Tensor:
        dtype = values.dtype
        if dtype.is_floating_point and dtype.itemsize == 1:
            values = values.view(torch.uint8)  # torch cannot scatter these; 0 is all zero bits
        groups = values.shape[-1] // n
        grouped = (*values.shape[:-1], groups, n)
        out = torch.zeros(*values.shape[:-1], groups, m, dtype=values.dtype)
        out.scatter_(-1, index.reshape(grouped).to(torch.int64), values.reshape(grouped))
        dense = out.reshape(*values.shape[:-1], groups * m)
        return dense if dense.dtype == dtype else dense.view(dtype)

    @staticmethod
    def decompose(b: Builder, values: Value, index: Value, *, n: int, m: int) -> Value:
        # Slot j of a group is the sum over i of values[i] where index[i] = j: one term or none.
        *lead, last = values.shape
        groups = last // n
        wide = values
        if values.dtype.is_floating_point and values.dtype.itemsize == 1:
            wide = b.cast(values, dtype=torch.float32)
        elif not (values.dtype.is_floating_point or values.dtype.is_complex):
            wide = b.cast_to(values, torch.int64)
        stored = b.reshape(wide, shape=(*lead, groups, n, 1))
        # Cast first: a packed sub-byte tensor has no views.
        place = b.reshape(b.cast_to(index, torch.int32), shape=(*lead, groups, n, 1))
        slots = b.iota(shape=(m,), axis=0, dtype=torch.int32)
        zero = b.scalar(0, wide.dtype)
        spread = b.where(b.eq(place, slots), stored, zero)
        dense = b.sum(spread, axes=(len(values.shape),))
        return b.reshape(b.cast_to(dense, values.dtype), shape=(*lead, groups * m))


@define("pack_nibbles", Trait.PURE)
class PackNibbles:
    """uint8 values below 16, [..., K], two a byte: [..., K / 2].

    Element i of the first half is the low nibble of byte i, of the second half the high one.
    """

    @staticmethod
    def infer(x: TensorType) -> TensorType:
        return x.with_shape((*x.shape[:-1], _halves("pack_nibbles", x)))

    @staticmethod
    def evaluate(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return low | (high << 4)

    @staticmethod
    def decompose(b: Builder, x: Value) -> Value:
        axis, size = len(x.shape) - 1, x.shape[-1]
        low = b.slice(x, axis=axis, start=0, stop=size // 2)
        high = b.slice(x, axis=axis, start=size // 2, stop=size)
        made: Value = b.add(low, b.mul(high, b.scalar(16, x.dtype)))
        return made


@define("unpack_nibbles", Trait.PURE | Trait.DECODE)
class UnpackNibbles:
    """The values that `pack_nibbles` packed: uint8 [..., K] to uint8 [..., 2 * K]."""

    @staticmethod
    def infer(x: TensorType) -> TensorType:
        if x.dtype != torch.uint8 or not x.rank:
            raise TypeInferenceError(f"accel.unpack_nibbles: {x}")
        return x.with_shape((*x.shape[:-1], x.shape[-1] * 2))

    @staticmethod
    def evaluate(x: Tensor) -> Tensor:
        return torch.cat([x & 15, x >> 4], -1)

    @staticmethod
    def decompose(b: Builder, x: Value) -> Value:
        low = b.bitwise_and(x, b.scalar(15, x.dtype))
        high = b.floor_div(x, b.scalar(16, x.dtype))
        made: Value = b.cat(low, high, axis=len(x.shape) - 1)
        return made


def _halves(name: str, x: TensorType) -> int:
    size = x.shape[-1] if x.rank else 1
    if x.dtype != torch.uint8 or not isinstance(size, int) or size % 2:
        raise TypeInferenceError(f"accel.{name}: {x}, not uint8 with an even last axis")
    return size // 2
