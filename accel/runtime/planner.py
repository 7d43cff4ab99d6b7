"""Places buffers in one arena so that no two that live at the same time overlap.

A buffer is a size and an interval of steps. Finding the smallest arena is NP-hard (dynamic storage
allocation), so a few greedy orders are tried and the best kept: largest first (Pisarchyk and Lee,
"Efficient Memory Management for Deep Neural Net Inference", 2020), largest area (size times
lifetime) first, longest lived first, and first come first served. Each buffer goes into the
tightest gap that fits between the buffers that live at the same time; in a second round both ends
of the arena are filled, so that two long-lived buffers do not split what is between them. The
search stops when it reaches the lower bound: the largest sum of live sizes at one step.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Interval:
    """A buffer of `size` bytes, in use from step `first` to step `last`, both included."""

    size: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in bytes (multiples of 64), the arena's size, and the least size possible."""

    offsets: tuple[int, ...]
    total: int
    lower_bound: int


def aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def plan_memory(intervals: Sequence[Interval]) -> Layout:
    """Offsets for all intervals. Empty buffers get offset 0 and take no room."""
    bound = lower_bound(intervals)
    best: Layout | None = None
    for order, ceiling in [(o, c) for c in (0, bound) for o in _ORDERS]:
        ranked = sorted(range(len(intervals)), key=order(intervals))
        offsets, total = _place(intervals, ranked, ceiling)
        if best is None or total < best.total:
            best = Layout(tuple(offsets), total, bound)
        if best.total == bound:
            break
    assert best is not None
    return best


def lower_bound(intervals: Sequence[Interval]) -> int:
    """The largest sum, over steps, of the (aligned) sizes in use."""
    change: dict[int, int] = {}
    for i in intervals:
        size = aligned(i.size)
        change[i.first] = change.get(i.first, 0) + size
        change[i.last + 1] = change.get(i.last + 1, 0) - size
    live = peak = 0
    for step in sorted(change):
        live += change[step]
        peak = max(peak, live)
    return peak


_Key = Callable[[int], tuple[int, ...]]


def _largest_first(intervals: Sequence[Interval]) -> _Key:
    return lambda n: (-intervals[n].size, intervals[n].first, n)


def _largest_area_first(intervals: Sequence[Interval]) -> _Key:
    def key(n: int) -> tuple[int, ...]:
        i = intervals[n]
        return (-i.size * (i.last - i.first + 1), i.first, n)

    return key


def _first_come(intervals: Sequence[Interval]) -> _Key:
    return lambda n: (intervals[n].first, -intervals[n].size, n)


def _longest_first(intervals: Sequence[Interval]) -> _Key:
    return lambda n: (intervals[n].first - intervals[n].last, -intervals[n].size, n)


_ORDERS = (_largest_first, _largest_area_first, _first_come, _longest_first)


def _place(
    intervals: Sequence[Interval], order: Sequence[int], ceiling: int
) -> tuple[list[int], int]:
    """Best fit in the given order. Each step keeps its placed buffers sorted by offset."""
    offsets = [0] * len(intervals)
    total = 0
    steps = 1 + max((i.last for i in intervals), default=0)
    placed: list[list[tuple[int, int]]] = [[] for _ in range(steps)]  # (offset, end) by step
    for n in order:
        i = intervals[n]
        if i.size == 0:
            continue
        size = aligned(i.size)
        offset = _tightest_gap(placed[i.first : i.last + 1], size, ceiling)
        offsets[n] = offset
        for step in range(i.first, i.last + 1):
            insort(placed[step], (offset, offset + size))
        total = max(total, offset + size)
    return offsets, total


def _tightest_gap(live: Sequence[list[tuple[int, int]]], size: int, ceiling: int) -> int:
    """An offset in the smallest gap of at least `size` between live buffers, or above them all.

    The gap below the `ceiling` is filled from its upper end (unless nothing is live).
    """
    best, best_room, end = -1, 0, 0
    for start, stop in sorted({r for step in live for r in step}):
        room = start - end
        if room >= size and (best < 0 or room < best_room):
            best, best_room = end, room
        end = max(end, stop)
    room = ceiling - end
    if room >= size and end > 0 and (best < 0 or room < best_room):
        return ceiling - size
    return best if best >= 0 else end
