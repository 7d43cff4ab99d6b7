"""Golden vectors: recorded calls, replayed to see whether this machine computes the same.

Tolerances follow from dtypes. Another CPU or library sums in another order, so results agree to
some of the digits and not to all: half of them is asked for, that is an error of at most
sqrt(epsilon) of the largest magnitude (float32: 3.5e-4). Integers and booleans must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.runtime.artifact import GoldenCase

_SEED = 0


@dataclass(frozen=True)
class Deviation:
    """How far one output is from the recorded one; `note` says more if it cannot be compared."""

    function: str
    output: int
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return not self.note and self.error <= self.tolerance


def tolerance(dtype: torch.dtype) -> float:
    """The largest allowed error of an output relative to its largest magnitude."""
    if dtype.is_floating_point or dtype.is_complex:
        return math.sqrt(torch.finfo(dtype).eps)
    return 0.0


def record(
    function: str,
    run: Callable[[Sequence[Tensor]], list[Tensor]],
    inputs: Sequence[Tensor],
    device: torch.device | str = "cpu",
) -> GoldenCase:
    """Calls a compiled function on its device and keeps inputs and outputs."""
    kept = [t.detach().cpu().clone() for t in inputs]
    return golden_case(function, kept, replay(run, kept, device))


def replay(
    run: Callable[[Sequence[Tensor]], list[Tensor]],
    inputs: Sequence[Tensor],
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """The results of a call on copies of the inputs; what the model draws is always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        return run([t.to(device, copy=True) for t in inputs])


def golden_case(function: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> GoldenCase:
    """Inputs and outputs as they are stored: on the CPU, sharing memory with nobody."""
    kept = [o.detach().cpu().clone() for o in outputs]
    return GoldenCase(function, inputs, kept, [tolerance(o.dtype) for o in kept])


def compare(function: str, results: Sequence[Tensor], case: GoldenCase) -> list[Deviation]:
    """Deviation of each output from the recorded one."""
    if len(results) != len(case.outputs):
        note = f"{len(results)} outputs where {len(case.outputs)} were recorded"
        return [Deviation(function, 0, math.inf, 0.0, note)]
    return [
        _deviation(function, i, result, wanted, bound)
        for i, (result, wanted, bound) in enumerate(zip(results, case.outputs, case.tolerances))
    ]


def _deviation(
    function: str, output: int, result: Tensor, wanted: Tensor, bound: float
) -> Deviation:
    def differs(note: str) -> Deviation:
        return Deviation(function, output, math.inf, bound, note)

    if result.shape != wanted.shape or result.dtype != wanted.dtype:
        return differs(
            f"{result.dtype} {list(result.shape)} where {wanted.dtype} {list(wanted.shape)} was "
            "recorded"
        )
    if wanted.numel() == 0:
        return Deviation(function, output, 0.0, bound)
    if not (wanted.dtype.is_floating_point or wanted.dtype.is_complex):
        wrong = int((result != wanted).sum())
        return (
            differs(f"{wrong} of {wanted.numel()} elements differ")
            if wrong
            else Deviation(function, output, 0.0, bound)
        )
    wide = torch.complex128 if wanted.dtype.is_complex else torch.float64
    a, b = result.to(wide), wanted.to(wide)
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()) or not _same_odd_values(a[~finite], b[~finite]):
        return differs("infinities or NaNs are elsewhere")
    if not bool(finite.any()):
        return Deviation(function, output, 0.0, bound)
    scale = float(b[finite].abs().max())
    error = float((a[finite] - b[finite]).abs().max())
    return Deviation(function, output, error / scale if scale else error, bound)


def _same_odd_values(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a, nan=1.5), torch.nan_to_num(b, nan=1.5))
