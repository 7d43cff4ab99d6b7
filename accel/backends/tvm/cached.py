"""Attention of new queries over a key/value cache, as one kernel (`accel.cached_attention`).

A task is one query of one head. It walks the cache up to its own position, which is data, in
blocks of 64 keys with a running maximum and sum (see `attention`). Keys are read as they lie, a
product of a query and a key at a time; what the cache holds behind the position is never touched.
Keys and values that are computed from caches, such as those of a quantized cache, are computed for
a block at a time.
"""

from __future__ import annotations

import math as pymath
from functools import partial

import torch

from accel.backends.loops.phases import Planner
from accel.backends.tvm import tir, updates
from accel.backends.tvm.attention import (
    KEYS,
    AttentionNest,
    AttentionPhase,
    find_place,
)
from accel.backends.tvm.attention import reason as attention_reason
from accel.backends.tvm.code import Emitter
from accel.backends.tvm.tir import Block, Buffer, Expr
from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.op import Trait

_LANES = 16


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
    if op.name == "dequantize" and op.operands[0].dtype != torch.int8:
        # Every query head of a group decodes for itself: codes of 4 bits take too long for that.
        return "codes of less than 8 bits are decoded once, before the kernel"
    return None


class CachedPhase(AttentionPhase):
    """The last phase of a cached attention kernel; updates of the caches come before it."""


def plan(planner: Planner, op: Op) -> None:
    """Plans the phases of a region with cached attention, or a view of it, after its updates."""
    _, k, v, *_ = op.arguments()
    updated = {}
    for number, result in enumerate(planner.region.results):
        if result.op is not None and result.op.name == "dynamic_update":
            if result.op.operands[0] not in planner.region.args:
                break
            updates.plan(planner, result.op, number)
            updated[result] = number
    held = {*planner.region.args, *updated}
    others = [i for i, r in enumerate(planner.region.results) if r not in updated]
    if len(others) != 1 or any(x not in held and x.op is None for x in (k, v)):
        raise BackendError("a cache is an argument of its kernel", where=str(op.location or ""))
    axes, place = find_place(planner, op, others[0])
    phase = CachedPhase(axes, [], [], op=op, keys=k, values=v, result=others[0])
    phase.place = place
    planner.phases.append(phase)


class CachedNest(AttentionNest):
    """Emits a `CachedPhase`."""

    queries = 1

    def __init__(self, phase: AttentionPhase, emitter: Emitter, result: Buffer) -> None:
        super().__init__(phase, emitter, result)
        self.position = self.op.arguments()[3]

    def _blocks(self) -> tuple[Expr, Expr]:
        emitter = self.emitter
        place = (self.batch,) if self.position.shape else ()  # one for all texts, or one each
        self.at = emitter.block.let(emitter.element(self.position, place), "at")
        block = emitter.block
        last = block.let(self._place(0) + tir.tirx.Cast("int64", self.at), "last")
        # A position outside of the cache reads nothing outside of it.
        size = self.sizes.code(self.k.shape[2])
        self.end = block.let(tir.tirx.max(tir.tirx.min(last + tir.i64(1), size), tir.i64(0)), "end")
        low, high = tir.i64(0), tir.tirx.floordiv(self.end + tir.i64(KEYS - 1), tir.i64(KEYS))
        window = self.op.attribute("window")
        if window is not None:
            first = tir.tirx.max(last - tir.i64(int(window) - 1), tir.i64(0))
            low = tir.tirx.floordiv(first, tir.i64(KEYS))
        return block.let(low, "low"), block.let(tir.tirx.max(high, low), "high")

    def _products(self) -> None:
        """A score is a sum of 16 lanes; lanes of keys after the query stay at minus infinity."""
        emitter = self.emitter
        block = emitter.block
        self._each(KEYS, partial(self._set, self.scores[0], -pymath.inf))
        self.steps = block.let(
            tir.tirx.min(tir.i64(KEYS), self.end - self.base) + self.sizes.zero, "steps"
        )
        source, start = self._block_of(self.keys, self.depth)
        key, outer = tir.var("key"), Block()
        row = outer.let(start + key * tir.i64(self.depth), "row")
        total: Expr = None
        for piece in range(0, self.depth, _LANES):
            factor = tir.vector(self.scaled[0], tir.i64(piece), _LANES)
            keys = tir.vector(source, row + tir.i64(piece), _LANES)
            total = factor * keys if total is None else total + factor * keys
        # Vectors by hand: LLVM would take 16 keys at a time and gather their elements.
        total = tir.sum_of_lanes(outer, total, _LANES)
        outer.store(self.scores[0], total, key)
        block.loop(key, self.steps, outer)

    def _block_of(self, value: Value, size: int) -> tuple[Buffer, Expr]:
        """Where a block of keys or values lies: in its cache, or computed, in an array."""
        emitter = self.emitter
        if value in emitter.buffers:
            return super()._block_of(value, size)
        tile = tir.local_array("tile", KEYS * size, "float32")
        emitter.block.allocate(tile)
        element = emitter.indexer.axis("element", size)
        key, lane = (emitter.indexer.of(a) for a in (self.keys_axis, element))
        with (
            emitter.loop((self.keys_axis,), self.steps, self.base),
            emitter.loop((element,), tir.i64(size)),
        ):
            made = emitter.element(value, (self.batch, self._group(), key, lane))
            row = emitter.addresses.code(key) - self.base
            emitter.block.store(tile, made, row * tir.i64(size) + emitter.addresses.code(lane))
        return tile, tir.i64(0)

    def _mask_scores(self) -> None:
        if not self._masks():
            return
        emitter = self.emitter
        with emitter.loop((self.keys_axis,), self.steps, self.base):
            with self._query(self._place(0)) as body:
                self._mask_one(0)
            emitter.block.statements.extend(body.statements)

    def _offset(self) -> Expr:
        return tir.tirx.Cast("int64", self.at)

    def _keys_seen(self) -> Expr:
        return self.steps

    def _may_be_empty(self) -> bool:
        return self.mask is not None and self.mask.dtype == torch.bool
