"""Ops that move elements and compute none.

Those with the VIEW trait are index maps of their first operand: result[i] = x[map(i)]. A code
generator may read through them instead of copying. Dimensions in attributes may be symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Arg, Lit, Trait, aten, define
from accel.ir.ops.elementwise import MOVABLE, check_dtype
from accel.ir.types import (
    Dim,
    Shape,
    TensorType,
    at_least,
    broadcast_shapes,
    format_shape,
    normalize_axis,
    product,
    same_dim,
    same_shape,
    simplify_dim,
)

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value

VIEW = Trait.PURE | Trait.VIEW


@define("reshape", VIEW)
class Reshape:
    """The same elements in C order under another shape (no -1: the shape is complete)."""

    @staticmethod
    def infer(x: TensorType, *, shape: Shape) -> TensorType:
        if not same_dim(product(x.shape), product(shape)):
            raise TypeInferenceError(
                f"accel.reshape: {format_shape(x.shape)} has not as many elements as "
                f"{format_shape(shape)}"
            )
        return x.with_shape(shape)

    evaluate = aten("reshape", "x", "shape")


@define("permute", VIEW)
class Permute:
    """Axes in another order: result axis i is operand axis `axes[i]`."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...]) -> TensorType:
        if sorted(axes) != list(range(x.rank)):
            raise TypeInferenceError(f"accel.permute: {axes} is no permutation of rank {x.rank}")
        return x.with_shape(x.shape[a] for a in axes)

    evaluate = aten("permute", "x", "axes")


@define("broadcast_to", VIEW)
class BroadcastTo:
    """Numpy broadcasting to a given shape."""

    @staticmethod
    def infer(x: TensorType, *, shape: Shape) -> TensorType:
        if x.rank > len(shape) or not same_shape(broadcast_shapes(x.shape, shape), shape):
            raise TypeInferenceError(
                f"accel.broadcast_to: {format_shape(x.shape)} to {format_shape(shape)}"
            )
        return x.with_shape(shape)

    evaluate = aten("expand", "x", "shape")


def slice_length(name: str, x: TensorType, axis: int, start: Dim, stop: Dim, step: int) -> Dim:
    """How many elements [start:stop:step] takes; TypeInferenceError if it does not fit x."""
    size = x.shape[axis]
    known = isinstance(start, int) and isinstance(stop, int)
    if step < 1 or (known and not 0 <= start <= stop) or at_least(stop, size, more=True):
        raise TypeInferenceError(
            f"accel.{name}: [{start}:{stop}:{step}] does not fit axis {axis} of "
            f"{format_shape(x.shape)}"
        )
    span = stop - start
    return simplify_dim(span if step == 1 else (span + step - 1) // step)


@define("slice", VIEW)
class Slice:
    """Elements start, start + step, ... below stop, along one axis. 0 <= start <= stop <= size."""

    @staticmethod
    def infer(x: TensorType, *, axis: int, start: Dim, stop: Dim, step: int = 1) -> TensorType:
        axis = normalize_axis(axis, x.rank)
        length = slice_length("slice", x, axis, start, stop, step)
        return x.with_shape((*x.shape[:axis], length, *x.shape[axis + 1 :]))

    evaluate = aten("slice.Tensor", "x", "axis", "start", "stop", "step")


@define("flip", VIEW)
class Flip:
    """Reversed along `axes`."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...]) -> TensorType:
        check_dtype("flip", MOVABLE, x)
        if len({normalize_axis(axis, x.rank) for axis in axes}) != len(axes):
            raise TypeInferenceError(f"accel.flip: axes {axes} repeat an axis")
        return x

    evaluate = aten("flip", "x", "axes")


@define("pad", Trait.PURE)
class Pad:
    """`low[i]` elements of `value` before axis i and `high[i]` after; negative amounts crop."""

    @staticmethod
    def infer(x: TensorType, *, low: Shape, high: Shape, value: float = 0.0) -> TensorType:
        check_dtype("pad", MOVABLE + "ue", x)
        if not len(low) == len(high) == x.rank:
            raise TypeInferenceError(f"accel.pad: amounts for rank {len(low)}, not {x.rank}")
        shape = tuple(simplify_dim(a + d + b) for a, d, b in zip(low, x.shape, high))
        if any(isinstance(d, int) and d < 0 for d in shape):
            raise TypeInferenceError(f"accel.pad: {low}, {high} crop all of {x}")
        return x.with_shape(shape)

    evaluate = aten(
        "constant_pad_nd",
        "x",
        Arg(lambda v: [p for pair in zip(reversed(v["low"]), reversed(v["high"])) for p in pair]),
        "value",
    )


@define("cat", Trait.PURE)
class Cat:
    """Operands one after the other along `axis`."""

    @staticmethod
    def infer(*xs: TensorType, axis: int) -> TensorType:
        if not xs:
            raise TypeInferenceError("accel.cat needs at least one operand")
        axis = normalize_axis(axis, xs[0].rank)
        total: Dim = 0
        for x in xs:
            rest = x.shape[:axis] + x.shape[axis + 1 :]
            first = xs[0].shape[:axis] + xs[0].shape[axis + 1 :]
            if x.dtype != xs[0].dtype or x.rank != xs[0].rank or not same_shape(rest, first):
                raise TypeInferenceError(
                    f"accel.cat: {x} and {xs[0]} differ outside of axis {axis}"
                )
            total = total + x.shape[axis]
        return xs[0].with_shape(
            (*xs[0].shape[:axis], simplify_dim(total), *xs[0].shape[axis + 1 :])
        )

    evaluate = aten("cat", "xs", "axis")


@define("diagonal", VIEW)
class Diagonal:
    """Elements (i, i + offset) of two axes, as a new last axis."""

    @staticmethod
    def infer(x: TensorType, *, offset: int = 0, axis1: int = 0, axis2: int = 1) -> TensorType:
        a, b = normalize_axis(axis1, x.rank), normalize_axis(axis2, x.rank)
        rows, columns = x.shape[a], x.shape[b]
        if not (isinstance(rows, int) and isinstance(columns, int)):
            raise TypeInferenceError("accel.diagonal needs static sizes")
        if a == b:
            raise TypeInferenceError(f"accel.diagonal: axes {axis1} and {axis2} are one")
        length = max(min(rows + min(offset, 0), columns - max(offset, 0)), 0)
        rest = [d for i, d in enumerate(x.shape) if i not in (a, b)]
        return x.with_shape((*rest, length))

    evaluate = aten("diagonal", "x", "offset", "axis1", "axis2")


@define("unfold", VIEW)
class Unfold:
    """Sliding windows of `size` along `axis`, `step` apart; the window is a new last axis."""

    @staticmethod
    def infer(x: TensorType, *, axis: int, size: int, step: int) -> TensorType:
        axis = normalize_axis(axis, x.rank)
        if size < 0 or step < 1 or at_least(size, x.shape[axis], more=True):
            raise TypeInferenceError(f"accel.unfold: windows of {size}, step {step}, of {x}")
        windows = (x.shape[axis] - size) // step + 1
        return x.with_shape((*x.shape[:axis], simplify_dim(windows), *x.shape[axis + 1 :], size))

    evaluate = aten("unfold", "x", "axis", "size", "step")


@define("arange", Trait.PURE)
class Arange:
    """start + step * i for i < `length`, in one dimension."""

    @staticmethod
    def infer(*, length: Dim, dtype: torch.dtype, start: Dim = 0, step: Dim = 1) -> TensorType:
        check_dtype("arange", "fi", TensorType((length,), dtype))
        if step == 0:
            raise TypeInferenceError("accel.arange: step 0")
        return TensorType((length,), dtype)

    evaluate = aten(
        "arange.start_step",
        "start",
        Arg(lambda v: v["start"] + v["length"] * v["step"]),
        "step",
        dtype="dtype",
    )


@define("iota", Trait.PURE)
class Iota:
    """start + step * i along `axis` of a tensor of `shape`."""

    @staticmethod
    def infer(
        *, shape: Shape, axis: int, dtype: torch.dtype, start: Dim = 0, step: Dim = 1
    ) -> TensorType:
        check_dtype("iota", "fi", TensorType(shape, dtype))
        normalize_axis(axis, len(shape))
        return TensorType(shape, dtype)

    @staticmethod
    def evaluate(
        *, shape: tuple[int, ...], axis: int, dtype: torch.dtype, start: int = 0, step: int = 1
    ) -> Tensor:
        line = (torch.arange(shape[axis], dtype=torch.int64) * step + start).to(dtype)
        view = [1] * len(shape)
        view[axis] = shape[axis]
        return line.reshape(view).expand(shape)

    @staticmethod
    def decompose(
        b: Builder, *, shape: Shape, axis: int, dtype: torch.dtype, start: Dim = 0, step: Dim = 1
    ) -> Value:
        axis = normalize_axis(axis, len(shape))
        if step == 0:
            return b.broadcast_to(b.cast_to(b.size(value=start), dtype), shape=shape)
        line = b.arange(length=shape[axis], dtype=dtype, start=start, step=step)
        if len(shape) == 1:
            return line
        column = b.reshape(line, shape=(shape[axis], *(1 for _ in shape[axis + 1 :])))
        return b.broadcast_to(column, shape=shape)


@define("size", Trait.PURE)
class Size:
    """A symbolic size as a 0-d int64 tensor."""

    @staticmethod
    def infer(*, value: Dim) -> TensorType:
        return TensorType((), torch.int64)

    evaluate = aten("scalar_tensor", "value", dtype=Lit(torch.int64))


def permutation_inverse(axes: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes `axes`."""
    inverse = [0] * len(axes)
    for i, axis in enumerate(axes):
        inverse[axis] = i
    return tuple(inverse)
