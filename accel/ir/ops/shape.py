"""Ops that move elements and compute none.

Those with the VIEW trait are index maps of their first operand: result[i] = x[map(i)]. A code
generator may read through them instead of copying. Dimensions in attributes may be symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Trait, aten, define
from accel.ir.types import (
    Dim,
    Shape,
    TensorType,
    broadcast_shapes,
    format_shape,
    normalize_axis,
    product,
    same_dim,
    same_shape,
    simplify_dim,
)

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

    @staticmethod
    def evaluate(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
        return x.reshape(shape)


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
        if not same_shape(broadcast_shapes(x.shape, shape), shape):
            raise TypeInferenceError(
                f"accel.broadcast_to: {format_shape(x.shape)} to {format_shape(shape)}"
            )
        return x.with_shape(shape)

    @staticmethod
    def evaluate(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
        return x.expand(shape)


@define("slice", VIEW)
class Slice:
    """Elements start, start + step, ... below stop, along one axis. 0 <= start <= stop <= size."""

    @staticmethod
    def infer(x: TensorType, *, axis: int, start: Dim, stop: Dim, step: int = 1) -> TensorType:
        axis = normalize_axis(axis, x.rank)
        if isinstance(start, int) and isinstance(stop, int):
            size = x.shape[axis]
            if not 0 <= start <= stop or (isinstance(size, int) and stop > size) or step < 1:
                raise TypeInferenceError(
                    f"accel.slice: [{start}:{stop}:{step}] does not fit axis {axis} of "
                    f"{format_shape(x.shape)}"
                )
            length: Dim = (stop - start + step - 1) // step
        else:
            span = sympy.sympify(stop) - sympy.sympify(start)
            length = simplify_dim(span if step == 1 else sympy.floor((span + step - 1) / step))
        return x.with_shape((*x.shape[:axis], length, *x.shape[axis + 1 :]))

    evaluate = aten("slice.Tensor", "x", "axis", "start", "stop", "step")


@define("flip", VIEW)
class Flip:
    """Reversed along `axes`."""

    @staticmethod
    def infer(x: TensorType, *, axes: tuple[int, ...]) -> TensorType:
        for axis in axes:
            normalize_axis(axis, x.rank)
        return x

    evaluate = aten("flip", "x", "axes")


@define("pad", Trait.PURE)
class Pad:
    """`low[i]` elements of `value` before axis i and `high[i]` after; negative amounts crop."""

    @staticmethod
    def infer(x: TensorType, *, low: Shape, high: Shape, value: float = 0.0) -> TensorType:
        if not len(low) == len(high) == x.rank:
            raise TypeInferenceError(f"accel.pad: amounts for rank {len(low)}, not {x.rank}")
        return x.with_shape(simplify_dim(a + d + b) for a, d, b in zip(low, x.shape, high))

    @staticmethod
    def evaluate(
        x: Tensor, *, low: tuple[int, ...], high: tuple[int, ...], value: float = 0.0
    ) -> Tensor:
        amounts = [p for a, b in zip(reversed(low), reversed(high)) for p in (a, b)]
        return torch.ops.aten.constant_pad_nd(x, amounts, value)


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
        windows = (x.shape[axis] - size) // step + 1
        return x.with_shape((*x.shape[:axis], simplify_dim(windows), *x.shape[axis + 1 :], size))

    evaluate = aten("unfold", "x", "axis", "size", "step")


@define("iota", Trait.PURE)
class Iota:
    """start + step * i along `axis` of a tensor of `shape`."""

    @staticmethod
    def infer(
        *, shape: Shape, axis: int, dtype: torch.dtype, start: Dim = 0, step: Dim = 1
    ) -> TensorType:
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


@define("size", Trait.PURE)
class Size:
    """A symbolic size as a 0-d int64 tensor."""

    @staticmethod
    def infer(*, value: Dim) -> TensorType:
        return TensorType((), torch.int64)

    @staticmethod
    def evaluate(*, value: int) -> Tensor:
        return torch.tensor(value, dtype=torch.int64)


def permutation_inverse(axes: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes `axes`."""
    inverse = [0] * len(axes)
    for i, axis in enumerate(axes):
        inverse[axis] = i
    return tuple(inverse)
