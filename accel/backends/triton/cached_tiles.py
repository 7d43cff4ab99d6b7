"""Tiles of cached attention (see `cached`): their dimensions, and loads of products' operands."""

from __future__ import annotations

from dataclasses import dataclass

from accel.backends.loops.index import Axis
from accel.backends.loops.trace import Index
from accel.backends.triton.emitter import Emitter
from accel.backends.triton.text import Expr
from accel.ir.module import Value
from accel.ir.op import Trait


class Tiles(Emitter):
    """Loads the operands of products as they are stored, zeros outside; other values as ever."""

    raw = False

    def load(self, value: Value, index: Index) -> Expr:
        if not self.raw:
            return super().load(value, index)
        self.used.setdefault(value)
        flat = self.indexer.flatten(index, value.shape)
        loaded = self.load_text(self.pointers[value], self.addresses.code(flat), flat.axes)
        text = loaded.text
        if "mask=" in text:
            text = text.removesuffix(")") + ", other=0.0)"
        return Expr(text, "stored", loaded.dims)


@dataclass
class Span:
    """One dimension of a tile: `axes` at the positions `variable`, of which those in `mask` are
    there."""

    axes: tuple[Axis, ...]
    variable: str
    dim: str
    size: str
    mask: str = ""


def is_stored(value: Value) -> bool:
    """Whether an element is one load, as it is stored: an argument, behind views or not."""
    while value.op is not None and value.op.has(Trait.VIEW):
        value = value.op.operands[0]
    return value.op is None
