"""Attention as one kernel: scores, softmax and the weighted sum, a few queries at a time.

Keys are first copied to [B, G, D, T] and values to [B, G, T, E], T rounded up to whole blocks of 64
keys, reading through whatever views (head splits, a fused qkv) or arithmetic the region has. Then
each task takes 4 queries of a head through all blocks of keys with a running maximum and sum
(Milakov & Gimelshein, 2018; Dao et al., 2022), so that scores never leave the core. Products are
outer products: a block's 4 x 64 scores, or 4 x 64 results, stay in vector registers.
"""

from __future__ import annotations

import math as pymath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.phases import Phase, Planner
from accel.backends.loops.places import find_place
from accel.backends.loops.trace import Index
from accel.backends.tvm import dtypes, math, scalar, tir
from accel.backends.tvm.code import Emitter
from accel.backends.tvm.nests import group_extent, parts_of
from accel.backends.tvm.tir import Block, Buffer, Expr, select
from accel.errors import BackendError
from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.types import Dim, product

KEYS = 64  # of one block
QUERIES = 4  # of one task
_LEAST_QUERIES = 16  # with fewer, copying keys and values costs more than it gains
_LARGEST_HEAD = 256


def reason(op: Op, least_queries: int = _LEAST_QUERIES) -> str | None:
    """None if a kernel of kind "attention" may hold this op, else the reason why not."""
    q, k, v, *_, mask, _ = op.arguments()
    if any(x.dtype not in (torch.float32, torch.bfloat16, torch.float16) for x in (q, k, v)):
        return f"attention of {q.dtype}"
    sizes = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    if not all(isinstance(d, int) for d in sizes):
        return "attention with symbolic heads"
    if isinstance(q.shape[2], int) and q.shape[2] < least_queries:
        return f"attention of {q.shape[2]} queries"
    if any(d % 16 or d > _LARGEST_HEAD for d in (q.shape[3], v.shape[3])):
        return f"attention heads of size {q.shape[3]} and {v.shape[3]}"
    if isinstance(k.shape[2], int) and k.shape[2] == 0:
        return "attention without keys"
    if mask is not None and mask.type.rank != 4:
        return f"attention with a mask of rank {mask.type.rank}"
    return None


@dataclass
class AttentionPhase(Phase):
    """The last phase of an attention kernel. `index` is the result's place of (b, h, i, e)."""

    op: Op | None = None
    keys: Value | None = None
    values: Value | None = None
    place: Index = ()


def plan(planner: Planner, op: Op) -> None:
    """Plans the phases of a region whose one result is attention, or a view of it."""
    if len(planner.region.results) != 1:
        raise BackendError("an attention kernel has one result", where=str(op.location or ""))
    _, k, v, *_ = op.arguments()
    b = Builder(before=op)
    keys = _padded(b, b.permute(k, axes=(0, 1, 3, 2)), 3)
    values = _padded(b, v, 2)
    for value in (keys, values):
        planner.materialize(value)
    axes, place = find_place(planner, op)
    phase = AttentionPhase(axes, [], [], op=op, keys=keys, values=values)
    phase.place = place
    phase.needs = {keys, values}
    planner.phases.append(phase)


def _padded(b: Builder, x: Value, axis: int) -> Value:
    """`axis` rounded up to whole blocks with zeros."""
    extent = x.shape[axis]
    high = [0] * x.type.rank
    high[axis] = parts_of(extent, KEYS) * KEYS - extent
    low = (0,) * x.type.rank
    padded: Value = b.pad(b.widen(x), low=low, high=tuple(high))
    return padded


class AttentionNest:
    """Emits an `AttentionPhase`. A row is one task: `QUERIES` queries of one head."""

    queries = QUERIES

    def __init__(self, phase: AttentionPhase, emitter: Emitter, result: Buffer) -> None:
        assert phase.op is not None and phase.keys is not None and phase.values is not None
        self.phase, self.emitter, self.out = phase, emitter, result
        self.op, self.keys, self.values = phase.op, phase.keys, phase.values
        self.q, self.k, self.v, *_, self.mask, self.sinks = phase.op.arguments()
        self.causal = bool(phase.op.attributes.get("causal", False))
        self.sizes = emitter.sizes
        self.depth, self.width = int(self.q.shape[3]), int(self.v.shape[3])
        self.batch, self.head, self.query, self.column = phase.place[:4]
        self.address = phase.place[4]
        queries, keys = self.q.shape[2], self.k.shape[2]
        outer = [i.single_axis for i in (self.batch, self.head)]
        self.outer = [(a,) for a in outer if a is not None]
        self.rows: Dim = product(
            (*(group_extent(g) for g in self.outer), parts_of(queries, self.queries))
        )
        self.cost: Dim = product((self.queries * (self.depth + self.width) // 8, keys))
        self.keys_axis = emitter.indexer.axis("key", parts_of(keys, KEYS) * KEYS)
        self.depth_axis = emitter.indexer.axis("depth", self.depth)

    # -- loops -----------------------------------------------------------------------------

    def emit(self, begin: Expr, end: Expr) -> Block:
        emitter = self.emitter
        row = tir.var("row")
        axes = [a for g in self.outer for a in g]
        with emitter.scope(axes, guarded=True) as body:
            count = self.sizes.code(parts_of(self.q.shape[2], self.queries))
            first = body.let(tir.tirx.truncmod(row, count) * tir.i64(self.queries), "first")
            rest = body.let(tir.tirx.truncdiv(row, count), "rest")
            for group in reversed(self.outer):
                extent = self.sizes.code(group_extent(group))
                emitter.addresses.bind(group, body.let(tir.tirx.truncmod(rest, extent), "outer"))
                rest = body.let(tir.tirx.truncdiv(rest, extent), "rest")
            self._task(first)
        emitter.block.loop(row, end - begin, body, begin)
        return emitter.scopes[0].block

    def _task(self, first: Expr) -> None:
        block = self.emitter.block
        self.first = first
        self.scaled = self._arrays("q", self.depth)
        self.scores = self._arrays("scores", KEYS)
        self.sums = self._arrays("sums", KEYS)
        self.results = self._arrays("results", self.width)
        self.best = self._arrays("best", 1)
        for m in range(self.queries):
            self._load_query(m)
            self._each(KEYS, partial(self._set, self.sums[m], 0.0))
            self._each(self.width, partial(self._set, self.results[m], 0.0))
            block.store(self.best[m], tir.f32(-pymath.inf), tir.i64(0))
            if self.sinks is not None:
                self._see_sink(m)
        step = tir.var("step")
        low, high = self._blocks()
        with self.emitter.scope() as body:
            self.base = body.let((low + step) * tir.i64(KEYS), "base")
            self._products()
            self._mask_scores()
            for m in range(self.queries):
                self._softmax(m)
            self._weighted_sum()
        block.loop(step, high - low, body)
        for m in range(self.queries):
            self._store(m)

    def _see_sink(self, m: int) -> None:
        """What the softmax has seen first: a key whose value is 0."""
        with self._query(m, self._place(m)) as body:
            sink = self.emitter.element(self.sinks, (self.head,))
            self.emitter.block.store(self.best[m], sink, tir.i64(0))
            self.emitter.block.store(self.sums[m], tir.f32(1.0), tir.i64(0))
        self.emitter.block.statements.extend(body.statements)

    def _arrays(self, name: str, length: int) -> list[Buffer]:
        made = [tir.local_array(f"{name}{m}", length, "float32") for m in range(self.queries)]
        for array in made:
            self.emitter.block.allocate(array)
        return made

    def _each(self, count: int | Expr, body: Callable[[Block, Expr], None]) -> None:
        """A loop of plain code over lanes."""
        lane, inner = tir.var("lane"), Block()
        body(inner, lane)
        extent = tir.i64(count) if isinstance(count, int) else count
        self.emitter.block.loop(lane, extent, inner)

    def _set(self, array: Buffer, number: float, block: Block, lane: Expr) -> None:
        block.store(array, tir.f32(number), lane)

    def _place(self, m: int) -> Expr:
        """The number of query m of the task; those past the end repeat the last one."""
        last = self.sizes.code(self.q.shape[2]) - tir.i64(1)
        return tir.tirx.min(self.first + tir.i64(m), last)

    def _blocks(self) -> tuple[Expr, Expr]:
        """The blocks of keys that the task's queries may see."""
        block = self.emitter.block
        low, high = tir.i64(0), self.sizes.code(parts_of(self.k.shape[2], KEYS))
        offset = self.sizes.code(self.op.attribute("offset"))
        if self.causal:
            seen = self._place(self.queries - 1) + offset + tir.i64(KEYS)
            high = tir.tirx.min(high, tir.tirx.floordiv(seen, tir.i64(KEYS)))
        if self.op.attribute("window") is not None:
            first = self.first + offset - tir.i64(int(self.op.attribute("window")) - 1)
            low = tir.tirx.max(low, tir.tirx.floordiv(first, tir.i64(KEYS)))
        high = tir.tirx.max(high, low)
        return block.let(low, "low"), block.let(high, "high")

    # -- arithmetic ------------------------------------------------------------------------

    @contextmanager
    def _query(self, m: int, place: Expr) -> Iterator[Block]:
        """Code for query m of the task, which is number `place`; what does not depend on it moves
        out."""
        emitter, axis = self.emitter, self.query.single_axis
        bound: tuple[Axis, ...] = () if axis is None else (axis,)
        with emitter.scope(bound) as body:
            if bound:
                emitter.addresses.bind(bound, body.let(place, "query"))
            yield body
            if bound:
                emitter.addresses.unbind(bound)

    def _load_query(self, m: int) -> None:
        emitter = self.emitter
        scale = tir.f32(float(self.op.attribute("scale")))
        with self._query(m, self._place(m)) as body:
            depth = emitter.indexer.of(self.depth_axis)
            with emitter.loop((self.depth_axis,), tir.i64(self.depth)):
                value = emitter.element(self.q, (self.batch, self.head, self.query, depth))
                lane = emitter.addresses.code(depth)
                emitter.block.store(self.scaled[m], value * scale, lane)
        emitter.block.statements.extend(body.statements)

    def _group(self) -> Affine:
        """The key head of the task's query head."""
        share = int(self.q.shape[1]) // int(self.k.shape[1])
        return self.emitter.indexer.divide(self.head, share)[0]

    def _flat(self, value: Value, *index: Affine) -> Affine:
        return self.emitter.indexer.flatten(index, value.shape)

    def _products(self) -> None:
        """scores[m] = q[m] . keys of the block: an outer product for each element of the head."""
        emitter = self.emitter
        for m in range(self.queries):
            self._each(KEYS, partial(self._set, self.scores[m], 0.0))
        depth, lane = tir.var("depth"), tir.var("lane")
        head = self._flat(self.keys, self.batch, self._group(), Affine(), Affine())
        start = emitter.block.let(emitter.addresses.code(head) + self.base, "start")
        stride = self.sizes.code(self.keys.shape[3])
        outer, inner = Block(), Block()
        factors = [
            outer.let(tir.load(self.scaled[m], depth), "factor") for m in range(self.queries)
        ]
        key = inner.let(tir.load(emitter.buffers[self.keys], start + depth * stride + lane), "key")
        for m, factor in enumerate(factors):
            inner.store(self.scores[m], tir.load(self.scores[m], lane) + factor * key, lane)
        outer.loop(lane, tir.i64(KEYS), inner)
        # The sum with `zero` keeps LLVM from unrolling the loop, see `rows`.
        emitter.block.loop(depth, tir.i64(self.depth) + self.sizes.zero, outer)

    def _mask_scores(self) -> None:
        """softcap, mask, causal and window limits, and nothing beyond the last key."""
        emitter = self.emitter
        keys = self.k.shape[2]
        whole = isinstance(keys, int) and keys % KEYS == 0
        left = self.sizes.code(keys) - self.base
        steps: Expr = tir.i64(KEYS)
        if not whole:
            steps = emitter.block.let(tir.tirx.min(steps, left), "steps")
        if self._masks():
            with emitter.loop((self.keys_axis,), steps, self.base):
                for m in range(self.queries):
                    with self._query(m, self._place(m)) as body:
                        self._mask_one(m)
                    emitter.block.statements.extend(body.statements)
        if not whole:
            for m in range(self.queries):
                lane, inner = tir.var("lane"), Block()
                inner.store(self.scores[m], tir.f32(-pymath.inf), lane)
                emitter.block.loop(lane, tir.i64(KEYS) - steps, inner, steps)

    def _masks(self) -> bool:
        """Whether scores change before the softmax."""
        limited = self.mask is not None or self.causal
        return limited or any(self.op.attribute(n) for n in ("window", "softcap"))

    def _offset(self) -> Expr:
        """Where the first query stands among the keys."""
        return self.sizes.code(self.op.attribute("offset"))

    def _keys_seen(self) -> Expr:
        """How many keys of a block have a weight."""
        return tir.i64(KEYS) + self.sizes.zero

    def _mask_one(self, m: int) -> None:
        emitter, block = self.emitter, self.emitter.block
        key = emitter.indexer.of(self.keys_axis)
        lane = block.let(emitter.addresses.code(key) - self.base, "lane")
        score = tir.load(self.scores[m], lane)
        cap = self.op.attribute("softcap")
        if cap is not None:
            inner = block.let(score / tir.f32(float(cap)), "capped")
            score = tir.f32(float(cap)) * math.tanh(inner, block)
        keep: list[Expr] = []
        if self.mask is not None:
            full = (self.batch, self.head, self.query, key)
            index = tuple(Affine() if d == 1 else i for d, i in zip(self.mask.shape, full))
            value = emitter.element(self.mask, index)
            if self.mask.dtype == torch.bool:
                keep.append(value)
            else:
                score = score + value
        query = emitter.addresses.code(self.query) + self._offset()
        distance = block.let(emitter.addresses.code(key) - query, "distance")
        if self.causal:
            keep.append(distance <= tir.i64(0))
        if self.op.attribute("window") is not None:
            keep.append(distance > tir.i64(-int(self.op.attribute("window"))))
        for condition in keep:
            score = select(condition, block.let(score, "score"), tir.f32(-pymath.inf))
        block.store(self.scores[m], score, lane)

    def _softmax(self, m: int) -> None:
        """Moves the running maximum; scores become weights, sums and results are rescaled."""
        block, zero = self.emitter.block, tir.i64(0)
        top = tir.local_array(f"top{m}", KEYS, "float32")
        block.allocate(top)
        scores, sums, results = self.scores[m], self.sums[m], self.results[m]
        half = KEYS // 2
        source = scores
        while half:
            lane, inner = tir.var("lane"), Block()
            a = inner.let(tir.load(source, lane), "a")
            b = inner.let(tir.load(source, lane + tir.i64(half)), "b")
            inner.store(top, scalar.maximum(a, b), lane)
            block.loop(lane, tir.i64(half), inner)
            source, half = top, half // 2
        before = block.let(tir.load(self.best[m], zero), "before")
        best = block.let(tir.load(top, zero), "best")
        best = block.let(
            select(tir.tirx.Or(before > best, tir.is_nan(before)), before, best), "best"
        )
        block.store(self.best[m], best, zero)
        # A row without any key so far has -inf as its maximum, and -inf - -inf is NaN.
        origin = block.let(select(tir.eq(best, tir.f32(-pymath.inf)), tir.f32(0.0), best), "origin")
        shrink = block.let(math.exp(block.let(before - origin, "fall"), block), "shrink")

        def weigh(inner: Block, lane: Expr) -> None:
            below = inner.let(tir.load(scores, lane) - origin, "below")
            weight = inner.let(math.exp(below, inner), "weight")
            inner.store(scores, weight, lane)
            inner.store(sums, tir.load(sums, lane) * shrink + weight, lane)

        def rescale(inner: Block, lane: Expr) -> None:
            inner.store(results, tir.load(results, lane) * shrink, lane)

        self._each(KEYS, weigh)
        self._each(self.width, rescale)

    def _weighted_sum(self) -> None:
        """results[m] += weights[m] . values of the block."""
        emitter, width = self.emitter, tir.i64(self.width)
        source, start = self._block_of(self.values, self.width)
        piece = _piece(self.width)
        for offset in range(0, self.width, piece):
            key, lane = tir.var("key"), tir.var("lane")
            outer, inner = Block(), Block()
            weights = [
                outer.let(tir.load(self.scores[m], key), "weight") for m in range(self.queries)
            ]
            place = start + key * width + lane + tir.i64(offset)
            value = inner.let(tir.load(source, place), "value")
            for m, weight in enumerate(weights):
                at = lane + tir.i64(offset)
                inner.store(self.results[m], tir.load(self.results[m], at) + weight * value, at)
            outer.loop(lane, tir.i64(piece), inner)
            emitter.block.loop(key, self._keys_seen(), outer)

    def _block_of(self, value: Value, size: int) -> tuple[Buffer, Expr]:
        """The memory of a block of values, and where it begins."""
        emitter = self.emitter
        head = self._flat(value, self.batch, self._group(), Affine(), Affine())
        start = emitter.addresses.code(head) + self.base * tir.i64(size)
        return emitter.buffers[value], emitter.block.let(start, "start")

    def _total(self, m: int) -> Expr:
        """The sum of the weights."""
        block, sums, half = self.emitter.block, self.sums[m], KEYS
        while half > 1:
            half //= 2
            lane, inner = tir.var("lane"), Block()
            inner.store(sums, tir.load(sums, lane) + tir.load(sums, lane + tir.i64(half)), lane)
            block.loop(lane, tir.i64(half), inner)
        return block.let(tir.load(sums, tir.i64(0)), "total")

    def _inverse(self, total: Expr) -> Expr:
        inverse: Any = tir.f32(1.0) / total
        if self._may_be_empty():
            inverse = select(tir.eq(total, tir.f32(0.0)), tir.f32(0.0), inverse)
        return self.emitter.block.let(inverse, "inverse")

    def _store(self, m: int) -> None:
        inverse = self._inverse(self._total(m))
        with self._query(m, self.first + tir.i64(m)) as body:
            self._store_row(self.results[m], inverse)
        seen = self.first + tir.i64(m) < self.sizes.code(self.q.shape[2])
        self.emitter.block.branch(seen, body)

    def _store_row(self, sums: Buffer, inverse: Expr) -> None:
        """The result of a query of a head: sums times the inverse."""
        emitter, column = self.emitter, self.column.single_axis
        assert column is not None
        with emitter.loop((column,), tir.i64(self.width)):
            lane = emitter.addresses.code(self.column)
            value = emitter.block.let(tir.load(sums, lane) * inverse, "value")
            stored = dtypes.to_storage(value, self.op.result.dtype, emitter.block)
            emitter.block.store(self.out, stored, emitter.addresses.code(self.address))

    def _may_be_empty(self) -> bool:
        """Whether a query without keys gives 0 (else 0 / 0, as softmax of -inf)."""
        limited = self.causal or self.op.attribute("window") is not None
        return limited or (self.mask is not None and self.mask.dtype == torch.bool)


def _piece(width: int) -> int:
    """Columns of the result that are summed at a time: 16 registers for four queries."""
    return next(p for p in (64, 48, 32, 16) if width % p == 0)
