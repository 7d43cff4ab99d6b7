"""Activations: elementwise composites with parameters. Each keeps its name until a backend asks for
its decomposition, which computes 16-bit floats in float32 and rounds once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from accel.errors import TypeInferenceError
from accel.ir.op import aten, define
from accel.ir.ops.elementwise import ELEMENTWISE, check_dtype
from accel.ir.types import TensorType

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value


@define("relu", ELEMENTWISE)
class Relu:
    """max(x, 0)."""

    @staticmethod
    def infer(x: TensorType) -> TensorType:
        check_dtype("relu", "fi", x)
        return x

    evaluate = aten("relu", "x")

    @staticmethod
    def decompose(b: Builder, x: Value) -> Value:
        return b.maximum(x, b.scalar(0, x.dtype))


@define("gelu", ELEMENTWISE)
class Gelu:
    """x * Phi(x) (Hendrycks & Gimpel, 2016), by erf, or the tanh approximation."""

    @staticmethod
    def infer(x: TensorType, *, approximate: str = "none") -> TensorType:
        check_dtype("gelu", "f", x)
        if approximate not in ("none", "tanh"):
            raise TypeInferenceError(f"accel.gelu: approximate = '{approximate}'")
        return x

    evaluate = aten("gelu", "x", approximate="approximate")

    @staticmethod
    def decompose(b: Builder, x: Value, *, approximate: str = "none") -> Value:
        wide = b.widen(x)
        half = b.mul(wide, b.scalar(0.5, wide.dtype))
        if approximate == "none":
            inner = b.erf(b.mul(wide, b.scalar(math.sqrt(0.5), wide.dtype)))
        else:
            cube = b.mul(b.mul(wide, wide), wide)
            poly = b.add(wide, b.mul(cube, b.scalar(0.044715, wide.dtype)))
            inner = b.tanh(b.mul(poly, b.scalar(math.sqrt(2 / math.pi), wide.dtype)))
        y = b.mul(half, b.add(inner, b.scalar(1.0, wide.dtype)))
        return b.cast_to(y, x.dtype)


@define("silu", ELEMENTWISE)
class Silu:
    """x * sigmoid(x) (Elfwing et al., 2017)."""

    @staticmethod
    def infer(x: TensorType) -> TensorType:
        check_dtype("silu", "f", x)
        return x

    evaluate = aten("silu", "x")

    @staticmethod
    def decompose(b: Builder, x: Value) -> Value:
        wide = b.widen(x)
        y = b.mul(wide, b.sigmoid(wide))
        return b.cast_to(y, x.dtype)


@define("softplus", ELEMENTWISE)
class Softplus:
    """log(1 + e^(beta x)) / beta; x itself where beta * x > threshold."""

    @staticmethod
    def infer(x: TensorType, *, beta: float = 1.0, threshold: float = 20.0) -> TensorType:
        check_dtype("softplus", "f", x)
        return x

    evaluate = aten("softplus", "x", "beta", "threshold")

    @staticmethod
    def decompose(b: Builder, x: Value, *, beta: float = 1.0, threshold: float = 20.0) -> Value:
        wide = b.widen(x)
        scaled = b.mul(wide, b.scalar(beta, wide.dtype))
        soft = b.div(b.log1p(b.exp(scaled)), b.scalar(beta, wide.dtype))
        y = b.where(b.gt(scaled, b.scalar(threshold, wide.dtype)), wide, soft)
        return b.cast_to(y, x.dtype)


@define("leaky_relu", ELEMENTWISE)
class LeakyRelu:
    """x where x > 0, else slope * x."""

    @staticmethod
    def infer(x: TensorType, *, slope: float = 0.01) -> TensorType:
        check_dtype("leaky_relu", "f", x)
        return x

    evaluate = aten("leaky_relu", "x", "slope")

    @staticmethod
    def decompose(b: Builder, x: Value, *, slope: float = 0.01) -> Value:
        wide = b.widen(x)
        low = b.mul(wide, b.scalar(slope, wide.dtype))
        y = b.where(b.gt(wide, b.scalar(0.0, wide.dtype)), wide, low)
        return b.cast_to(y, x.dtype)


@define("elu", ELEMENTWISE)
class Elu:
    """scale * x where x > 0, else scale * alpha * (e^(input_scale x) - 1)."""

    @staticmethod
    def infer(
        x: TensorType, *, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
    ) -> TensorType:
        check_dtype("elu", "f", x)
        return x

    evaluate = aten("elu", "x", "alpha", "scale", "input_scale")

    @staticmethod
    def decompose(
        b: Builder, x: Value, *, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
    ) -> Value:
        wide = b.widen(x)
        zero = b.scalar(0.0, wide.dtype)
        low = b.expm1(b.mul(wide, b.scalar(input_scale, wide.dtype)))
        low = b.mul(low, b.scalar(alpha * scale, wide.dtype))
        high = b.mul(wide, b.scalar(scale, wide.dtype))
        y = b.where(b.gt(wide, zero), high, low)
        return b.cast_to(y, x.dtype)


@define("hardsigmoid", ELEMENTWISE)
class HardSigmoid:
    """clamp(x + 3, 0, 6) / 6 (Howard et al., 2019)."""

    @staticmethod
    def infer(x: TensorType) -> TensorType:
        check_dtype("hardsigmoid", "f", x)
        return x

    evaluate = aten("hardsigmoid", "x")

    @staticmethod
    def decompose(b: Builder, x: Value) -> Value:
        wide = b.widen(x)
        shifted = b.add(wide, b.scalar(3.0, wide.dtype))
        y = b.mul(b.clamp(shifted, min=0.0, max=6.0), b.scalar(1 / 6, wide.dtype))
        return b.cast_to(y, x.dtype)


@define("hardswish", ELEMENTWISE)
class HardSwish:
    """x * clamp(x + 3, 0, 6) / 6 (Howard et al., 2019)."""

    @staticmethod
    def infer(x: TensorType) -> TensorType:
        check_dtype("hardswish", "f", x)
        return x

    evaluate = aten("hardswish", "x")

    @staticmethod
    def decompose(b: Builder, x: Value) -> Value:
        wide = b.widen(x)
        shifted = b.add(wide, b.scalar(3.0, wide.dtype))
        gate = b.clamp(shifted, min=0.0, max=6.0)
        y = b.mul(b.mul(wide, gate), b.scalar(1 / 6, wide.dtype))  # as PyTorch: no division
        return b.cast_to(y, x.dtype)


@define("mish", ELEMENTWISE)
class Mish:
    """x * tanh(softplus(x)) (Misra, 2019)."""

    @staticmethod
    def infer(x: TensorType) -> TensorType:
        check_dtype("mish", "f", x)
        return x

    evaluate = aten("mish", "x")

    @staticmethod
    def decompose(b: Builder, x: Value) -> Value:
        wide = b.widen(x)
        y = b.mul(wide, b.tanh(b.softplus(wide)))
        return b.cast_to(y, x.dtype)


@define("log_sigmoid", ELEMENTWISE)
class LogSigmoid:
    """log(sigmoid(x)), stable: min(x, 0) - log1p(e^-|x|)."""

    @staticmethod
    def infer(x: TensorType) -> TensorType:
        check_dtype("log_sigmoid", "f", x)
        return x

    evaluate = aten("log_sigmoid", "x")

    @staticmethod
    def decompose(b: Builder, x: Value) -> Value:
        wide = b.widen(x)
        tail = b.log1p(b.exp(b.neg(b.abs(wide))))
        y = b.sub(b.minimum(wide, b.scalar(0.0, wide.dtype)), tail)
        return b.cast_to(y, x.dtype)
