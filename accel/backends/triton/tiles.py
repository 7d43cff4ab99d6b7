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
from accel.ir.types import Dim, product, substitute

_MOST_HELD = 16384  # columns of a row that stay in registers
_LOOP_COLUMNS = 2048
SHORT = _TILE = 2048  # elements of a tile of several rows
_ACROSS = 8192  # where memory runs along the rows: several loads of a thread on their way at once
_LEAST_ACROSS, _MOST_ACROSS = 32, 128  # rows: whole sectors of 32 bytes, side by side
_MANY_ROWS, _FEW_READS = 16, 6  # rows for each multiprocessor; a norm's, with a residual
_PLAIN_READS = 2  # of a reduction of one tensor: its own, and where the result goes
_FLAT = 1024
_LARGE_FLAT = 1 << 24  # elements: then two vectors a thread, measured with GELU and concatenations
_SYMBOLIC_SIZE = 4096  # what an unknown size is taken for: a number of rows


@dataclass(frozen=True)
class KernelTile:
    """How far a kernel's tiles are from what the model of costs chooses, as powers of two.

    `elements` scales how much one program computes at a time, `warps` how many warps compute it.
    """

    elements: int = 0
    warps: int = 0

    def scaled(self, elements: int, least: int = 1) -> int:
        """`elements` (a power of two) times 2**self.elements, at least `least`."""
        wanted = elements << self.elements if self.elements >= 0 else elements >> -self.elements
        return max(wanted, least)

    def warps_for(self, elements: int) -> int:
        warps = _warps(elements)
        warps = warps << self.warps if self.warps >= 0 else warps >> -self.warps
        return max(1, min(16, warps))


MODEL_TILE = KernelTile()  # the model's own choice

# What tuning tries for kernels without an anchor, the likeliest to pay first.
KERNEL_TILES = (
    KernelTile(0, 1), KernelTile(1, 0), KernelTile(-1, 0), KernelTile(0, -1), KernelTile(1, 1),
    KernelTile(-1, -1), KernelTile(2, 1), KernelTile(-2, -1), KernelTile(0, 2), KernelTile(2, 0),
)  # fmt: skip


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


def choose_flat(
    groups: Sequence[Group],
    reads: Sequence[Affine],
    itemsize: int,
    sms: int,
    tile: KernelTile = MODEL_TILE,
) -> Shape:
    """The tile of a phase without reductions."""
    crossed = _crossed(groups, reads)
    if crossed is not None:
        side = 32 if itemsize > 2 else 64
        columns = min(side, next_power(_known(group_extent(groups[-1]))))
        rows = max(side, _TILE // columns)  # of narrow tiles more
        rows = min(rows, next_power(_known(group_extent(crossed))))
        warps = max(1, min(8, tile.scaled(rows * columns // 256)))
        return Shape(rows, columns, warps, crossed)
    total = _known(product(group_extent(g) for g in groups))
    most = 2 * _FLAT if total >= _LARGE_FLAT else _FLAT
    block = max(128, min(most, next_power(total // (2 * sms) + 1)))
    block = min(tile.scaled(block, 32), next_power(total))
    return Shape(1, block, tile.warps_for(block))


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
    tile: KernelTile = MODEL_TILE,
) -> Shape:
    """The tile of a phase with reductions; sets the columns' sizes."""
    count = _known(product(group_extent(g) for g in groups))
    across = _runs_across(groups, columns, reads)
    rows, most, looped, many = 1, _MOST_HELD, _LOOP_COLUMNS, False
    if across is not None:
        longest = max(next_power(_known(one.extent)) for one in columns.values())
        rows = min(max(_ACROSS // longest, _LEAST_ACROSS), _MOST_ACROSS)
        rows = min(rows, next_power(_known(group_extent(across))))
        most = looped = _ACROSS // rows
    for one in columns.values():
        extent = one.extent
        one.held = isinstance(extent, int) and extent <= most
        size = tile.scaled(looped, 16)
        one.size = next_power(extent) if one.held and isinstance(extent, int) else size
    widest = max(one.size for one in columns.values())
    if across is None and widest < _TILE and all(one.held for one in columns.values()):
        # Short rows share a program, as long as there are programs for every multiprocessor.
        room = max(1, count // (4 * sms))
        rows = min(_TILE // 2 // widest or 1, 1 << (room.bit_length() - 1), next_power(count))
        many = count >= _MANY_ROWS * sms and len(set(reads)) <= _FEW_READS
        rows = max(rows, _TILE // widest) if many else rows
        rows = min(tile.scaled(max(rows, 1)), next_power(count))
    elements = rows * widest
    if many:
        elements //= 4  # a warp or two a row: less to add up between warps, more loads on their way
    if across is not None and len(set(reads)) <= _PLAIN_READS:
        # Many elements a thread, as far as registers go: fewer threads have to meet.
        elements //= 16 if all(one.held for one in columns.values()) else 8
    return Shape(rows, widest, tile.warps_for(elements))


def _runs_across(
    groups: Sequence[Group], columns: Mapping[frozenset[Axis], Columns], reads: Sequence[Affine]
) -> Group | None:
    """The rows' range that memory is contiguous along, if it is not along the columns."""
    inner = [g[-1] for one in columns.values() for g in one.groups]
    along = 0
    rows: Group | None = None
    outer = [axis for group in groups for axis in group]
    for read in reads:
        if all(read.coefficient(axis) == 0 for axis in outer):
            continue  # the same for all rows: short
        if any(read.coefficient(axis) == 1 for axis in inner):
            along += 1
        elif rows is None and groups and read.coefficient(groups[-1][-1]) == 1:
            rows = groups[-1]
    return rows if along == 0 else None


def _known(extent: Dim) -> int:
    """A size, or what it would be with usual values for its symbols."""
    if isinstance(extent, int):
        return extent
    size = substitute(extent, {str(s): _SYMBOLIC_SIZE for s in extent.free_symbols})
    return size if isinstance(size, int) else _SYMBOLIC_SIZE
