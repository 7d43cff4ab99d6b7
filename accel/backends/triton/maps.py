"""Matrices that a kernel copies with the tensor memory accelerator (TMA), from Hopper on.

A `MapCode` is a parameter of the Triton function through which a tile of a matrix is loaded or
stored at once (`m0.load([row, k])`); the runtime makes what it stands for, a tensor map, from the
address of a tensor that the launch gets anyway (`accel.runtime.tensor_map`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from accel.backends.cubin.compile import SHARED
from accel.backends.loops.index import Affine, Axis, Indexer
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.backends.triton.addresses import even_stride
from accel.backends.triton.operands import is_stored
from accel.ir.module import Value
from accel.ir.types import SUB_BYTE_BITS, Dim, product

FIRST_CAPABILITY = 90
MULTIPLE = 16  # bytes, of every stride


@dataclass(frozen=True)
class MapCode:
    """One matrix.

    Attributes:
        name: the parameter.
        pointer: the parameter with the tensor's address.
        element: Triton's name of the element type ("fp16").
        rows, columns, stride: the matrix in elements; `columns` are adjacent.
        box: rows and columns of a tile.
        shared: the source is Gluon's, which names the layout of a tile in shared memory.
    """

    name: str
    pointer: str
    element: str
    rows: Dim
    columns: int
    stride: int
    box: tuple[int, int]
    shared: bool = False

    @property
    def type(self) -> str:
        """Triton's type of the parameter; `accel.backends.cubin` knows what SHARED stands for."""
        tail = f",{SHARED}" if self.shared else ""
        return f"tensordesc<{self.element}[{self.box[0]}, {self.box[1]}]{tail}>"


@dataclass(frozen=True)
class Matrix:
    """An argument, or a part of it, as a matrix: its element [i, j] is [row0 + i, col0 + j] of
    `rows` x `columns`; rows lie `stride` elements apart."""

    value: Value
    rows: Dim
    columns: int
    stride: int
    row0: int
    col0: int


class Loads(Survey):
    """Notes which arguments are read, and where."""

    def __init__(self, indexer: Indexer) -> None:
        super().__init__(indexer, {})
        self.found: list[tuple[Value, Affine]] = []

    def load(self, value: Value, index: Index) -> bool:
        self.found.append((value, self.indexer.flatten(index, value.shape)))
        return super().load(value, index)


def matrix(
    indexer: Indexer,
    value: Value,
    index: Index,
    rows: Sequence[Axis],
    columns: Sequence[Axis],
    *,
    stored: bool = False,
) -> Matrix | None:
    """`value` at `index` as a matrix over two ranges; None if TMA cannot copy it.

    An operand may be behind views; of a result (`stored`) the value itself is meant.
    """
    if stored:
        place, flat = value, indexer.flatten(index, value.shape)
    else:
        if not is_stored(value):
            return None
        loads = Loads(indexer)
        loads.element(value, index)
        if len(loads.found) != 1:
            return None
        place, flat = loads.found[0]
    terms = dict(flat.terms)
    if not rows or not columns:
        return None
    stride, near = even_stride(terms, tuple(rows)), even_stride(terms, tuple(columns))
    offset, count = flat.constant, product(a.extent for a in columns)
    if near != 1 or not (isinstance(stride, int) and isinstance(offset, int)) or stride <= 0:
        return None
    if not isinstance(count, int) or terms.keys() - {*rows, *columns} or _bits(place) % 8:
        return None
    row0, col0 = divmod(offset, stride)
    if col0 + count > stride or stride * (_bits(place) // 8) % MULTIPLE:
        return None
    return Matrix(place, product(a.extent for a in rows) + row0, col0 + count, stride, row0, col0)


def _bits(value: Value) -> int:
    dtype: torch.dtype = value.dtype
    return SUB_BYTE_BITS.get(dtype, 8 * dtype.itemsize)
