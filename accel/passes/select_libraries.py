"""Gives contractions to vendor libraries: `linear + gelu` becomes one `accel.call`.

Asks each library of the context, in order of preference, whether it takes an op with its epilogue.
Contract: exact (the call's region is the ops it replaces).

    %1 = "accel.linear"(%x, %w, %b)            %2 = "accel.call"(%x, %w, %b) ({
    %2 = "accel.gelu"(%1)                 ->     ...linear, gelu...
                                               }) {library = "onednn.linear", options = [...]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.module import Module, Op
from accel.ir.op import Trait
from accel.passes.base import EXACT, Context, Contract, LibraryMatch, Pass, register_pass
from accel.passes.outline import finish_outline, outline


@register_pass
@dataclass
class SelectLibraries(Pass):
    """Outlines vendor calls around contractions."""

    name: ClassVar[str] = "select_libraries"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions.values():
            order = {op: i for i, op in enumerate(function.ops)}
            for op in function.ops:
                if op.has(Trait.CONTRACTION) or op.has(Trait.UPDATE):
                    self._select(op, context, order)

    def _select(self, op: Op, context: Context, order: dict[Op, int]) -> None:
        for library in context.libraries:
            match = library.match(op)
            if match is None:
                continue
            match = _ordered(match, order)
            if not context.rewrite(f"{self.name}.{library.name}", op):
                return
            attributes = {"library": match.library, "options": match.options}
            call = outline(match.ops, "call", attributes, self.name, duplicate=match.copies)
            last = match.ops[-1]
            assert last.parent is not None
            last.parent.insert_before(call, last)
            order[call] = order[last]
            finish_outline(call, match.ops)
            for copied in match.copies:
                if not copied.result.uses:
                    copied.erase()
            return


def _ordered(match: LibraryMatch, order: dict[Op, int]) -> LibraryMatch:
    """The ops in program order; the epilogue's last op is where the call goes."""
    match.ops.sort(key=order.__getitem__)
    return match
