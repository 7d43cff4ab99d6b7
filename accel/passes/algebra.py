"""Scalar identities, as rows of a table: what `canonicalize` knows of arithmetic.

A row is a name, a pattern and a replacement over the same variables. They hold over the reals for
every input (so no x - x = 0 for floats, where x may be infinite), and none makes a result less
accurate than rounding. Canonical forms: a constant is the second operand of a commutative op, a
subtraction of a constant is an addition, a division by a power of two is a multiplication.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.patterns import bind, op, scalar, splat_value, var
from accel.ir.rewrite import Made, Match, Rewrite, RewriteContext, Rule
from accel.ir.types import SUB_BYTE_BITS, broadcast_shapes, is_integer, same_shape


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def _is_bool(dtype: torch.dtype) -> bool:
    return dtype == torch.bool


def _is_signed(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex or (is_integer(dtype) and dtype.is_signed)


x, y, z = var("x"), var("y"), var("z")
f = var("f", dtype=_is_float, text="floating")
i = var("i", dtype=is_integer, text="an integer")
p, q = var("p", dtype=_is_bool, text="bool"), var("q", dtype=_is_bool, text="bool")
s = var("s", dtype=_is_signed, text="signed")
r = var("r", dtype=lambda t: _is_float(t) or is_integer(t), text="a real number")
c, d = scalar("c"), scalar("d")

_ROWS: list[tuple[str, Any, Any]] = [
    # addition and subtraction
    ("add_zero", op("add", x, 0), x),
    ("sub_zero", op("sub", x, 0), x),
    ("zero_sub", op("sub", 0, s), op("neg", s)),
    ("sub_self_int", op("sub", i, i), 0),
    ("add_neg", op("add", x, op("neg", y)), op("sub", x, y)),
    ("sub_neg", op("sub", x, op("neg", y)), op("add", x, y)),
    ("neg_neg", op("neg", op("neg", x)), x),
    ("neg_sub", op("neg", op("sub", x, y)), op("sub", y, x)),
    # multiplication, division, powers
    ("mul_one", op("mul", x, 1), x),
    ("mul_minus_one", op("mul", s, -1), op("neg", s)),
    ("mul_zero_int", op("mul", i, 0), 0),
    ("mul_neg_neg", op("mul", op("neg", x), op("neg", y)), op("mul", x, y)),
    ("div_one", op("div", x, 1), x),
    ("one_div", op("div", 1, f), op("reciprocal", f)),
    ("div_sqrt", op("div", x, op("sqrt", y)), op("mul", x, op("rsqrt", y))),
    ("reciprocal_sqrt", op("reciprocal", op("sqrt", x)), op("rsqrt", x)),
    ("mul_reciprocal", op("mul", x, op("reciprocal", y)), op("div", x, y)),
    ("floor_div_one", op("floor_div", i, 1), i),
    ("trunc_div_one", op("trunc_div", i, 1), i),
    ("pow_one", op("pow", x, 1), x),
    ("pow_two", op("pow", x, 2), op("mul", x, x)),
    ("pow_three", op("pow", x, 3), op("mul", op("mul", x, x), x)),
    ("pow_half", op("pow", f, 0.5), op("sqrt", f)),
    ("pow_minus_one", op("pow", f, -1), op("reciprocal", f)),
    ("pow_minus_half", op("pow", f, -0.5), op("rsqrt", f)),
    # idempotent and cancelling functions
    ("abs_abs", op("abs", op("abs", s)), op("abs", s)),
    ("abs_neg", op("abs", op("neg", s)), op("abs", s)),
    ("abs_relu", op("abs", op("relu", r)), op("relu", r)),
    ("square_abs", op("mul", op("abs", r), op("abs", r)), op("mul", r, r)),
    ("relu_relu", op("relu", op("relu", x)), op("relu", x)),
    ("maximum_zero", op("maximum", r, 0), op("relu", r)),
    ("maximum_self", op("maximum", x, x), x),
    ("minimum_self", op("minimum", x, x), x),
    ("clamp_none", op("clamp", x, min=None, max=None), x),
    ("clamp_zero", op("clamp", x, min=0, max=None), op("relu", x)),
    # logic
    ("not_not", op("logical_not", op("logical_not", p)), p),
    ("and_true", op("logical_and", p, True), p),
    ("and_false", op("logical_and", p, False), False),
    ("or_false", op("logical_or", p, False), p),
    ("or_true", op("logical_or", p, True), True),
    ("and_self", op("logical_and", p, p), p),
    ("or_self", op("logical_or", p, p), p),
    ("xor_false", op("logical_xor", p, False), p),
    ("bitwise_and_bool", op("bitwise_and", p, q), op("logical_and", p, q)),
    ("bitwise_or_bool", op("bitwise_or", p, q), op("logical_or", p, q)),
    ("bitwise_xor_bool", op("bitwise_xor", p, q), op("logical_xor", p, q)),
    ("bitwise_not_bool", op("bitwise_not", p), op("logical_not", p)),
    ("mul_bool", op("mul", p, q), op("logical_and", p, q)),
    ("ne_false", op("ne", p, False), p),
    ("eq_true", op("eq", p, True), p),
    ("eq_false", op("eq", p, False), op("logical_not", p)),
    ("ne_true", op("ne", p, True), op("logical_not", p)),
    ("not_eq", op("logical_not", op("eq", x, y)), op("ne", x, y)),
    ("not_ne", op("logical_not", op("ne", x, y)), op("eq", x, y)),
    ("not_lt_int", op("logical_not", op("lt", i, y)), op("ge", i, y)),
    ("not_le_int", op("logical_not", op("le", i, y)), op("gt", i, y)),
    ("not_gt_int", op("logical_not", op("gt", i, y)), op("le", i, y)),
    ("not_ge_int", op("logical_not", op("ge", i, y)), op("lt", i, y)),
    ("eq_self_int", op("eq", i, i), True),
    ("where_true", op("where", True, x, y), x),
    ("where_false", op("where", False, x, y), y),
    ("where_same", op("where", p, x, x), x),
    ("where_not", op("where", op("logical_not", p), x, y), op("where", p, y, x)),
    ("where_bool", op("where", p, True, False), p),
]


def lossless(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every value of the first dtype is one of the second."""
    if narrow == wide or narrow == torch.bool:
        return True
    if narrow.is_complex or wide.is_complex or wide == torch.bool:
        return False
    if narrow in SUB_BYTE_BITS or wide in SUB_BYTE_BITS:
        return False
    if narrow.is_floating_point:
        if not wide.is_floating_point:
            return False
        a, b = torch.finfo(narrow), torch.finfo(wide)
        return a.eps >= b.eps and a.max <= b.max and a.smallest_normal >= b.smallest_normal
    a_int = torch.iinfo(narrow)
    if wide.is_floating_point:
        return a_int.max <= 2 / torch.finfo(wide).eps and a_int.max <= torch.finfo(wide).max
    b_int = torch.iinfo(wide)
    return b_int.min <= a_int.min and a_int.max <= b_int.max


class CastChain(Rule):
    """cast(cast(x)): one cast where the middle dtype holds every value of x."""

    name, roots = "cast_chain", ("cast",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        value, wanted = op.operands[0], op.attribute("dtype")
        if value.dtype == wanted:
            return value
        inner = value.op
        if inner is None or inner.name != "cast":
            return None
        source = inner.operands[0]
        if not lossless(source.dtype, value.dtype):
            context.miss(self.name, op, f"{source.dtype} to {value.dtype} rounds")
            return None
        return b.cast_to(source, wanted)


class ConstantSecond(Rule):
    """c + x becomes x + c: rules look for constants in one place."""

    name, roots = "constant_second", Trait.COMMUTATIVE

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        first, second = op.operands[:2]
        if not _is_constant(first) or _is_constant(second):
            return None
        return b.op(op.name, (second, first), op.attributes).result


def _is_constant(value: Value) -> bool:
    return value.op is not None and value.op.has(Trait.CONSTANT)


class DropBroadcast(Rule):
    """Elementwise ops broadcast by themselves: they read what `broadcast_to` reads.

    Where the result would get smaller, it is broadcast instead: less is computed.
    """

    name, roots = "broadcast_below_elementwise", Trait.ELEMENTWISE

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        operands = [_operand_of(v, "broadcast_to") for v in op.operands]
        shape = broadcast_shapes(*(v.shape for v in operands))
        bare = [without_leading_ones(v) for v in operands]
        if same_shape(broadcast_shapes(*(v.shape for v in bare)), shape):
            operands = bare
        if all(new is old for new, old in zip(operands, op.operands)):
            return None
        value = b.op(op.name, operands, op.attributes).result
        if same_shape(value.shape, op.result.shape):
            return value
        widened: Value = b.broadcast_to(value, shape=op.result.shape)
        return widened


def _operand_of(value: Value, name: str) -> Value:
    """What an op of this name reads, if the value is made by one; else the value itself."""
    made = value.op
    return made.operands[0] if made is not None and made.name == name else value


def without_leading_ones(value: Value) -> Value:
    """The operand of a reshape that only adds leading axes of size 1."""
    inner = _operand_of(value, "reshape")
    extra = len(value.shape) - len(inner.shape)
    fits = extra > 0 and same_shape(value.shape, (1,) * extra + inner.shape)
    return inner if fits else value


class SmallFull(Rule):
    """A constant operand of an elementwise op has no axes unless the result's shape needs them."""

    name, roots = "full_without_axes", Trait.ELEMENTWISE

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        new = list(op.operands)
        for k, value in enumerate(op.operands):
            number = splat_value(value)
            if number is None or not value.shape:
                continue
            others = [v.shape for j, v in enumerate(new) if j != k]
            if others and same_shape(broadcast_shapes(*others), op.result.shape):
                new[k] = b.scalar(number, value.dtype)
        if all(a is v for a, v in zip(new, op.operands)):
            return None
        return b.op(op.name, new, op.attributes).result


def _sub_constant(b: Builder, m: Match) -> Made:
    value: Value = b.add(m["s"], b.scalar(-m["c"], m["s"].dtype))
    return _fit(b, value, m)


def _power_of_two(m: Match) -> bool:
    number = m["c"]
    if not isinstance(number, float) or not math.isfinite(number) or number == 0:
        return False
    return abs(math.frexp(number)[0]) == 0.5 and 2.0**-14 <= abs(number) <= 2.0**14


def _mul_inverse(b: Builder, m: Match) -> Made:
    return _fit(b, b.mul(m["f"], b.scalar(1 / m["c"], m["f"].dtype)), m)


def _fit(b: Builder, value: Value, m: Match) -> Made:
    """The value broadcast to the root's shape (a constant may have had more axes)."""
    shape = m.root.result.shape
    if same_shape(value.shape, shape):
        return value
    widened: Value = b.broadcast_to(value, shape=shape)
    return widened


def _holds(number: Any, dtype: torch.dtype) -> bool:
    """Whether the dtype holds the number without overflow (zero stays zero)."""
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        return number == 0 or info.smallest_normal <= abs(number) <= info.max
    info_int = torch.iinfo(dtype)
    return bool(info_int.min <= number <= info_int.max)


def _both_held(m: Match, number: Any) -> bool:
    dtype = m["x"].dtype
    if dtype.is_complex or dtype == torch.bool or dtype in SUB_BYTE_BITS:
        return False
    return all(_holds(n, dtype) for n in (m["c"], m["d"], number))


_STRUCTURAL: list[Rule] = [
    Rewrite("sub_constant", op("sub", s, c), _sub_constant, when=lambda m: m["c"] != 0),
    Rewrite("div_power_of_two", op("div", f, c), _mul_inverse, when=_power_of_two),
    Rewrite(
        "add_add",
        op("add", op("add", x, d), c),
        lambda b, m: _fit(b, b.add(m["x"], b.scalar(m["c"] + m["d"], m["x"].dtype)), m),
        when=lambda m: max(abs(m["c"]), abs(m["d"])) <= 1e4 and _both_held(m, m["c"] + m["d"]),
    ),
    Rewrite(
        "mul_mul",
        op("mul", op("mul", x, d), c),
        lambda b, m: _fit(b, b.mul(m["x"], b.scalar(m["c"] * m["d"], m["x"].dtype)), m),
        when=lambda m: _both_held(m, m["c"] * m["d"]),
    ),
    Rewrite(
        "clamp_clamp",
        op("clamp", op("clamp", x, min=bind("a"), max=bind("b")), min=bind("c"), max=bind("d")),
        lambda b, m: b.clamp(m["x"], **_clamp_bounds(m)),
    ),
    Rewrite(
        "minimum_relu",
        op("minimum", op("relu", r), c),
        lambda b, m: _fit(b, b.clamp(m["r"], min=type(m["c"])(0), max=m["c"]), m),
    ),
    Rewrite(
        "minimum_maximum",
        op("minimum", op("maximum", r, d), c),
        lambda b, m: _fit(b, b.clamp(m["r"], min=m["d"], max=m["c"]), m),
    ),
    CastChain(),
    ConstantSecond(),
    DropBroadcast(),
    SmallFull(),
]


def _clamp_bounds(m: Match) -> dict[str, Any]:
    """Bounds of clamp(clamp(x, a, b), c, d), each as torch defines it: min(max(x, low), high)."""
    low, high = m["c"], m["d"]

    def again(bound: Any, free: Any) -> Any:
        if bound is None:
            return free
        bound = bound if low is None else max(bound, low)
        return bound if high is None else min(bound, high)

    return {"min": again(m["a"], low), "max": again(m["b"], high)}


def algebra_rules() -> list[Rule]:
    """All scalar identities."""
    return [Rewrite(name, pattern, made) for name, pattern, made in _ROWS] + _STRUCTURAL
