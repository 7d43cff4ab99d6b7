"""Elementwise ops on one element each: name -> Triton code, and which dtypes have code.

float16, bfloat16 and float32 compute in float32. Elementary functions are CUDA's own (libdevice),
which PyTorch calls too. Integers wrap around. Division of integers by a run-time value has no code:
zero must be an error there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from accel.backends.triton import dtypes
from accel.backends.triton.gelu import gelu, gelu_backward, had_16_bits, short_sigmoid
from accel.backends.triton.text import Block, Expr, dims_of, number, solid
from accel.ir.module import Op, Value
from accel.ir.types import SUB_BYTE_BITS, is_float, is_integer

# (block, kind of the operands, operands) -> value
Emitter = Callable[[Block, str, list[Expr]], Expr]


def supports(op: Op) -> str | None:
    """None if `emit` has code for this elementwise op on these dtypes, else the reason why not."""
    for value in (*op.operands, *op.results):
        if not dtypes.is_known(value.dtype):
            return f"dtype {value.dtype}"
    if op.name == "cast":
        target = op.attributes["dtype"]
        return f"casts to {target}" if target in SUB_BYTE_BITS else None
    if any(is_storage_only(v.dtype) for v in (*op.operands, *op.results)):
        return f"arithmetic on {op.operands[0].dtype}"
    dtype = op.operands[0].dtype if op.name != "where" else op.operands[1].dtype
    if op.name in ("gelu", "gelu_backward") or (op.name == "sigmoid" and is_float(dtype)):
        return None
    if op.name in _ANY or op.name in ("where", "bitcast", "clamp", "relu"):
        return None
    if is_float(dtype) and (op.name in _FLOAT or op.name in _DIVISIONS or op.name == "pow"):
        return None
    if is_integer(dtype) and op.name in _DIVISIONS:
        return _division_reason(op)
    if is_integer(dtype) and op.name in _INTEGER:
        return None
    if dtype == torch.bool and op.name in _BOOLEAN:
        return None
    return f"accel.{op.name} of {dtype} has no generated code"


def is_storage_only(dtype: torch.dtype) -> bool:
    return dtype in SUB_BYTE_BITS or (dtype.is_floating_point and dtype.itemsize == 1)


def _division_reason(op: Op) -> str | None:
    divisor = constant_value(op.operands[1])
    if divisor is None:
        return "integer division by a run-time value (zero must be an error)"
    return "integer division by zero" if divisor == 0 else None


def constant_value(value: Value) -> bool | int | float | None:
    """The number, if the value is a `full` of a real one."""
    op = value.op
    if op is None or op.name != "full":
        return None
    found = op.attributes["value"]
    return found if isinstance(found, (bool, int, float)) else None


def constant(value: bool | int | float, dtype: torch.dtype) -> Expr:
    """`full`'s value as torch stores it, in the compute type."""
    kind = dtypes.compute(dtype)
    if kind == "bool":
        return number(bool(value), kind)
    if dtype.is_floating_point:
        return number(float(torch.tensor(float(value), dtype=dtype)), kind)
    return number(int(value), kind)


def emit(op: Op, args: Sequence[Expr], block: Block) -> Expr:
    """The op's value for operands that are names or constants, in its result's compute type."""
    operands = list(args)
    if all(a.number is not None for a in operands):
        operands = [solid(a) for a in operands]
    if op.name in _SPECIAL:
        return _SPECIAL[op.name](op, operands, block)
    dtype = op.operands[0].dtype
    kind = dtypes.compute(dtype)
    if op.name in _ANY:
        return _ANY[op.name](block, kind, operands)
    if is_float(dtype):
        return _FLOAT[op.name](block, kind, operands)
    return (_BOOLEAN if dtype == torch.bool else _INTEGER)[op.name](block, kind, operands)


def _same(template: str) -> Emitter:
    """Code whose result has its operands' type; {0} and {1} are the operands."""
    return lambda block, kind, args: Expr(template.format(*args), kind, dims_of(*args))


def _solid(template: str) -> Emitter:
    """As `_same`, for Triton functions that take no literals."""
    return lambda block, kind, args: Expr(
        template.format(*(solid(a) for a in args)), kind, dims_of(*args)
    )


def _test(template: str) -> Emitter:
    """Code whose result is a bool."""
    return lambda block, kind, args: Expr(template.format(*args), "bool", dims_of(*args))


def _libdevice(name: str) -> Emitter:
    def code(block: Block, kind: str, args: list[Expr]) -> Expr:
        operands = ", ".join(str(solid(a)) for a in args)
        return Expr(f"libdevice.{name}({operands})", kind, dims_of(*args))

    return code


def _exact(template: str, rounded: str) -> Emitter:
    """IEEE rounding for float32 (`rounded`); float64 has nothing else."""

    def code(block: Block, kind: str, args: list[Expr]) -> Expr:
        chosen = rounded if kind == "float32" else template
        args = [solid(a) for a in args]
        return Expr(chosen.format(*args), kind, dims_of(*args))

    return code


def divide(a: Expr, b: Expr) -> Expr:
    return _exact("({0} / {1})", "tl.div_rn({0}, {1})")(_NO_BLOCK, a.kind, [a, b])


def _reciprocal(block: Block, kind: str, args: list[Expr]) -> Expr:
    return divide(number(1.0, kind), args[0])


def _rsqrt(block: Block, kind: str, args: list[Expr]) -> Expr:
    if kind == "float64":  # the instruction's float64 has few digits
        return _libdevice("rsqrt")(block, kind, args)
    return Expr(f"tl.rsqrt({solid(args[0])})", kind, args[0].dims)


def _sigmoid(op: Op, args: list[Expr], block: Block) -> Expr:
    kind, x = dtypes.compute(op.result.dtype), solid(args[0])
    if kind == "float32" and had_16_bits(op.operands[0]):
        return short_sigmoid(x, kind, block)
    power = block.let(f"libdevice.exp(-{x})", kind, x.dims, "power")
    below = block.let(f"1.0 + {power}", kind, x.dims, "below")
    return divide(number(1.0, kind), below)


def _sign(block: Block, kind: str, args: list[Expr]) -> Expr:
    x = solid(args[0])
    text = f"({x} > 0).to(tl.{kind})"
    if not kind.startswith("uint"):
        text = f"{text} - ({x} < 0).to(tl.{kind})"
    return Expr(text, kind, x.dims)


def _absolute(block: Block, kind: str, args: list[Expr]) -> Expr:
    if kind.startswith("uint"):
        return args[0]
    return Expr(f"tl.abs({solid(args[0])})", kind, args[0].dims)


def _negate(block: Block, kind: str, args: list[Expr]) -> Expr:
    x = solid(args[0])
    if kind.startswith("float"):  # 0 - x would have the other zero
        return Expr(f"{x} * -1.0", kind, x.dims)
    return Expr(f"{number(0, kind)} - {x}", kind, x.dims)


def _is_infinite(block: Block, kind: str, args: list[Expr]) -> Expr:
    x = solid(args[0])
    return Expr(f'(tl.abs({x}) == float("inf"))', "bool", x.dims)


def _where(op: Op, args: list[Expr], block: Block) -> Expr:
    kind = dtypes.compute(op.result.dtype)
    condition = solid(args[0])
    return Expr(f"tl.where({condition}, {args[1]}, {args[2]})", kind, dims_of(*args))


def _cast(op: Op, args: list[Expr], block: Block) -> Expr:
    return dtypes.convert(args[0], op.operands[0].dtype, op.result.dtype, block)


def _bitcast(op: Op, args: list[Expr], block: Block) -> Expr:
    source, target = op.operands[0].dtype, op.result.dtype
    raw = block.let(str(dtypes.to_storage(args[0], source, block)), "stored", args[0].dims, "raw")
    stored = f"{raw}.to(tl.{dtypes.storage(target)}, bitcast=True)"
    named = block.let(stored, "stored", args[0].dims, "bits")
    return dtypes.from_storage(named, target, block)


def _clamp(op: Op, args: list[Expr], block: Block) -> Expr:
    """NaN compares false, so it passes; a NaN bound makes every element NaN, as in torch."""
    x, dtype = solid(args[0]), op.operands[0].dtype
    kind = dtypes.compute(dtype)
    bounds = [op.attribute("min"), op.attribute("max")]
    if any(isinstance(b, float) and math.isnan(b) for b in bounds):
        return number(math.nan, kind)
    for bound, relation in zip(bounds, "<>"):
        if bound is not None:
            limit = constant(bound, dtype)
            text = f"tl.where({x} {relation} {limit}, {limit}, {x})"
            x = block.let(text, kind, x.dims, "clamp")
    return x


def _relu(op: Op, args: list[Expr], block: Block) -> Expr:
    kind = dtypes.compute(op.operands[0].dtype)
    x, zero = solid(args[0]), number(0, kind)
    return Expr(f"tl.where({x} < {zero}, {zero}, {x})", kind, x.dims)


def _integer_division(op: Op, args: list[Expr], block: Block, *, floor: bool) -> tuple[Expr, Expr]:
    """Quotient and remainder by a constant; Triton's own // and % truncate."""
    x = solid(args[0])
    kind = x.kind
    divisor = int(constant_value(op.operands[1]) or 1)
    by = number(divisor, kind)
    quotient = block.let(f"{x} // {by}", kind, x.dims, "quotient")
    rest = block.let(f"{x} - {quotient} * {by}", kind, x.dims, "rest")
    if not floor or kind.startswith("uint"):
        return quotient, rest
    off = block.let(f"({rest} {'<' if divisor > 0 else '>'} 0)", "bool", x.dims, "off")
    one, zero = number(1, kind), number(0, kind)
    quotient = block.let(f"{quotient} - tl.where({off}, {one}, {zero})", kind, x.dims, "quotient")
    return quotient, Expr(f"{rest} + tl.where({off}, {by}, {zero})", kind, x.dims)


def _float_remainder(block: Block, kind: str, args: list[Expr]) -> tuple[Expr, Expr]:
    """C's fmod, and whether its sign differs from the divisor's."""
    dims = dims_of(*args)
    rest = block.let(str(_libdevice("fmod")(block, kind, args)), kind, dims, "rest")
    text = f"({rest} != 0.0) & (({solid(args[1])} < 0.0) != ({rest} < 0.0))"
    return rest, block.let(text, "bool", dims, "differs")


def _remainder(op: Op, args: list[Expr], block: Block) -> Expr:
    dtype = op.operands[0].dtype
    kind = dtypes.compute(dtype)
    if not is_float(dtype):
        if constant_value(op.operands[1]) == -1:
            return number(0, kind)
        return _integer_division(op, args, block, floor=True)[1]
    rest, differs = _float_remainder(block, kind, args)
    return Expr(f"tl.where({differs}, {rest} + {args[1]}, {rest})", kind, dims_of(*args))


def _fmod(op: Op, args: list[Expr], block: Block) -> Expr:
    dtype = op.operands[0].dtype
    kind = dtypes.compute(dtype)
    if is_float(dtype):
        return _libdevice("fmod")(block, kind, args)
    if constant_value(op.operands[1]) == -1:
        return number(0, kind)
    return _integer_division(op, args, block, floor=False)[1]


def _floor_div(op: Op, args: list[Expr], block: Block) -> Expr:
    dtype = op.operands[0].dtype
    kind = dtypes.compute(dtype)
    if not is_float(dtype):
        if constant_value(op.operands[1]) == -1:
            return _negate(block, kind, args[:1])
        return _integer_division(op, args, block, floor=True)[0]
    dims = dims_of(*args)
    x, y = (solid(a) for a in args)
    ratio = block.let(str(divide(x, y)), kind, dims, "ratio")
    rest, differs = _float_remainder(block, kind, args)
    less = Expr(f"({x} - {rest})", kind, dims)
    exact = block.let(str(divide(less, y)), kind, dims, "exact")
    exact = block.let(f"tl.where({differs}, {exact} - 1.0, {exact})", kind, dims, "exact")
    whole = block.let(f"tl.floor({exact})", kind, dims, "whole")
    text = f"tl.where({exact} - {whole} > 0.5, {whole} + 1.0, {whole})"
    whole = block.let(text, kind, dims, "whole")
    nothing = f"libdevice.copysign({ratio} * 0.0, {ratio})"
    whole = block.let(f"tl.where({exact} == 0.0, {nothing}, {whole})", kind, dims, "whole")
    return Expr(f"tl.where({y} == 0.0, {ratio}, {whole})", kind, dims)


def _trunc_div(op: Op, args: list[Expr], block: Block) -> Expr:
    dtype = op.operands[0].dtype
    kind = dtypes.compute(dtype)
    if is_float(dtype):
        return Expr(f"libdevice.trunc({divide(*args)})", kind, dims_of(*args))
    if constant_value(op.operands[1]) == -1:
        return _negate(block, kind, args[:1])
    return _integer_division(op, args, block, floor=False)[0]


def _power(op: Op, args: list[Expr], block: Block) -> Expr:
    kind = dtypes.compute(op.operands[0].dtype)
    x = solid(args[0])
    exponent = constant_value(op.operands[1])
    if exponent == 2:
        return Expr(f"{x} * {x}", kind, x.dims)
    if exponent == 3:
        return Expr(f"{x} * {x} * {x}", kind, x.dims)
    if exponent == -1:
        return divide(number(1.0, kind), x)
    return _libdevice("pow")(block, kind, _same_shape(args))


def _same_shape(args: list[Expr]) -> list[Expr]:
    """Constants as scalars of the operands' type; Triton broadcasts them."""
    return [solid(a) for a in args]


def _shift(left: bool) -> Emitter:
    def code(block: Block, kind: str, args: list[Expr]) -> Expr:
        x, y = solid(args[0]), solid(args[1])
        dims = dims_of(x, y)
        width = int(kind.lstrip("uint"))
        zero = number(0, kind)
        inside = block.let(f"({y} >= {zero}) & ({y} < {number(width, kind)})", "bool", dims, "ok")
        amount = block.let(f"tl.where({inside}, {y}, {zero})", kind, dims, "amount")
        fill = str(zero)
        if not left and not kind.startswith("uint"):
            fill = f"tl.where({x} < {zero}, {number(-1, kind)}, {zero})"
        return Expr(
            f"tl.where({inside}, {x} {'<<' if left else '>>'} {amount}, {fill})", kind, dims
        )

    return code


def _truth(value: Expr, kind: str) -> str:
    return str(solid(value)) if kind == "bool" else f"({solid(value)} != 0)"


def _logical(template: str) -> Emitter:
    return lambda block, kind, args: Expr(
        template.format(*(_truth(a, kind) for a in args)), "bool", dims_of(*args)
    )


def exponential(op: Op) -> str:
    """The function that computes an exponential: a short one, in float32, of the difference of
    what had 16 bits and something else, as softmax has it. It is off by 1e-6 where that matters."""
    less = op.operands[0].op
    short = op.result.dtype == torch.float32 and less is not None and less.name == "sub"
    return "tl.exp" if short and _came_from_16_bits(op.operands[0]) else "libdevice.exp"


def _came_from_16_bits(value: Value) -> bool:
    while value.op is not None and value.op.name in ("cast", "sub", "where"):
        if had_16_bits(value):
            return True
        value = value.op.operands[1 if value.op.name == "where" else 0]
    return had_16_bits(value)


def _exp(op: Op, args: list[Expr], block: Block) -> Expr:
    kind = dtypes.compute(op.result.dtype)
    return Expr(f"{exponential(op)}({solid(args[0])})", kind, args[0].dims)


_NO_BLOCK: Any = None

_SPECIAL: dict[str, Callable[[Op, list[Expr], Block], Expr]] = {
    "where": _where, "cast": _cast, "bitcast": _bitcast, "clamp": _clamp, "relu": _relu,
    "remainder": _remainder, "fmod": _fmod, "floor_div": _floor_div, "trunc_div": _trunc_div,
    "pow": _power, "gelu": gelu, "gelu_backward": gelu_backward, "sigmoid": _sigmoid,
    "exp": _exp,
}  # fmt: skip
_DIVISIONS = {"remainder", "fmod", "floor_div", "trunc_div"}

# Of any dtype.
_ANY: dict[str, Emitter] = {
    "eq": _test("({0} == {1})"),
    "ne": _test("({0} != {1})"),
    "logical_not": _logical("~{0}"),
    "logical_and": _logical("{0} & {1}"),
    "logical_or": _logical("{0} | {1}"),
    "logical_xor": _logical("{0} ^ {1}"),
}
_COMPARE: dict[str, Emitter] = {
    "lt": _test("({0} < {1})"),
    "le": _test("({0} <= {1})"),
    "gt": _test("({0} > {1})"),
    "ge": _test("({0} >= {1})"),
    "sign": _sign,
}
_FLOAT: dict[str, Emitter] = {
    **_COMPARE,
    "add": _same("{0} + {1}"),
    "sub": _same("{0} - {1}"),
    "mul": _same("{0} * {1}"),
    "div": _exact("{0} / {1}", "tl.div_rn({0}, {1})"),
    "abs": _absolute,
    "neg": _negate,
    "sqrt": _exact("libdevice.sqrt({0})", "tl.sqrt_rn({0})"),
    "rsqrt": _rsqrt,
    "reciprocal": _reciprocal,
    "round": _libdevice("rint"),
    "maximum": _same("tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"),
    "minimum": _same("tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"),
    "isnan": _test("({0} != {0})"),
    "isinf": _is_infinite,
    "ceil": _solid("tl.ceil({0})"),
    "floor": _solid("tl.floor({0})"),
    **{
        name: _libdevice(name)
        for name in ("trunc", "exp", "exp2", "expm1", "log", "log2", "log10",
                     "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh",
                     "acosh", "atanh", "tanh", "erf", "erfc", "erfinv", "lgamma", "atan2")
    },
}  # fmt: skip
_INTEGER: dict[str, Emitter] = {
    **_COMPARE,
    "add": _same("{0} + {1}"),
    "sub": _same("{0} - {1}"),
    "mul": _same("{0} * {1}"),
    "abs": _absolute,
    "neg": _negate,
    **{name: _same("{0}") for name in ("ceil", "floor", "round", "trunc")},
    "maximum": _same("tl.maximum({0}, {1})"),
    "minimum": _same("tl.minimum({0}, {1})"),
    "isnan": _test("({0} != {0})"),
    "isinf": _test("({0} != {0})"),
    "bitwise_not": _same("~{0}"),
    "bitwise_and": _same("{0} & {1}"),
    "bitwise_or": _same("{0} | {1}"),
    "bitwise_xor": _same("{0} ^ {1}"),
    "shift_left": _shift(True),
    "shift_right": _shift(False),
}
_BOOLEAN: dict[str, Emitter] = {
    **{name: _same("{0} & {1}") for name in ("mul", "bitwise_and", "minimum")},
    **{name: _same("{0} | {1}") for name in ("add", "bitwise_or", "maximum")},
    "bitwise_xor": _same("{0} ^ {1}"),
    "bitwise_not": _same("~{0}"),
    "sign": _same("{0}"),
    "lt": _same("~{0} & {1}"),
    "le": _same("~{0} | {1}"),
    "gt": _same("{0} & ~{1}"),
    "ge": _same("{0} | ~{1}"),
    "isnan": _same("{0} & ~{0}"),
    "isinf": _same("{0} & ~{0}"),
}
