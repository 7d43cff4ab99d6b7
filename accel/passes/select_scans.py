"""Gives running sums and products to the kernel generator, with the elementwise ops around them.

Padded batches number their tokens by a running sum of the mask, samplers cut a running sum of
probabilities: a comparison or a cast before, a subtraction or another comparison after. As one
kernel a row is read once and written once. Contract: exact (the kernel's region is the ops it
replaces).

    %1 = "accel.ne"(%mask, %zero)                 %3 = "accel.kernel"(%mask) ({
    %2 = "accel.cumsum"(%1) {axis = 1}     ->       ne, cumsum, sub
    %3 = "accel.sub"(%2, %one)                    }) {kind = "scan"}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.capability import KernelGenerator
from accel.ir.module import Op
from accel.ir.op import Trait
from accel.ir.types import same_shape
from accel.passes.anchored import AnchoredPass
from accel.passes.base import EXACT, Context, Contract, register_pass
from accel.passes.outline import elementwise_epilogue, prologue

SCANS = ("cumsum", "cumprod")


@register_pass
@dataclass
class SelectScans(AnchoredPass):
    """Outlines scans with at most `most` elementwise ops before and after each."""

    name: ClassVar[str] = "select_scans"
    contract: ClassVar[Contract] = EXACT
    anchors: ClassVar[tuple[str, ...]] = SCANS
    kind: ClassVar[str] = "scan"

    most: int = 8

    def _select(
        self, op: Op, context: Context, generator: KernelGenerator, order: dict[Op, int]
    ) -> None:
        if not context.rewrite(self.name, op):
            return
        after = elementwise_epilogue(op, generator, self.most)
        before = prologue([op], generator, self.most, lambda made: _is_like(made, op))
        ops = sorted((*before, op, *after), key=order.__getitem__)
        self._outline(ops, "scan", generator, order)


def _is_like(made: Op, scan: Op) -> bool:
    """Whether an op computes one element for each of the scan's."""
    return made.has(Trait.ELEMENTWISE) and same_shape(made.result.shape, scan.result.shape)
