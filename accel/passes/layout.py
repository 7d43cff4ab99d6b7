"""Runs convolutions channels-last: the layout that oneDNN and cuDNN compute in.

Each 2-d convolution becomes `layout = "nhwc"` between two permutes; then whatever follows without
caring for the order of axes (elementwise ops, padding, reductions, concatenation) follows into that
layout, so that permutes remain at the edges only. What cannot follow (a max pool, say) reads a
permuted view, which costs nothing. A 1x1 convolution is a product over the last axis there.

Contract: exact (elements are only addressed otherwise). Before and after:

    %1 = "accel.conv"(%x, %w, %b) {...} : (tensor<1x3x8x8xf32>, ...) -> tensor<1x4x8x8xf32>
    %2 = "accel.relu"(%1) : (tensor<1x4x8x8xf32>) -> tensor<1x4x8x8xf32>

    %3 = "accel.permute"(%x) {axes = [0, 2, 3, 1]} : (...) -> tensor<1x8x8x3xf32>
    %4 = "accel.conv"(%3, %w, %b) {..., layout = "nhwc"} : (...) -> tensor<1x8x8x4xf32>
    %5 = "accel.relu"(%4) : (tensor<1x8x8x4xf32>) -> tensor<1x8x8x4xf32>
    %2 = "accel.permute"(%5) {axes = [0, 3, 1, 2]} : (...) -> tensor<1x4x8x8xf32>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from accel.ir.builder import Builder
from accel.ir.module import Function, Module, Op, Value, constant_name
from accel.ir.op import Trait
from accel.ir.storage import WeightStore
from accel.ir.types import product
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.deferred import deferred_channels, deferred_reshape
from accel.passes.weights import drop_unused

_TO_LAST = (0, 2, 3, 1)  # result axis i is operand axis _TO_LAST[i]
_TO_FIRST = (0, 3, 1, 2)
_CHANNELS = 4  # of a photograph: three, and zeros
_THIN = 52  # inputs and outputs of a 1x1 convolution: in * out / (in + out) FLOPs a byte


@register_pass
@dataclass
class Layout(Pass):
    """Moves 2-d convolutions and what surrounds them to channels-last."""

    name: ClassVar[str] = "layout"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        on_gpu = getattr(context.target, "kind", "cpu") == "cuda"
        for function in module.functions.values():
            if any(_is_first(op, on_gpu) for op in function.ops):
                mover = _Mover(function, module.weights, context, self.name)
                mover.run()
                drop_unused(module, list(mover.replaced))


def _is_first(op: Op, on_gpu: bool) -> bool:
    """A convolution that a channels-last library call can take: with a stored weight, of float32,
    or on a GPU of 16-bit floats too.

    The others (computed or decoded weights, other dtypes) are one ATen call, channels-first.
    """
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if on_gpu else (torch.float32,)
    return (
        op.name == "conv"
        and op.result.type.rank == 4
        and op.result.dtype in dtypes
        and op.attribute("layout") == "nchw"
        and constant_name(op.operands[1]) is not None
    )


def _is_pointwise(op: Op) -> bool:
    """A 1x1 convolution without stride, padding or groups."""
    _, weight, _ = op.arguments()
    return (
        weight.shape[2:] == (1, 1)
        and set(op.attribute("stride")) == {1}
        and set(op.attribute("padding")) == {0}
        and op.attribute("groups") == 1
    )


def _fits_one_call(op: Op) -> bool:
    """Whether cuDNN's call takes all that follows: [a residual and] ReLU.

    Anything else is better off in the kernel of a product, or cuBLAS's, which adds a bias at no
    cost. So is a convolution of single pixels, and one of what squeeze-excite has scaled, which
    a product does as it reads.
    """
    x = op.operands[0]
    if set(x.shape[2:]) == {1} or _is_scaled(x):
        return False
    user = op.result.single_user
    if user is not None and user.name == "add":
        user = user.result.single_user
    elif _is_thin(op):
        return False
    return user is not None and user.name == "relu"


def _is_thin(op: Op) -> bool:
    """A 1x1 convolution of 16-bit floats, static sizes and so few channels that memory is the limit
    however it is computed: a generated kernel wastes less on tiles."""
    outputs, inputs = op.operands[1].shape[:2]
    static = all(isinstance(d, int) for d in op.result.shape) and op.result.dtype.itemsize == 2
    return static and _is_pointwise(op) and inputs * outputs <= _THIN * (inputs + outputs)


def _cuts_patches(op: Op) -> bool:
    """A convolution whose windows lie side by side, as a vision transformer's first one."""
    x, weight, _ = op.arguments()
    window = tuple(weight.shape[2:])
    whole = all(isinstance(d, int) and d % k == 0 for d, k in zip(x.shape[2:], window, strict=True))
    plain = set(op.attribute("padding")) == {0} and set(op.attribute("dilation")) == {1}
    apart = tuple(op.attribute("stride")) == window and op.attribute("groups") == 1
    return plain and apart and whole and window != (1, 1)


def _patches(b: Builder, op: Op) -> Value:
    """The windows of a convolution that cuts patches: [B, rows, columns, C * KH * KW]."""
    x, weight, _ = op.arguments()
    batch, channels = x.shape[:2]
    (height, width), (rows, columns) = weight.shape[2:], op.result.shape[2:]
    cut = b.reshape(x, shape=(batch, channels, rows, height, columns, width))
    moved = b.permute(cut, axes=(0, 2, 4, 1, 3, 5))
    made: Value = b.reshape(moved, shape=(batch, rows, columns, channels * height * width))
    return made


def _has_few_channels(op: Op) -> bool:
    """An image of 16-bit elements with three channels, a photograph. cuDNN has kernels for four,
    and would fill up the channels itself, in kernels of its own (H200: 158 us for ResNet-50's first
    convolution, 122 with four channels, 316 with eight; 183 where four pixels are one with 16; 80
    where four columns of these are one, an image of 105 MB instead of 26)."""
    x, groups = op.operands[0], op.attribute("groups")
    return x.shape[1] == _CHANNELS - 1 and x.dtype.itemsize == 2 and groups == 1


def _adds_bias(op: Op) -> bool:
    """Whether a kernel adds a convolution's bias: cuDNN's with a ReLU, or a generated depthwise
    one. torch adds others in a kernel of their own, which a generated one does with what follows.
    """
    groups = op.attribute("groups")
    return _fits_one_call(op) if groups == 1 else groups == op.operands[0].shape[1]


def _is_scaled(x: Value) -> bool:
    """Whether an image is the product of another with one number for each channel, and is read
    once."""
    if x.op is None or x.op.name != "mul" or len(x.uses) != 1:
        return False
    return any(v.type.rank == 4 and set(v.shape[2:]) == {1} for v in x.op.operands)


class _Mover:
    """`twins` maps a channels-first value to the same value channels-last."""

    def __init__(
        self, function: Function, weights: WeightStore, context: Context, made_by: str
    ) -> None:
        self.function, self.context, self.made_by = function, context, made_by
        self.weights = weights
        self.on_gpu = getattr(context.target, "kind", "cpu") == "cuda"
        self.replaced: dict[str, str] = {}  # weights in another shape, by the weight's name
        self.twins: dict[Value, Value] = {}

    def run(self) -> None:
        replaced: list[Op] = []
        for op in list(self.function.ops):
            if self._follows(op) and self.context.rewrite(f"layout.{op.name}", op):
                self._move(op)
                replaced.append(op)
        moved = set(replaced)
        for op in reversed(replaced):
            for value in op.results:
                self._leave(value, moved)
        for op in reversed(replaced):
            if not any(r.uses for r in op.results):
                op.erase()

    def _follows(self, op: Op) -> bool:
        """Whether the op can be computed channels-last from operands that are (or may be)."""
        if _is_first(op, self.on_gpu):
            return True
        if len(op.results) != 1 or not any(v in self.twins for v in op.operands):
            return False
        if op.has(Trait.ELEMENTWISE):
            return op.result.type.rank == 4 and all(self._may_move(v) for v in op.operands)
        if op.name == "pad":
            return True
        if op.name == "cat":
            return all(v in self.twins for v in op.operands)
        axes = op.attributes.get("axes")
        if op.has(Trait.REDUCTION) and isinstance(axes, tuple):
            # Without keepdim the rest must come out in the same order: batch, then channels.
            kept = {0, 1, 2, 3} - {int(a) % 4 for a in axes}
            return bool(op.attribute("keepdim")) or not (1 in kept and kept & {2, 3})
        return False

    def _may_move(self, value: Value) -> bool:
        """Twins, scalars, and what is small or constant and broadcast."""
        if value in self.twins or value.type.rank == 0:
            return True
        source = value.op
        return source is not None and source.has(Trait.CONSTANT)

    def _last(self, value: Value, b: Builder) -> Value:
        """The value channels-last; a permuted view of it if nobody computes it that way."""
        if value.type.rank == 0:
            return value
        if value not in self.twins:
            shape = (1,) * (4 - value.type.rank) + value.shape
            wide = b.reshape_to(value, shape)
            self.twins[value] = b.permute(wide, axes=_TO_LAST)
        return self.twins[value]

    def _move(self, op: Op) -> None:
        b = Builder(before=op, location=op.location, made_by=self.made_by)
        attributes: dict[str, Any] = dict(op.attributes)
        operands: Sequence[Value | None]
        if op.name == "conv":
            x, *rest = op.arguments()
            if self.on_gpu and _cuts_patches(op):
                self._finish(op, self._linear(b, [_patches(b, op), *rest]))
                return
            operands = [self._last(x, b), *rest]
            attributes["layout"] = "nhwc"
            if _is_pointwise(op) and not (self.on_gpu and _fits_one_call(op)):
                self._finish(op, self._linear(b, operands))
                return
            if self.on_gpu and _has_few_channels(op):
                operands = [*self._whole_vectors(b, operands), rest[1]]
            if self.on_gpu and rest[1] is not None and not _adds_bias(op):
                made = b.op("conv", [*operands[:2], None], attributes).result
                self._finish(op, b.add(made, rest[1]))
                return
        else:
            operands = [self._last(v, b) for v in op.operands]
        for name in ("low", "high"):
            if op.name == "pad":
                attributes[name] = tuple(attributes[name][a] for a in _TO_LAST)
        if op.name == "cat":
            attributes["axis"] = _TO_LAST.index(int(attributes["axis"]) % 4)
        if op.has(Trait.REDUCTION):
            axes = (_TO_LAST.index(int(a) % 4) for a in attributes["axes"])
            attributes["axes"] = tuple(sorted(axes))
        self._finish(op, b.op(op.name, operands, attributes).result)

    def _finish(self, op: Op, result: Value) -> None:
        if result.type.rank == 4:
            self.twins[op.result] = result
        else:
            op.result.replace_all_uses(result)

    def _whole_vectors(self, b: Builder, operands: Sequence[Value | None]) -> list[Value]:
        """Image and weight with a channel of zeros."""
        x, weight = operands[:2]
        assert x is not None and weight is not None
        name, missing = str(constant_name(weight)), _CHANNELS - int(x.shape[3])
        if name not in self.replaced:
            shape = (weight.shape[0], weight.shape[1] + missing, *weight.shape[2:])
            store = deferred_channels(self.weights.pick(name), name, missing)
            type = weight.type.with_shape(shape)
            self.replaced[name] = self.weights.add_lazy(f"{name}.wide", type, store)
        wide = b.constant(self.replaced[name], self.weights.type(self.replaced[name]))
        padded = b.pad(x, low=(0, 0, 0, 0), high=(0, 0, 0, missing), value=0.0)
        return [padded, wide]

    def _linear(self, b: Builder, operands: Sequence[Value | None]) -> Value:
        """A convolution whose windows are x's last axis as a product over it."""
        x, weight, bias = operands
        assert x is not None and weight is not None
        name = str(constant_name(weight))
        if name not in self.replaced:
            type = weight.type.with_shape((weight.shape[0], product(weight.shape[1:])))
            store = deferred_reshape(self.weights.pick(name), name, [int(d) for d in type.shape])
            self.replaced[name] = self.weights.add_lazy(f"{name}.matrix", type, store)
        matrix = b.constant(self.replaced[name], self.weights.type(self.replaced[name]))
        result: Value = b.linear(x, matrix, bias)
        return result

    def _leave(self, value: Value, moved: set[Op]) -> None:
        """Gives users outside of the layout a permuted view."""
        outside = [(user, i) for user, i in value.uses if user not in moved]
        if not outside:
            return
        twin = self.twins[value]
        assert twin.op is not None and twin.op.next is not None
        b = Builder(before=twin.op.next, location=twin.op.location, made_by=self.made_by)
        first = b.permute(twin, axes=_TO_FIRST)
        for user, index in outside:
            user.set_operand(index, first)
