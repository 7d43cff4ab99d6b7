"""Measures of how far a lossy pass moved a model's outputs: what `approximate(metric, ...)` names.

A metric takes the results of one function on one input, before and after, and gives a number that
is 0 for equal results and grows with the error. Over several inputs the manager takes the worst.
Only floating results count; results of other dtypes must be compared by `disagreement`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.names import near

Metric: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], float]


def _pairs(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    wide = torch.float64
    return [
        (a.to(wide), b.to(wide))
        for a, b in zip(before, after)
        if a.dtype.is_floating_point and a.numel()
    ]


def relative_error(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest over the results of |after - before| / |before|, in the Euclidean norm."""
    worst = 0.0
    for a, b in _pairs(before, after):
        norm, distance = float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b - a))
        worst = max(worst, distance / norm if norm else distance)
    return worst


def max_error(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest |after - before| over the largest |before|, elementwise."""
    worst = 0.0
    for a, b in _pairs(before, after):
        scale, distance = float(a.abs().max()), float((b - a).abs().max())
        worst = max(worst, distance / scale if scale else distance)
    return worst


def cosine_distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """1 - cosine similarity of the results as vectors; the worst of them."""
    worst = 0.0
    for a, b in _pairs(before, after):
        norms = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
        worst = max(worst, 1 - float((a * b).sum()) / norms if norms else float(not a.equal(b)))
    return worst


def kl_divergence(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean over positions of KL(softmax(before) || softmax(after)), over the last axis, in nats."""
    worst = 0.0
    for a, b in _pairs(before, after):
        if a.dim() == 0:
            continue
        log_p, log_q = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
        worst = max(worst, float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    return worst


def disagreement(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Share of positions whose largest entry along the last axis is another one (top-1 changes).

    Results without an axis, or of integer dtype, are compared elementwise.
    """
    worst = 0.0
    for a, b in zip(before, after):
        if not a.numel():
            continue
        if a.dtype.is_floating_point and a.dim():
            a, b = a.argmax(-1), b.argmax(-1)
        worst = max(worst, float((a != b).double().mean()))
    return worst


METRICS: dict[str, Metric] = {
    "relative_error": relative_error,
    "max_error": max_error,
    "cosine_distance": cosine_distance,
    "kl_divergence": kl_divergence,
    "disagreement": disagreement,
}


def metric(name: str) -> Metric:
    """The metric of this name; OptionError with near names if there is none."""
    if name not in METRICS:
        raise OptionError(f"no metric named '{name}'", advice=near(name, METRICS))
    return METRICS[name]
