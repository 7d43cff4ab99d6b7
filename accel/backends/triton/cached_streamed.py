"""Writes attention over caches for Hopper in Gluon: blocks of keys and values come by TMA.

    ring of STAGES slots: a block of keys [KEYS, DEPTH] and its values [KEYS, WIDTH]

The ring is filled before the program waits for earlier kernels: caches are older than those. Keys
are the rows of the first product, K Q', and columns of V are the rows of the second, V' P', so that
both operands which are large go from shared memory to the tensor cores without passing through
registers, and few queries waste little. What is there of the new token (its key and value, a sink)
is where the running maximum and sums start. A block that ends behind the position is cut in shared
memory: what the cache holds there is never used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from accel.backends.loops.index import Affine
from accel.backends.loops.phases import Planner, region_symbols
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import size_name
from accel.backends.triton.cached_code import LOG2_E, CachedWriter
from accel.backends.triton.cached_pages import page_function, paged_reason, pages_of
from accel.backends.triton.cached_plan import Plan
from accel.backends.triton.cached_tiles import Span, Tiles, is_paged
from accel.backends.triton.dependent import WAIT
from accel.backends.triton.maps import MapCode
from accel.backends.triton.overlapped import _TMA_NAMES, SHARED_BYTES
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import next_power
from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.types import product

_WARPS = 4
_LEAST_ROWS = 8  # of a product's columns on tensor cores
_SIZES = (64, 128, 256)  # of heads: rows of the second product
_COMBINED = 64  # elements a thread of parts that are added up
_LARGEST_ROW = (1 << 31) - (1 << 16)
FEWEST_STAGES = 2  # the slot of the step before is filled while a step computes


@dataclass(frozen=True)
class StreamedCachedTile:
    """Keys of one block, programs that share a key/value head, blocks in flight."""

    capability: ClassVar[int] = 90

    keys: int
    split: int
    stages: int = 3

    @property
    def warps(self) -> int:
        return _WARPS


def reason(op: Op) -> str | None:
    """None if this writer takes the op, else why not (see `cached.reason` for all writers)."""
    q, k, v, _, mask, _ = op.arguments()
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"a cache of {k.dtype}"
    if any(int(x.shape[3]) not in _SIZES for x in (k, v)):
        return f"heads of size {k.shape[3]} and {v.shape[3]}"
    if mask is not None:
        return "a mask that is data"
    if q.shape[2] != 1:
        return f"{q.shape[2]} new tokens"
    rows = product(k.shape[:3])
    if isinstance(rows, int) and rows > _LARGEST_ROW:
        return f"{rows} rows of a cache"
    if is_paged(k) or is_paged(v):
        return paged_reason(op)
    return "a ring" if op.attribute("ring") else None


class StreamedCachedWriter(CachedWriter):
    """Writes the one program of a cached attention kernel in Gluon."""

    def __init__(
        self, planner: Planner, plan: Plan, emitter: Tiles, tile: StreamedCachedTile, scratch: int
    ) -> None:
        super().__init__(planner, plan, emitter, tile, scratch)
        shared = tile.stages * tile.keys * (self.depth + self.width) * self.q.dtype.itemsize
        if tile.stages < FEWEST_STAGES or shared > SHARED_BYTES:
            raise BackendError(f"{tile} does not fit")
        self.pages = pages_of(self.k)
        if self.pages is not None and self.pages.size % tile.keys and tile.keys % self.pages.size:
            raise BackendError(f"{tile} with pages of {self.pages.size} tokens")
        self.symbols = "".join(f", {size_name(s)}" for s in region_symbols(planner.region))
        self.height = max(_LEAST_ROWS, next_power(int(self.count)))
        self.constants |= {"ROWS": self.height, "STAGES": tile.stages}
        self.element = _TMA_NAMES[self.q.dtype]

    def write(self) -> Program:
        block = self.top.block
        self._layouts(block)
        self._place()
        self._read_position()
        self._columns()
        self._allocate(block)
        self._find_own("bad = tl.maximum(bad, own_wrong.to(tl.int32))")
        for line in (
            "for i in tl.static_range(STAGES):",
            *(f"    {text}" for text in self._find("i")),
            *self._bring("i", "i", "i < steps"),
            *self._find("STAGES"),
        ):
            block.line(line)
        block.line(f"{WAIT}()")
        self._start(block)
        self._walk(block)
        if self.pages is not None:
            wrong = Block(block.names)
            wrong.line("tl.store(status, 1)")
            block.nest("if bad > 0:", wrong)
        self._finish()
        maps = self._maps()
        constants = [f"{name} = tl.constexpr({value})" for name, value in self.constants.items()]
        helpers = ["\n".join(constants)]
        if self.pages is not None:
            table = self.emitter.pointers[self.pages.table]
            self.emitter.used.setdefault(self.pages.table)
            self.emitter.checks = True
            helpers.append(page_function(self.pages, self.tile.keys, table, self.symbols))
        pairs = product((self.q.shape[0], self.k.shape[1]))
        return Program(block.source(), helpers, {},
                       product((pairs, self.tile.split)), _WARPS, list(self.emitter.used),
                       self.emitter.checks, maps, gluon=True)  # fmt: skip

    def _cache(self, value: Value) -> Value:
        """The argument, and so the matrix, that a cache is."""
        paged, write = pages_of(value), self.plan.writes.get(value)
        if paged is not None:
            return paged.pool
        return value if write is None else write.cache

    def _maps(self) -> tuple[MapCode, ...]:
        made = []
        for number, value in enumerate((self.k, self.v)):
            cache = self._cache(value)
            self.emitter.used.setdefault(cache)
            columns, rows = int(value.shape[3]), self.tile.keys
            if self.pages is not None:
                _, rows = self.pages.of_block(rows)
            made.append(MapCode(f"m{number}", self.emitter.pointers[cache], self.element,
                                product(cache.shape[:3]), columns, columns, (rows, columns),
                                shared=True))  # fmt: skip
        return tuple(made)

    # -- before the loop -------------------------------------------------------------------

    def _layouts(self, block: Block) -> None:
        lanes = 32 * 8 // self.depth  # rows of a warp, 16 bytes a thread
        for line in (
            f"wide: tl.constexpr = tl.NVMMADistributedLayout([3, 0], [{_WARPS}, 1], "
            "[16, ROWS, 16])",
            f"across: tl.constexpr = tl.BlockedLayout([1, 8], [{max(1, lanes)}, "
            f"{min(32, self.depth // 8)}], [{_WARPS}, 1], [1, 0])",
            f"flat: tl.constexpr = tl.BlockedLayout([2, 1], [32, 1], [1, {_WARPS}], [0, 1])",
            "over: tl.constexpr = tl.SliceLayout(0, wide)",
        ):
            block.line(line)

    def _shares(self) -> None:
        """Keys `first + low` to `first + high` are this program's; the new one is no part of it."""
        line = self.top.block.line
        line("count = end - first")
        line("share = ((count + KEYS - 1) // KEYS + SPLIT - 1) // SPLIT * KEYS")
        line("low = part * share")
        line("high = tl.minimum(low + share, count)")
        line("steps = (tl.maximum(high - low, 0) + KEYS - 1) // KEYS")

    def _columns(self) -> None:
        line, indexer = self.top.block.line, self.emitter.indexer
        line("row = tl.arange(0, ROWS, tl.SliceLayout(1, across))[:, None]")
        self.rows = Span(self.plan.rows, "row", ROW, "ROWS")
        if self.count < self.height:
            line(f"row_ok = row < {self.count}")
            self.rows.mask = "row_ok"
        line("d = tl.arange(0, DEPTH, tl.SliceLayout(0, across))[None, :]")
        line("e = tl.arange(0, WIDTH, tl.SliceLayout(1, wide))[:, None]")
        line("number = tl.arange(0, KEYS, tl.SliceLayout(1, wide))[:, None]")
        self.columns = {
            "DEPTH": Span((indexer.axis("d", self.depth),), "d", COL, "DEPTH"),
            "WIDTH": Span((indexer.axis("e", self.width),), "e", ROW, "WIDTH"),
        }

    def _allocate(self, block: Block) -> None:
        default = "tl.NVMMASharedLayout.get_default_for"
        for line in (
            "keys = tl.allocate_shared_memory(m0.dtype, [STAGES, KEYS, DEPTH], m0.layout)",
            "values = tl.allocate_shared_memory(m1.dtype, [STAGES, KEYS, WIDTH], m1.layout)",
            "queries = tl.allocate_shared_memory(m0.dtype, [ROWS, DEPTH], "
            f"{default}([ROWS, DEPTH], m0.dtype))",
            "weights = tl.allocate_shared_memory(m0.dtype, [ROWS, KEYS], "
            f"{default}([ROWS, KEYS], m0.dtype))",
            "ready = tl.allocate_shared_memory(tl.int64, [STAGES, 1], mbarrier.MBarrierLayout())",
            "for i in tl.static_range(STAGES):",
            "    mbarrier.init(ready.index(i), count=1)",
            "fence_async_shared()",
            "bad = tl.program_id(0) * 0  # whether a page was none"
            if self.pages is not None
            else f"key0 = ({self._first(self.k)} + first + low).to(tl.int32)",
        ):
            block.line(line)

    def _bring(self, slot: str, step: str, condition: str) -> list[str]:
        """Copies of a step's block, if there is one."""
        width = self.tile.keys * (self.depth + self.width) * self.q.dtype.itemsize
        lines = [f"    if {condition}:", f"        mbarrier.expect(ready.index({slot}), {width})"]
        if self.pages is None:
            copies = [(f"key0 + {step} * KEYS", "")]
        else:
            count, rows = self.pages.of_block(self.tile.keys)
            copies = [(f"page_{i}", f".slice({i * rows}, {rows}, dim=0)" if count > 1 else "")
                      for i in range(count)]  # fmt: skip
        for row, part in copies:
            lines += [f"        bring_tile({m}, [{row}, 0], ready.index({slot}), "
                      f"{ring}.index({slot}){part})" for m, ring in (("m0", "keys"),
                                                                     ("m1", "values"))]  # fmt: skip
        return lines

    def _find(self, step: str) -> list[str]:
        """The rows of the pool at which the pages of a step's block begin."""
        if self.pages is None:
            return []
        count, rows = self.pages.of_block(self.tile.keys)
        table = self.emitter.pointers[self.pages.table]
        return [
            f"page_{i}, bad = page({table}, low + {step} * KEYS + {i * rows}, high, text, head, bad"
            f"{self.symbols})"
            for i in range(count)
        ]

    def _start(self, block: Block) -> None:
        """The queries, and what the running maximum and sums are before the cache's first key."""
        plan, line = self.plan, block.line
        with self._bound(self.rows):
            query = self._tile(self.q, (plan.lead[0], *plan.query), self.rows, "DEPTH")
        line(f"queries.store({query})")
        line('top = tl.full([ROWS], float("-inf"), tl.float32, over)')
        line("total = tl.zeros([KEYS, ROWS], tl.float32, wide)")
        line("sums = tl.zeros([WIDTH, ROWS], tl.float32, wide)")
        if self.sinks is not None:
            line("line = tl.arange(0, ROWS, over)")
            span = Span(plan.rows, "line", COL, "ROWS", f"(line < {self.count})")
            with self._bound(span):
                sink = self.emitter.element(self.sinks, (plan.query[0],))
                self.emitter.block.line(f"top = tl.where(part == 0, {sink} * {LOG2_E!r}, top)")
            line("total = tl.where((part == 0) & (number == 0), 1.0, total)")
        if self.single:
            self._add_new(query, block)
        line("fence_async_shared()")
        line("meet()")

    def _add_new(self, query: Expr, block: Block) -> None:
        """The new token's key and value: stored and attended to by the first part."""
        line = block.line
        k, v = (self._new_line(value, size) for value, size in ((self.k, "DEPTH"),
                                                                (self.v, "WIDTH")))  # fmt: skip
        line(f"own = tl.sum({query}.to(tl.float32) * {k}.to(tl.float32), 1)")
        line(f"own = {self._scaled('tl.convert_layout(own, over)')}")
        line('own = tl.where(part == 0, own, float("-inf"))')
        self._raise("own", block)
        line("newest = tl.exp2(own - base)")
        line("total = total * scale[None, :] + tl.where(number == 0, newest[None, :], 0.0)")
        line(f"sums = sums * scale[None, :] + {v}.to(tl.float32) * newest[None, :]")
        line("top = higher")

    def _new_line(self, value: Value, size: str) -> Expr:
        emitter, plan, block = self.emitter, self.plan, self.top.block
        columns, write = self.columns[size], plan.writes[value]
        with self._bound(columns):
            index = (*plan.lead, Affine(), emitter.indexer.of(columns.axes[0]))
            made = dtypes.to_storage(emitter.element(write.source, index), value.dtype, block)
            made = block.let(made.text, "stored", made.dims, "new")
        place = f"{self._own_row(value)} * {value.shape[3]} + {columns.variable}"
        mask = f"{self.mine} & ({columns.variable} >= 0)"
        block.line(f"tl.store(y{write.result} + {place}, {made}, mask={mask})")
        return made

    def _scaled(self, score: str) -> str:
        """A score in the units of exp2."""
        scale, cap = float(self.op.attribute("scale")), self.op.attribute("softcap")
        if cap is None:
            return f"{score} * {scale * LOG2_E!r}"
        return f"libdevice.tanh({score} * {scale / float(cap)!r}) * {float(cap) * LOG2_E!r}"

    def _raise(self, score: str, block: Block) -> None:
        """The running maximum with a score, and the factor of what was summed below the last."""
        block.line(f"higher = tl.maximum(top, {score})")
        block.line('base = tl.where(higher == float("-inf"), 0.0, higher)')
        block.line("scale = tl.exp2(top - base)")

    # -- the loop --------------------------------------------------------------------------

    def _walk(self, block: Block) -> None:
        body, line = Block(block.names), block.line
        for text in (
            "slot = step % STAGES",
            "mbarrier.wait(ready.index(slot), (step // STAGES) & 1)",
            "scores = warpgroup_mma(keys.index(slot), queries.permute([1, 0]), "
            "tl.zeros([KEYS, ROWS], tl.float32, wide), use_acc=False, is_async=True)",
            "score = warpgroup_mma_wait(num_outstanding=0, deps=[scores])",
            f"score = {self._scaled('score')}",
            "unit = low + step * KEYS + number",
            'score = tl.where(unit < high, score, float("-inf"))',
        ):
            body.line(text)
        self._raise("tl.max(score, 0)", body)
        element = dtypes.storage(self.q.dtype)
        for text in (
            "weight = tl.exp2(score - base[None, :])",
            "total = total * scale[None, :] + weight",
            "top = higher",
            f"weights.permute([1, 0]).store(weight.to(tl.{element}))",
        ):
            body.line(text)
        cut = Block(block.names)
        for text in (
            "place = low + step * KEYS + tl.arange(0, KEYS, tl.SliceLayout(1, rows))[:, None]",
            "tail = values.index(slot).load(rows)",
            "values.index(slot).store(tl.where(place < high, tail, 0.0))",
        ):
            cut.line(text)
        body.nest("if low + step * KEYS + KEYS > high:", cut)
        body.line("fence_async_shared()")
        body.line("meet()  # all have left the products of the step before")
        body.line("more = step - 1 + STAGES")
        body.line("last = (step - 1 + STAGES) % STAGES")
        body.lines += [t[4:] for t in self._bring("last", "more", "(step > 0) & (more < steps)")]
        body.lines += self._find("(step + STAGES)")
        for text in (
            "product = warpgroup_mma(values.index(slot).permute([1, 0]), "
            "weights.permute([1, 0]), sums * scale[None, :], is_async=True)",
            "sums = warpgroup_mma_wait(num_outstanding=0, deps=[product])",
        ):
            body.line(text)
        lanes = max(1, 256 // self.width)
        line(f"rows: tl.constexpr = tl.BlockedLayout([1, 8], [{lanes}, {32 // lanes}], "
             f"[{_WARPS}, 1], [1, 0])")  # fmt: skip
        block.nest("for step in range(0, steps):", body)

    # -- the end ---------------------------------------------------------------------------

    def _finish(self) -> None:
        block, line = self.top.block, self.top.block.line
        line("whole = tl.sum(total, 0)")
        line("cell = tl.arange(0, WIDTH, tl.SliceLayout(1, flat))[:, None]")
        line("query = tl.arange(0, ROWS, tl.SliceLayout(0, flat))[None, :]")
        inside = f"(query < {self.count})" if self.count < self.height else ""
        if self.tile.split == 1:
            line("result = tl.convert_layout(sums / whole[None, :], flat)")
            self._store_cells("result", "cell", "query", inside, block)
            return
        sums, tops, done = self.parts
        tail = f", mask={inside}" if inside else ""
        line(f"own = (pair * SPLIT + part) * {self.count}")
        line(f"tl.store({sums} + (own + query) * {self.width} + cell, "
             f"tl.convert_layout(sums, flat){tail})")  # fmt: skip
        line("line = tl.arange(0, ROWS, over)")
        tail = f", mask=line < {self.count}" if self.count < self.height else ""
        line(f"tl.store({tops} + (own + line) * 2, top{tail})")
        line(f"tl.store({tops} + (own + line) * 2 + 1, whole{tail})")
        line("meet()")
        line(f'arrived = tl.atomic_add({done} + pair, 1, sem="acq_rel")')
        body = Block(block.names)
        body.line(f"tl.store({done} + pair, 0)")
        self._combine(body)
        block.nest("if arrived == SPLIT - 1:", body)

    def _combine(self, body: Block) -> None:
        """Adds up the parts of a head, some columns of all queries at a time."""
        sums, tops, _ = self.parts
        line, split = body.line, self.tile.split
        lines = next_power(int(self.count))
        span = max(32, min(self.width, _COMBINED * 32 * _WARPS // (split * lines)))
        warps = min(_WARPS, lines)
        self.constants |= {"LINES": lines, "SPAN": span}
        line(f"deep: tl.constexpr = tl.BlockedLayout([SPLIT, 1, 1], [1, 1, 32], [1, {warps}, "
             f"{_WARPS // warps}], [2, 1, 0])")  # fmt: skip
        line("pairs: tl.constexpr = tl.SliceLayout(2, deep)")
        line("each = (pair * SPLIT + tl.arange(0, SPLIT, tl.SliceLayout(1, pairs))[:, None]) * "
             f"{self.count}")  # fmt: skip
        line("which = tl.arange(0, LINES, tl.SliceLayout(0, pairs))[None, :]")
        tail = f", mask=which < {self.count}, other=0.0" if lines > self.count else ""
        line(f"tops = tl.load({tops} + (each + which) * 2{tail})")
        line(f"totals = tl.load({tops} + (each + which) * 2 + 1{tail})")
        line("highest = tl.max(tops, 0)")
        line('highest = tl.where(highest == float("-inf"), 0.0, highest)')
        line("shares = tl.exp2(tops - highest[None, :])")
        line("divisor = tl.sum(totals * shares, 0)")
        line("final: tl.constexpr = tl.SliceLayout(0, deep)")
        line("lined = tl.arange(0, LINES, tl.SliceLayout(1, final))[:, None]")
        inner = Block(body.names)
        inner.line("cells = begin + tl.arange(0, SPAN, tl.SliceLayout(0, final))[None, :]")
        inner.line(f"at_each = (each + which)[:, :, None] * {self.width} + cells[None, :, :]")
        tail = f", mask=which[:, :, None] < {self.count}, other=0.0" if lines > self.count else ""
        inner.line(f"parts = tl.load({sums} + at_each{tail})")
        inner.line("added = tl.sum(parts * shares[:, :, None], 0)")
        inner.line("divided = tl.convert_layout(divisor, tl.SliceLayout(1, final))")
        inner.line("result = added / divided[:, None]")
        inside = f"(lined < {self.count})" if lines > self.count else ""
        self._store_cells("result", "cells", "lined", inside, inner)
        body.nest(f"for begin in range(0, {self.width}, SPAN):", inner)

    def _store_cells(self, value: str, cell: str, row: str, inside: str, block: Block) -> None:
        """Stores results over columns `cell` and queries `row`."""
        axis = self.emitter.indexer.axis("e", self.width)
        rows = Span(self.plan.rows, row, ROW, "ROWS", inside)
        made = Expr(value, "float32", frozenset((ROW, COL)))
        self._store(made, rows, Span((axis,), cell, COL, "WIDTH"), block)
