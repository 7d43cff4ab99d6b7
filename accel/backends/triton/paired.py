"""Writes products for Hopper in Gluon: neighbouring multiprocessors share what they bring.

A tile of 128 x 256 results reads 384 rows of its operands for every step of K, all of them from the
second-level cache. Two programs that have the same columns need the same tile of the weight: each
brings one half of it, and TMA writes that half to the shared memory of both. So a program reads
256 rows instead of 384, which costs less time where the cache is the limit, and less power
everywhere: under a long load it is power that decides how fast a Hopper multiplies. Everything else
is `cooperative`'s.

    cluster of two programs:  rows 0-127 | columns 0-255      rows 128-255 | columns 0-255
                              brings columns 0-127            brings columns 128-255

A slot is written from both sides, so it is free when the groups of both programs have multiplied
it, and no program may end while the other still writes to it: the warps that bring wait at the end
until all slots are free.

Gluon of Triton 3.6 has no words for that. Where a source means both programs it says so with a line
of assembly (`BOTH`, `EVERYONE`) before the copy or the arrival; `accel.backends.cubin.pairs` finds
it in the PTX and writes the instruction's form for clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

from accel.backends.cubin.pairs import BOTH, EVERYONE, MEET
from accel.backends.triton.cooperative import CooperativeTile, CooperativeWriter
from accel.backends.triton.text import Block
from accel.backends.triton.tiles import parts_of
from accel.ir.types import Dim, product

PAIR = 2  # programs of a cluster


@dataclass(frozen=True)
class PairedTile(CooperativeTile):
    """Results of one of the two programs; `group` counts rows of tiles of single programs."""


class PairedWriter(CooperativeWriter):
    """Writes the one program of a product whose programs come in pairs."""

    bring_warps = 4  # so that no warp is idle: all threads of a cluster must meet

    def _programs(self) -> Dim:
        pairs = product((self._pairs(), parts_of(self.columns, self.width)))
        most = max(1, self.sms // PAIR)
        return PAIR * (min(pairs, most) if isinstance(pairs, int) else most)

    def _pairs(self) -> Dim:
        """Pairs of rows of tiles."""
        return parts_of(self.rows, PAIR * self.tile.rows)

    def _down(self) -> Dim:
        return self._pairs()

    def _brought(self) -> int:
        return self.overlapped.columns // PAIR

    def _first(self) -> str:
        return f"tl.program_id(0) // {PAIR}"

    def _stride(self) -> str:
        return f"PROGRAMS // {PAIR}"

    def _bringing(self) -> tuple[str, str]:
        return self._first(), self._stride()

    def _releases(self) -> int:
        return PAIR * self.groups

    def _release(self, body: Block, slot: str) -> None:
        body.line("everyone()")
        super()._release(body, slot)

    def _row0(self, place: str) -> str:
        return f"({place} * {PAIR} + tl.program_id(0) % {PAIR}) * {self.tile.rows}"

    def _group(self) -> int:
        return max(1, self.overlapped.group // PAIR)

    def _weight_copies(self, slot: str, k: str) -> list[str]:
        half = self._brought()
        lines = [self._expectation(slot)]
        for number in range(PAIR):
            one = self.right[number % self.count]
            first = one.row0 if self.count == PAIR else one.row0 + number * half
            lines += [
                f"if tl.program_id(0) % {PAIR} == {number}:",
                f"    both_{number}()",
                "    " + self._copy(slot, k, one, first, f".slice({number * half}, {half}, dim=0)"),
            ]
        return lines

    def _before_parts(self) -> list[str]:
        return ["meet_pair()"]

    def _after_bringing(self) -> str:
        return (
            "    for _ in tl.static_range(STAGES):\n"
            "        if step >= EARLY:\n"
            "            mbarrier.wait(free.index(step % STAGES), ((step // STAGES) & 1) ^ 1)\n"
            "        step += 1\n"
        )

    def _helpers(self) -> list[str]:
        names = {f"both_{i}": f"{BOTH} half {i}" for i in range(PAIR)}
        names |= {"everyone": EVERYONE, "meet_pair": MEET}
        return [
            f"@gluon.jit\ndef {name}():\n"
            f'    tl.inline_asm_elementwise("{code} // $0", "=r", [], dtype=tl.int32, '
            "is_pure=False, pack=1)\n"
            for name, code in names.items()
        ]
