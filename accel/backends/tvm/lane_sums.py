"""Sums of the lanes of vectors, sixteen together: 3 instructions a sum, where one alone takes 8."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from accel.backends.tvm import tir
from accel.backends.tvm.tir import Block, Expr

LANES = 16
_FOURS = range(0, LANES, 4)
# For each level the lanes of two vectors (16 on: of the second) that the lanes so far behind are
# added to.
_HALVES: tuple[tuple[list[int], int], ...] = (
    ([x for i in _FOURS for x in (i, 16 + i, i + 1, 17 + i)], 2),
    ([x for i in _FOURS for x in (i, i + 1, 16 + i, 17 + i)], 2),
    ([16 * v + 4 * i + x for v in (0, 1) for i in (0, 1) for x in range(4)], 8),
    ([16 * v + 4 * i + x for v in (0, 1) for i in (0, 2) for x in range(4)], 4),
)


class LaneSums:
    """The sums of the lanes of 16 vectors at a time, of several series that come in turns.

    Two vectors whose lanes are added in part become one that holds both, until one vector holds all
    sixteen sums in order; then `done` gets it.
    """

    def __init__(self, block: Block, done: Mapping[int, Callable[[Expr], None]]) -> None:
        self.block, self.done = block, done
        self._waiting: dict[int, list[tuple[int, Expr]]] = {m: [] for m in done}

    def add(self, series: int, vector: Expr) -> None:
        waiting, level = self._waiting[series], 0
        vector = self.block.cell(vector, "part")
        while waiting and waiting[-1][0] == level:
            _, before = waiting.pop()
            lanes, behind = _HALVES[level]
            low, high = (
                tir.tirx.Shuffle([before, vector], [tir.const(x + d, "int32") for x in lanes])
                for d in (0, behind)
            )
            vector, level = self.block.cell(low + high, "part"), level + 1
        if level == len(_HALVES):
            self.done[series](vector)
        else:
            waiting.append((level, vector))
