"""How large a tile is, and how many warps compute it: a model of costs, not a measurement.

A GPU is full when every multiprocessor has a few programs; a program is efficient when each thread
moves 16 bytes or more at a time. Between the two a tile is as large as the problem allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.merge import group_extent
from accel.backends.triton.addresses import Group
from accel.ir.types import Dim, product

_MOST_HELD = 16384  # columns of a row that stay in registers
_LOOP_COLUMNS = 2048
_TILE = 2048  # elements of a tile of several rows
_FLAT = 1024
_SYMBOLIC_ROWS = 4096  # what an unknown number of rows is taken for


@dataclass
class Shape:
    """A tile: `rows` by `columns`; `crossed` is the group that rows run along in a transpose."""

    rows: int
    columns: int
    warps: int
    crossed: Group | None = None


@dataclass
class Columns:
    """The columns of a row: axes that merge, the block size, and whether one block holds all."""

    axes: tuple[Axis, ...]
    groups: list[Group]
    size: int = 1
    held: bool = True
    name: str = ""

    @property
    def extent(self) -> Dim:
        return product(group_extent(g) for g in self.groups)


def parts_of(extent: Dim, size: int) -> Dim:
    """How many blocks cover a range."""
    if size == 1:
        return extent
    if isinstance(extent, int):
        return -(-extent // size)
    return (extent + (size - 1)) // size


def next_power(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def _warps(elements: int) -> int:
    """8 elements a thread: 16 bytes of a half-precision tensor."""
    return max(1, min(16, next_power(elements) // 256))


def choose_flat(groups: Sequence[Group], reads: Sequence[Affine], itemsize: int, sms: int) -> Shape:
    """The tile of a phase without reductions."""
    crossed = _crossed(groups, reads)
    if crossed is not None:
        side = 32 if itemsize > 2 else 64
        rows = min(side, next_power(_known(group_extent(crossed))))
        columns = min(side, next_power(_known(group_extent(groups[-1]))))
        return Shape(rows, columns, max(1, min(8, rows * columns // 256)), crossed)
    total = _known(product(group_extent(g) for g in groups))
    block = max(128, min(_FLAT, next_power(total // (2 * sms) + 1)))
    block = min(block, next_power(total))
    return Shape(1, block, _warps(block))


def _crossed(groups: Sequence[Group], reads: Sequence[Affine]) -> Group | None:
    """A range that memory is contiguous along where it is not along the last one."""
    if len(groups) < 2:
        return None
    last = groups[-1][-1]
    if _known(group_extent(groups[-1])) < 4:
        return None
    for read in reads:
        if read.coefficient(last) in (0, 1):
            continue
        for group in groups[:-1]:
            if read.coefficient(group[-1]) == 1 and _known(group_extent(group)) >= 4:
                return group
    return None


def choose_rows(
    groups: Sequence[Group],
    columns: Mapping[frozenset[Axis], Columns],
    reads: Sequence[Affine],
    sms: int,
) -> Shape:
    """The tile of a phase with reductions; sets the columns' sizes."""
    count = _known(product(group_extent(g) for g in groups))
    across = _runs_across(groups, columns, reads)
    rows = 1
    if across is not None:
        rows = min(64, next_power(_known(group_extent(across))))
    for one in columns.values():
        extent = one.extent
        most = _MOST_HELD if rows == 1 else _TILE // rows
        one.held = isinstance(extent, int) and extent <= most
        size = _LOOP_COLUMNS if rows == 1 else max(_TILE // rows, 16)
        one.size = next_power(extent) if one.held and isinstance(extent, int) else size
    widest = max(one.size for one in columns.values())
    if across is None and widest < _TILE and all(one.held for one in columns.values()):
        # Short rows share a program, as long as there are programs for every multiprocessor.
        room = max(1, count // (4 * sms))
        rows = min(_TILE // 2 // widest or 1, 1 << (room.bit_length() - 1), next_power(count))
        rows = max(rows, 1)
    elements = rows * widest
    return Shape(rows, widest, _warps(elements))


def _runs_across(
    groups: Sequence[Group], columns: Mapping[frozenset[Axis], Columns], reads: Sequence[Affine]
) -> Group | None:
    """The rows' range that memory is contiguous along, if it is not along the columns."""
    inner = [g[-1] for one in columns.values() for g in one.groups]
    along = 0
    rows: Group | None = None
    for read in reads:
        if any(read.coefficient(axis) == 1 for axis in inner):
            along += 1
        elif rows is None and groups and read.coefficient(groups[-1][-1]) == 1:
            rows = groups[-1]
    return rows if along == 0 else None


def _known(extent: Dim) -> int:
    return extent if isinstance(extent, int) else _SYMBOLIC_ROWS
