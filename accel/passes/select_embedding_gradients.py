"""Gives gradients of embedding tables to the kernel generator, with what is added to them.

A table that is also the head's weight has two gradients: the head's, over all rows, and the
embedding's, which has numbers in the rows of the tokens that were read and zeros elsewhere. One
kernel writes their sum, so that the second is never written by itself. The elementwise ops that
make the other operand (the head's gradient times a number) are taken along.
Contract: exact (the kernel's region is the ops it replaces).

    %1 = "accel.mul"(%head, %loss)                 %3 = "accel.kernel"(%grad, %ids, %head, %loss) ({
    %2 = "accel.embedding_backward"(%grad, %ids) ->   mul, embedding_backward, add
    %3 = "accel.add"(%1, %2)                        }) {kind = "embedding_gradient"}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.capability import KernelGenerator
from accel.ir.module import Op
from accel.ir.op import Trait
from accel.passes.anchored import AnchoredPass
from accel.passes.base import EXACT, Context, Contract, register_pass
from accel.passes.outline import elementwise_epilogue, prologue

KIND = "embedding_gradient"


@register_pass
@dataclass
class SelectEmbeddingGradients(AnchoredPass):
    """Outlines embedding gradients with at most `most` elementwise ops after each, and as many
    before what these add."""

    name: ClassVar[str] = "select_embedding_gradients"
    contract: ClassVar[Contract] = EXACT
    anchors: ClassVar[tuple[str, ...]] = ("embedding_backward",)
    kind: ClassVar[str] = KIND

    most: int = 6

    def _select(
        self, op: Op, context: Context, generator: KernelGenerator, order: dict[Op, int]
    ) -> None:
        if not context.rewrite(self.name, op):
            return
        after = elementwise_epilogue(op, generator, self.most)
        beside = prologue(after, generator, self.most, _is_plain)
        ops = sorted((*beside, op, *after), key=order.__getitem__)
        numbers = [o for o in (v.op for x in ops for v in x.operands) if o and _is_number(o)]
        self._outline(ops, KIND, generator, order, duplicate=numbers)


def _is_plain(op: Op) -> bool:
    return op.has(Trait.ELEMENTWISE) or op.has(Trait.VIEW)


def _is_number(op: Op) -> bool:
    """Whether an op converts one number, which every kernel that reads it may do by itself."""
    return op.name == "cast" and op.result.type.rank == 0
