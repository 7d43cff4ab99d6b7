"""Rows that nobody reads are not computed: slices move up, in front of what makes the rows.

A classifier reads the first of a vision transformer's 197 tokens, or the last of a text; all that
the last block computes after its keys and values is needed of this token alone. A value of which
only a range along one axis is read (at most half of it) is computed from that range of its
operands, where its op treats the axis index by index (`accel.passes.read_ranges`): elementwise ops,
views, products along their rows, attention along its queries. What is read of an operand goes on
upwards, to the first value that something else needs whole. Where one linear makes queries, keys
and values, and queries are read of some rows only, it is cut in two (`accel.passes.split_linears`).

XLA and TVM move slices over elementwise ops; here they cross whole blocks. Contract: exact. Before
and after:

    %0 = "accel.linear"(%x, %w) : (tensor<2x197x64xf32>, tensor<32x64xf32>) -> tensor<2x197x32xf32>
    %1 = "accel.slice"(%0) {axis = 1, start = 0, stop = 1} : ... -> tensor<2x1x32xf32>

    %0 = "accel.slice"(%x) {axis = 1, start = 0, stop = 1} : ... -> tensor<2x1x64xf32>
    %1 = "accel.linear"(%0, %w) : (tensor<2x1x64xf32>, tensor<32x64xf32>) -> tensor<2x1x32xf32>
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.module import Function, Module, Op
from accel.ir.op import Trait
from accel.ir.types import SUB_BYTE_BITS, at_least
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.read_ranges import Range, join_slices, narrow, needs_of, read_of
from accel.passes.split_linears import SplitLinear

_NEVER = Trait.CONSTANT | Trait.DECODE | Trait.RANDOM | Trait.OPAQUE | Trait.UPDATE


@register_pass
@dataclass
class HoistSlices(Pass):
    """Computes only the rows that are read."""

    name: ClassVar[str] = "hoist_slices"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions.values():
            if not self._hoist(function, context):
                return

    def _hoist(self, function: Function, context: Context) -> bool:
        """Readers come before what they read; False when fuel is spent."""
        for op in function.body.reversed_ops():
            if op.name == "linear":
                split = SplitLinear.of(op, context)
                if split is not None:
                    if not context.rewrite(split.name, op):
                        return False
                    split.apply()
                    continue
            if not self._narrow(op, context):
                return False
        return True

    def _narrow(self, op: Op, context: Context) -> bool:
        if len(op.results) != 1 or op.regions or not op.has(Trait.PURE) or op.has(_NEVER):
            return True
        read = read_of(op.result)
        if read is None or not op.operands:
            return True
        if op.name == "slice":
            return self._join(op, read, context)
        if not read.is_small(op.result.shape[read.axis]):
            return True
        needs = needs_of(op, read)
        packed = any(v.dtype in SUB_BYTE_BITS for v in op.operands)
        if needs is None or packed:
            context.miss(self.name, op, f"it mixes the indices of axis {read.axis}")
        elif context.rewrite(self.name, op):
            narrow(op, read, needs, self.name)
        else:
            return False
        return True

    def _join(self, op: Op, read: Range, context: Context) -> bool:
        """Slices of a slice along one axis are one each, so that they are seen above."""
        along = read.axis == op.attribute("axis") % len(op.result.shape)
        readers = [(user.attribute("start"), user.attribute("stop")) for user in op.result.users]
        empty = any(not at_least(stop, start, more=True) for start, stop in readers)
        if not along or empty:
            return True
        if not context.rewrite("join_slices", op):
            return False
        join_slices(op, self.name)
        return True
