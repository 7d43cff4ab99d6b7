"""Kinds of kernels that are built around one op, the anchor: which ops, and with which loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from accel.backends.loops.phases import Phase, Planner
from accel.backends.tvm import (
    attention,
    blocked,
    cached,
    cached_merge,
    cached_nest,
    depthwise,
    updates,
)
from accel.ir.module import Op, Region


@dataclass(frozen=True)
class Anchor:
    """One kind of kernel.

    Attributes:
        ops: the names of the ops it may be built around.
        reason: why an op of this name has no such kernel; None if it has.
        plan: adds the phases of a region with this op.
        phase, nest: the phase that computes the op, and what emits it.
        neighbours: ops that stay whole in such a kernel, and the reason why one does not.
        sources: ops that may compute what the anchor reads, and the reason why one may not.
    """

    ops: tuple[str, ...]
    reason: Callable[[Op], str | None]
    plan: Callable[[Planner, Op], None]
    phase: type[Phase]
    nest: Callable[..., Any]
    neighbours: Mapping[str, Callable[[Op], str | None]] = field(default_factory=dict)
    sources: Mapping[str, Callable[[Op], str | None]] = field(default_factory=dict)


ANCHORS: dict[str, Anchor] = {
    "attention": Anchor(
        ("attention",),
        attention.reason,
        attention.plan,
        attention.AttentionPhase,
        attention.AttentionNest,
    ),
    "cached_attention": Anchor(
        ("cached_attention",),
        cached.reason,
        cached.plan,
        cached_nest.CachedPhase,
        cached_nest.CachedNest,
        {"dynamic_update": updates.reason, "update_pages": updates.reason},
        {
            "dequantize": cached.computed_reason,
            "rope": cached.computed_reason,
            "reshape": cached.pages_reason,
            "permute": cached.pages_reason,
            "gather": cached.pages_reason,
        },
    ),
    "matmul": Anchor(
        ("linear", "conv"),
        blocked.reason,
        blocked.plan,
        blocked.BlockedPhase,
        blocked.BlockedNest,
    ),
    "depthwise": Anchor(
        ("conv",),
        depthwise.reason,
        depthwise.plan,
        depthwise.DepthwisePhase,
        depthwise.DepthwiseNest,
    ),
}


def find(region: Region, kind: str) -> tuple[Anchor, Op] | None:
    """The anchor of a region of primitive ops for a kernel of this kind, if it has one."""
    anchor = ANCHORS.get(kind)
    if anchor is None:
        return None
    op = next((op for op in region.ops if op.name in anchor.ops), None)
    return None if op is None else (anchor, op)


# Phases before and after an anchor's own.
_AROUND: dict[type[Phase], Callable[..., Any]] = {
    updates.UpdatePhase: updates.UpdateNest,
    cached_nest.MergePhase: cached_merge.MergeNest,
}


def nest_of(phase: Phase) -> Callable[..., Any] | None:
    """What emits an anchor's phase; None for other phases."""
    if type(phase) in _AROUND:
        return _AROUND[type(phase)]
    return next((a.nest for a in ANCHORS.values() if type(phase) is a.phase), None)


def reason(op: Op, kind: str) -> str | None:
    """None if a kernel of this kind may be built around the op, else the reason why not."""
    anchor = ANCHORS.get(kind)
    if anchor is None:
        return f"no kernels of kind '{kind}' on CPUs"
    if op.name in anchor.neighbours:
        return anchor.neighbours[op.name](op)
    if op.name not in anchor.ops:
        return f"accel.{op.name} is not accel.{' or accel.'.join(anchor.ops)}"
    return anchor.reason(op)
