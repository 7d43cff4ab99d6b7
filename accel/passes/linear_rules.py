"""Rules that raise linear layers and rotary embeddings. Part of `raise_composites`."""

from __future__ import annotations

from dataclasses import dataclass

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.rewrite import Made, RewriteContext, Rule
from accel.ir.types import Dim, same_dim, same_shape, simplify_dim


class RaiseLinear(Rule):
    """x times a transposed matrix; x times a stored matrix, which `fold` then transposes."""

    name, roots = "raise_linear", ("matmul",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        x, y = op.operands
        if len(y.shape) != 2 or not x.dtype.is_floating_point:
            return None
        made = y.op
        if made is None:
            return None
        if made.name == "permute":
            linear: Value = b.linear(x, made.operands[0])
            return linear
        if made.name == "constant":
            stored: Value = b.linear(x, b.permute(y, axes=(1, 0)))
            return stored
        return None


class LinearBias(Rule):
    """A linear plus a vector over its outputs."""

    name, roots = "linear_bias", ("add",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        for value, bias in (op.operands, op.operands[::-1]):
            linear = value.op
            if linear is None or linear.name != "linear" or linear.arguments()[2] is not None:
                continue
            x, weight, _ = linear.arguments()
            outputs = (weight.shape[0],)
            extra = len(bias.shape) - 1
            if extra < 0 or not all(same_dim(d, 1) for d in bias.shape[:extra]):
                continue
            if not same_shape(bias.shape[extra:], outputs) or bias is value:
                continue
            if not same_shape(value.shape, op.result.shape):
                continue
            if len(value.uses) != 1:
                context.miss(self.name, linear, "the product has another user")
                continue
            made: Value = b.linear(x, weight, b.reshape_to(bias, outputs))
            return made
        return None


@dataclass(frozen=True)
class _Window:
    """value[..., start : start + length * step : step] along the last axis."""

    base: Value
    start: Dim
    step: int
    length: Dim


def _window(value: Value) -> _Window:
    op = value.op
    last = len(value.shape) - 1
    if op is not None and op.name == "slice" and op.attribute("axis") == last:
        return _Window(
            op.operands[0], op.attribute("start"), op.attribute("step"), value.shape[last]
        )
    return _Window(value, 0, 1, value.shape[last])


def _same_window(a: _Window, b: _Window) -> bool:
    return (
        a.base is b.base
        and a.step == b.step
        and same_dim(a.start, b.start)
        and same_dim(a.length, b.length)
    )


class RaiseRope(Rule):
    """x * cos + rotate(x) * sin, in the half and the interleaved style."""

    name, roots = "raise_rope", ("add",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        if len(op.result.shape) < 2 or not op.result.dtype.is_floating_point:
            return None
        for plain, turned in (op.operands, op.operands[::-1]):
            first, second = plain.op, turned.op
            if first is None or second is None or not first.name == second.name == "mul":
                continue
            for rotated, sin in (second.operands, second.operands[::-1]):
                style = _rotation(rotated)
                if style is None:
                    continue
                made = self.emit(b, op, first, style, sin)
                if made is not None:
                    return made
                context.miss(self.name, op, "the rotated value is not the one that meets cos")
        return None

    def emit(
        self, b: Builder, op: Op, first: Op, rotation: tuple[str, _Window], sin: Value
    ) -> Value | None:
        style, window = rotation
        for x, cos in (first.operands, first.operands[::-1]):
            if not _same_window(_window(x), window) or not same_shape(x.shape, op.result.shape):
                continue
            rope: Value = b.rope(x, cos, sin, style=style)
            return rope
        return None


def _rotation(value: Value) -> tuple[str, _Window] | None:
    """(style, what is rotated) if the value is rotate(x)."""
    op = value.op
    if op is None:
        return None
    if op.name == "cat" and len(op.operands) == 2:
        if op.attribute("axis") != len(value.shape) - 1:
            return None
        return _half(*op.operands)
    if op.name == "reshape":
        return _interleaved(op)
    return None


def _half(first: Value, second: Value) -> tuple[str, _Window] | None:
    """cat(-x[half:], x[:half])"""
    negated = first.op
    if negated is None or negated.name != "neg":
        return None
    high, low = _window(negated.operands[0]), _window(second)
    fits = (
        high.base is low.base
        and high.step == low.step == 1
        and same_dim(high.length, low.length)
        and same_dim(high.start, low.start + low.length)
    )
    whole = _Window(low.base, low.start, 1, simplify_dim(low.length * 2))
    return ("half", whole) if fits else None


def _interleaved(op: Op) -> tuple[str, _Window] | None:
    """reshape(cat([-x[1::2], x[::2]] as a new last axis))"""
    joined = op.operands[0].op
    if joined is None or joined.name != "cat" or len(joined.operands) != 2:
        return None
    rank = len(joined.result.shape)
    if joined.attribute("axis") != rank - 1 or not same_dim(joined.result.shape[-1], 2):
        return None
    if not same_shape(joined.result.shape[:-2], op.result.shape[:-1]):
        return None
    parts = [_unsqueezed(v) for v in joined.operands]
    negated = parts[0].op if parts[0] is not None else None
    if negated is None or negated.name != "neg" or parts[1] is None:
        return None
    odd, even = _window(negated.operands[0]), _window(parts[1])
    fits = (
        odd.base is even.base
        and odd.step == even.step == 2
        and same_dim(odd.start, even.start + 1)
        and same_dim(odd.length, even.length)
    )
    whole = _Window(even.base, even.start, 1, simplify_dim(even.length * 2))
    return ("interleaved", whole) if fits else None


def _unsqueezed(value: Value) -> Value | None:
    """What a reshape gave a last axis of size 1; a negation may stand on either side of it."""
    op = value.op
    if op is None or op.name != "reshape":
        return None
    inner = op.operands[0]
    return inner if same_shape((*inner.shape, 1), value.shape) else None


def linear_rules() -> list[Rule]:
    """All rules about linears and rotary embeddings."""
    return [RaiseLinear(), LinearBias(), RaiseRope()]
