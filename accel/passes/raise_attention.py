"""Attention written as arithmetic becomes `accel.attention`, and masks become its attributes.

Finds softmax(scale * q k^T + mask) v (Vaswani et al., 2017) in the forms in which models write it:
scales before or after the product, soft caps, boolean and additive masks, batched products on three
to five axes. Then, for every attention: causal and sliding-window masks (comparisons of positions,
or stored tensors) become `causal`, `offset` and `window`; masks that hide nothing vanish; keys and
values repeated for query heads (Ainslie et al., 2023) are read once; scales of q go into `scale`.

Index maps are composed, never guessed: k is taken as the product reads it, so a key given as
`permute(0, 2, 3, 1)` stays that. What is nearly attention is reported. Contract: exact. Before and
after:

    %0 = "accel.permute"(%k) {axes = [0, 1, 3, 2]} : (tensor<1x2x8x4xf32>) -> tensor<1x2x4x8xf32>
    %1 = "accel.matmul"(%q, %0) : ... -> tensor<1x2x8x8xf32>
    %2 = "accel.mul"(%1, %scale) : (tensor<1x2x8x8xf32>, tensor<f32>) -> tensor<1x2x8x8xf32>
    %3 = "accel.tri_mask"() {rows = 8, columns = 8} : () -> tensor<8x8xi1>
    %4 = "accel.where"(%3, %2, %minus_infinity) : ... -> tensor<1x2x8x8xf32>
    %5 = "accel.softmax"(%4) {axis = 3} : (tensor<1x2x8x8xf32>) -> tensor<1x2x8x8xf32>
    %6 = "accel.matmul"(%5, %v) : ... -> tensor<1x2x8x4xf32>

    %6 = "accel.attention"(%q, %k, %v) {scale = 0.5, causal = true} : ... -> tensor<1x2x8x4xf32>
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from accel.ir.builder import Builder
from accel.ir.module import Module, Op, Value
from accel.ir.patterns import splat_value
from accel.ir.rewrite import Made, RewriteContext, Rule, RuleSet, rewrite
from accel.ir.types import Dim, same_dim, same_shape
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.eager_attention import EagerAttention
from accel.passes.masks import Band, Mask, MaskReader
from accel.passes.view_rules import view_rules


@register_pass
@dataclass
class RaiseAttention(Pass):
    """Raises attention arithmetic, and reads masks, grouped heads and scales off it."""

    name: ClassVar[str] = "raise_attention"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        reader = MaskReader(module.weights)
        rules: list[Rule] = [
            *view_rules(),  # what is built gets its normal form before the next rule looks
            EagerAttention(reader),
            AttentionMask(reader),
            GroupedHeads(),
            AttentionScale(),
        ]
        rewrite(module, RuleSet(rules), context)


def _attention(b: Builder, op: Op, operands: list[Value | None], **changes: Any) -> Value:
    attributes = op.definition.complete_attributes(op.attributes) | changes
    return b.op("attention", operands, attributes).result


class AttentionMask(Rule):
    """The part of a mask that is a band becomes attributes; the rest stays the mask."""

    name, roots = "attention_mask", ("attention",)

    def __init__(self, reader: MaskReader) -> None:
        self.reader = reader

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        q, k, v, mask, sinks = op.arguments()
        if mask is None:
            return None
        rows, columns = q.shape[2], k.shape[2]
        boolean = mask.dtype == torch.bool
        read = self.reader.boolean if boolean else self.reader.additive
        parts = read(mask, rows, columns)
        if not boolean:
            if parts.rest:
                context.miss(self.name, op, "some rows of the additive mask may see nothing")
                return None
            if not parts.band.every_row_sees_something(rows, columns):
                return None
        left = [*(value for value, _ in parts.rest), *parts.bias]
        inverted = mask.op is not None and mask.op.name == "logical_not"
        same = left == [mask] or (inverted and left == list(mask.op.operands))
        if parts.band.is_everything and (len(left) > 1 or same):
            return None
        attributes = _attributes(op, parts.band, context)
        if attributes is None:
            return None
        rest = _rest(b, parts, q)
        return _attention(b, op, [q, k, v, rest, sinks], **attributes)


def _rest(b: Builder, parts: Mask, q: Value) -> Value | None:
    """What the attributes do not say, as one mask."""
    result: Value | None = None
    for value, wanted in parts.rest:
        each = value if wanted else b.logical_not(value)
        result = each if result is None else b.logical_and(result, each)
    for value in parts.bias:
        wide = b.cast_to(value, q.dtype)
        result = wide if result is None else b.add(result, wide)
    return result


def _attributes(op: Op, band: Band, context: RewriteContext) -> dict[str, Any] | None:
    """The attention's attributes with one more band; None where they cannot say it."""
    causal, offset, window = (op.attribute(n) for n in ("causal", "offset", "window"))
    own = Band(offset if causal else None, None if window is None else offset - window)
    both = own.also(band)
    if both is None:
        context.miss("attention_mask", op, "two symbolic bands do not compare")
        return None
    if both.lower is None:
        return {"causal": both.upper is not None, "offset": _or_zero(both.upper), "window": None}
    upper = _or_zero(both.upper)
    width = upper - both.lower
    if not isinstance(width, int) or width < 1:
        context.miss("attention_mask", op, f"the window {width} is no positive number")
        return None
    return {"causal": both.upper is not None, "offset": upper, "window": width}


def _or_zero(dim: Dim | None) -> Dim:
    return 0 if dim is None else dim


class GroupedHeads(Rule):
    """Keys and values that were repeated for the query heads are read once."""

    name, roots = "grouped_heads", ("attention",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        q, k, v, *rest = op.arguments()
        first = _before_repeat(k)
        second = _before_repeat(v)
        if first is None or second is None:
            if first is not None or second is not None:
                name = "values" if first is not None else "keys"
                context.miss(self.name, op, f"the {name} are not repeated in the same way")
            return None
        if not same_dim(first[1], second[1]):
            context.miss(self.name, op, f"keys have {first[1]} groups, values {second[1]}")
            return None
        small = [
            b.reshape_to(source, (value.shape[0], groups, *value.shape[2:]))
            for (source, groups), value in ((first, k), (second, v))
        ]
        return _attention(b, op, [q, *small, *rest])


def _before_repeat(value: Value) -> tuple[Value, Dim] | None:
    """(source, groups) of [B, G * R, T, D] made by repeating each of G heads R times in a row."""
    op = value.op
    if op is None:
        return None
    if op.name == "broadcast_to":
        source = op.operands[0]
        lead = (1,) * (4 - len(source.shape)) + source.shape
        repeats = same_dim(lead[1], 1) and not same_dim(value.shape[1], 1)
        rest = same_dim(lead[0], value.shape[0]) and same_shape(lead[2:], value.shape[2:])
        return (source, 1) if repeats and rest else None
    wide = op.operands[0].op if op.name == "reshape" else None
    if wide is None or wide.name != "broadcast_to" or len(wide.result.shape) != 5:
        return None
    batch, groups, _, keys, width = wide.result.shape
    source = wide.operands[0]
    narrow = (batch, groups, 1, keys, width)
    lead = (1,) * (5 - len(source.shape)) + source.shape
    heads = same_shape((batch, keys, width), (value.shape[0], *value.shape[2:]))
    return (source, groups) if heads and same_shape(lead, narrow) else None


class AttentionScale(Rule):
    """Queries or keys multiplied by a number: the number goes into the scale."""

    name, roots = "attention_scale", ("attention",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        q, k, v, *rest = op.arguments()
        for place, value in ((0, q), (1, k)):
            found = _before_scale(b, value)
            if found is None:
                continue
            plain, factor = found
            operands = [q, k, v, *rest]
            operands[place] = plain
            return _attention(b, op, operands, scale=op.attribute("scale") * factor)
        return None


def _before_scale(b: Builder, value: Value) -> tuple[Value, float] | None:
    """The value without a multiplication by a number, under views if need be."""
    chain: list[Op] = []
    op = value.op
    while op is not None and op.name in ("reshape", "permute") and len(op.result.uses) == 1:
        chain.append(op)
        op = op.operands[0].op
    if op is None or op.name not in ("mul", "div") or len(op.result.uses) != 1:
        return None
    number = splat_value(op.operands[1])
    if not isinstance(number, float) or not number or op.operands[1].shape:
        return None
    result = op.operands[0]
    if not same_shape(result.shape, op.result.shape):
        return None
    for view in reversed(chain):
        result = b.op(view.name, (result,), view.attributes).result
    return result, number if op.name == "mul" else 1 / number
