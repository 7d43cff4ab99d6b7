"""Backward ops of activations and softmax: elementwise but for softmax, two operands each.

`grad` is the gradient of the result; the other operand is the forward op's input x or its result y.
Decompositions compute 16-bit floats in float32 and round once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Arg, Lit, aten, define
from accel.ir.ops.elementwise import ELEMENTWISE, check_dtype
from accel.ir.ops.norm import NORM
from accel.ir.types import TensorType, broadcast_shapes, normalize_axis, same_shape

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value


def _pair(name: str, grad: TensorType, other: TensorType) -> TensorType:
    dtype = check_dtype(name, "f", grad, other)
    return TensorType(broadcast_shapes(grad.shape, other.shape), dtype)


def _same(name: str, grad: TensorType, other: TensorType) -> TensorType:
    check_dtype(name, "f", grad, other)
    if not same_shape(grad.shape, other.shape):
        raise TypeInferenceError(f"accel.{name}: gradient {grad} for {other}")
    return grad


@define("sigmoid_backward", ELEMENTWISE)
class SigmoidBackward:
    """grad * y * (1 - y)."""

    @staticmethod
    def infer(grad: TensorType, y: TensorType) -> TensorType:
        return _pair("sigmoid_backward", grad, y)

    evaluate = aten("sigmoid_backward", "grad", "y")

    @staticmethod
    def decompose(b: Builder, grad: Value, y: Value) -> Value:
        wide = b.widen(y)
        slope = b.mul(wide, b.sub(b.scalar(1.0, wide.dtype), wide))
        return b.cast_to(b.mul(b.widen(grad), slope), y.dtype)


@define("tanh_backward", ELEMENTWISE)
class TanhBackward:
    """grad * (1 - y^2)."""

    @staticmethod
    def infer(grad: TensorType, y: TensorType) -> TensorType:
        return _pair("tanh_backward", grad, y)

    evaluate = aten("tanh_backward", "grad", "y")

    @staticmethod
    def decompose(b: Builder, grad: Value, y: Value) -> Value:
        wide = b.widen(y)
        slope = b.sub(b.scalar(1.0, wide.dtype), b.mul(wide, wide))
        return b.cast_to(b.mul(b.widen(grad), slope), y.dtype)


@define("threshold_backward", ELEMENTWISE)
class ThresholdBackward:
    """grad where x > `threshold`, else 0: the backward of relu."""

    @staticmethod
    def infer(grad: TensorType, x: TensorType, *, threshold: float = 0.0) -> TensorType:
        return _pair("threshold_backward", grad, x)

    evaluate = aten("threshold_backward", "grad", "x", "threshold")

    @staticmethod
    def decompose(b: Builder, grad: Value, x: Value, *, threshold: float = 0.0) -> Value:
        # `le`, so that a NaN lets the gradient through, as in torch.
        small = b.le(x, b.scalar(threshold, x.dtype))
        return b.where(small, b.scalar(0.0, grad.dtype), grad)


@define("hardtanh_backward", ELEMENTWISE)
class HardTanhBackward:
    """grad where `min` < x < `max`, else 0: the backward of clamp to that range."""

    @staticmethod
    def infer(grad: TensorType, x: TensorType, *, min: float, max: float) -> TensorType:
        return _pair("hardtanh_backward", grad, x)

    evaluate = aten("hardtanh_backward", "grad", "x", "min", "max")

    @staticmethod
    def decompose(b: Builder, grad: Value, x: Value, *, min: float, max: float) -> Value:
        zero = b.scalar(0.0, grad.dtype)
        above = b.gt(x, b.scalar(min, x.dtype))
        below = b.lt(x, b.scalar(max, x.dtype))
        return b.where(b.logical_and(above, below), grad, zero)  # 0 where x is NaN, as in torch


@define("leaky_relu_backward", ELEMENTWISE)
class LeakyReluBackward:
    """grad where x > 0, else `slope` * grad."""

    @staticmethod
    def infer(grad: TensorType, x: TensorType, *, slope: float = 0.01) -> TensorType:
        return _pair("leaky_relu_backward", grad, x)

    evaluate = aten("leaky_relu_backward", "grad", "x", "slope", Lit(False))

    @staticmethod
    def decompose(b: Builder, grad: Value, x: Value, *, slope: float = 0.01) -> Value:
        wide = b.widen(grad)
        low = b.mul(wide, b.scalar(slope, wide.dtype))
        y = b.where(b.gt(x, b.scalar(0.0, x.dtype)), wide, low)
        return b.cast_to(y, grad.dtype)


@define("elu_backward", ELEMENTWISE)
class EluBackward:
    """grad times the slope of `elu` at x."""

    @staticmethod
    def infer(
        grad: TensorType,
        x: TensorType,
        *,
        alpha: float = 1.0,
        scale: float = 1.0,
        input_scale: float = 1.0,
    ) -> TensorType:
        return _pair("elu_backward", grad, x)

    evaluate = aten("elu_backward", "grad", "alpha", "scale", "input_scale", Lit(False), "x")

    @staticmethod
    def decompose(
        b: Builder,
        grad: Value,
        x: Value,
        *,
        alpha: float = 1.0,
        scale: float = 1.0,
        input_scale: float = 1.0,
    ) -> Value:
        wide, g = b.widen(x), b.widen(grad)
        e = b.exp(b.mul(wide, b.scalar(input_scale, wide.dtype)))
        low = b.mul(b.mul(g, b.scalar(input_scale * alpha * scale, wide.dtype)), e)
        high = b.mul(g, b.scalar(scale, wide.dtype))
        return b.cast_to(b.where(b.gt(wide, b.scalar(0.0, wide.dtype)), high, low), x.dtype)


@define("gelu_backward", ELEMENTWISE)
class GeluBackward:
    """grad times the slope of `gelu` at x."""

    @staticmethod
    def infer(grad: TensorType, x: TensorType, *, approximate: str = "none") -> TensorType:
        if approximate not in ("none", "tanh"):
            raise TypeInferenceError(f"accel.gelu_backward: approximate = '{approximate}'")
        return _pair("gelu_backward", grad, x)

    evaluate = aten("gelu_backward", "grad", "x", approximate="approximate")

    @staticmethod
    def decompose(b: Builder, grad: Value, x: Value, *, approximate: str = "none") -> Value:
        wide = b.widen(x)

        def c(value: float) -> Value:
            return b.scalar(value, wide.dtype)

        square = b.mul(wide, wide)
        half = c(0.5)
        if approximate == "none":
            cdf = b.mul(half, b.add(c(1.0), b.erf(b.mul(wide, c(math.sqrt(0.5))))))
            density = b.mul(b.exp(b.mul(square, c(-0.5))), c(1 / math.sqrt(2 * math.pi)))
            slope = b.add(cdf, b.mul(wide, density))
        else:
            beta = math.sqrt(2 / math.pi)
            inner = b.mul(wide, b.add(c(beta), b.mul(square, c(0.044715 * beta))))
            t = b.tanh(inner)
            inner_slope = b.add(c(beta), b.mul(square, c(3 * 0.044715 * beta)))
            left = b.mul(half, b.add(c(1.0), t))
            right = b.mul(b.mul(b.mul(half, wide), b.sub(c(1.0), b.mul(t, t))), inner_slope)
            slope = b.add(left, right)
        return b.cast_to(b.mul(b.widen(grad), slope), x.dtype)


@define("silu_backward", ELEMENTWISE)
class SiluBackward:
    """grad * s * (1 + x * (1 - s)) with s = sigmoid(x)."""

    @staticmethod
    def infer(grad: TensorType, x: TensorType) -> TensorType:
        return _pair("silu_backward", grad, x)

    evaluate = aten("silu_backward", "grad", "x")

    @staticmethod
    def decompose(b: Builder, grad: Value, x: Value) -> Value:
        wide = b.widen(x)
        one = b.scalar(1.0, wide.dtype)
        s = b.sigmoid(wide)
        slope = b.mul(s, b.add(one, b.mul(wide, b.sub(one, s))))
        return b.cast_to(b.mul(b.widen(grad), slope), x.dtype)


@define("hardsigmoid_backward", ELEMENTWISE)
class HardSigmoidBackward:
    """grad / 6 where -3 < x < 3, else 0."""

    @staticmethod
    def infer(grad: TensorType, x: TensorType) -> TensorType:
        return _pair("hardsigmoid_backward", grad, x)

    @staticmethod
    def evaluate(grad: Tensor, x: Tensor) -> Tensor:
        inside = (x > -3) & (x < 3)
        return torch.where(inside, grad * (1 / 6), 0).to(grad.dtype)

    # ATen's own sixth is a float32.
    call = aten("hardsigmoid_backward", "grad", "x", when=lambda v: v["x"].dtype != torch.float64)

    @staticmethod
    def decompose(b: Builder, grad: Value, x: Value) -> Value:
        wide, g = b.widen(x), b.widen(grad)
        zero = b.scalar(0.0, g.dtype)
        low = b.gt(wide, b.scalar(-3.0, wide.dtype))
        inside = b.logical_and(low, b.lt(wide, b.scalar(3.0, wide.dtype)))
        return b.cast_to(b.where(inside, b.mul(g, b.scalar(1 / 6, g.dtype)), zero), x.dtype)


@define("hardswish_backward", ELEMENTWISE)
class HardSwishBackward:
    """0 where x <= -3, grad where x >= 3, else grad * (x / 3 + 1 / 2)."""

    @staticmethod
    def infer(grad: TensorType, x: TensorType) -> TensorType:
        return _pair("hardswish_backward", grad, x)

    evaluate = aten("hardswish_backward", "grad", "x")

    @staticmethod
    def decompose(b: Builder, grad: Value, x: Value) -> Value:
        wide, g = b.widen(x), b.widen(grad)
        third = b.div(wide, b.scalar(3.0, wide.dtype))
        middle = b.mul(g, b.add(third, b.scalar(0.5, wide.dtype)))
        low = b.le(wide, b.scalar(-3.0, wide.dtype))
        high = b.ge(wide, b.scalar(3.0, wide.dtype))
        y = b.where(low, b.scalar(0.0, wide.dtype), b.where(high, g, middle))
        return b.cast_to(y, x.dtype)


@define("softplus_backward", ELEMENTWISE)
class SoftplusBackward:
    """grad * sigmoid(beta x); grad itself where beta * x > threshold."""

    @staticmethod
    def infer(
        grad: TensorType, x: TensorType, *, beta: float = 1.0, threshold: float = 20.0
    ) -> TensorType:
        return _pair("softplus_backward", grad, x)

    evaluate = aten("softplus_backward", "grad", "x", "beta", "threshold")

    @staticmethod
    def decompose(
        b: Builder, grad: Value, x: Value, *, beta: float = 1.0, threshold: float = 20.0
    ) -> Value:
        wide, g = b.widen(x), b.widen(grad)
        scaled = b.mul(wide, b.scalar(beta, wide.dtype))
        soft = b.mul(g, b.sigmoid(scaled))
        y = b.where(b.gt(scaled, b.scalar(threshold, wide.dtype)), g, soft)
        return b.cast_to(y, x.dtype)


@define("mish_backward", ELEMENTWISE)
class MishBackward:
    """grad * (t + x * sigmoid(x) * (1 - t^2)) with t = tanh(softplus(x))."""

    @staticmethod
    def infer(grad: TensorType, x: TensorType) -> TensorType:
        return _pair("mish_backward", grad, x)

    evaluate = aten("mish_backward", "grad", "x")

    @staticmethod
    def decompose(b: Builder, grad: Value, x: Value) -> Value:
        wide = b.widen(x)
        t = b.tanh(b.softplus(wide))
        bend = b.sub(b.scalar(1.0, wide.dtype), b.mul(t, t))
        slope = b.add(t, b.mul(b.mul(wide, b.sigmoid(wide)), bend))
        return b.cast_to(b.mul(b.widen(grad), slope), x.dtype)


@define("softmax_backward", NORM)
class SoftmaxBackward:
    """(grad - sum(grad * y)) * y along `axis`, y = softmax(x)."""

    @staticmethod
    def infer(grad: TensorType, y: TensorType, *, axis: int) -> TensorType:
        normalize_axis(axis, max(y.rank, 1))
        return _same("softmax_backward", grad, y)

    evaluate = aten("_softmax_backward_data", "grad", "y", "axis", Arg(lambda v: v["y"].dtype))

    @staticmethod
    def decompose(b: Builder, grad: Value, y: Value, *, axis: int) -> Value:
        wide, g = b.widen(y), b.widen(grad)
        total = b.sum(b.mul(g, wide), axes=(axis,), keepdim=True)
        return b.cast_to(b.mul(b.sub(g, total), wide), y.dtype)


@define("log_softmax_backward", NORM)
class LogSoftmaxBackward:
    """grad - exp(y) * sum(grad) along `axis`, y = log_softmax(x)."""

    @staticmethod
    def infer(grad: TensorType, y: TensorType, *, axis: int) -> TensorType:
        normalize_axis(axis, max(y.rank, 1))
        return _same("log_softmax_backward", grad, y)

    evaluate = aten("_log_softmax_backward_data", "grad", "y", "axis", Arg(lambda v: v["y"].dtype))

    @staticmethod
    def decompose(b: Builder, grad: Value, y: Value, *, axis: int) -> Value:
        wide, g = b.widen(y), b.widen(grad)
        total = b.sum(g, axes=(axis,), keepdim=True)
        return b.cast_to(b.sub(g, b.mul(b.exp(wide), total)), y.dtype)
