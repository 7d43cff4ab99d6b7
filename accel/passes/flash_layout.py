"""Attention's results in training, as its kernels lay them out.

The kernels write [B, S, H, D]. Each result [B, H, S, D] is read through a permute from there, so
that the call's results are dense and what follows (a merge of the heads, the gradient of a merged
projection) reads them in place.

Contract: exact (two permutes that cancel). Before and after:

    %y, %l = "accel.flash_attention"(%q, %k, %v)      %y, %l = "accel.flash_attention"(%q, %k, %v)
    use(%y)                                           %1 = "accel.permute"(%y) {axes = [0, 2, 1, 3]}
                                                      %2 = "accel.permute"(%1) {axes = [0, 2, 1, 3]}
                                                      use(%2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from accel.ir.builder import Builder
from accel.ir.module import Module, Op, Value
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass

_SWAP = (0, 2, 1, 3)
_OPS = ("flash_attention", "flash_attention_backward")


@register_pass
@dataclass
class FlashLayout(Pass):
    """Reads training attention's results through their layout in memory."""

    name: ClassVar[str] = "flash_layout"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        # Not those inside of kernels, which write any layout.
        ops = [o for f in module.functions.values() for o in f.ops]
        for op in [o for o in ops if o.name in _OPS]:
            turned = [v for v in op.results if v.type.rank == 4 and v.uses]
            if turned and context.rewrite(self.name, op):
                self._turn(op, turned)

    def _turn(self, op: Op, values: Sequence[Value]) -> None:
        users = [list(value.uses) for value in values]
        assert op.next is not None
        # All permutes first, next to the op: they become one call with it.
        b = Builder(before=op.next, location=op.location, made_by=self.name)
        turned = [b.permute(value, axes=_SWAP) for value in values]
        # Made before anything is replaced: the next op may be one of these users.
        backs = [b.permute(last, axes=_SWAP) for last in turned]
        for last, back, uses in zip(turned, backs, users):
            for user, index in uses:
                if user.name == "permute" and user.attributes["axes"] == _SWAP:
                    user.replace_with([last])
                else:
                    user.set_operand(index, back)
            if not back.uses:
                back.op.erase()
