"""Writes products for Hopper in Gluon: two groups of warps share a tile of 128 x 256 results.

Tensor cores read both operands from shared memory, and a tile's bytes come from the second-level
cache: the larger a tile, the fewer of both for a multiplication. Of the sums of 128 x 256 results
each of two groups holds 64 rows, so that a group's instruction multiplies with all 256 columns.
Where multiplications take nearly all of the time, this is faster than groups that take turns
(`overlapped`, whose loop, copies and barriers it has); the epilogue is not hidden, though, except
as far as one group is ahead of the other.

    ready[slot]   as there        free[slot]   both groups have multiplied it

The results of a group go to memory in pieces of 128 columns, one after the other through one
buffer, which leaves more room for operands. A matrix that is added comes in two pieces to two
buffers, while the group multiplies, and a bias to registers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from accel.backends.triton.emitter import Scope
from accel.backends.triton.operands import TileEmitter
from accel.backends.triton.overlapped import OverlappedTile, OverlappedWriter
from accel.backends.triton.text import Block

_ASSIGNMENT = re.compile(r"(\w+) = (.*)")
_NAME = re.compile(r"[A-Za-z_]\w*")
_STORED = 128  # columns of results that a group stores at once, at most


@dataclass(frozen=True)
class CooperativeTile(OverlappedTile):
    """Results of both groups of warps together; the rest as there."""

    columns: int = 256
    group: int = 16


class CooperativeWriter(OverlappedWriter):
    """Writes the one program of a product whose groups of warps share tiles."""

    turns = False

    def _stored_at_once(self) -> tuple[int, int]:
        tile = self.overlapped
        self.pieces = 2 if self.width > _STORED else 1
        height, piece = tile.rows // self.groups, self.width // self.pieces
        self.row0 = f"(row0 + which * {height})"
        self.both = False  # there is a place for every piece
        return height, piece

    def _at(self, piece: int) -> None:
        """What follows is about a piece of the columns."""
        self.col0 = f"(col0 + {piece * self.piece})" if piece else "col0"
        self.place = (
            f"out.index(which * {self.pieces} + {piece})" if self.both else "out.index(which)"
        )

    def _find_resident(self, emitter: TileEmitter) -> None:
        super()._find_resident(emitter)
        if emitter.resident is None or self.pieces == 1:
            return
        self.stages, self.both = self.overlapped.stages, True
        self.out = self._result_map()
        if self.out is None:  # no room for both pieces of what is added
            emitter.resident, self.both = None, False
            self.out = self._result_map()

    def _buffers(self) -> int:
        return self.groups * (self.pieces if self.both else 1)

    def _out(self, group: int) -> str:
        return "left" if self.out is None else "out"

    def _first(self) -> str:
        return "tl.program_id(0)"

    def _first_step(self) -> str:
        return "0"

    def _stride(self) -> str:
        return "PROGRAMS"

    def _left(self) -> str:
        if self.pieces_of_x > 1:
            return f"left.index(slot * {self.pieces_of_x} + which)"
        return f"left.index(slot).slice(which * {self.height}, {self.height}, dim=0)"

    def _bring_resident(self, body: Block) -> None:
        for piece in range(self.pieces):
            self._at(piece)
            body.line(f"bring_tile(m3, [{self.row0}, {self.col0}], arrived, {self.place})")

    def _epilogue(self, body: Block) -> None:
        """One piece after the other. What is the same in all rows, or in all columns, is loaded
        before the multiplication, which hides how long that takes."""
        addresses = self.emitter.addresses
        bound, masks = list(addresses.groups), dict(self.emitter.masks)
        early: list[str] = []
        for piece in range(self.pieces):
            self._at(piece)
            self._made.clear()
            addresses.groups, self.emitter.masks = list(bound), dict(masks)
            part = Block(body.names)
            with self.emitter.inside(Scope(part, frozenset())):
                if self.pieces > 1:
                    half = ("first", "second")[piece]
                    part.line(f"acc_0 = tl.convert_layout({half}, layout)")
                super()._epilogue(part)
            ahead, rest = loaded_ahead(part.lines, ("row", "col"))
            early += ahead
            body.lines += rest
        body.lines[self.multiplied_from : self.multiplied_from] = early


def loaded_ahead(lines: Sequence[str], roots: tuple[str, str]) -> tuple[list[str], list[str]]:
    """Loads that depend on rows alone, or on columns, with the positions that they need; and the
    lines without these loads.

    `lines` assign names once; `roots` are those of the rows' and the columns' positions. Names that
    are assigned nowhere in them are known ahead.
    """
    assigned = {found[1] for found in map(_ASSIGNMENT.match, lines) if found is not None}
    along: dict[str, set[str]] = {}  # positions: which of the roots they depend on
    ahead: list[tuple[str, str, bool]] = []
    rest: list[str] = []
    for line in lines:
        found = _ASSIGNMENT.match(line)
        name, text = (found[1], found[2]) if found is not None else ("", "")
        used = [n for n in _NAME.findall(text) if n in along or n in assigned]
        known = bool(used) and all(n in along for n in used)
        depends = set().union(*(along.get(n, set()) for n in used))
        loads = "tl.load(" in text
        if name in roots or (known and not loads):
            along[name] = depends | ({name} & set(roots))
            ahead.append((name, line, False))
            rest.append(line)
        elif known and len(depends) < 2:
            ahead.append((name, line, True))
        else:
            rest.append(line)
    wanted: set[str] = set()
    kept: list[str] = []
    for name, line, loads in reversed(ahead):
        if loads or name in wanted:
            kept.append(line)
            wanted |= set(_NAME.findall(line))
    return kept[::-1], rest
