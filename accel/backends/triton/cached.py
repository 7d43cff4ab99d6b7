"""Attention of a few new queries over a key/value cache, as one launch (`cached_attention`).

The queries of one key/value head (a group's heads times the new tokens) are the rows of one tile.
The cache up to the position, which is data, is shared by SPLIT programs a head: each takes the same
number of blocks of KEYS keys with a running maximum and sum (Milakov & Gimelshein, 2018; "Flash-
Decoding", Dao et al., 2023) and leaves its part in scratch memory; the one that is done last adds
the parts up. The grid depends on the cache's size alone, so that a recorded launch serves every
position; how much each program reads follows from the position. What the cache holds behind the
position is never used.

Where the region also writes the new tokens' keys and values (`dynamic_update`), they are computed
on a tile of their own (rotary embedding included), stored over the cache, and attended to from
registers: no program reads what another one writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.phases import Planner
from accel.backends.loops.trace import Index
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import decompose, size_text
from accel.backends.triton.emitter import Emitter, Scope
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import next_power
from accel.errors import BackendError
from accel.ir.module import Op, Region, Value
from accel.ir.op import Trait
from accel.ir.types import Dim, product

_MOST_ROWS = 64  # queries of one key/value head
_LEAST_TILE = 16  # of a matrix product
_LARGEST_HEAD = 256
_COMBINED = 4096  # elements of a tile that adds up parts
_BOTH = frozenset((ROW, COL))
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class CachedTile:
    """Keys of one step, programs that share a key/value head, and how they are run."""

    keys: int
    split: int
    warps: int = 4
    stages: int = 3


def reason(op: Op) -> str | None:
    """None if a kernel of kind "cached_attention" may be built around this op, else why not."""
    q, k, v, *_ = op.arguments()
    if any(x.dtype not in (torch.float32, torch.bfloat16, torch.float16) for x in (q, k, v)):
        return f"attention of {q.dtype} over a cache of {k.dtype}"
    if len({x.dtype for x in (q, k, v)}) > 1:
        return "queries and a cache of different dtypes"
    sizes = (*q.shape[1:], *k.shape[1:], v.shape[3])
    if not all(isinstance(d, int) and d > 0 for d in sizes):
        return "attention with symbolic or empty sizes"
    rows = int(q.shape[1]) // int(k.shape[1]) * int(q.shape[2])
    if rows > _MOST_ROWS:
        return f"{rows} queries of one key/value head"
    if any(int(d) > _LARGEST_HEAD for d in (q.shape[3], v.shape[3])):
        return f"attention heads of size {q.shape[3]} and {v.shape[3]}"
    if op.attributes.get("ring"):
        return "a ring of keys"
    return None


def neighbour_reason(op: Op, update: Op) -> str | None:
    """None if the kernel around `op` may also write its new keys or values, else why not."""
    if update.name != "dynamic_update":
        return f"accel.{update.name} does not ride along with attention"
    q, k, v, position, _ = op.arguments()
    cache, source, start = update.operands
    if update.result is not k and update.result is not v:
        return "an update of something else"
    if start is not position or int(update.attribute("axis")) % 4 != 2:
        return "an update at another place than the queries'"
    if source.shape[2] != q.shape[2]:
        return f"an update of {source.shape[2]} positions for {q.shape[2]} queries"
    if cache.op is not None:
        return "an update of what is no argument"
    return None


def choose(pairs: Dim, capacity: int, size: int, itemsize: int, sms: int) -> CachedTile:
    """The tile for `pairs` key/value heads and heads of `size` elements.

    A multiprocessor needs some 40 kB in flight, which two programs of three stages give it.
    """
    keys = max(16, min(64, 16384 // (size * itemsize)))
    known = pairs if isinstance(pairs, int) else 16
    wanted = max(1, 2 * sms // max(known, 1))
    split = min(1 << (wanted.bit_length() - 1), next_power(-(-capacity // keys)), 128)
    return CachedTile(keys, split)


def candidates(kernel: Op, sms: int) -> list[CachedTile]:
    """Tiles worth timing for a kernel."""
    op = next(op for op in kernel.regions[0].ops if op.name == "cached_attention")
    _, k, v, *_ = op.arguments()
    size, capacity = max(int(k.shape[3]), int(v.shape[3])), int(k.shape[2])
    best = choose(product(k.shape[:2]), capacity, size, k.dtype.itemsize, sms)
    found = [best]
    for split in (best.split // 2, best.split * 2):
        for keys in (best.keys // 2, best.keys, best.keys * 2):
            if keys >= _LEAST_TILE and 0 < split <= next_power(-(-capacity // keys)):
                found.append(CachedTile(keys, split))
    return found


# -- the plan --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Write:
    """New rows of a cache: `source` goes over `cache`, an argument, in result number `result`."""

    cache: Value
    source: Value
    result: int


@dataclass
class Plan:
    """The axes of a kernel's tiles, and what it writes."""

    op: Op
    batch: tuple[Axis, ...]
    group: tuple[Axis, ...]
    rows: tuple[Axis, ...]  # heads of the group, new tokens
    lead: tuple[Affine, Affine]  # batch and key/value head
    query: tuple[Affine, Affine]  # head and new token of a row
    result: int = 0
    views: list[Op] = field(default_factory=list)  # from the attention's result to the region's
    writes: dict[Value, Write] = field(default_factory=dict)  # by the update's result


def make_plan(planner: Planner) -> Plan:
    """Plans a region with one cached attention, views of its result and updates of its cache."""
    region, indexer = planner.region, planner.indexer
    op = next(op for op in region.ops if op.name == "cached_attention")
    q, k, *_ = op.arguments()
    batch, heads, tokens, _ = q.shape
    group = int(heads) // int(k.shape[1])

    def axis(name: str, extent: Dim) -> tuple[Affine, tuple[Axis, ...]]:
        if extent == 1:
            return Affine(), ()
        made = indexer.axis(name, extent)
        return indexer.of(made), (made,)

    b, b_axes = axis("b", batch)
    g, g_axes = axis("g", k.shape[1])
    r, r_axes = axis("r", group)
    s, s_axes = axis("s", tokens)
    plan = Plan(op, b_axes, g_axes, (*r_axes, *s_axes), (b, g), (g.times(group).plus(r), s))
    for number, value in enumerate(region.results):
        made = value.op
        if made is not None and made.has(Trait.UPDATE):
            plan.writes[value] = Write(made.operands[0], made.operands[1], number)
            continue
        plan.result = number
        while made is not None and made is not op:
            if not made.has(Trait.VIEW):
                raise BackendError(f"a cached attention kernel that returns accel.{made.name}")
            plan.views.insert(0, made)
            made = made.operands[0].op
    return plan


def through_views(planner: Planner, views: Sequence[Op], index: Index) -> Index:
    """Where the views (permutes and reshapes) put the element at `index` of their source."""
    for op in views:
        if op.name == "permute":
            index = tuple(index[int(a)] for a in op.attribute("axes"))
        elif op.name == "reshape":
            index = planner.indexer.reshape(index, op.operands[0].shape, op.result.shape)
        else:
            raise BackendError(f"accel.{op.name} after cached attention")
    return index


# -- the code --------------------------------------------------------------------------------


class _Tiles(Emitter):
    """Loads the operands of products as they are stored, zeros outside; other values as ever."""

    raw = False

    def load(self, value: Value, index: Index) -> Expr:
        if not self.raw:
            return super().load(value, index)
        self.used.setdefault(value)
        flat = self.indexer.flatten(index, value.shape)
        loaded = self.load_text(self.pointers[value], self.addresses.code(flat), flat.axes)
        text = loaded.text
        if "mask=" in text:
            text = text.removesuffix(")") + ", other=0.0)"
        return Expr(text, "stored", loaded.dims)


@dataclass
class Span:
    """One dimension of a tile: `axes` at the positions `variable`, of which those in `mask` are
    there."""

    axes: tuple[Axis, ...]
    variable: str
    dim: str
    size: str
    mask: str = ""


class CachedWriter:
    """Writes the one program of a cached attention kernel."""

    def __init__(
        self, planner: Planner, plan: Plan, emitter: _Tiles, tile: CachedTile, scratch: int
    ) -> None:
        self.planner, self.plan, self.emitter, self.tile = planner, plan, emitter, tile
        self.op, self.top = plan.op, emitter.scopes[0]
        self.q, self.k, self.v, self.position, self.mask = plan.op.arguments()
        self.parts = [f"t{scratch + i}" for i in range(3)] if tile.split > 1 else []
        self.count = product(int(a.extent) for a in plan.rows)
        self.depth, self.width = int(self.q.shape[3]), int(self.v.shape[3])
        self.tokens, self.capacity = int(self.q.shape[2]), int(self.k.shape[2])
        self.precision = ', input_precision="ieee"' if self.q.dtype == torch.float32 else ""
        self.constants = {
            "ROWS": max(_LEAST_TILE, next_power(int(self.count))),
            "KEYS": tile.keys,
            "DEPTH": max(_LEAST_TILE, next_power(self.depth)),
            "WIDTH": max(_LEAST_TILE, next_power(self.width)),
            "SPLIT": tile.split,
        }

    def write(self) -> Program:
        plan, line = self.plan, self.top.block.line
        self._place()
        self._read_position()
        self._columns()
        with self._bound(self.rows):
            self.query = self._tile(self.q, (plan.lead[0], *plan.query), self.rows, "DEPTH")
        line('top = tl.full([ROWS, 1], float("-inf"), tl.float32)')
        line("total = tl.zeros([ROWS, 1], tl.float32)")
        line("sums = tl.zeros([ROWS, WIDTH], tl.float32)")
        if plan.writes:
            self._new_rows()
        body = Block(self.top.block.names)
        self._step(body)
        stages = f", num_stages={self.tile.stages}"
        self.top.block.nest(f"for start in tl.range(low, high, KEYS{stages}):", body)
        self._finish()
        pairs = product((self.q.shape[0], self.k.shape[1]))
        programs = product((pairs, self.tile.split))
        return Program(self.top.block.source(), [], self.constants, programs, self.tile.warps,
                       list(self.emitter.used), self.emitter.checks)  # fmt: skip

    def _place(self) -> None:
        """Which head of which text, and which part of its keys."""
        emitter, plan, line = self.emitter, self.plan, self.top.block.line
        wide = ".to(tl.int64)" if emitter.kind == "int64" else ""
        line(f"pair = (tl.program_id(0) // SPLIT){wide}")
        line("part = tl.program_id(0) % SPLIT")
        groups = size_text(self.k.shape[1])
        line(f"text = pair // {groups}")
        line(f"head = pair % {groups}")
        for axes, name in ((plan.batch, "text"), (plan.group, "head")):
            if axes:
                emitter.addresses.bind(axes, Expr(name, emitter.kind))
        self.top.axes = frozenset((*plan.batch, *plan.group))

    def _read_position(self) -> None:
        """`at`, the first query's position, and the keys from `low` to `high` of this program."""
        emitter, line = self.emitter, self.top.block.line
        at = dtypes.cast(emitter.element(self.position, ()), "int64")
        last = self.capacity - self.tokens
        if self.plan.writes:
            at = emitter._checked(emitter.block.let(str(at), "int64", at.dims, "place"),
                                  "0", str(last), frozenset())  # fmt: skip
            line(f"at = {at}.to(tl.int32)")
            line("end = at")
        else:
            line(f"at = tl.minimum(tl.maximum({at}, -{self.tokens}), {last}).to(tl.int32)")
            line(f"end = at + {self.tokens}")
        window = self.op.attribute("window")
        if window is None:
            line("first = 0")
        else:
            line(f"first = tl.maximum(at - {int(window) - 1}, 0) // KEYS * KEYS")
        line("share = ((end - first + KEYS - 1) // KEYS + SPLIT - 1) // SPLIT * KEYS")
        line("low = first + part * share")
        line("high = tl.minimum(low + share, end)")

    # -- tiles -----------------------------------------------------------------------------

    def _columns(self) -> None:
        """The rows of queries, and the columns of queries and keys, and of values."""
        line, indexer = self.top.block.line, self.emitter.indexer
        line("row = tl.arange(0, ROWS)[:, None]")
        self.rows = Span(self.plan.rows, "row", ROW, "ROWS")
        if self.count < self.constants["ROWS"]:
            line(f"row_ok = row < {self.count}")
            self.rows.mask = "row_ok"
        self.columns: dict[str, Span] = {}
        for size, extent, name in (("DEPTH", self.depth, "d"), ("WIDTH", self.width, "e")):
            line(f"{name} = tl.arange(0, {size})[None, :]")
            span = Span((indexer.axis(name, extent),), name, COL, size)
            if extent < self.constants[size]:
                line(f"{name}_ok = {name} < {extent}")
                span.mask = f"{name}_ok"
            self.columns[size] = span

    @contextmanager
    def _bound(self, *spans: Span, block: Block | None = None) -> Iterator[None]:
        """Binds the axes of the spans, in a scope of their own."""
        emitter = self.emitter
        bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
        known = emitter.scopes[-1].axes.union(*(s.axes for s in spans))
        with emitter.inside(Scope(block or emitter.block, known)):
            for span in spans:
                if span.axes:
                    flat = Expr(span.variable, emitter.kind, frozenset((span.dim,)))
                    groups = [(axis,) for axis in span.axes]
                    decompose(flat, groups, emitter.block, emitter.addresses)
                if span.mask:
                    emitter.masks.update(dict.fromkeys(span.axes, span.mask))
            yield
        emitter.addresses.groups, emitter.masks = bound, masks

    def _tile(self, value: Value, lead: Index, rows: Span, size: str) -> Expr:
        """A tile of `value` as it is stored, with zeros where it has no elements.

        `lead` is the index of all but the last axis, over the axes of `rows`, which are bound.
        """
        emitter, columns = self.emitter, self.columns[size]
        with self._bound(columns):
            block = emitter.block
            emitter.raw = _is_stored(value)
            made = emitter.element(value, (*lead, emitter.indexer.of(columns.axes[0])))
            masks = [s.mask for s in (rows, columns) if s.mask]
            if emitter.raw:  # zeros already, where the address depends on the masked axes
                masks = [m for m, s in ((rows.mask, rows), (columns.mask, columns))
                         if m and not s.axes]  # fmt: skip
            else:
                made = dtypes.to_storage(made, value.dtype, block)
            emitter.raw = False
            if made.dims != _BOTH:
                text = f"tl.broadcast_to({made}, [{rows.size}, {size}])"
                made = block.let(text, "stored", _BOTH, "tile")
            if masks:
                made = block.let(f"tl.where({' & '.join(masks)}, {made}, 0.0)", "stored", _BOTH,
                                 "tile")  # fmt: skip
        return made

    def _new_rows(self) -> None:
        """The new tokens' keys and values: stored by the first part, and attended to by it."""
        emitter, plan, block = self.emitter, self.plan, self.top.block
        self.constants["NEW"] = max(_LEAST_TILE, next_power(self.tokens))
        block.line("new = tl.arange(0, NEW)[:, None]")
        block.line(f"new_ok = new < {self.tokens}")
        axes: tuple[Axis, ...] = ()
        index = Affine()
        if self.tokens > 1:
            axes = (emitter.indexer.axis("j", self.tokens),)
            index = emitter.indexer.of(axes[0])
        span = Span(axes, "new", ROW, "NEW", "new_ok")
        with self._bound(span):
            keys = self._tile(plan.writes[self.k].source, (*plan.lead, index), span, "DEPTH")
            values = self._tile(plan.writes[self.v].source, (*plan.lead, index), span, "WIDTH")
        for value, made, width in ((self.k, keys, "DEPTH"), (self.v, values, "WIDTH")):
            columns = self.columns[width]
            masks = ["(part == 0)", "new_ok", *([columns.mask] if columns.mask else [])]
            place = f"({self._first(value)} + at + new) * {value.shape[3]} + {columns.variable}"
            target = f"y{plan.writes[value].result}"
            block.line(f"tl.store({target} + {place}, {made}, mask={' & '.join(masks)})")
        block.line("newest = at + tl.arange(0, NEW)[None, :]")
        seen = f"(part == 0) & (newest < at + {self.tokens})"
        self._attend(keys, values, "newest", seen, block)

    def _first(self, value: Value) -> str:
        """The row of the cache [B, G, C, E] at which this head's begin, as source."""
        emitter = self.emitter
        flat = emitter.indexer.flatten((*self.plan.lead, Affine()), value.shape[:3])
        return f"({emitter.addresses.code(flat)})"

    def _step(self, body: Block) -> None:
        """One block of the cache."""
        emitter, plan = self.emitter, self.plan
        body.line("key = start + tl.arange(0, KEYS)[:, None]")
        body.line("key_ok = key < high")
        made = []
        for value, width in ((self.k, "DEPTH"), (self.v, "WIDTH")):
            axis = emitter.indexer.axis("t", self.capacity)
            span = Span((axis,), "key", ROW, "KEYS", "key_ok")
            write = plan.writes.get(value)
            source = value if write is None else write.cache
            with self._bound(span, block=body):
                made.append(self._tile(source, (*plan.lead, emitter.indexer.of(axis)), span, width))
        body.line("place = start + tl.arange(0, KEYS)[None, :]")
        self._attend(made[0], made[1], "place", "(place < high)", body)

    def _attend(self, keys: Expr, values: Expr, place: str, seen: str, block: Block) -> None:
        """A tile of keys and values joins the running maximum and sums."""
        line, fresh = block.line, block.names.fresh
        score, weight, base = fresh("score"), fresh("weight"), fresh("base")
        line(f"{score} = tl.dot({self.query}, tl.trans({keys}){self.precision})")
        line(f"{score} = {score} * {float(self.op.attribute('scale'))!r}")
        cap = self.op.attribute("softcap")
        if cap is not None:
            line(f"{score} = libdevice.tanh({score} * {1.0 / float(cap)!r}) * {float(cap)!r}")
        keep = [seen]
        query = "at"
        if self.tokens > 1:
            query = f"(at + row % {self.tokens})"
            keep.append(f"({place} <= {query})")
        window = self.op.attribute("window")
        if window is not None:
            keep.append(f"({place} > {query} - {int(window)})")
        if self.mask is not None:
            mask = self._mask(place, seen, block)
            if self.mask.dtype == torch.bool:
                keep.append(f"({mask})")
            else:
                line(f"{score} = {score} + {mask}")
        hidden = 'float("-inf")'
        line(f"{score} = tl.where({' & '.join(keep)}, {score} * {_LOG2_E!r}, {hidden})")
        higher = fresh("higher")
        line(f"{higher} = tl.maximum(top, tl.max({score}, 1, keep_dims=True))")
        line(f"{base} = tl.where({higher} == {hidden}, 0.0, {higher})")
        line(f"{weight} = tl.exp2({score} - {base})")
        scale = fresh("scale")
        line(f"{scale} = tl.exp2(top - {base})")
        line(f"total = total * {scale} + tl.sum({weight}, 1, keep_dims=True)")
        small = weight if self.precision else f"{weight}.to({values}.dtype)"
        line(f"sums = tl.dot({small}, {values}, sums * {scale}{self.precision})")
        line(f"top = {higher}")

    def _mask(self, place: str, seen: str, block: Block) -> Expr:
        """The mask's element for each query and key."""
        assert self.mask is not None
        emitter, plan = self.emitter, self.plan
        axis = emitter.indexer.axis("t", self.capacity)
        name = block.names.fresh("seen")
        block.line(f"{name} = {seen}")
        span = Span((axis,), place, COL, "KEYS", name)
        full = (plan.lead[0], *plan.query, emitter.indexer.of(axis))
        index = tuple(
            Affine() if d == 1 else i for d, i in zip(self.mask.shape, full[-self.mask.type.rank :])
        )
        with self._bound(self.rows, span, block=block):
            return emitter.element(self.mask, index)

    # -- the end ---------------------------------------------------------------------------

    def _finish(self) -> None:
        """The result; if several programs share a head, by the one that is done last."""
        block = self.top.block
        if self.tile.split == 1:
            value = self._quotient("sums", "total", block)
            self._store(value, self.rows, self.columns["WIDTH"], block)
            return
        sums, tops, done = self.parts
        block.line(f"own = (pair * SPLIT + part) * {self.count}")
        mask = " & ".join(s.mask for s in (self.rows, self.columns["WIDTH"]) if s.mask)
        tail = f", mask={mask}" if mask else ""
        block.line(f"tl.store({sums} + (own + row) * {self.width} + e, sums{tail})")
        tail = f", mask={self.rows.mask}" if self.rows.mask else ""
        block.line(f"tl.store({tops} + (own + row) * 2, top{tail})")
        block.line(f"tl.store({tops} + (own + row) * 2 + 1, total{tail})")
        block.line("tl.debug_barrier()")
        block.line(f'arrived = tl.atomic_add({done} + pair, 1, sem="acq_rel")')
        body = Block(block.names)
        body.line(f"tl.store({done} + pair, 0)")
        self._combine(body)
        block.nest("if arrived == SPLIT - 1:", body)

    def _combine(self, body: Block) -> None:
        """Adds up the parts of a head, some columns of all rows at a time."""
        sums, tops, _ = self.parts
        emitter = self.emitter
        total = self.count * self.width
        block_size = max(16, min(next_power(total), next_power(_COMBINED // self.tile.split)))
        self.constants["BLOCK"] = block_size
        inner = Block(body.names)
        line = inner.line
        line("cell = begin + tl.arange(0, BLOCK)[None, :]")
        mask = ""
        if total % block_size:
            line(f"cell_ok = cell < {total}")
            mask = "cell_ok"
        line("each = tl.arange(0, SPLIT)[:, None]")
        line(f"spot = (pair * SPLIT + each) * {self.count}")
        tail = f", mask={mask}" if mask else ""
        line(f"maximum = tl.load({tops} + (spot + cell // {self.width}) * 2{tail})")
        line(f"part_total = tl.load({tops} + (spot + cell // {self.width}) * 2 + 1{tail})")
        line(f"part_sum = tl.load({sums} + spot * {self.width} + cell{tail})")
        line("highest = tl.max(maximum, 0, keep_dims=True)")
        line('highest = tl.where(highest == float("-inf"), 0.0, highest)')
        line("share_of = tl.exp2(maximum - highest)")
        line("whole = tl.sum(part_sum * share_of, 0, keep_dims=True)")
        line("divisor = tl.sum(part_total * share_of, 0, keep_dims=True)")
        value = self._quotient("whole", "divisor", inner)
        last = emitter.indexer.axis("e", self.width)
        cells = Span((*self.plan.rows, last), "cell", COL, "BLOCK", mask)
        self._store(value, cells, Span((), "", ROW, ""), inner)
        body.nest(f"for begin in range(0, {total}, BLOCK):", inner)

    def _quotient(self, sums: str, total: str, block: Block) -> Expr:
        """A row that sees no key is zero where a boolean mask hid them all."""
        text = f"{sums} / {total}"
        if self.mask is not None and self.mask.dtype == torch.bool:
            text = f"tl.where({total} > 0.0, {text}, 0.0)"
        return block.let(text, "float32", _BOTH, "result")

    def _store(self, value: Expr, rows: Span, columns: Span, block: Block) -> None:
        emitter, plan = self.emitter, self.plan
        axes = (*rows.axes, *columns.axes)
        index = (plan.lead[0], *plan.query, emitter.indexer.of(axes[-1]))
        result = plan.views[-1].result if plan.views else self.op.result
        place = through_views(self.planner, plan.views, index)
        made = dtypes.to_storage(value, self.op.result.dtype, block)
        with self._bound(rows, columns, block=block):
            code = emitter.addresses.code(emitter.indexer.flatten(place, result.shape))
        mask = " & ".join(s.mask for s in (rows, columns) if s.mask)
        tail = f", mask={mask}" if mask else ""
        spread = "" if rows.axes else f" + {rows.variable} * 0"  # a pointer for every lane
        block.line(f"tl.store(y{plan.result} + {code}{spread}, {made}{tail})")


def _is_stored(value: Value) -> bool:
    """Whether an element is one load, as it is stored: an argument, behind views or not."""
    while value.op is not None and value.op.has(Trait.VIEW):
        value = value.op.operands[0]
    return value.op is None


class CachedGenerator(Generator):
    """A cached attention kernel: one launch."""

    tile: CachedTile | None = None

    def run(self) -> KernelCode:
        plan = make_plan(self.planner)
        q, k, v, *_ = plan.op.arguments()
        self.kind = index_kind(self.region, [])
        pointers = {a: f"x{i}" for i, a in enumerate(self.region.args)}
        pointers |= {w.cache: f"y{w.result}" for w in plan.writes.values()}
        emitter = _Tiles(self.planner.indexer, pointers, set(), self.kind)
        pairs = product((q.shape[0], k.shape[1]))
        size = max(int(q.shape[3]), int(v.shape[3]))
        tile = self.tile or choose(pairs, int(k.shape[2]), size, k.dtype.itemsize, self.sms)
        program = CachedWriter(self.planner, plan, emitter, tile, 0).write()
        writes = [Slot("result", i) for i in range(len(self.region.results))]
        if tile.split > 1:
            rows = int(product(a.extent for a in plan.rows))
            parts = product((pairs, tile.split, rows, 4))
            sizes = (product((parts, int(v.shape[3]))), product((parts, 2)), product((pairs, 4)))
            self.scratch = [("float32", sizes[0]), ("float32", sizes[1]), ("int32", sizes[2])]
            writes += [Slot("scratch", i) for i in range(3)]
        reads = [Slot("input", self.region.args.index(a)) for a in program.reads]
        reads.sort(key=lambda s: s.number)
        updates = [
            (w.result, reads.index(Slot("input", self.region.args.index(w.cache))))
            for w in plan.writes.values()
        ]
        self._launch(program, reads, writes, updates)
        self.launches[0].updates = updates
        code = KernelCode(self.name, self.launches, [size for _, size in self.scratch])
        code.zeroed = [2] if tile.split > 1 else []
        return code


def generate(
    name: str, region: Region, comment: str, sms: int, tile: CachedTile | None = None
) -> KernelCode:
    """The source of a region with one cached attention. Raises BackendError for what has none."""
    generator = CachedGenerator(name, region, comment, sms)
    generator.tile = tile
    return generator.run()
