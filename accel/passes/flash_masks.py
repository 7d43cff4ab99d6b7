"""Masks of training attention: what is a band around the diagonal becomes attributes.

A causal mask leaves cuDNN's kernel its own form; with a sliding window, generated kernels visit no
block that is hidden. Forward and backward are programs of their own, each with its own mask
(`accel.frontends.joint_masks`). For GPUs: torch's CPU kernel takes a mask, and no window.
Contract: exact (the band is added inside of the op). Before and after:

    %m = "accel.where"(%band, %zero, %minus_infinity)
    %y, %l = "accel.flash_attention"(%q, %k, %v, %m)

    %y, %l = "accel.flash_attention"(%q, %k, %v) {causal = true, window = 64}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from accel.ir.builder import Builder
from accel.ir.module import Module, Op, Value
from accel.ir.patterns import splat_value
from accel.ir.rewrite import Made, RewriteContext, Rule, RuleSet, rewrite
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.masks import Band, Mask, MaskReader, hidden_unless

_OPS = ("flash_attention", "flash_attention_backward")


@register_pass
@dataclass
class FlashMasks(Pass):
    """Reads bands off the masks of training attention."""

    name: ClassVar[str] = "flash_masks"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        rewrite(module, RuleSet([_FlashMask(MaskReader(module.weights))]), context)


class _FlashMask(Rule):
    name, roots = "flash_mask", _OPS

    def __init__(self, reader: MaskReader) -> None:
        self.reader = reader

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        *operands, mask = op.arguments()
        if mask is None:
            return None
        q, k = operands[:2] if op.name == _OPS[0] else operands[1:3]
        rows, columns = q.shape[2], k.shape[2]
        parts = self.reader.additive(mask, rows, columns)
        if parts.band.is_everything and (parts.rest or parts.bias):
            return None
        safe = not parts.rest and parts.band.every_row_sees_something(rows, columns)
        if not safe and not _hides_wholly(mask):
            context.miss(self.name, op, "a row that sees nothing would average finite numbers")
            return None
        window = op.attribute("window")
        own = Band(0 if op.attribute("causal") else None, None if window is None else -window)
        both = own.also(parts.band)
        if both is None or both.upper not in (None, 0):
            context.miss(self.name, op, "a diagonal that is not the scores' own")
            return None
        lower = both.lower
        if lower is not None and not (isinstance(lower, int) and lower < 0):
            context.miss(self.name, op, f"a window that begins at {lower}")
            return None
        rest = _rest(b, parts, mask.dtype)
        attributes = op.definition.complete_attributes(op.attributes)
        attributes |= {"causal": both.upper == 0, "window": None if lower is None else -lower}
        return list(b.op(op.name, [*operands, rest], attributes).results)


def _rest(b: Builder, parts: Mask, dtype: torch.dtype) -> Value | None:
    """What the band does not say, as one additive mask."""
    total: Value | None = None
    zero, hidden = (b.scalar(number, dtype) for number in (0.0, float("-inf")))
    for value, wanted in parts.rest:
        each = b.where(value, *((zero, hidden) if wanted else (hidden, zero)))
        total = each if total is None else b.add(total, each)
    for bias in parts.bias:
        each = b.cast_to(bias, dtype)
        total = each if total is None else b.add(total, each)
    return total


def _hides_wholly(mask: Value) -> bool:
    """Whether what `MaskReader.additive` takes for hidden is minus infinity: then a row that sees
    nothing is the same however it is said."""
    op = mask.op
    if op is None or splat_value(mask) == 0:
        return True
    if op.name in ("reshape", "broadcast_to", "cast"):
        return _hides_wholly(op.operands[0])
    if op.name == "add":
        return all(_hides_wholly(v) for v in op.operands)
    found = hidden_unless(op) if op.name == "where" else None
    if found is None:
        return op.name != "constant"  # a bias; or numbers, of which the reader tells no more
    _, wanted, shown = found
    low = splat_value(op.operands[2 if wanted else 1])
    return low == float("-inf") and _hides_wholly(shown)
