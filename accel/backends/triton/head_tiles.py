"""Heads of queries, keys and values as matrices that TMA copies blocks of rows of.

[B, H, S, D] in memory, [B, S, H * D] as a projection leaves it, or a part of a fused one: in each
of them the rows of a head lie a constant stride apart, in one matrix that is the whole argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accel.backends.loops.index import Affine, Axis, Indexer, exact_quotient
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.backends.triton.maps import MULTIPLE
from accel.backends.triton.operands import is_stored
from accel.ir.module import Value
from accel.ir.types import Dim


@dataclass(frozen=True)
class Tiles:
    """An argument as a matrix of which a block of consecutive rows is one tile.

    `row` and `column` say where a head starts; `rows` is how many there are in all.
    """

    value: Value
    rows: Dim
    stride: int
    row: Affine
    column: Affine


class _Loads(Survey):
    """Notes which arguments are read, and where."""

    def __init__(self, indexer: Indexer) -> None:
        super().__init__(indexer, {})
        self.found: list[tuple[Value, Affine]] = []

    def load(self, value: Value, index: Index) -> bool:
        self.found.append((value, self.indexer.flatten(index, value.shape)))
        return super().load(value, index)


def tiles_of(indexer: Indexer, value: Value, index: Index, width: int) -> Tiles | None:
    """`value` [B, H, rows, width] at `index`, perhaps behind views; None if TMA cannot copy it."""
    if not is_stored(value):
        return None
    loads = _Loads(indexer)
    loads.element(value, index)
    if len(loads.found) != 1:
        return None
    place, flat = loads.found[0]
    row, column = index[2].single_axis, index[3].single_axis
    if row is None or column is None or flat.coefficient(column) != 1:
        return None
    stride = flat.coefficient(row)
    if not isinstance(stride, int) or stride <= 0 or stride * place.dtype.itemsize % MULTIPLE:
        return None
    down, across = Affine(), Affine()
    for part in _terms(flat, (row, column)):
        whole = _quotient(part, stride)
        down, across = (down.plus(whole), across) if whole else (down, across.plus(part))
    low, high = indexer.range(across)
    if not (isinstance(low, int) and isinstance(high, int) and low >= 0 and high + width <= stride):
        return None
    rows = exact_quotient(place.type.numel(), stride)
    return None if rows is None else Tiles(place, rows, stride, down, across)


def _terms(flat: Affine, without: Sequence[Axis]) -> list[Affine]:
    parts = [Affine(0, ((atom, c),)) for atom, c in flat.terms if atom not in without]
    return [*parts, Affine(flat.constant)] if flat.constant != 0 else parts


def _quotient(part: Affine, stride: int) -> Affine | None:
    """The part in rows; None if it is not whole ones."""
    if not part.terms:
        whole = exact_quotient(part.constant, stride)
        return None if whole is None else Affine(whole)
    ((atom, coefficient),) = part.terms
    whole = exact_quotient(coefficient, stride)
    return None if whole is None else Affine(0, ((atom, whole),))
