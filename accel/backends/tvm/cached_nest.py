"""Loops of attention over a cache (see `cached`): tasks, blocks of keys, and the last sums.

A task has one query of each of the heads that share a key head, so that keys are read, or decoded,
once for all of them. Sixteen keys are multiplied at a time: each product is a sum of lanes, and
sixteen of those are added up together, as one transposes (3 instructions a sum instead of 8).
"""

from __future__ import annotations

import math as pymath
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.survey import Survey
from accel.backends.tvm import tir
from accel.backends.tvm.attention import KEYS, AttentionNest, AttentionPhase
from accel.backends.tvm.code import Emitter
from accel.backends.tvm.lane_sums import LANES, LaneSums
from accel.backends.tvm.nests import group_extent, parts_of
from accel.backends.tvm.tir import Block, Buffer, Expr
from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.types import product

_MOST_MEMBERS = 8  # heads of one task
_TOGETHER = 4  # of them whose sums are in registers at the same time
_SUMS = 16  # registers for weighted sums


def members_of(heads: int, groups: int) -> int:
    """How many heads of a group one task takes."""
    share = heads // groups
    return next(m for m in range(min(share, _MOST_MEMBERS), 0, -1) if share % m == 0)


def row_of_sums(width: int) -> int:
    """Elements of what a task leaves of a head: sums of values, the maximum, the sum of weights."""
    return width + LANES


@dataclass
class CachedPhase(AttentionPhase):
    """The attention of a kernel over caches; updates of the caches come before it.

    Attributes:
        parts: how many tasks share the keys of a query.
        left: where there are several, what they leave: [B, H, S, parts, `row_of_sums`].
    """

    parts: int = 1
    left: Value | None = None


@dataclass
class MergePhase(CachedPhase):
    """The last sums, over what the tasks have left."""


class CachedNest(AttentionNest):
    """Emits a `CachedPhase`."""

    def __init__(self, phase: AttentionPhase, emitter: Emitter, result: Buffer) -> None:
        op = phase.op
        assert op is not None
        self.heads, groups = (int(x.shape[1]) for x in op.operands[:2])
        self.queries = members_of(self.heads, groups)
        super().__init__(phase, emitter, result)
        self.position = self.op.arguments()[3]
        assert isinstance(phase, CachedPhase)
        self.parts, self.left = phase.parts, phase.left
        self.chunks = self.heads // self.queries
        batch, self.query_axis = self.batch.single_axis, self.query.single_axis
        self.outer = [] if batch is None else [(batch,)]
        rows = (*(group_extent(g) for g in self.outer), self.chunks, self.q.shape[2], self.parts)
        self.rows = product(rows)
        width = self.queries * (self.depth + self.width) // 8
        self.cost = product((width, parts_of(self.k.shape[2], self.parts)))

    # -- tasks -----------------------------------------------------------------------------

    def emit(self, begin: Expr, end: Expr) -> Block:
        emitter, row = self.emitter, tir.var("row")
        axes = [a for g in self.outer for a in g]
        if self.query_axis is not None:
            axes.append(self.query_axis)
        with emitter.scope(axes, guarded=True) as body:
            rest, self.part = split_row(body, row, tir.i64(self.parts))
            rest, query = split_row(body, rest, self.sizes.code(self.q.shape[2]))
            rest, chunk = split_row(body, rest, tir.i64(self.chunks))
            if self.query_axis is not None:
                emitter.addresses.bind((self.query_axis,), query)
            for group in self.outer:
                emitter.addresses.bind(group, rest)
            self.chunk = chunk
            share = self.heads // int(self.k.shape[1]) // self.queries
            number = body.let(tir.tirx.truncdiv(chunk, tir.i64(share)), "group")
            self.group = emitter.indexer.datum(number, frozenset())
            self._task(query)
        emitter.block.loop(row, end - begin, body, begin)
        return emitter.scopes[0].block

    def _place(self, m: int) -> Expr:
        return self.first

    def _group(self) -> Affine:
        return self.group

    @contextmanager
    def _query(self, m: int, place: Expr) -> Iterator[Block]:
        emitter, axis = self.emitter, self.head.single_axis
        bound: tuple[Axis, ...] = () if axis is None else (axis,)
        with emitter.scope(bound) as body:
            if bound:
                head = self.chunk * tir.i64(self.queries) + tir.i64(m)
                emitter.addresses.bind(bound, body.let(head, "head"))
            yield body
            if bound:
                emitter.addresses.unbind(bound)

    def _see_sink(self, m: int) -> None:
        """Of all parts the first has seen it."""
        outer = self.emitter.block
        with self.emitter.scope(guarded=True) as body:
            super()._see_sink(m)
        outer.branch(tir.eq(self.part, tir.i64(0)), body)

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
        low = block.let(low, "low")
        high = block.let(tir.tirx.max(high, low), "high")
        if self.parts == 1:
            return low, high
        each = tir.tirx.truncdiv(high - low + tir.i64(self.parts - 1), tir.i64(self.parts))
        each = block.let(each, "each")
        low = block.let(tir.tirx.min(low + self.part * each, high), "from")
        return low, block.let(tir.tirx.min(low + each, high), "to")

    # -- memory ----------------------------------------------------------------------------

    def _read(self, value: Value, size: int) -> None:
        """Finds where a block of keys or values lies: in its cache, or computed, in an array."""
        emitter = self.emitter
        self.tile: Buffer | None = None
        if not _lies_in_memory(value, emitter.buffers):
            self.tile = self._computed(value, size)

    def _rows(self, value: Value, size: int, first: Expr) -> tuple[Buffer, Expr]:
        """Where the rows of 16 keys of the block lie, one after the other, from `first` on."""
        emitter, block = self.emitter, self.emitter.block
        if self.tile is not None:
            return self.tile, block.let(first * tir.i64(size), "start")
        emitter.addresses.bind((self.keys_axis,), block.let(self.base + first, "key"))
        key = emitter.indexer.of(self.keys_axis)
        source, place = self._locate(value, (self.batch, self._group(), key, Affine()))
        flat = emitter.indexer.flatten(place, source.shape)
        start = block.let(emitter.addresses.code(flat), "start")
        emitter.addresses.unbind((self.keys_axis,))
        return emitter.buffers[source], start

    def _locate(self, value: Value, index: tuple[Affine, ...]) -> tuple[Value, tuple[Affine, ...]]:
        """What holds an element, behind views and a table of pages, and its index there."""
        emitter = self.emitter
        while value not in emitter.buffers:
            op = value.op
            assert op is not None
            source = op.operands[0]
            if op.name == "reshape":
                index = emitter.indexer.reshape(index, value.shape, source.shape)
            elif op.name == "permute":
                axes: Any = op.attribute("axes")
                index = tuple(index[axes.index(i)] for i in range(len(index)))
            elif op.name == "gather":
                table, pages = op.operands[1], source.shape[0]
                count = table.type.rank
                page = emitter.lookup(table, index[:count], 0, pages - 1, wrap=pages, clamp=False)
                index = (page, *index[count:])
            else:
                raise BackendError(f"a cache is read through accel.{op.name}")
            value = source
        return value, index

    def _computed(self, value: Value, size: int) -> Buffer:
        """A block that is computed, elements side by side at a time that are computed alike."""
        emitter = self.emitter
        tile = tir.local_array("tile", KEYS * size, "float32")
        emitter.block.allocate(tile)
        run = self._run_of(value, size)
        with emitter.loop((self.keys_axis,), self.steps, self.base):
            key = emitter.indexer.of(self.keys_axis)
            row = (emitter.addresses.code(key) - self.base) * tir.i64(size)
            for start in range(0, size, run):
                axis = emitter.indexer.axis("lane", run)
                # Without `zero` LLVM would unroll the loop, and take 16 keys at a time instead.
                with emitter.loop((axis,), tir.i64(run) + self.sizes.zero):
                    lane = Affine(start).plus(emitter.indexer.of(axis))
                    made = emitter.element(value, (self.batch, self._group(), key, lane))
                    emitter.block.store(tile, made, row + emitter.addresses.code(lane))
        return tile

    def _run_of(self, value: Value, size: int) -> int:
        """How many elements of a key have one scale, and are the same half of bytes side by side:
        all that is read lies one after the other, or is the same."""
        indexer, run = self.emitter.indexer, size
        while run % (2 * LANES) == 0:
            survey = Survey(indexer, self.emitter.buffers)
            axis = indexer.axis("lane", run)
            lane = Affine(size - run).plus(indexer.of(axis))
            survey.element(value, (self.batch, self._group(), indexer.of(self.keys_axis), lane))
            reads = {r.coefficient(axis) for r in survey.reads}
            if axis not in survey.fixed and reads <= {0, 1}:
                break
            run //= 2
        return run

    # -- arithmetic ------------------------------------------------------------------------

    def _products(self) -> None:
        """Scores of keys after the query stay at minus infinity."""
        emitter = self.emitter
        block = emitter.block
        for m in range(self.queries):
            self._each(KEYS, partial(self._set, self.scores[m], -pymath.inf))
        left = tir.tirx.min(tir.i64(KEYS), self.end - self.base)
        self.steps = block.let(left + self.sizes.zero, "steps")
        self._read(self.keys, self.depth)
        whole = block.let(tir.tirx.truncdiv(self.steps, tir.i64(LANES)), "whole")
        self._chunks(whole, self._sixteen)
        rest = self.steps - whole * tir.i64(LANES)
        self._chunks(tir.tirx.min(rest, tir.i64(1)), self._one_by_one, whole)

    def _chunks(
        self, count: Expr, body: Callable[[Block, Expr], None], start: Expr | None = None
    ) -> None:
        """Runs `body` for the first key of so many chunks of 16."""
        emitter, chunk = self.emitter, tir.var("chunk")
        with emitter.scope((self.keys_axis,)) as inner:
            first = inner.let(chunk * tir.i64(LANES), "first")
            body(inner, first)
        emitter.block.loop(chunk, count, inner, start)

    def _sixteen(self, block: Block, first: Expr) -> None:
        source, start = self._rows(self.keys, self.depth, first)
        for low in range(0, self.queries, _TOGETHER):
            members = range(low, min(low + _TOGETHER, self.queries))
            done = {m: partial(self._store_scores, block, m, first) for m in members}
            sums = LaneSums(block, done)
            for key in range(LANES):
                row = start + tir.i64(key * self.depth)
                totals = self._dots(block, source, row, members)
                for m, total in totals.items():
                    sums.add(m, total)

    def _dots(self, block: Block, source: Buffer, row: Expr, members: range) -> dict[int, Expr]:
        """The products of a key with queries, elementwise, their halves added up: 16 lanes each."""
        totals: dict[int, Expr] = {}
        for piece in range(0, self.depth, LANES):
            key = block.cell(tir.vector(source, row + tir.i64(piece), LANES), "key")
            for m in members:
                factor = tir.vector(self.scaled[m], tir.i64(piece), LANES)
                made = factor * key
                totals[m] = totals[m] + made if m in totals else made
        return totals

    def _store_scores(self, block: Block, m: int, first: Expr, scores: Expr) -> None:
        place = tir.lanes_from(first, LANES)
        block.store(self.scores[m], scores, place)

    def _one_by_one(self, block: Block, first: Expr) -> None:
        """The last keys, fewer than 16."""
        source, start = self._rows(self.keys, self.depth, first)
        key, inner = tir.var("key"), Block()
        row = inner.let(start + key * tir.i64(self.depth), "row")
        for m, total in self._dots(inner, source, row, range(self.queries)).items():
            inner.store(self.scores[m], tir.sum_of_lanes(inner, total, LANES), first + key)
        block.loop(key, self.steps - first, inner)

    def _mask_scores(self) -> None:
        if not self._masks():
            return
        emitter = self.emitter
        with emitter.loop((self.keys_axis,), self.steps, self.base):
            for m in range(self.queries):
                with self._query(m, self._place(m)) as body:
                    self._mask_one(m)
                emitter.block.statements.extend(body.statements)

    def _weighted_sum(self) -> None:
        self._read(self.values, self.width)
        lanes = max(_SUMS // self.queries, 1) * LANES
        piece = next(p for p in range(lanes, 0, -LANES) if self.width % p == 0)

        def add(block: Block, first: Expr) -> None:
            source, start = self._rows(self.values, self.width, first)
            count = block.let(tir.tirx.min(tir.i64(LANES), self.steps - first), "count")
            for offset in range(0, self.width, piece):
                self._add_values(block, source, start, (first, count), offset, piece)

        self._chunks(tir.tirx.truncdiv(self.steps + tir.i64(LANES - 1), tir.i64(LANES)), add)

    def _add_values(
        self,
        block: Block,
        source: Buffer,
        start: Expr,
        keys: tuple[Expr, Expr],
        offset: int,
        piece: int,
    ) -> None:
        """Adds `piece` elements of values times weights, of keys `first` to `first + count`."""
        first, count = keys
        key, lane = tir.var("key"), tir.var("lane")
        outer, inner = Block(), Block()
        members = range(self.queries)
        weights = [outer.let(tir.load(self.scores[m], first + key), "weight") for m in members]
        at = lane + tir.i64(offset)
        value = inner.let(tir.load(source, start + key * tir.i64(self.width) + at), "value")
        for m, weight in enumerate(weights):
            inner.store(self.results[m], tir.load(self.results[m], at) + weight * value, at)
        outer.loop(lane, tir.i64(piece), inner)
        block.loop(key, count, outer)

    def _store(self, m: int) -> None:
        if self.left is None:
            inverse = self._inverse(self._total(m))
            with self._query(m, self.first) as body:
                self._store_row(self.results[m], inverse)
        else:
            total = self._total(m)
            with self._query(m, self.first) as body:
                self._leave(m, total)
        self.emitter.block.statements.extend(body.statements)

    def _leave(self, m: int, total: Expr) -> None:
        """What the part of the keys comes to, for the last sums."""
        emitter, block, results = self.emitter, self.emitter.block, self.results[m]
        assert self.left is not None
        target, place = emitter.buffers[self.left], (self.batch, self.head, self.query)
        index = (*place, emitter.indexer.datum(self.part, frozenset()), Affine())
        flat = emitter.indexer.flatten(index, self.left.shape)
        start = block.let(emitter.addresses.code(flat), "start")

        def copy(inner: Block, lane: Expr) -> None:
            inner.store(target, tir.load(results, lane), start + lane)

        self._each(self.width, copy)
        block.store(target, tir.load(self.best[m], tir.i64(0)), start + tir.i64(self.width))
        block.store(target, total, start + tir.i64(self.width + 1))

    def _offset(self) -> Expr:
        return tir.tirx.Cast("int64", self.at)

    def _may_be_empty(self) -> bool:
        return self.mask is not None and self.mask.dtype == torch.bool


def split_row(block: Block, number: Expr, extent: Expr) -> tuple[Expr, Expr]:
    """The quotient and the remainder."""
    rest = block.let(tir.tirx.truncdiv(number, extent), "rest")
    return rest, block.let(tir.tirx.truncmod(number, extent), "place")


def _lies_in_memory(value: Value, buffers: Mapping[Value, Buffer]) -> bool:
    """Whether rows of 16 keys are one piece of memory: of a cache, or of a page."""
    if value in buffers:
        return True
    found: list[Op] = []
    for name in ("reshape", "permute", "gather"):
        op = value.op
        if op is None or op.name != name:
            return False
        found.append(op)
        value = op.operands[0]
    page = value.shape[2]
    whole = isinstance(page, int) and page % LANES == 0
    return whole and value in buffers and found[1].attribute("axes") == (0, 2, 1, 3, 4)
