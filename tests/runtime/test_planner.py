"""No two buffers that live at the same time overlap, and the arena is close to the least size."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.runtime.planner import ALIGNMENT, Interval, aligned, lower_bound, plan_memory

_interval = st.builds(
    lambda size, first, length: Interval(size, first, first + length),
    st.integers(0, 5000),
    st.integers(0, 30),
    st.integers(0, 12),
)


def _check(intervals: list[Interval]) -> float:
    """Asserts that the layout is legal; returns its size over the lower bound."""
    layout = plan_memory(intervals)
    placed = list(zip(intervals, layout.offsets, strict=True))
    for n, (a, offset) in enumerate(placed):
        assert offset % ALIGNMENT == 0
        assert offset + a.size <= layout.total
        for b, other in placed[:n]:
            together = a.first <= b.last and b.first <= a.last
            apart = offset + a.size <= other or other + b.size <= offset
            assert apart or not together or 0 in (a.size, b.size)
    assert layout.lower_bound == lower_bound(intervals) <= layout.total
    return layout.total / max(layout.lower_bound, 1)


@settings(max_examples=300, deadline=None)
@given(st.lists(_interval, max_size=40))
def test_live_buffers_never_overlap(intervals: list[Interval]) -> None:
    _check(intervals)


def test_random_problems_come_near_the_lower_bound() -> None:
    generator = random.Random(0)
    ratios = []
    for _ in range(150):
        count = generator.randint(5, 120)
        intervals = []
        for _ in range(count):
            first = generator.randint(0, count)
            size = generator.choice([64, 256, 1000, 4096, 100_000])
            intervals.append(Interval(size, first, first + generator.randint(0, 10)))
        ratios.append(_check(intervals))
    assert sum(ratios) / len(ratios) < 1.01
    assert max(ratios) < 1.1


def test_a_chain_takes_two_buffers() -> None:
    layout = plan_memory([Interval(1000, i, i + 1) for i in range(50)])
    assert layout.total == 2 * aligned(1000) == layout.lower_bound


def test_transformer_like_lifetimes_are_packed_exactly() -> None:
    """A residual stream, wide hidden layers, and short-lived small buffers."""
    intervals = []
    for layer in range(30):
        t = layer * 6
        intervals += [
            Interval(40_000, t, t + 6),
            Interval(160_000, t + 3, t + 4),
            Interval(40_000, t + 1, t + 2),
            Interval(1_000, t + 1, t + 3),
        ]
    layout = plan_memory(intervals)
    assert layout.total == layout.lower_bound


@pytest.mark.parametrize("intervals", [[], [Interval(0, 0, 5)]])
def test_nothing_needs_no_memory(intervals: list[Interval]) -> None:
    assert plan_memory(intervals).total == 0


def test_sizes_are_rounded_to_cache_lines() -> None:
    layout = plan_memory([Interval(1, 0, 1), Interval(1, 0, 1), Interval(65, 0, 1)])
    assert sorted(layout.offsets) != [0, 0, 0]
    assert layout.total == 64 + 64 + 128
