"""Timing several systems fairly, and comparing their outputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def interleaved_medians(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 7, seconds: float = 0.5
) -> dict[str, float]:
    """Median seconds of each call, timed in turns so that drift of the machine hits all alike.

    In a round each system runs for at least `seconds` (or 3 calls); its first call, which finds
    another system's data in the processor's caches, is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            until = time.perf_counter() + seconds
            done = 0
            while done < 3 or time.perf_counter() < until:
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
                done += 1
    return {name: statistics.median(t) for name, t in times.items()}


def device_medians(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 7, seconds: float = 0.5
) -> dict[str, float]:
    """`interleaved_medians` on a GPU: seconds from one call's end to the next one's, by the
    device's clock, as many calls at a time as take a millisecond or more."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            count = max(1, round(1e-3 / max(time.perf_counter() - begin, 1e-6)))
            until = time.perf_counter() + seconds
            done = 0
            while done < 3 or time.perf_counter() < until:
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                for _ in range(count):
                    call()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) * 1e-3 / count)
                done += 1
    return {name: statistics.median(t) for name, t in times.items()}


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """max |got - wanted| / max |wanted| over all results, in float64; inf if shapes differ.

    NaN in one and not in the other is an error of inf.
    """
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return float("inf")
    worst = 0.0
    for g, w in zip(got, wanted):
        if not w.numel():
            continue
        g, w = g.detach().double(), w.detach().double()
        if not (g.isnan() == w.isnan()).all():
            return float("inf")
        scale = float(w.abs().nan_to_num().max()) or 1.0
        worst = max(worst, float((g - w).abs().nan_to_num().max()) / scale)
    return worst
