"""Gives attention to the kernel generator, with the views around it.

A generated kernel reads queries, keys and values through their head split (and out of a fused qkv
projection), and writes the merged heads, so nothing is copied before or after; scores stay in the
core. What the generator does not take (few queries, odd head sizes) is left to a vendor library.
Contract: exact (the kernel's region is the ops it replaces).

    %q = "accel.permute"(%1)                     %3 = "accel.kernel"(%1, %k, %v) ({
    %2 = "accel.attention"(%q, %k, %v)     ->      permute, attention, permute, reshape
    %3 = "accel.reshape"("accel.permute"(%2))    }) {kind = "attention", ...}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.capability import KernelGenerator
from accel.ir.module import Function, Module, Op
from accel.ir.op import Trait
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.outline import finish_outline, outline

# Ops that have a kind of kernel of their own name.
KINDS = ("attention", "cached_attention")


@register_pass
@dataclass
class SelectAttention(Pass):
    """Outlines attention and its views into kernels."""

    name: ClassVar[str] = "select_attention"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        if context.generator is None:
            return
        for function in module.functions.values():
            order = {op: i for i, op in enumerate(function.ops)}
            for op in function.ops:
                if op.name in KINDS:
                    self._select(op, function, context, context.generator, order)

    def _select(
        self,
        op: Op,
        function: Function,
        context: Context,
        generator: KernelGenerator,
        order: dict[Op, int],
    ) -> None:
        reason = generator.supports_anchor(op, op.name)
        if reason is not None:
            context.miss(self.name, op, reason)
            return
        if not context.rewrite(self.name, op):
            return
        ops = [op, *views_after(op, generator)]
        views = sorted(views_before(op, generator), key=order.__getitem__)
        attributes = {"backend": generator.name, "kind": op.name}
        kernel = outline(ops, "kernel", attributes, self.name, duplicate=views)
        last = ops[-1]
        function.body.insert_before(kernel, last)
        order[kernel] = order[last]
        finish_outline(kernel, ops)


def _is_view(op: Op | None, generator: KernelGenerator) -> bool:
    return op is not None and op.has(Trait.VIEW) and generator.supports(op) is None


def views_before(op: Op, generator: KernelGenerator) -> set[Op]:
    """VIEW ops that the operands are read through. They stay for whoever else uses them."""
    found: set[Op] = set()
    pending = list(op.operands)
    while pending:
        made = pending.pop().op
        if made is not None and made not in found and _is_view(made, generator):
            found.add(made)
            pending.extend(made.operands)
    return found


def views_after(op: Op, generator: KernelGenerator) -> list[Op]:
    """The head merge: permutes and reshapes that nothing else comes between."""
    found: list[Op] = []
    user = op.result.single_user
    while user is not None and user.name in ("permute", "reshape") and _is_view(user, generator):
        found.append(user)
        user = user.result.single_user
    return found
