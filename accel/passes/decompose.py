"""Breaks composites that no backend takes whole into primitives, until every op has a home.

An op stays whole if the kernel generator supports it, or if a vendor call already holds it. What
has neither and no decomposition is left for torch, by its ATen form, and shows in the report.
Contract: exact.

    %1 = "accel.softmax"(%x) {axis = 1}   ->   amax, sub, exp, sum, div
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.builder import Builder
from accel.ir.capability import KernelGenerator
from accel.ir.module import Function, Module, Op
from accel.ir.op import Trait
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass


@register_pass
@dataclass
class Decompose(Pass):
    """Lowers unsupported composites. Without a kernel generator only ops that torch cannot run.
    `keep` names one that torch runs better whole."""

    name: ClassVar[str] = "decompose"
    contract: ClassVar[Contract] = EXACT

    keep: str = ""

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions.values():
            # Newly made ops come before the op that the walk is at, so they are visited by hand.
            pending = [op for op in function.ops if op.has(Trait.COMPOSITE)]
            while pending:
                op = pending.pop()
                if op.name == self.keep or not _wants_decomposition(op, context.generator):
                    continue
                if not context.rewrite(f"decompose.{op.name}", op):
                    return
                builder = Builder(before=op, made_by=self.name)
                before = op.prev
                op.replace_with(builder.decompose(op))
                pending.extend(_made_since(before, op, function.body.first))
            _decompose_loops(function, context)


def _decompose_loops(function: Function, context: Context) -> None:
    """In the body of a loop over the tokens: what torch has no operator for."""
    for loop in function.ops:
        if loop.name != "scan":
            continue
        pending = [op for op in loop.regions[0].ops if op.has(Trait.COMPOSITE)]
        while pending:
            op = pending.pop()
            if not _wants_decomposition(op, None) or not context.rewrite("decompose.loop", op):
                continue
            before = op.prev
            op.replace_with(Builder(before=op, made_by=Decompose.name).decompose(op))
            pending.extend(_made_since(before, op, loop.regions[0].first))


def _made_since(before: Op | None, op: Op, first: Op | None) -> list[Op]:
    made = []
    current = first if before is None else before.next
    while current is not None and current is not op.next:
        if current.has(Trait.COMPOSITE):
            made.append(current)
        current = current.next
    return made


def _wants_decomposition(op: Op, generator: KernelGenerator | None) -> bool:
    if op.definition.decompose is None or op.parent is None:
        return False
    if generator is not None:
        # Reductions are always split: fusion planning works on primitive ones.
        return op.has(Trait.REDUCTION) or generator.supports(op) is not None
    return op.aten_call() is None
