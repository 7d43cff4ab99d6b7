"""Attention over pages becomes attention over a cache that is read through a table.

For generated kernels, to which a gather is an index map: reading a key is one more read, of its
page's number, and nothing is copied. What no kernel takes stays as it was.
Contract: exact. Before and after:

    %1 = "accel.paged_attention"(%q, %keys, %values, %table, %position)

    %1 = "accel.reshape"("accel.permute"("accel.gather"(%keys, %table)))    // the same for %values
    %2 = "accel.cached_attention"(%q, %1, ..., %position)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.builder import Builder
from accel.ir.module import Module, Op, Value
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass


@register_pass
@dataclass
class OpenPages(Pass):
    """Writes attention over pages as reads through a table."""

    name: ClassVar[str] = "open_pages"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions.values():
            for op in [o for o in function.ops if o.name == "paged_attention"]:
                if context.rewrite(self.name, op):
                    self._open(op)

    def _open(self, op: Op) -> None:
        b = Builder(before=op, location=op.location, made_by=self.name)
        (made,) = b.decompose(op)
        for value in made.op.operands[1:3]:  # type: ignore[union-attr]
            _read_through(b, value)
        op.replace_with([made])


def _read_through(b: Builder, cache: Value) -> None:
    """The pages of a cache by primitive ops."""
    gathered = cache.op
    assert gathered is not None and gathered.name == "gather_pages"
    inner = Builder(before=gathered, location=gathered.location, made_by=b.made_by)
    gathered.replace_with(inner.decompose(gathered))
