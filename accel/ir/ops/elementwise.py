"""Elementwise ops: one table row each.

Operands of one op share one dtype (casts are explicit) and broadcast as in numpy. A row gives the
ATen overload, which kinds of dtypes it takes, how the result's dtype follows, and whether the
operands commute. `where`, `clamp`, `cast` and `bitcast` follow as small classes; activations are
in `accel.ir.ops.activation`.

Floating ops take f64, f32, f16 and bf16. Eight-bit floats, wide unsigned integers and sub-byte
integers are for storage: cast or dequantize first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from accel.errors import TypeInferenceError
from accel.ir.op import Arg, Aten, Lit, Trait, aten, define
from accel.ir.types import (
    BOOL,
    COMPLEX,
    DTYPE_NAMES,
    FLOATS,
    INTEGERS,
    SUB_BYTE_BITS,
    TensorType,
    broadcast_shapes,
    value_dtype,
)

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value

ELEMENTWISE = Trait.PURE | Trait.ELEMENTWISE
COMMUTES = ELEMENTWISE | Trait.COMMUTATIVE

# Kinds of operand dtypes, one letter each in the tables below.
_KINDS: dict[str, frozenset[torch.dtype]] = {
    "f": FLOATS,
    "i": INTEGERS,
    "b": BOOL,
    "c": COMPLEX,
    "u": frozenset({torch.uint16, torch.uint32, torch.uint64}),
    "e": frozenset(d for d in DTYPE_NAMES if d.is_floating_point and d.itemsize == 1)
    - {torch.float8_e8m0fnu},  # a format of scales: it has no zero and no sign
    "q": frozenset(SUB_BYTE_BITS),
}
# What torch can move, pad and scatter.
MOVABLE = "fibcq"
# How a result dtype follows from the operands' one.
_RESULTS: dict[str, Callable[[torch.dtype], torch.dtype]] = {
    "same": lambda dtype: dtype,
    "bool": lambda dtype: torch.bool,
    "real": lambda dtype: dtype.to_real() if dtype.is_complex else dtype,
}


def check_dtype(name: str, kinds: str, *types: TensorType | None) -> torch.dtype:
    """The one dtype of the operands; TypeInferenceError if they differ or are not of `kinds`."""
    given = [t.dtype for t in types if t is not None]
    if any(dtype != given[0] for dtype in given):
        raise TypeInferenceError(
            f"accel.{name}: operands have dtypes {', '.join(map(str, given))}",
            advice="insert accel.cast: the operands must have one dtype",
        )
    if not any(given[0] in _KINDS[kind] for kind in kinds):
        raise TypeInferenceError(
            f"accel.{name} does not take {given[0]}", advice="insert accel.cast"
        )
    return given[0]


def _definition_class(
    name: str, infer: Callable[..., TensorType], evaluate: Aten, doc: str
) -> type:
    """A definition class made from one table row."""
    members = {"infer": staticmethod(infer), "evaluate": evaluate, "__doc__": doc}
    return type(name, (), {**members, "__module__": __name__})


def _unary(name: str, overload: str, kinds: str, result: str, doc: str) -> None:
    rule = _RESULTS[result]

    def infer(x: TensorType) -> TensorType:
        return x.with_dtype(rule(check_dtype(name, kinds, x)))

    define(name, ELEMENTWISE)(_definition_class(name, infer, aten(overload, "x"), doc))


def _binary(
    name: str,
    overload: str,
    kinds: str,
    result: str,
    commutes: bool,
    doc: str,
    rounding: str | None = None,
) -> None:
    rule = _RESULTS[result]
    form = aten(overload, "x", "y")
    if rounding is not None:
        form = aten(overload, "x", "y", rounding_mode=Lit(rounding))

    def infer(x: TensorType, y: TensorType) -> TensorType:
        dtype = check_dtype(name, kinds, x, y)
        return TensorType(broadcast_shapes(x.shape, y.shape), rule(dtype))

    define(name, COMMUTES if commutes else ELEMENTWISE)(_definition_class(name, infer, form, doc))


# name, ATen overload, kinds of operands, result, meaning
_UNARY: tuple[tuple[str, str, str, str, str], ...] = (
    ("abs", "abs", "fic", "real", "|x|"),
    ("neg", "neg", "fic", "same", "-x"),
    ("sign", "sign", "fib", "same", "-1, 0 or 1"),
    ("ceil", "ceil", "fi", "same", "least integer >= x"),
    ("floor", "floor", "fi", "same", "greatest integer <= x"),
    ("round", "round", "fi", "same", "nearest integer, halves to even"),
    ("trunc", "trunc", "fi", "same", "integer part"),
    ("exp", "exp", "fc", "same", "e^x"),
    ("exp2", "exp2", "fc", "same", "2^x"),
    ("expm1", "expm1", "fc", "same", "e^x - 1"),
    ("log", "log", "fc", "same", "natural logarithm"),
    ("log2", "log2", "fc", "same", "base 2 logarithm"),
    ("log10", "log10", "fc", "same", "base 10 logarithm"),
    ("log1p", "log1p", "fc", "same", "log(1 + x)"),
    ("sqrt", "sqrt", "fc", "same", "square root"),
    ("rsqrt", "rsqrt", "fc", "same", "1 / sqrt(x)"),
    ("reciprocal", "reciprocal", "fc", "same", "1 / x"),
    ("sin", "sin", "fc", "same", "sine"),
    ("cos", "cos", "fc", "same", "cosine"),
    ("tan", "tan", "fc", "same", "tangent"),
    ("asin", "asin", "fc", "same", "inverse sine"),
    ("acos", "acos", "fc", "same", "inverse cosine"),
    ("atan", "atan", "fc", "same", "inverse tangent"),
    ("sinh", "sinh", "fc", "same", "hyperbolic sine"),
    ("cosh", "cosh", "fc", "same", "hyperbolic cosine"),
    ("tanh", "tanh", "fc", "same", "hyperbolic tangent"),
    ("asinh", "asinh", "fc", "same", "inverse hyperbolic sine"),
    ("acosh", "acosh", "fc", "same", "inverse hyperbolic cosine"),
    ("atanh", "atanh", "fc", "same", "inverse hyperbolic tangent"),
    ("erf", "erf", "f", "same", "Gauss error function"),
    ("erfc", "erfc", "f", "same", "1 - erf(x)"),
    ("erfinv", "erfinv", "f", "same", "inverse of erf"),
    ("lgamma", "lgamma", "f", "same", "log |gamma(x)|"),
    ("digamma", "digamma", "f", "same", "derivative of lgamma"),
    ("sigmoid", "sigmoid", "fc", "same", "1 / (1 + e^-x)"),
    ("isnan", "isnan", "fibc", "bool", "x is NaN"),
    ("isinf", "isinf", "fibc", "bool", "x is +inf or -inf"),
    ("logical_not", "logical_not", "fibc", "bool", "x == 0"),
    ("bitwise_not", "bitwise_not", "ib", "same", "complement of each bit"),
)

# name, ATen overload, kinds of operands, result, whether the operands commute, meaning
_BINARY: tuple[tuple[str, str, str, str, bool, str], ...] = (
    ("add", "add.Tensor", "fibc", "same", True, "x + y; of bool: or"),
    ("sub", "sub.Tensor", "fic", "same", False, "x - y"),
    ("mul", "mul.Tensor", "fibc", "same", True, "x * y; of bool: and"),
    ("div", "div.Tensor", "fc", "same", False, "x / y, floating"),
    ("remainder", "remainder.Tensor", "fi", "same", False, "Python's %, sign of the divisor"),
    ("fmod", "fmod.Tensor", "fi", "same", False, "C's fmod, sign of the dividend"),
    ("pow", "pow.Tensor_Tensor", "fic", "same", False, "x ** y"),
    ("atan2", "atan2", "f", "same", False, "angle of the point (y, x)"),
    ("maximum", "maximum", "fib", "same", True, "larger of both, NaN if either is"),
    ("minimum", "minimum", "fib", "same", True, "smaller of both, NaN if either is"),
    ("eq", "eq.Tensor", "fibcu", "bool", True, "x == y"),
    ("ne", "ne.Tensor", "fibcu", "bool", True, "x != y"),
    ("lt", "lt.Tensor", "fib", "bool", False, "x < y"),
    ("le", "le.Tensor", "fib", "bool", False, "x <= y"),
    ("gt", "gt.Tensor", "fib", "bool", False, "x > y"),
    ("ge", "ge.Tensor", "fib", "bool", False, "x >= y"),
    ("logical_and", "logical_and", "fibc", "bool", True, "both nonzero"),
    ("logical_or", "logical_or", "fibc", "bool", True, "either nonzero"),
    ("logical_xor", "logical_xor", "fibc", "bool", True, "exactly one nonzero"),
    ("bitwise_and", "bitwise_and.Tensor", "ibu", "same", True, "and of each bit"),
    ("bitwise_or", "bitwise_or.Tensor", "ibu", "same", True, "or of each bit"),
    ("bitwise_xor", "bitwise_xor.Tensor", "ibu", "same", True, "exclusive or of each bit"),
    ("shift_left", "bitwise_left_shift.Tensor", "i", "same", False, "x << y"),
    ("shift_right", "bitwise_right_shift.Tensor", "i", "same", False, "x >> y, arithmetic"),
)

for _row in _UNARY:
    _unary(*_row)
for _brow in _BINARY:
    _binary(*_brow)
_binary("floor_div", "div.Tensor_mode", "fi", "same", False, "floor(x / y)", "floor")
_binary("trunc_div", "div.Tensor_mode", "fi", "same", False, "trunc(x / y)", "trunc")


@define("where", ELEMENTWISE)
class Where:
    """x where the condition holds, else y."""

    @staticmethod
    def infer(condition: TensorType, x: TensorType, y: TensorType) -> TensorType:
        if condition.dtype != torch.bool:
            raise TypeInferenceError(f"accel.where: the condition is {condition.dtype}, not bool")
        if x.dtype != y.dtype:
            raise TypeInferenceError(f"accel.where: operands have dtypes {x.dtype}, {y.dtype}")
        return TensorType(broadcast_shapes(condition.shape, x.shape, y.shape), x.dtype)

    evaluate = aten("where.self", "condition", "x", "y")


@define("cast", ELEMENTWISE)
class Cast:
    """x in another dtype, as `Tensor.to` rounds. Cast to a sub-byte dtype, the values must fit."""

    @staticmethod
    def infer(x: TensorType, *, dtype: torch.dtype) -> TensorType:
        return x.with_dtype(dtype)

    evaluate = aten("_to_copy", "x", dtype=Arg(lambda v: value_dtype(v["dtype"])))


@define("bitcast", ELEMENTWISE | Trait.BITS)
class Bitcast:
    """The same bits read as another dtype of the same width."""

    @staticmethod
    def infer(x: TensorType, *, dtype: torch.dtype) -> TensorType:
        if x.dtype in SUB_BYTE_BITS or dtype in SUB_BYTE_BITS or torch.bool in (x.dtype, dtype):
            raise TypeInferenceError(f"accel.bitcast: {x.dtype} to {dtype}")
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
        dtype = check_dtype("clamp", "fi", x)
        if dtype in INTEGERS and (isinstance(min, float) or isinstance(max, float)):
            raise TypeInferenceError(f"accel.clamp: {dtype} with bounds {min}, {max}")
        return x

    evaluate = (
        aten(
            "clamp", "x", "min", "max", when=lambda v: v["min"] is not None or v["max"] is not None
        ),
        aten("clone", "x"),
    )

    @staticmethod
    def decompose(
        b: Builder, x: Value, *, min: int | float | None = None, max: int | float | None = None
    ) -> Value:
        if min is not None:
            x = b.maximum(x, b.scalar(min, x.dtype))
        if max is not None:
            x = b.minimum(x, b.scalar(max, x.dtype))
        return x
