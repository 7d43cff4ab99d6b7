"""Gives depthwise convolutions to the kernel generator, with the padding before and what follows;
max pools too, where the image is channels-last.

A generated kernel computes channels-last, reads beyond the border as zeros (so that a pad before
the convolution costs nothing), and applies bias and activation before anything is written. The
weight [C, 1, KH, KW] is stored as [KH, KW, C], as the kernel reads it.
Contract: exact (the kernel's region is the ops it replaces; weights are only moved).

    %1 = "accel.pad"(%x)                  %w = "accel.constant"() {name = "w.last"}
    %2 = "accel.conv"(%1, %w)       ->    %3 = "accel.kernel"(%x, %w) ({
    %3 = "accel.clamp"(%2)                  permute, reshape, pad, conv, clamp
                                          }) {kind = "depthwise", ...}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.builder import Builder
from accel.ir.capability import KernelGenerator
from accel.ir.module import Module, Op, constant_name
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.deferred import deferred_permute
from accel.passes.outline import elementwise_epilogue, finish_outline, is_full, outline
from accel.passes.weights import drop_unused


@register_pass
@dataclass
class SelectDepthwise(Pass):
    """Outlines depthwise convolutions. `max_epilogue` bounds the ops taken along after one."""

    name: ClassVar[str] = "select_depthwise"
    contract: ClassVar[Contract] = EXACT

    max_epilogue: int = 6

    def run(self, module: Module, context: Context) -> None:
        generator = context.generator
        if generator is None:
            return
        moved: list[str] = []
        for op in [o for o in module.walk() if o.name == "conv"]:
            weight = constant_name(op.operands[1])
            reason = generator.supports_anchor(op, "depthwise")
            if reason is None and weight is None:
                reason = "the weight is not stored"
            if reason is not None:
                context.miss(self.name, op, reason)
            elif context.rewrite(self.name, op):
                self._select(op, module, generator)
                moved.append(str(weight))
        drop_unused(module, moved)
        for op in [o for o in module.walk() if o.name == "max_pool"]:
            reason = generator.supports_anchor(op, "pool") or _channels_first(op)
            if reason is not None:
                context.miss(self.name, op, reason)
            elif context.rewrite("select_pool", op):
                self._pool(op, generator)

    def _pool(self, op: Op, generator: KernelGenerator) -> None:
        """Outlines a pool with the permutes around it, so that what it makes is channels-last."""
        permutes = list(op.result.users)
        after, before = permutes[0], op.operands[0].op
        assert before is not None and after.parent is not None
        for other in permutes[1:]:
            other.replace_with([after.result])
        attributes = {"backend": generator.name, "kind": "pool"}
        kernel = outline([op, after], "kernel", attributes, self.name, duplicate=[before])
        after.parent.insert_before(kernel, after)
        finish_outline(kernel, [op, after])

    def _select(self, op: Op, module: Module, generator: KernelGenerator) -> None:
        x, weight, _ = op.arguments()
        name, weights = str(constant_name(weight)), module.weights
        channels, _, height, width = weight.shape
        stored = weight.type.with_shape((height, width, channels))
        last = f"{name}.last"
        if last not in weights:
            shape = (height, width, channels)
            store = deferred_permute(weights.pick(name), name, (2, 3, 0, 1), shape)
            weights.add_lazy(last, stored, store)
        b = Builder(before=op, location=op.location, made_by=self.name)
        turned = b.permute(b.constant(last, stored), axes=(2, 0, 1))
        shaped = b.reshape(turned, shape=weight.shape)
        pad = x.op
        members = [turned.op, shaped.op]
        padded = [pad] if pad is not None and pad.name == "pad" else []
        epilogue = elementwise_epilogue(op, generator, self.max_epilogue)
        op.set_operand(1, shaped)
        members += [op, *epilogue]
        attributes = {"backend": generator.name, "kind": "depthwise"}
        kernel = outline(members, "kernel", attributes, self.name, duplicate=padded, inline=is_full)
        last_op = members[-1]
        assert last_op.parent is not None
        last_op.parent.insert_before(kernel, last_op)
        finish_outline(kernel, members)
        if weight.op is not None and not weight.uses:
            weight.op.erase()


def _channels_first(op: Op) -> str | None:
    """Why an image is not channels-last behind its permutes, before and after; None if it is."""
    before, users = op.operands[0].op, op.result.users
    if before is None or before.name != "permute" or before.attribute("axes") != (0, 3, 1, 2):
        return "an image that is channels-first"
    if not users or any(u.name != "permute" or u.attribute("axes") != (0, 2, 3, 1) for u in users):
        return "a result that is read channels-first"
    return None
