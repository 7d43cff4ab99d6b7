"""Elementwise ops on one scalar each: name -> code, and which dtypes have code.

`emit(op, args, block)` writes an op's arithmetic in the compute types of `dtypes`. float32 (and the
16-bit floats, computed in float32) use `math`; float64 and the rare functions call the C library,
one element at a time. Integer sums and products are computed in the next wider type, since LLVM may
assume that a signed sum does not overflow where torch wraps; it narrows them again by itself.
"""

from __future__ import annotations

import math as pymath
from collections.abc import Callable, Sequence
from typing import Any

import torch

from accel.backends.tvm import dtypes, math, tir
from accel.backends.tvm.tir import Block, Expr, cast, const, extern, intrinsic, select
from accel.ir.module import Op, Value
from accel.ir.types import is_float, is_integer

Emitter = Callable[[Block, str, list[Expr]], Expr]

_WIDER = {
    "int8": "int32", "int16": "int32", "int32": "int64", "int64": "int128",
    "uint8": "int32", "uint16": "int64", "uint32": "uint64", "uint64": "uint128",
}  # fmt: skip


def supports(op: Op) -> str | None:
    """None if `emit` has code for this elementwise op on these dtypes, else the reason why not."""
    for value in (*op.operands, *op.results):
        if not dtypes.is_known(value.dtype):
            return f"dtype {value.dtype}"
    if op.name == "cast":
        return _cast_reason(op)
    if op.name == "gelu":
        own = op.attribute("approximate") == "none" and dtypes.compute(op.result.dtype) == "float32"
        return None if own else "has a decomposition"
    if any(v.dtype in dtypes.ONLY_CAST for v in (*op.operands, *op.results)):
        return f"arithmetic on {op.operands[0].dtype}"
    dtype = op.operands[0].dtype if op.name != "where" else op.operands[1].dtype
    if op.name in _ANY or op.name in ("where", "bitcast", "clamp", "relu"):
        return None
    if is_float(dtype):
        if op.name in _FLOAT or op.name in _DIVISIONS or op.name == "pow":
            return None
    elif is_integer(dtype):
        if op.name in _DIVISIONS:
            return _division_reason(op)
        if op.name in _INTEGER:
            return None
    elif op.name in _BOOLEAN:
        return None
    return f"accel.{op.name} of {dtype} has no generated code"


def _cast_reason(op: Op) -> str | None:
    target = op.attributes["dtype"]
    if not isinstance(target, torch.dtype) or target in dtypes.READ_ONLY:
        return f"casts to {target}"
    return None


def _division_reason(op: Op) -> str | None:
    divisor = constant_value(op.operands[1])
    if divisor is None:
        return "integer division by a run-time value (zero must be an error, not a trap)"
    return "integer division by zero" if divisor == 0 else None


def constant_value(value: Value) -> bool | int | float | None:
    """The number, if the value is a `full` of a real one."""
    op = value.op
    if op is None or op.name != "full":
        return None
    number = op.attributes["value"]
    return number if isinstance(number, (bool, int, float)) else None


def constant(number: bool | int | float, dtype: torch.dtype, block: Block) -> Expr:
    """`full`'s value as torch stores it, in the compute type."""
    kind = dtypes.compute(dtype)
    if kind == "bool":
        return const(bool(number), "bool")
    if is_float(dtype):
        return const(float(torch.tensor(float(number), dtype=dtype)), kind)
    whole = int(number)
    if dtype == torch.uint64:
        return math.const_u64(whole % (1 << 64))
    del block
    return const(whole % (1 << 8 * dtype.itemsize) if kind.startswith("uint") else whole, kind)


def emit(op: Op, args: Sequence[Expr], block: Block) -> Expr:
    """The op's value for named scalar operands, in its result's compute type."""
    names = list(args)
    if op.name in _SPECIAL:
        return _SPECIAL[op.name](op, names, block)
    dtype = op.operands[0].dtype
    kind = dtypes.compute(dtype)
    if op.name in _ANY:
        return _ANY[op.name](block, kind, names)
    if is_float(dtype):
        return _FLOAT[op.name](block, kind, names)
    return (_BOOLEAN if dtype == torch.bool else _INTEGER)[op.name](block, kind, names)


def widened(kind: str, combine: Callable[..., Expr], args: Sequence[Expr]) -> Expr:
    """Integer arithmetic that wraps around."""
    wide = _WIDER[kind]
    return cast(combine(*(cast(a, wide) for a in args)), kind)


def _libm(name: str) -> Emitter:
    """A C library function: `tanf` of float32, `tan` of float64."""

    def code(block: Block, kind: str, args: list[Expr]) -> Expr:
        del block
        return extern(kind, name if kind == "float64" else f"{name}f", *args)

    return code


def _fast(function: Callable[[Expr, Block], Expr], name: str) -> Emitter:
    """`math`'s function for float32, the C library's for float64."""
    slow = _libm(name)

    def code(block: Block, kind: str, args: list[Expr]) -> Expr:
        return function(args[0], block) if kind == "float32" else slow(block, kind, args)

    return code


def _intrinsic(name: str) -> Emitter:
    def code(block: Block, kind: str, args: list[Expr]) -> Expr:
        del block
        return intrinsic(kind, name, *args)

    return code


def _simple(function: Callable[..., Expr]) -> Emitter:
    return lambda block, kind, args: function(*args)


def _wrapping(function: Callable[..., Expr]) -> Emitter:
    return lambda block, kind, args: widened(kind, function, args)


def maximum(a: Expr, b: Expr) -> Expr:
    """NaN if either is."""
    return select(tir.tirx.Or(a > b, tir.is_nan(a)), a, b)


def minimum(a: Expr, b: Expr) -> Expr:
    return select(tir.tirx.Or(a < b, tir.is_nan(a)), a, b)


def _divide(a: Expr, b: Expr) -> Expr:
    """TVM refuses to print a division by a constant zero; the product with infinity is the same."""
    if isinstance(b, tir.tirx.FloatImm) and b.value == 0:
        return tir.tirx.Mul(a, const(pymath.copysign(pymath.inf, b.value), tir.dtype_of(b)))
    return tir.tirx.Div(a, b)


def _sigmoid(block: Block, kind: str, args: list[Expr]) -> Expr:
    if kind == "float32":
        return math.sigmoid(args[0], block)
    one = const(1.0, kind)
    return one / (one + extern(kind, "exp", const(0.0, kind) - args[0]))


def _sign(block: Block, kind: str, args: list[Expr]) -> Expr:
    del block
    zero, one = const(0, kind), const(1, kind)
    positive = select(args[0] > zero, one, zero)
    if kind.startswith("uint"):
        return positive
    return select(args[0] < zero, const(-1, kind), positive)


def _abs(block: Block, kind: str, args: list[Expr]) -> Expr:
    if kind == "float32":
        return math.absolute(args[0])
    if kind == "float64":
        return intrinsic(kind, "llvm.fabs", args[0])
    if kind.startswith("uint"):
        return args[0]
    return select(args[0] < const(0, kind), _negate(block, kind, args), args[0])


def _negate(block: Block, kind: str, args: list[Expr]) -> Expr:
    del block
    if kind.startswith("float"):  # not 0 - x, which has the other zero
        sign = {"float32": ("uint32", 31), "float64": ("uint64", 63)}[kind]
        mask = const(1, sign[0]) << const(sign[1], sign[0])
        return tir.bits(tir.bits(args[0], sign[0]) ^ mask, kind)
    return widened(kind, lambda a: const(0, tir.dtype_of(a)) - a, args)


def _float_remainder(block: Block, kind: str, args: list[Expr]) -> tuple[Expr, Expr]:
    """C's fmod, and whether its sign differs from the divisor's."""
    x, y = args
    rest = block.let(_libm("fmod")(block, kind, [x, y]), "rest")
    zero = const(0.0, kind)
    differs = tir.tirx.And(tir.ne(rest, zero), tir.ne(y < zero, rest < zero))
    return rest, block.let(differs, "differs")


def _remainder(op: Op, args: list[Expr], block: Block) -> Expr:
    dtype = op.operands[0].dtype
    kind = dtypes.compute(dtype)
    if is_float(dtype):
        rest, differs = _float_remainder(block, kind, args)
        return select(differs, rest + args[1], rest)
    if constant_value(op.operands[1]) == -1:
        return const(0, kind)
    return tir.tirx.floormod(args[0], args[1])


def _fmod(op: Op, args: list[Expr], block: Block) -> Expr:
    dtype = op.operands[0].dtype
    kind = dtypes.compute(dtype)
    if is_float(dtype):
        return _libm("fmod")(block, kind, args)
    if constant_value(op.operands[1]) == -1:
        return const(0, kind)
    return tir.tirx.truncmod(args[0], args[1])


def _floor_div(op: Op, args: list[Expr], block: Block) -> Expr:
    dtype = op.operands[0].dtype
    kind = dtypes.compute(dtype)
    if not is_float(dtype):
        if constant_value(op.operands[1]) == -1:
            return _negate(block, kind, args[:1])
        return tir.tirx.floordiv(args[0], args[1])
    x, y = args
    zero = const(0.0, kind)
    rest, differs = _float_remainder(block, kind, args)
    exact = block.let((x - rest) / y, "exact")
    exact = block.let(select(differs, exact - const(1.0, kind), exact), "exact")
    whole = block.let(intrinsic(kind, "llvm.floor", exact), "whole")
    off = exact - whole > const(0.5, kind)
    whole = select(off, whole + const(1.0, kind), whole)
    nothing = intrinsic(kind, "llvm.copysign", zero, x / y)
    whole = select(tir.eq(exact, zero), nothing, whole)
    return select(tir.eq(y, zero), x / y, whole)


def _trunc_div(op: Op, args: list[Expr], block: Block) -> Expr:
    dtype = op.operands[0].dtype
    kind = dtypes.compute(dtype)
    if is_float(dtype):
        return intrinsic(kind, "llvm.trunc", args[0] / args[1])
    if constant_value(op.operands[1]) == -1:
        return _negate(block, kind, args[:1])
    return tir.tirx.truncdiv(args[0], args[1])


def _power(op: Op, args: list[Expr], block: Block) -> Expr:
    x, y = args
    kind = dtypes.compute(op.operands[0].dtype)
    exponent = constant_value(op.operands[1])
    if exponent == 2:
        return x * x
    if exponent == 3:
        return x * x * x
    if exponent == -1:
        return const(1.0, kind) / x
    return _libm("pow")(block, kind, [x, y])


def _shift(left: bool) -> Emitter:
    def code(block: Block, kind: str, args: list[Expr]) -> Expr:
        x, y = args
        width = int(kind.lstrip("uint"))
        wide = _WIDER[kind]
        inside = tir.tirx.And(y >= const(0, kind), y < const(width, kind))
        amount = cast(select(inside, y, const(0, kind)), wide)
        if left:
            shifted = cast(cast(x, wide) << amount, kind)
            return select(inside, shifted, const(0, kind))
        fill = const(0, kind)
        if not kind.startswith("uint"):
            fill = select(x < const(0, kind), const(-1, kind), fill)
        return select(inside, cast(cast(x, wide) >> amount, kind), fill)

    return code


def _where(op: Op, args: list[Expr], block: Block) -> Expr:
    del op, block
    return select(args[0], args[1], args[2])


def _cast(op: Op, args: list[Expr], block: Block) -> Expr:
    return dtypes.convert(args[0], op.operands[0].dtype, op.result.dtype, block)


def _bitcast(op: Op, args: list[Expr], block: Block) -> Expr:
    source, target = op.operands[0].dtype, op.result.dtype
    raw = dtypes.to_storage(args[0], source, block)
    return dtypes.from_storage(tir.bits(raw, dtypes.storage(target)), target, block)


def _bound(number: Any, dtype: torch.dtype, block: Block) -> Expr | None:
    return None if number is None else constant(number, dtype, block)


def _clamp(op: Op, args: list[Expr], block: Block) -> Expr:
    """NaN compares false, so it passes; a NaN bound makes every element NaN, as in torch."""
    x, dtype = args[0], op.operands[0].dtype
    low = _bound(op.attribute("min"), dtype, block)
    high = _bound(op.attribute("max"), dtype, block)
    for bound in (op.attribute("min"), op.attribute("max")):
        if isinstance(bound, float) and pymath.isnan(bound):
            return const(pymath.nan, dtypes.compute(dtype))
    if low is not None:
        x = block.let(select(x < low, low, x), "v")
    return x if high is None else select(x > high, high, x)


def _relu(op: Op, args: list[Expr], block: Block) -> Expr:
    del block
    zero = const(0, dtypes.compute(op.operands[0].dtype))
    return select(args[0] < zero, zero, args[0])


def _gelu(op: Op, args: list[Expr], block: Block) -> Expr:
    del op
    return math.gelu(args[0], block)


def _truth(value: Expr, kind: str) -> Expr:
    return value if kind == "bool" else tir.ne(value, const(0, kind))


def _logical(combine: Callable[..., Expr]) -> Emitter:
    return lambda block, kind, args: combine(*(_truth(a, kind) for a in args))


_SPECIAL: dict[str, Callable[[Op, list[Expr], Block], Expr]] = {
    "where": _where, "cast": _cast, "bitcast": _bitcast, "clamp": _clamp, "relu": _relu,
    "remainder": _remainder, "fmod": _fmod, "floor_div": _floor_div, "trunc_div": _trunc_div,
    "pow": _power, "gelu": _gelu,
}  # fmt: skip
_DIVISIONS = {"remainder", "fmod", "floor_div", "trunc_div"}

# Of any dtype.
_ANY: dict[str, Emitter] = {
    "eq": _simple(tir.eq),
    "ne": _simple(tir.ne),
    "logical_not": _logical(lambda a: tir.tirx.Not(a)),
    "logical_and": _logical(lambda a, b: tir.tirx.And(a, b)),
    "logical_or": _logical(lambda a, b: tir.tirx.Or(a, b)),
    "logical_xor": _logical(tir.ne),
}

_COMPARE: dict[str, Emitter] = {
    "lt": _simple(lambda a, b: a < b),
    "le": _simple(lambda a, b: a <= b),
    "gt": _simple(lambda a, b: a > b),
    "ge": _simple(lambda a, b: a >= b),
    "sign": _sign,
}

_FLOAT: dict[str, Emitter] = {
    **_COMPARE,
    "add": _simple(lambda a, b: a + b),
    "sub": _simple(lambda a, b: a - b),
    "mul": _simple(lambda a, b: tir.tirx.Mul(a, b)),  # TVM's operators take 0 * x as 0 for NaN
    "div": _simple(_divide),
    "abs": _abs,
    "neg": _negate,
    "ceil": _intrinsic("llvm.ceil"),
    "floor": _intrinsic("llvm.floor"),
    "round": _intrinsic("llvm.rint"),
    "trunc": _intrinsic("llvm.trunc"),
    "sqrt": _intrinsic("llvm.sqrt"),
    "rsqrt": lambda block, kind, args: const(1.0, kind) / intrinsic(kind, "llvm.sqrt", args[0]),
    "reciprocal": lambda block, kind, args: const(1.0, kind) / args[0],
    "maximum": _simple(maximum),
    "minimum": _simple(minimum),
    "isnan": _simple(tir.is_nan),
    "isinf": lambda block, kind, args: tir.eq(
        _abs(block, kind, args), const(pymath.inf, kind)
    ),
    "exp": _fast(math.exp, "exp"),
    "exp2": _fast(math.exp2, "exp2"),
    "expm1": _fast(math.expm1, "expm1"),
    "log": _fast(math.log, "log"),
    "log2": _fast(math.log2, "log2"),
    "log10": _fast(math.log10, "log10"),
    "log1p": _fast(math.log1p, "log1p"),
    "sin": _fast(math.sin, "sin"),
    "cos": _fast(math.cos, "cos"),
    "tanh": _fast(math.tanh, "tanh"),
    "erf": _fast(math.erf, "erf"),
    "sigmoid": _sigmoid,
    **{
        name: _libm(name)
        for name in ("tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh",
                     "erfc", "lgamma", "atan2")
    },
}  # fmt: skip

_INTEGER: dict[str, Emitter] = {
    **_COMPARE,
    "add": _wrapping(lambda a, b: a + b),
    "sub": _wrapping(lambda a, b: a - b),
    "mul": _wrapping(lambda a, b: a * b),
    "abs": _abs,
    "neg": _negate,
    **{name: _simple(lambda a: a) for name in ("ceil", "floor", "round", "trunc")},
    "maximum": _simple(lambda a, b: select(a > b, a, b)),
    "minimum": _simple(lambda a, b: select(a < b, a, b)),
    "isnan": lambda block, kind, args: const(False, "bool"),
    "isinf": lambda block, kind, args: const(False, "bool"),
    "bitwise_not": _simple(lambda a: tir.tirx.bitwise_not(a)),
    "bitwise_and": _simple(lambda a, b: a & b),
    "bitwise_or": _simple(lambda a, b: a | b),
    "bitwise_xor": _simple(lambda a, b: a ^ b),
    "shift_left": _shift(True),
    "shift_right": _shift(False),
}

_BOOLEAN: dict[str, Emitter] = {
    **{
        name: _simple(lambda a, b: tir.tirx.And(a, b)) for name in ("mul", "bitwise_and", "minimum")
    },
    **{name: _simple(lambda a, b: tir.tirx.Or(a, b)) for name in ("add", "bitwise_or", "maximum")},
    "bitwise_xor": _simple(tir.ne),
    "bitwise_not": _simple(lambda a: tir.tirx.Not(a)),
    "sign": _simple(lambda a: a),
    "lt": _simple(lambda a, b: tir.tirx.And(tir.tirx.Not(a), b)),
    "le": _simple(lambda a, b: tir.tirx.Or(tir.tirx.Not(a), b)),
    "gt": _simple(lambda a, b: tir.tirx.And(a, tir.tirx.Not(b))),
    "ge": _simple(lambda a, b: tir.tirx.Or(a, tir.tirx.Not(b))),
    "isnan": lambda block, kind, args: const(False, "bool"),
    "isinf": lambda block, kind, args: const(False, "bool"),
}
