"""Attention of new queries over a key/value cache, as one kernel (`accel.cached_attention`).

A task is one query of the heads that share a key head. It walks the cache up to its own position,
which is data, in blocks of 64 keys with a running maximum and sum (see `attention`); what the cache
holds behind the position is never touched. Where heads are few, several tasks share the keys of a
query, and a last phase adds up what they leave (Dao et al., 2023, Flash-Decoding). Keys and values
that are computed from caches, such as those of a quantized cache, are computed for a block at a
time; those in pages are read where they lie.
"""

from __future__ import annotations

from typing import Any

import torch

from accel.backends.loops.phases import Planner
from accel.backends.tvm import updates
from accel.backends.tvm.attention import find_place
from accel.backends.tvm.attention import reason as attention_reason
from accel.backends.tvm.cached_nest import CachedPhase, MergePhase, members_of, row_of_sums
from accel.errors import BackendError
from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.op import Trait

_TASKS = 16  # of a kernel: as many as threads share well
_LEAST_KEYS = 256  # of a part


def reason(op: Op) -> str | None:
    """None if a kernel of kind "cached_attention" may hold this op, else the reason why not."""
    q, k, v, *_ = op.arguments()
    if any(x.dtype != torch.float32 for x in (q, k, v)):
        return f"attention over a cache of {k.dtype}"
    if any(map(_is_view_of_a_cache, (k, v))):
        return "attention over a view of a cache"
    if op.attribute("ring"):
        return "attention over a ring with room for more than one token"
    return attention_reason(op, least_queries=0)


def _is_view_of_a_cache(value: Value) -> bool:
    """Or of anything else that lies in memory: what a kernel does not compute itself."""
    op = value.op
    if pages_of(value) is not None:
        return False
    while op is not None and op.has(Trait.VIEW):
        op = op.operands[0].op
    if op is value.op:
        return False
    if op is None or len(op.result.users) > 1:
        return True
    return not (op.has(Trait.DECODE) or op.has(Trait.ELEMENTWISE) or op.name == "rope")


def computed_reason(op: Op) -> str | None:
    """None if a kernel may compute its keys or values with this op, else the reason why not."""
    if op.result.dtype != torch.float32:
        return f"keys of {op.result.dtype}"
    return None


def pages_reason(op: Op) -> str | None:
    """None if this op, or the view that ends in it, reads a cache through a table of pages."""
    return None if pages_of(op.result) is not None else "no cache in pages"


def pages_of(value: Value) -> Value | None:
    """The pool of a cache that is read through a table (`gather_pages` by primitive ops)."""
    op = value.op
    while op is not None and op.name in ("reshape", "permute"):
        op = op.operands[0].op
    if op is None or op.name != "gather" or op.operands[1].type.rank != 2:
        return None
    pool = op.operands[0]
    stored = pool.op is None or pool.op.has(Trait.UPDATE)
    return pool if stored and op.attribute("axis") == 0 else None


def plan(planner: Planner, op: Op) -> None:
    """Plans the phases of a region with cached attention, or a view of it, after its updates."""
    _, k, v, *_ = op.arguments()
    updated = {}
    for number, result in enumerate(planner.region.results):
        if result.op is not None and result.op.has(Trait.UPDATE):
            if result.op.operands[0] not in planner.region.args:
                break
            updates.plan(planner, result.op, number)
            updated[result] = number
    held = {*planner.region.args, *updated}
    others = [i for i, r in enumerate(planner.region.results) if r not in updated]
    if len(others) != 1 or any(x not in held and x.op is None for x in (k, v)):
        raise BackendError("a cache is an argument of its kernel", where=str(op.location or ""))
    axes, place = find_place(planner, op, others[0])
    parts, left = _parts(op), None
    if parts > 1:
        *shape, width = op.result.shape
        size = row_of_sums(int(width))
        left = Builder(before=op).full_of((*shape, parts, size), 0.0, torch.float32)
        planner.scratch_values.append(left)
    for kind in (CachedPhase, MergePhase)[: 1 if left is None else 2]:
        phase = kind(axes, [], [], op=op, keys=k, values=v, result=others[0])
        phase.place, phase.parts, phase.left = place, parts, left
        phase.needs = set() if left is None else {left}
        planner.phases.append(phase)


def _parts(op: Op) -> int:
    """How many tasks share the keys of a query, where heads are too few for equal shares."""
    q, k, *_ = op.arguments()
    keys: Any = k.shape[2]
    if not all(isinstance(d, int) for d in (q.shape[0], q.shape[2], keys)):
        return 1
    window = op.attribute("window")
    keys = keys if window is None else min(keys, int(window))
    chunks = int(q.shape[1]) // members_of(int(q.shape[1]), int(k.shape[1]))
    tasks = int(q.shape[0]) * chunks * int(q.shape[2])
    return max(1, min(-(-_TASKS // tasks), keys // _LEAST_KEYS))
