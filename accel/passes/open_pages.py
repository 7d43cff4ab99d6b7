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
    """Writes attention over pages as reads through a table.

    `kernels`: only where a generated kernel takes it; the rest is left to a library's call. Codes
    in pages, too, which a kernel decodes.
    """

    name: ClassVar[str] = "open_pages"
    contract: ClassVar[Contract] = EXACT

    kernels: bool = False

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions.values():
            for op in [o for o in function.ops if o.name == "paged_attention"]:
                before = op.prev
                made = self._opened(op)
                reason = self._refusal(made, context)
                if reason is None and context.rewrite(self.name, op):
                    op.replace_with([made])
                    continue
                if reason is not None:
                    context.miss(self.name, op, reason)
                while op.prev is not None and op.prev is not before:
                    op.prev.erase()
            for op in [o for o in function.ops if self.kernels and o.name == "gather_pages"]:
                if context.rewrite(self.name, op):
                    _read_through(op, self.name)

    def _opened(self, op: Op) -> Value:
        b = Builder(before=op, location=op.location, made_by=self.name)
        (made,) = b.decompose(op)
        assert made.op is not None
        for value in made.op.operands[1:3]:
            assert value.op is not None
            _read_through(value.op, self.name)
        return made

    def _refusal(self, made: Value, context: Context) -> str | None:
        if not self.kernels or context.generator is None or made.op is None:
            return None
        return context.generator.supports_anchor(made.op, made.op.name)


def _read_through(gathered: Op, made_by: str) -> None:
    """The pages of a cache by primitive ops."""
    b = Builder(before=gathered, location=gathered.location, made_by=made_by)
    gathered.replace_with(b.decompose(gathered))
