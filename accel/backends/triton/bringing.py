"""Which tiles of a product a program computes, and the warp that brings their operands by TMA.

A part of `overlapped` and of its variants: which tile comes when, what a copy brings, and when. A
program stays on its multiprocessor and takes every so-manieth tile. Tiles go by in groups of rows
of tiles, column by column: what is read again then lies in the second-level cache.
"""

from __future__ import annotations

from accel.backends.triton.addresses import size_name, size_text
from accel.backends.triton.dependent import WAIT
from accel.backends.triton.maps import Matrix
from accel.backends.triton.product_loop import MatmulWriter
from accel.backends.triton.tiles import parts_of
from accel.ir.types import Dim, product


class BringingWriter(MatmulWriter):
    """Writes the order of tiles and the function `bring`.

    Attributes:
        width: columns of results of a tile; count: accumulators.
        groups: groups of warps that multiply.
        pieces_of_x: copies that bring x's rows of a step. A copy's rows are a power of 2.
        left, right: x, and the weight once for each accumulator.
        turns: groups of warps have tiles of their own, one after the other.
    """

    width: int
    count: int
    groups: int
    pieces_of_x: int
    sms: int
    left: Matrix
    right: list[Matrix]
    turns = True

    def _first(self) -> str:
        """A group's first tile, in which step of the program it comes, and how far the next is."""
        return "tl.program_id(0) + which * PROGRAMS"

    def _first_step(self) -> str:
        return f"which * {self._steps()}"

    def _stride(self) -> str:
        return f"{self.groups} * PROGRAMS"

    def _down(self) -> Dim:
        """Rows of tiles."""
        return parts_of(self.rows, self.tile.rows)

    def _tiles(self) -> str:
        down = size_text(self._down())
        across = size_text(parts_of(self.columns, self.width))
        return f"{down} * {across}"

    def _programs(self) -> Dim:
        tiles = product((self._down(), parts_of(self.columns, self.width)))
        return min(tiles, self.sms) if isinstance(tiles, int) else self.sms

    def _steps(self) -> int:
        return -(-self.depth // int(self.tile.depth))

    def _sizes(self) -> list[str]:
        return sorted(size_name(str(s)) for s in getattr(self.rows, "free_symbols", ()))

    def _group(self) -> int:
        """Rows of tiles that go by together."""
        return int(self.tile.group)

    def _row0(self, place: str) -> str:
        """The first row of the tile of a program, `place` rows of tiles down."""
        return f"{place} * {self.tile.rows}"

    def _place_source(self) -> str:
        down = size_text(self._down())
        across = size_text(parts_of(self.columns, self.width))
        arguments = ", ".join(["tile", *self._sizes()])
        return (
            f"@gluon.jit\ndef place({arguments}):\n"
            f"    first = tile // (GROUP * {across}) * GROUP\n"
            f"    height = tl.minimum({down} - first, GROUP)\n"
            f"    inside = tile % (GROUP * {across})\n"
            f"    row0 = {self._row0('(first + inside % height)')}\n"
            f"    return row0.to(tl.int32), (inside // height * {self.width}).to(tl.int32)\n"
        )

    def _brought(self) -> int:
        """Rows of the weight that one copy brings."""
        return self.width

    def _weight_copies(self, slot: str, k: str) -> list[str]:
        """Copies of a step's tile of the weight; its barrier is told of those of x as well."""
        lines = [self._expectation(slot)]
        for number, one in enumerate(self.right):
            whole = self.count == 1
            part = "" if whole else f".slice({number * self.width}, {self.width}, dim=0)"
            lines.append(self._copy(slot, k, one, one.row0, part))
        return lines

    def _expectation(self, slot: str) -> str:
        tile, width = self.tile, self.left.value.dtype.itemsize
        bytes_ = (tile.rows + tile.columns) * tile.depth * width
        return f"mbarrier.expect(ready.index({slot}), {bytes_})"

    def _copy(self, slot: str, k: str, one: Matrix, row0: Dim, part: str) -> str:
        """A copy of rows of the weight to a part of a slot."""
        return (f"bring_tile(m1, [{plus('col0', row0)}, {plus(k, one.col0)}], "
                f"ready.index({slot}), right.index({slot}){part})")  # fmt: skip

    def _copies_of_x(self) -> list[str]:
        pieces, left = self.pieces_of_x, self.left
        rows = int(self.tile.rows) // pieces
        places = [(number * rows, f"slot * {pieces} + {number}") for number in range(pieces)]
        if pieces == 1:
            places = [(0, "slot")]
        return [
            f"bring_tile(m0, [{plus('row0', left.row0 + row)}, {plus('k', left.col0)}], "
            f"ready.index(slot), left.index({slot}))"
            for row, slot in places
        ]

    def _bringing(self) -> tuple[str, str]:
        """The first tile of a program, and how far the next is, as the warp that brings sees it."""
        return "tl.program_id(0)", "PROGRAMS"

    def _after_bringing(self) -> str:
        """What the warp that brings does last."""
        return ""

    def _before_parts(self) -> list[str]:
        """What every group of warps does first."""
        return []

    def _bring_source(self) -> str:
        """The first tiles of the weight come while the kernel before this one still runs."""
        sizes = "".join(f", {s}" for s in self._sizes())
        first, stride = self._bringing()
        return (
            f"@gluon.jit\ndef bring(left, right, ready, free, m0, m1{sizes}):\n"
            + "".join(f"    {line}\n" for line in self._before_parts())
            + f"    if {first} < {self._tiles()}:\n"
            f"        row0, col0 = place({first}{sizes})\n"
            "        for i in tl.static_range(EARLY):\n"
            + "".join(f"            {line}\n" for line in self._weight_copies("i", "i * DEPTH"))
            + f"    {WAIT}()\n"
            "    step = 0\n"
            f"    for tile in range({first}, {self._tiles()}, {stride}):\n"
            f"        row0, col0 = place(tile{sizes})\n"
            f"        for k in range(0, {self.depth}, DEPTH):\n"
            "            slot = step % STAGES\n"
            "            if step >= EARLY:\n"
            "                mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)\n"
            + "".join(f"                {line}\n" for line in self._weight_copies("slot", "k"))
            + "".join(f"            {line}\n" for line in self._copies_of_x())
            + "            step += 1\n"
            + self._after_bringing()
        )


def plus(name: str, offset: Dim) -> str:
    return name if offset == 0 else f"{name} + {size_text(offset)}"
