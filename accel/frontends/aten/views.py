"""Views, copies and rearrangements: ops that move elements and compute none.

Overloads whose result has the operand's elements in C order are all one `reshape` to the shape that
torch computed. Sizes in attributes come from the fake result, so symbolic ones need no special
care.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accel.errors import CaptureError
from accel.frontends.aten.reductions import axis_of
from accel.frontends.importer import Importer, lower
from accel.ir.module import Value
from accel.ir.types import Dim, simplify_dim


@lower(
    "view", "reshape", "_unsafe_view", "_reshape_alias", "flatten.using_ints", "unflatten.int",
    "unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims", "view_as", "ravel", "reshape_as",
    "view_copy", "unsqueeze_copy", "squeeze_copy", "atleast_1d", "atleast_2d",
)  # fmt: skip
def reshaped(c: Importer, x: Tensor, *ignored: Any, **also_ignored: Any) -> Value:
    return c.b.reshape_to(c(x), c.out_shape)


@lower(
    "alias", "detach", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "lift", "positive",
    "resolve_conj", "resolve_neg", "conj", "alias_copy", "detach_copy", "data",
)  # fmt: skip
def same(c: Importer, x: Tensor, *ignored: Any, **also_ignored: Any) -> Value:
    return c(x)


@lower(
    "to.dtype", "to.dtype_layout", "to.device", "to.other", "to.prim_Device", "to.prim_dtype",
    "_to_copy", "type_as", "_autocast_to_reduced_precision", "_autocast_to_full_precision",
)  # fmt: skip
def to(c: Importer, x: Tensor, *ignored: Any, **also_ignored: Any) -> Value:
    return c.b.cast_to(c(x), c.out_dtype)


@lower("view.dtype")
def view_dtype(c: Importer, x: Tensor, dtype: torch.dtype) -> Value:
    if x.dtype.itemsize != dtype.itemsize:
        return NotImplemented
    result: Value = c.b.bitcast(c(x), dtype=dtype)
    return result


@lower("copy")
def copy(c: Importer, x: Tensor, source: Tensor, non_blocking: bool = False) -> Value:
    return broadcast(c, c.b.cast_to(c(source), c.out_dtype), c.out_shape)


@lower("fill.Scalar", "fill.Tensor")
def fill(c: Importer, x: Tensor, value: Any) -> Value:
    single = c(value) if isinstance(value, Tensor) else c.scalar(value, c.out_dtype)
    return broadcast(c, c.b.cast_to(single, c.out_dtype), c.out_shape)


@lower("zero")
def zero(c: Importer, x: Tensor) -> Value:
    return broadcast(c, c.scalar(0, c.out_dtype), c.out_shape)


def broadcast(c: Importer, value: Value, shape: Sequence[Dim]) -> Value:
    """`value` itself if it has the shape, else a broadcast."""
    if tuple(value.shape) == tuple(shape):
        return value
    result: Value = c.b.broadcast_to(value, shape=tuple(shape))
    return result


@lower("expand", "expand_as", "broadcast_to", "expand_copy", "prims::broadcast_in_dim")
def expand(c: Importer, x: Tensor, *ignored: Any, **also_ignored: Any) -> Value:
    value = c(x)
    if c.call.target._schema.name == "prims::broadcast_in_dim":
        kept = ignored[1]
        shape = tuple(
            value.shape[kept.index(i)] if i in kept else 1 for i in range(len(c.out_shape))
        )
        value = c.b.reshape_to(value, shape)
    return broadcast(c, value, c.out_shape)


def permute_to(c: Importer, value: Value, axes: Sequence[int]) -> Value:
    if list(axes) == list(range(len(axes))):
        return value
    result: Value = c.b.permute(value, axes=tuple(axes))
    return result


@lower("permute", "permute_copy", "prims::transpose")
def permute(c: Importer, x: Tensor, dims: Sequence[int]) -> Value:
    return permute_to(c, c(x), [d % x.dim() for d in dims])


@lower("transpose.int", "transpose_copy.int", "swapaxes", "swapdims")
def transpose(c: Importer, x: Tensor, a: int, b: int) -> Value:
    axes = list(range(x.dim()))
    if axes:
        axes[a], axes[b] = axes[b], axes[a]
    return permute_to(c, c(x), axes)


@lower("t", "t_copy", "numpy_T", "mT")
def reverse(c: Importer, x: Tensor) -> Value:
    axes = list(range(x.dim()))
    if c.call.target._schema.name == "aten::mT":
        axes[-2], axes[-1] = axes[-1], axes[-2]
    else:
        axes.reverse()
    return permute_to(c, c(x), axes)


@lower("movedim.int", "movedim.intlist")
def movedim(c: Importer, x: Tensor, source: Any, destination: Any) -> Value:
    sources = [s % x.dim() for s in (source if isinstance(source, (list, tuple)) else [source])]
    targets = destination if isinstance(destination, (list, tuple)) else [destination]
    order: list[int] = [-1] * x.dim()
    for s, t in zip(sources, targets):
        order[t % x.dim()] = s
    rest = iter(i for i in range(x.dim()) if i not in sources)
    return permute_to(c, c(x), [next(rest) if o < 0 else o for o in order])


def slice_axis(
    c: Importer, value: Value, axis: int, start: Dim, length: Dim, step: int = 1
) -> Value:
    """`length` elements from `start`, `step` apart; `value` itself if that is all of it."""
    if start == 0 and step == 1 and length == value.shape[axis]:
        return value
    if step == 1:
        stop = simplify_dim(start + length)
    else:
        stop = simplify_dim(start + (length - 1) * step + 1)
        if length == 0:
            stop = start
    result: Value = c.b.slice(value, axis=axis, start=start, stop=stop, step=step)
    return result


def first_of_slice(c: Importer, size: Any, start: Any, length: Dim) -> Dim:
    """A slice's start within [0, size], from Python's start, which may be negative or too far.

    `length` is that of the result: `[-3:]` of length 3 lies inside.
    """
    if start is None:
        return 0
    if isinstance(size, int) and isinstance(start, int):
        return max(0, min(start + size if start < 0 else start, size))
    if c.symbols.is_nonnegative(start):
        if length == c.dim(size - start) or c.symbols.is_nonnegative(size - start):
            return c.dim(start)
        if length == 0 or c.symbols.is_nonnegative(start - size):
            return c.dim(size)
    if c.symbols.is_nonnegative(-start):
        if length == c.dim(-start) or c.symbols.is_nonnegative(size + start):
            return c.dim(size + start)
        if c.symbols.is_nonnegative(-(size + start)):
            return 0
    raise CaptureError(
        f"a slice from {start}, of which nobody knows whether it is negative or past the end",
        where=str(c.location or ""),
        advice="slice from a position that is known to lie inside",
    )


def position_of(c: Importer, size: Any, index: Any) -> Dim:
    """An index, which lies inside, counted from the front."""
    if isinstance(index, int):
        return index if index >= 0 else c.dim(size + index)
    return first_of_slice(c, size, index, 1)


@lower("slice.Tensor", "slice_copy.Tensor")
def slice_(
    c: Importer, x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    axis = axis_of(x, dim)
    length = c.out_shape[axis]
    first = first_of_slice(c, x.shape[axis], start, length)
    return slice_axis(c, c(x), axis, first, length, step)


@lower("narrow")
def narrow(c: Importer, x: Tensor, dim: int, start: Any, length: Any) -> Value:
    axis = axis_of(x, dim)
    size = c.dim(length)
    first = first_of_slice(c, x.shape[axis], start, size)
    return slice_axis(c, c(x), axis, first, size)


@lower("select.int", "select_copy.int")
def select(c: Importer, x: Tensor, dim: int, index: Any) -> Value:
    axis = axis_of(x, dim)
    first = position_of(c, x.shape[axis], index)
    return c.b.reshape_to(slice_axis(c, c(x), axis, first, 1), c.out_shape)


@lower(
    "split.Tensor", "split_with_sizes", "chunk", "tensor_split.sections", "tensor_split.indices",
    "split.sizes", "split_copy.Tensor", "split_with_sizes_copy", "unsafe_split.Tensor",
    "unsafe_chunk", "unsafe_split_with_sizes",
)  # fmt: skip
def split(c: Importer, x: Tensor, sizes: Any, dim: int = 0) -> list[Value]:
    axis = axis_of(x, dim)
    value, start = c(x), 0
    parts: list[Value] = []
    for part in c.call.result:
        length = c.dim(part.shape[axis])
        parts.append(slice_axis(c, value, axis, start, length))
        start = simplify_dim(start + length)
    return parts


@lower("unbind.int", "unbind_copy.int")
def unbind(c: Importer, x: Tensor, dim: int = 0) -> list[Value]:
    axis, value = axis_of(x, dim), c(x)
    return [
        c.b.reshape_to(slice_axis(c, value, axis, i, 1), c.shape(part.shape))
        for i, part in enumerate(c.call.result)
    ]


@lower("cat", "concat", "concatenate")
def cat(c: Importer, tensors: Sequence[Tensor], dim: int = 0) -> Value:
    # ATen lets empty one-dimensional tensors join anything.
    parts = [t for t in tensors if not (t.dim() == 1 and t.shape[0] == 0)] or list(tensors)
    values = [c.b.cast_to(c(t), c.out_dtype) for t in parts]
    if len(values) == 1:
        return values[0]
    result: Value = c.b.cat(*values, axis=axis_of(parts[0], dim))
    return result


@lower("stack")
def stack(c: Importer, tensors: Sequence[Tensor], dim: int = 0) -> Value:
    axis = dim % (tensors[0].dim() + 1)
    shape = c.out_shape
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    values = [c.b.reshape(c.b.cast_to(c(t), c.out_dtype), shape=one) for t in tensors]
    result: Value = values[0] if len(values) == 1 else c.b.cat(*values, axis=axis)
    return result


@lower("repeat", "tile")
def repeat(c: Importer, x: Tensor, repeats: Sequence[Any]) -> Value:
    """Each axis gets a new axis before it, which is broadcast and merged."""
    shape = c.shape(x.shape)
    times = c.shape(repeats)
    rank = max(len(shape), len(times))
    shape = (*(1 for _ in range(rank - len(shape))), *shape)
    times = (*(1 for _ in range(rank - len(times))), *times)
    spread = [d for size in shape for d in (1, size)]
    target = [d for n, size in zip(times, shape) for d in (n, size)]
    value = c.b.reshape_to(c(x), tuple(spread))
    return c.b.reshape_to(broadcast(c, value, target), c.out_shape)


@lower("repeat_interleave.self_int")
def repeat_interleave(
    c: Importer, x: Tensor, repeats: Any, dim: int | None = None, output_size: Any = None
) -> Value:
    value = c(x)
    if dim is None:
        value = c.b.reshape_to(value, (c.dim(x.numel()),))
    axis = 0 if dim is None else axis_of(x, dim)
    shape, times = value.shape, c.dim(repeats)
    one = c.b.reshape(value, shape=(*shape[: axis + 1], 1, *shape[axis + 1 :]))
    wide = broadcast(c, one, (*shape[: axis + 1], times, *shape[axis + 1 :]))
    return c.b.reshape_to(wide, c.out_shape)


@lower("flip")
def flip(c: Importer, x: Tensor, dims: Sequence[int]) -> Value:
    if not dims or not x.dim():
        return c(x)
    result: Value = c.b.flip(c(x), axes=tuple(sorted(d % x.dim() for d in dims)))
    return result


@lower("roll")
def roll(c: Importer, x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    value = c(x)
    if not dims:
        value = c.b.reshape_to(value, (c.dim(x.numel()),))
        dims = (0,)
    for shift, dim in zip(shifts, dims):
        axis = dim % len(value.shape)
        size = value.shape[axis]
        if not isinstance(size, int):
            return NotImplemented
        cut = (-shift) % size if size else 0
        if cut:
            tail = slice_axis(c, value, axis, cut, size - cut)
            value = c.b.cat(tail, slice_axis(c, value, axis, 0, cut), axis=axis)
    return c.b.reshape_to(value, c.out_shape)


@lower("constant_pad_nd")
def constant_pad(c: Importer, x: Tensor, pad: Sequence[Any], value: Any = 0) -> Value:
    low: list[Dim] = [0] * x.dim()
    high: list[Dim] = [0] * x.dim()
    for i in range(len(pad) // 2):
        low[-1 - i], high[-1 - i] = c.dim(pad[2 * i]), c.dim(pad[2 * i + 1])
    if not any(low) and not any(high):
        return c(x)
    result: Value = c.b.pad(c(x), low=tuple(low), high=tuple(high), value=float(value))
    return result


@lower("pad")
def pad(
    c: Importer, x: Tensor, pad: Sequence[Any], mode: str = "constant", value: float | None = None
) -> Value:
    return constant_pad(c, x, pad, value or 0.0) if mode == "constant" else NotImplemented


@lower("tril", "triu")
def triangle(c: Importer, x: Tensor, diagonal: int = 0) -> Value:
    rows, columns = c.shape(x.shape)[-2:]
    if c.call.target._schema.name == "aten::tril":
        mask = c.b.tri_mask(rows=rows, columns=columns, diagonal=diagonal)
    else:
        mask = c.b.tri_mask(rows=rows, columns=columns, diagonal=columns, lower=diagonal - 1)
    result: Value = c.b.where(mask, c(x), c.scalar(0, c.out_dtype))
    return result


@lower("diagonal", "diagonal_copy")
def diagonal(c: Importer, x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    result: Value = c.b.diagonal(
        c(x), offset=offset, axis1=axis_of(x, dim1), axis2=axis_of(x, dim2)
    )
    return result


@lower("unfold", "unfold_copy")
def unfold(c: Importer, x: Tensor, dim: int, size: int, step: int) -> Value:
    result: Value = c.b.unfold(c(x), axis=axis_of(x, dim), size=size, step=step)
    return result


@lower("as_strided", "as_strided_copy")
def as_strided(
    c: Importer, x: Tensor, size: Sequence[Any], stride: Sequence[Any], offset: Any = None
) -> Value:
    """Positions in memory, mapped to elements of the operand by running both on numbers."""
    if tuple(size) == tuple(x.shape) and tuple(stride) == x.stride() and not offset:
        return c(x)
    value = c(x)
    if not value.type.is_static or not all(isinstance(s, int) for s in (*size, *stride)):
        return NotImplemented
    count = x.numel()
    base = x.storage_offset()
    last = 1 + sum((d - 1) * s for d, s in zip(x.shape, x.stride())) if count else 0
    element = torch.full((last,), -1, dtype=torch.int64)
    element.as_strided(x.shape, x.stride()).copy_(torch.arange(count).reshape(x.shape))
    start = (base if offset is None else offset) - base
    reach = start + 1 + sum((d - 1) * s for d, s in zip(size, stride))
    if start < 0 or reach > last:
        return NotImplemented
    positions = element.as_strided(size, stride, start)
    if bool((positions < 0).any()):
        return NotImplemented
    flat = c.b.reshape_to(value, (count,))
    index = c.tensor_constant(positions.reshape(-1).clone(), "positions")
    picked = c.b.gather(flat, c.b.reshape_to(index, (positions.numel(),)), axis=0)
    return c.b.reshape_to(picked, c.out_shape)
