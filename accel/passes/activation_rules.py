"""Rules that raise activations written as arithmetic. Part of `raise_composites`."""

from __future__ import annotations

import math

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.patterns import bind, scalar, splat_value, var
from accel.ir.patterns import op as pattern
from accel.ir.rewrite import Made, Rewrite, RewriteContext, Rule
from accel.ir.types import same_dim, same_shape
from accel.passes.arithmetic import (
    close,
    factors,
    polynomial,
    same_polynomial,
    scaled,
)

_TANH_1 = math.sqrt(2 / math.pi)
_TANH_3 = _TANH_1 * 0.044715

x = var("x")


class RaiseProduct(Rule):
    """gelu, silu, hardswish: x times a gate of x, however the product is associated."""

    name, roots = "raise_gated_activation", ("mul", "div")

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        if not op.result.dtype.is_floating_point:
            return None
        product = factors(op)
        if len(product.values) != 2:
            return None
        for gate, value in (product.values, product.values[::-1]):
            made = _gated(b, gate, value, product.constant)
            if made is not None and same_shape(made.shape, op.result.shape):
                return made
        return None


def _gated(b: Builder, gate: Value, value: Value, constant: float) -> Value | None:
    """constant * value * gate, where the gate is a function of the value."""
    made = gate.op
    if made is None:
        return None
    approximate = _gelu_gate(made, value)
    if approximate and close(constant, 0.5):
        gelu: Value = b.gelu(value, approximate=approximate)
        return gelu
    if made.name == "sigmoid" and close(constant, 1.0):
        if made.operands[0] is value:
            silu: Value = b.silu(value)
            return silu
        if same_polynomial(polynomial(made.operands[0], value), _twice(_TANH_1, _TANH_3)):
            by_sigmoid: Value = b.gelu(value, approximate="tanh")
            return by_sigmoid
    if _is_ramp(made, value) and close(constant, 1 / 6):
        swish: Value = b.hardswish(value)
        return swish
    if made.name == "hardsigmoid" and made.operands[0] is value and close(constant, 1.0):
        from_gate: Value = b.hardswish(value)
        return from_gate
    return None


def _twice(first: float, third: float) -> dict[int, float]:
    return {1: 2 * first, 3: 2 * third}


def _gelu_gate(gate: Op, value: Value) -> str:
    """Which approximation 1 + erf(x / sqrt 2) or 1 + tanh(...) is of; empty if neither."""
    if gate.name != "add" or splat_value(gate.operands[1]) != 1:
        return ""
    inner = gate.operands[0].op
    if inner is None:
        return ""
    if inner.name == "erf":
        base, factor = scaled(inner.operands[0])
        return "none" if base is value and close(factor, math.sqrt(0.5)) else ""
    if inner.name == "tanh":
        wanted = {1: _TANH_1, 3: _TANH_3}
        return "tanh" if same_polynomial(polynomial(inner.operands[0], value), wanted) else ""
    return ""


def _is_ramp(op: Op, value: Value) -> bool:
    """clamp(x + 3, 0, 6)"""
    if op.name != "clamp" or op.attribute("min") != 0 or op.attribute("max") != 6:
        return False
    inner = op.operands[0].op
    shifted = inner is not None and inner.name == "add" and inner.operands[0] is value
    return bool(shifted and inner is not None and splat_value(inner.operands[1]) == 3)


class RaiseHardSigmoid(Rule):
    """clamp(x + 3, 0, 6) / 6, unless it is part of a hardswish."""

    name, roots = "raise_hardsigmoid", ("mul", "div")

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        base, factor = scaled(op.result)
        made = base.op
        if made is None or made.name != "clamp" or not close(factor, 1 / 6):
            return None
        inner = made.operands[0].op
        if inner is None or inner.name != "add" or not _is_ramp(made, inner.operands[0]):
            return None
        value: Value = b.hardsigmoid(inner.operands[0])
        return value


class RaiseSoftmax(Rule):
    """exp(x - m) / sum(exp(x - m)) along one axis, for any m that is constant along it."""

    name, roots = "raise_softmax", ("div",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        exponent, total = op.operands[0].op, op.operands[1].op
        if exponent is None or total is None or exponent.name != "exp" or total.name != "sum":
            return None
        if total.operands[0] is not exponent.result:
            return None
        axes = total.attribute("axes")
        if len(axes) != 1 or not total.attribute("keepdim"):
            context.miss(self.name, total, f"axes = {axes}, not one axis that is kept")
            return None
        axis = axes[0] % len(exponent.result.shape)
        value = exponent.operands[0]
        shift = value.op
        if shift is not None and shift.name == "sub" and _along(shift.operands[1], axis, value):
            full = same_shape(shift.operands[0].shape, value.shape)
            value = shift.operands[0] if full else value
        made: Value = b.softmax(value, axis=axis)
        return made


def _along(shift: Value, axis: int, value: Value) -> bool:
    """Whether the shift does not change along the axis."""
    place = axis - len(value.shape) + len(shift.shape)
    return place < 0 or same_dim(shift.shape[place], 1)


def activation_rules() -> list[Rule]:
    """All rules about activations and softmax."""
    one_plus_exp = pattern("add", pattern("exp", pattern("neg", x)), 1)
    leaky = pattern("where", pattern("gt", x, 0), x, pattern("mul", x, scalar("c")))
    return [
        RaiseProduct(),
        RaiseHardSigmoid(),
        RaiseSoftmax(),
        Rewrite("raise_sigmoid", pattern("reciprocal", one_plus_exp), pattern("sigmoid", x)),
        Rewrite("raise_silu", pattern("div", x, one_plus_exp), pattern("silu", x)),
        Rewrite(
            "raise_leaky_relu",
            leaky,
            lambda b, m: b.leaky_relu(m["x"], slope=m["c"]),
            when=lambda m: m["x"].dtype.is_floating_point,
        ),
        Rewrite(
            "raise_log_softmax",
            pattern("log", pattern("softmax", x, axis=bind("axis"))),
            lambda b, m: b.log_softmax(m["x"], axis=m["axis"]),
        ),
    ]
