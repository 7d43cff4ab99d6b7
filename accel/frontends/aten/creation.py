"""Tensors made from nothing: ranges, fills, identity."""

from __future__ import annotations

from typing import Any

import torch

from accel.frontends.importer import Importer, lower
from accel.ir.module import Value
from accel.ir.types import is_float


def filled(c: Importer, value: Any) -> Value:
    """A tensor of the result's shape and dtype with one value."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        single = c.scalar(value, c.out_dtype)
        result: Value = c.b.broadcast_to(single, shape=c.out_shape) if c.out_shape else single
        return result
    if c.out_dtype == torch.bool:
        value = bool(value)
    elif is_float(c.out_dtype):
        value = float(value)
    else:
        value = int(value)
    made: Value = c.b.full(value=value, dtype=c.out_dtype, shape=c.out_shape)
    return made


@lower("full", "full_like", "new_full")
def full(c: Importer, _: Any, size_or_value: Any, *rest: Any, **ignored: Any) -> Value:
    """`full(size, value)`, `full_like(x, value)`, `new_full(x, size, value)`."""
    value = rest[0] if c.call.target._schema.name == "aten::new_full" else size_or_value
    return filled(c, value)


@lower(
    "zeros", "zeros_like", "new_zeros", "empty.memory_format", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided", "empty_permuted",
)  # fmt: skip
def zeros(c: Importer, *ignored: Any, **also_ignored: Any) -> Value:
    """Uninitialized memory is zeros here: any value will do."""
    return filled(c, 0)


@lower("ones", "ones_like", "new_ones")
def ones(c: Importer, *ignored: Any, **also_ignored: Any) -> Value:
    return filled(c, 1)


@lower("scalar_tensor")
def scalar_tensor(c: Importer, value: Any, **ignored: Any) -> Value:
    return c.scalar(value, c.out_dtype)


def _range(c: Importer, start: Any, step: Any) -> Value:
    shape, dtype = c.out_shape, c.out_dtype
    whole = all(isinstance(v, (int, torch.SymInt)) for v in (start, step))
    if not is_float(dtype) and whole:
        result: Value = c.b.iota(
            shape=shape, axis=0, dtype=dtype, start=c.dim(start), step=c.dim(step)
        )
        return result
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    line = c.b.cast_to(c.b.iota(shape=shape, axis=0, dtype=torch.int64), inner)
    if step != 1:
        line = c.b.mul(line, c.scalar(step, inner))
    if start != 0:
        line = c.b.add(line, c.scalar(start, inner))
    return c.b.cast_to(line, dtype)


@lower("arange")
def arange(c: Importer, end: Any, **ignored: Any) -> Value:
    return _range(c, 0, 1)


@lower("arange.start")
def arange_start(c: Importer, start: Any, end: Any, **ignored: Any) -> Value:
    return _range(c, start, 1)


@lower("arange.start_step")
def arange_start_step(c: Importer, start: Any, end: Any, step: Any = 1, **ignored: Any) -> Value:
    return _range(c, start, step)


@lower("eye", "eye.m")
def eye(c: Importer, *ignored: Any, **also_ignored: Any) -> Value:
    rows, columns = c.out_shape
    mask = c.b.tri_mask(rows=rows, columns=columns, diagonal=0, lower=-1)
    return c.b.cast_to(mask, c.out_dtype)


@lower("tril_indices", "triu_indices")
def triangle_indices(c: Importer, *args: Any, **ignored: Any) -> Value:
    """Positions depend on static sizes only, so they are a constant."""
    made = c.call.target(*args, dtype=torch.int64, device="cpu")
    return c.b.cast_to(c.tensor_constant(made, "indices"), c.out_dtype)
