"""Tiles of cached attention (see `cached`): their dimensions, and loads of products' operands."""

from __future__ import annotations

from dataclasses import dataclass

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.trace import Index
from accel.backends.triton.emitter import Emitter
from accel.backends.triton.text import Expr
from accel.ir.module import Value
from accel.ir.op import Trait
from accel.ir.types import Dim


class Tiles(Emitter):
    """Loads the operands of products as they are stored, zeros outside; other values as ever."""

    raw = False
    wrong = ""  # where given, what gathers the failures of lookups: a store in a loop is costly

    def lookup(
        self, value: Value, index: Index, low: Dim, high: Dim, *, wrap: Dim, clamp: bool
    ) -> Affine:
        raw, self.raw = self.raw, False
        try:
            return super().lookup(value, index, low, high, wrap=wrap, clamp=clamp)
        finally:
            self.raw = raw

    def _checked(self, place: Expr, first: str, last: str, axes: frozenset[Axis]) -> Expr:
        if not self.wrong:
            return super()._checked(place, first, last, axes)
        self.checks = True
        text = f"({place} < {first}) | ({place} > {last})"
        wrong = self.block.let(text, "bool", place.dims, "wrong")
        mask = self.mask(axes)
        self.block.line(f"{self.wrong} = {self.wrong} | ({wrong}{f' & {mask}' if mask else ''})")
        return self.block.let(f"tl.where({wrong}, {first}, {place})", "int64", place.dims, "place")

    def compute(self, value: Value, index: Index) -> Expr:
        if value.op is not None and value.op.name == "update_pages":
            return self.load(value.op.operands[0], index)  # nobody reads the new tokens there
        return super().compute(value, index)

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
    """Whether an element is one load, as it is stored: an argument, behind views and pages or
    not."""
    while value.op is not None and (
        value.op.has(Trait.VIEW) or value.op.name in ("gather", "update_pages")
    ):
        value = value.op.operands[0]
    return value.op is None


def is_paged(value: Value) -> bool:
    """Whether a cache is read through a table of its pages."""
    while value.op is not None and value.op.has(Trait.VIEW):
        value = value.op.operands[0]
    return value.op is not None and value.op.name == "gather"
