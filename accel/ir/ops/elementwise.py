"""Elementwise ops: one table row each.

Operands of one op share one dtype (casts are explicit) and broadcast as in numpy. A row gives the
ATen overload, how the result dtype follows, and whether the first two operands commute.
Activations with parameters and `where`, `clamp`, `cast` follow the table as small classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Aten, Lit, Trait, aten, define
from accel.ir.types import TensorType, broadcast_shapes, is_float

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value

ELEMENTWISE = Trait.PURE | Trait.ELEMENTWISE
COMMUTES = ELEMENTWISE | Trait.COMMUTATIVE


def _check_same_dtype(name: str, *types: TensorType) -> torch.dtype:
    dtype = types[0].dtype
    for t in types[1:]:
        if t.dtype != dtype:
            raise TypeInferenceError(
                f"accel.{name}: operands have dtypes {', '.join(str(t.dtype) for t in types)}",
                advice="insert accel.cast: elementwise ops take one dtype",
            )
    return dtype


def _real_of(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _definition_class(
    name: str, infer: Callable[..., TensorType], evaluate: Aten, doc: str
) -> type:
    """A definition class made from one table row."""
    members = {"infer": staticmethod(infer), "evaluate": evaluate, "__doc__": doc}
    return type(name, (), {**members, "__module__": __name__})


def _unary(name: str, overload: str, rule: Callable[[torch.dtype], torch.dtype], doc: str) -> None:
    def infer(x: TensorType) -> TensorType:
        return x.with_dtype(rule(x.dtype))

    define(name, ELEMENTWISE)(_definition_class(name, infer, aten(overload, "x"), doc))


def _binary(
    name: str,
    overload: str,
    rule: Callable[[torch.dtype], torch.dtype],
    commutes: bool,
    doc: str,
    **kwargs: str | Lit,
) -> None:
    def infer(x: TensorType, y: TensorType) -> TensorType:
        dtype = _check_same_dtype(name, x, y)
        return TensorType(broadcast_shapes(x.shape, y.shape), rule(dtype))

    define(name, COMMUTES if commutes else ELEMENTWISE)(
        _definition_class(name, infer, aten(overload, "x", "y", **kwargs), doc)
    )


def _same(dtype: torch.dtype) -> torch.dtype:
    return dtype


def _bool(dtype: torch.dtype) -> torch.dtype:
    return torch.bool


def _only_float(dtype: torch.dtype) -> torch.dtype:
    if not (is_float(dtype) or dtype.is_complex):
        raise TypeInferenceError(f"needs a floating dtype, got {dtype}", advice="insert accel.cast")
    return dtype


_UNARY: tuple[tuple[str, str, Callable[[torch.dtype], torch.dtype], str], ...] = (
    ("abs", "abs", _real_of, "|x|"),
    ("neg", "neg", _same, "-x"),
    ("sign", "sign", _same, "-1, 0 or 1"),
    ("ceil", "ceil", _same, "least integer >= x"),
    ("floor", "floor", _same, "greatest integer <= x"),
    ("round", "round", _same, "nearest integer, halves to even"),
    ("trunc", "trunc", _same, "integer part"),
    ("exp", "exp", _only_float, "e^x"),
    ("exp2", "exp2", _only_float, "2^x"),
    ("expm1", "expm1", _only_float, "e^x - 1"),
    ("log", "log", _only_float, "natural logarithm"),
    ("log2", "log2", _only_float, "base 2 logarithm"),
    ("log10", "log10", _only_float, "base 10 logarithm"),
    ("log1p", "log1p", _only_float, "log(1 + x)"),
    ("sqrt", "sqrt", _only_float, "square root"),
    ("rsqrt", "rsqrt", _only_float, "1 / sqrt(x)"),
    ("reciprocal", "reciprocal", _only_float, "1 / x"),
    ("sin", "sin", _only_float, "sine"),
    ("cos", "cos", _only_float, "cosine"),
    ("tan", "tan", _only_float, "tangent"),
    ("asin", "asin", _only_float, "inverse sine"),
    ("acos", "acos", _only_float, "inverse cosine"),
    ("atan", "atan", _only_float, "inverse tangent"),
    ("sinh", "sinh", _only_float, "hyperbolic sine"),
    ("cosh", "cosh", _only_float, "hyperbolic cosine"),
    ("tanh", "tanh", _only_float, "hyperbolic tangent"),
    ("asinh", "asinh", _only_float, "inverse hyperbolic sine"),
    ("acosh", "acosh", _only_float, "inverse hyperbolic cosine"),
    ("atanh", "atanh", _only_float, "inverse hyperbolic tangent"),
    ("erf", "erf", _only_float, "Gauss error function"),
    ("erfc", "erfc", _only_float, "1 - erf(x)"),
    ("erfinv", "erfinv", _only_float, "inverse of erf"),
    ("lgamma", "lgamma", _only_float, "log |gamma(x)|"),
    ("digamma", "digamma", _only_float, "derivative of lgamma"),
    ("sigmoid", "sigmoid", _only_float, "1 / (1 + e^-x)"),
    ("isnan", "isnan", _bool, "x is NaN"),
    ("isinf", "isinf", _bool, "x is +inf or -inf"),
    ("logical_not", "logical_not", _bool, "x == 0"),
    ("bitwise_not", "bitwise_not", _same, "complement of each bit"),
)

_BINARY: tuple[tuple[str, str, Callable[[torch.dtype], torch.dtype], bool, str], ...] = (
    ("add", "add.Tensor", _same, True, "x + y"),
    ("sub", "sub.Tensor", _same, False, "x - y"),
    ("mul", "mul.Tensor", _same, True, "x * y"),
    ("div", "div.Tensor", _only_float, False, "x / y, floating"),
    ("remainder", "remainder.Tensor", _same, False, "Python's %, sign of the divisor"),
    ("fmod", "fmod.Tensor", _same, False, "C's fmod, sign of the dividend"),
    ("pow", "pow.Tensor_Tensor", _same, False, "x ** y"),
    ("atan2", "atan2", _only_float, False, "angle of (y, x)"),
    ("maximum", "maximum", _same, True, "larger of both, NaN if either is"),
    ("minimum", "minimum", _same, True, "smaller of both, NaN if either is"),
    ("eq", "eq.Tensor", _bool, True, "x == y"),
    ("ne", "ne.Tensor", _bool, True, "x != y"),
    ("lt", "lt.Tensor", _bool, False, "x < y"),
    ("le", "le.Tensor", _bool, False, "x <= y"),
    ("gt", "gt.Tensor", _bool, False, "x > y"),
    ("ge", "ge.Tensor", _bool, False, "x >= y"),
    ("logical_and", "logical_and", _bool, True, "both nonzero"),
    ("logical_or", "logical_or", _bool, True, "either nonzero"),
    ("logical_xor", "logical_xor", _bool, True, "exactly one nonzero"),
    ("bitwise_and", "bitwise_and.Tensor", _same, True, "and of each bit"),
    ("bitwise_or", "bitwise_or.Tensor", _same, True, "or of each bit"),
    ("bitwise_xor", "bitwise_xor.Tensor", _same, True, "exclusive or of each bit"),
    ("shift_left", "bitwise_left_shift.Tensor", _same, False, "x << y"),
    ("shift_right", "bitwise_right_shift.Tensor", _same, False, "x >> y, arithmetic if signed"),
)

for _row in _UNARY:
    _unary(*_row)
for _brow in _BINARY:
    _binary(*_brow)
_binary("floor_div", "div.Tensor_mode", _same, False, "floor(x / y)", rounding_mode=Lit("floor"))
_binary("trunc_div", "div.Tensor_mode", _same, False, "trunc(x / y)", rounding_mode=Lit("trunc"))


@define("where", ELEMENTWISE)
class Where:
    """x where the condition holds, else y."""

    @staticmethod
    def infer(condition: TensorType, x: TensorType, y: TensorType) -> TensorType:
        if condition.dtype != torch.bool:
            raise TypeInferenceError(f"accel.where: the condition is {condition.dtype}, not bool")
        dtype = _check_same_dtype("where", x, y)
        return TensorType(broadcast_shapes(condition.shape, x.shape, y.shape), dtype)

    evaluate = aten("where.self", "condition", "x", "y")


@define("cast", ELEMENTWISE)
class Cast:
    """x in another dtype, as `Tensor.to` rounds."""

    @staticmethod
    def infer(x: TensorType, *, dtype: torch.dtype) -> TensorType:
        return x.with_dtype(dtype)

    evaluate = aten("_to_copy", "x", dtype="dtype")


@define("bitcast", ELEMENTWISE)
class Bitcast:
    """The same bits read as another dtype of the same width."""

    @staticmethod
    def infer(x: TensorType, *, dtype: torch.dtype) -> TensorType:
        if x.dtype.itemsize != dtype.itemsize:
            raise TypeInferenceError(f"accel.bitcast: {x.dtype} and {dtype} differ in width")
        return x.with_dtype(dtype)

    evaluate = aten("view.dtype", "x", "dtype")


@define("clamp", ELEMENTWISE)
class Clamp:
    """min(max(x, `min`), `max`); a bound of none is no bound. relu is `min = 0`."""

    @staticmethod
    def infer(
        x: TensorType, *, min: int | float | None = None, max: int | float | None = None
    ) -> TensorType:
        return x

    @staticmethod
    def evaluate(
        x: Tensor, *, min: int | float | None = None, max: int | float | None = None
    ) -> Tensor:
        return x if min is None and max is None else torch.clamp(x, min, max)

    @staticmethod
    def decompose(
        b: Builder, x: Value, *, min: int | float | None = None, max: int | float | None = None
    ) -> Value:
        if min is not None:
            x = b.maximum(x, b.scalar(min, x.dtype))
        if max is not None:
            x = b.minimum(x, b.scalar(max, x.dtype))
        return x


@define("relu", ELEMENTWISE)
class Relu:
    """max(x, 0)."""

    @staticmethod
    def infer(x: TensorType) -> TensorType:
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
        _only_float(x.dtype)
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
        return x.with_dtype(_only_float(x.dtype))

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
        return x.with_dtype(_only_float(x.dtype))

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
        return x.with_dtype(_only_float(x.dtype))

    evaluate = aten("leaky_relu", "x", "slope")

    @staticmethod
    def decompose(b: Builder, x: Value, *, slope: float = 0.01) -> Value:
        zero = b.scalar(0.0, x.dtype)
        return b.where(b.gt(x, zero), x, b.mul(x, b.scalar(slope, x.dtype)))


@define("elu", ELEMENTWISE)
class Elu:
    """scale * x where x > 0, else scale * alpha * (e^(input_scale x) - 1)."""

    @staticmethod
    def infer(
        x: TensorType, *, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
    ) -> TensorType:
        return x.with_dtype(_only_float(x.dtype))

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
        return x.with_dtype(_only_float(x.dtype))

    evaluate = aten("hardsigmoid", "x")

    @staticmethod
    def decompose(b: Builder, x: Value) -> Value:
        wide = b.widen(x)
        shifted = b.add(wide, b.scalar(3.0, wide.dtype))
        y = b.div(b.clamp(shifted, min=0.0, max=6.0), b.scalar(6.0, wide.dtype))
        return b.cast_to(y, x.dtype)


@define("hardswish", ELEMENTWISE)
class HardSwish:
    """x * clamp(x + 3, 0, 6) / 6 (Howard et al., 2019)."""

    @staticmethod
    def infer(x: TensorType) -> TensorType:
        return x.with_dtype(_only_float(x.dtype))

    evaluate = aten("hardswish", "x")

    @staticmethod
    def decompose(b: Builder, x: Value) -> Value:
        wide = b.widen(x)
        shifted = b.add(wide, b.scalar(3.0, wide.dtype))
        gate = b.clamp(shifted, min=0.0, max=6.0)
        y = b.div(b.mul(wide, gate), b.scalar(6.0, wide.dtype))
        return b.cast_to(y, x.dtype)


@define("mish", ELEMENTWISE)
class Mish:
    """x * tanh(softplus(x)) (Misra, 2019)."""

    @staticmethod
    def infer(x: TensorType) -> TensorType:
        return x.with_dtype(_only_float(x.dtype))

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
        return x.with_dtype(_only_float(x.dtype))

    @staticmethod
    def evaluate(x: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(x)

    @staticmethod
    def decompose(b: Builder, x: Value) -> Value:
        wide = b.widen(x)
        tail = b.log1p(b.exp(b.neg(b.abs(wide))))
        y = b.sub(b.minimum(wide, b.scalar(0.0, wide.dtype)), tail)
        return b.cast_to(y, x.dtype)
