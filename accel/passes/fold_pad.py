"""Folds explicit zero padding into the convolution that follows it.

Models that pad "same" by hand (EfficientNet, MobileNet from TensorFlow) pay a copy of the image for
it; where the padding is the same on both sides of each spatial axis, a convolution does it itself.

Contract: exact. Before and after:

    %1 = "accel.pad"(%x) {low = [0, 0, 1, 1], high = [0, 0, 1, 1], value = 0.0} : ...
    %2 = "accel.conv"(%1, %w) {padding = [0, 0], ...} : ...

    %2 = "accel.conv"(%x, %w) {padding = [1, 1], ...} : ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.builder import Builder
from accel.ir.module import Module, Op
from accel.ir.types import Shape
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass


@register_pass
@dataclass
class FoldPad(Pass):
    """pad + conv -> conv."""

    name: ClassVar[str] = "fold_pad"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions.values():
            for op in function.ops:
                pad = op.operands[0].op if op.name == "conv" else None
                if pad is None or pad.name != "pad":
                    continue
                reason = _refusal(pad, op)
                if reason:
                    context.miss(self.name, op, reason)
                elif context.rewrite(self.name, op):
                    _fold(pad, op)


def _spatial(amounts: Shape, conv: Op) -> tuple[Shape, Shape]:
    """Amounts of the spatial axes, and of batch and channels."""
    if conv.attribute("layout") == "nhwc":
        return amounts[1:-1], (amounts[0], amounts[-1])
    return amounts[2:], amounts[:2]


def _refusal(pad: Op, conv: Op) -> str:
    low, low_rest = _spatial(pad.attribute("low"), conv)
    high, high_rest = _spatial(pad.attribute("high"), conv)
    if pad.attribute("value") != 0:
        return "the padding is not zero"
    if any(a != 0 for a in (*low_rest, *high_rest)):
        return "batch or channels are padded"
    if low != high:
        return f"the sides differ: {low} and {high}"
    if any(not isinstance(a, int) or a < 0 for a in low):
        return "the padding crops, or is not static"
    return ""


def _fold(pad: Op, conv: Op) -> None:
    low, _ = _spatial(pad.attribute("low"), conv)
    padding = tuple(int(a) + int(p) for a, p in zip(low, conv.attribute("padding")))
    b = Builder(before=conv, made_by=FoldPad.name)
    _, *rest = conv.arguments()
    attributes = {**conv.attributes, "padding": padding}
    conv.replace_with(b.op("conv", [pad.operands[0], *rest], attributes).results)
    if not pad.result.uses:
        pad.erase()
