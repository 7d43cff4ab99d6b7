"""Operands of `tl.dot`: elements as they are stored."""

from __future__ import annotations

from accel.backends.loops.index import Axis
from accel.backends.loops.trace import Index
from accel.backends.triton import dtypes
from accel.backends.triton.emitter import Emitter
from accel.backends.triton.text import COL, ROW, Expr
from accel.ir.module import Value
from accel.ir.op import Trait


class StoredOperands(Emitter):
    """Loads dot's operands as they are stored, zeros beyond K; other values as ever."""

    raw = False

    def load(self, value: Value, index: Index) -> Expr:
        if not self.raw:
            return super().load(value, index)
        self.used.setdefault(value)
        flat = self.indexer.flatten(index, value.shape)
        loaded = self.load_text(self.pointers[value], self.addresses.code(flat), flat.axes)
        return Expr(loaded.text, "stored", loaded.dims)

    def load_text(self, pointer: str, address: Expr, axes: frozenset[Axis]) -> Expr:
        made = super().load_text(pointer, address, axes)
        if self.raw and "mask=" in made.text:
            return Expr(made.text.removesuffix(")") + ", other=0.0)", made.kind, made.dims)
        return made


class TileEmitter(StoredOperands):
    """Traces what follows a product; one operand of the shape of the result may lie in shared
    memory already (`resident`, in registers by that name)."""

    resident: Value | None = None

    def load(self, value: Value, index: Index) -> Expr:
        if value is not self.resident:
            return super().load(value, index)
        self.used.setdefault(value)
        loaded = Expr("resident", "", frozenset((ROW, COL)))
        return dtypes.from_storage(loaded, value.dtype, self.block)


def is_stored(value: Value) -> bool:
    """Whether an element is one load of a 16-bit float: an argument, behind views or not."""
    while value.op is not None and value.op.has(Trait.VIEW):
        value = value.op.operands[0]
    return value.op is None
