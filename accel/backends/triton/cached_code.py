"""The program of a cached attention kernel (see `cached`), written out."""

from __future__ import annotations

import math
from typing import Any

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.phases import Planner
from accel.backends.loops.trace import Index
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import size_text
from accel.backends.triton.cached_pages import find_page, row_of_page
from accel.backends.triton.cached_plan import Plan
from accel.backends.triton.cached_results import Results
from accel.backends.triton.cached_tiles import Span, Tiles, is_paged, is_stored
from accel.backends.triton.dependent import WAIT
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import next_power
from accel.ir.module import Value
from accel.ir.types import product

_LEAST_TILE = 16  # of a matrix product
_BOTH = frozenset((ROW, COL))
LOG2_E = math.log2(math.e)
_LARGEST_POSITION = (1 << 31) - (1 << 16)


class CachedWriter(Results):
    """Writes the one program of a cached attention kernel."""

    def __init__(
        self, planner: Planner, plan: Plan, emitter: Tiles, tile: Any, scratch: int
    ) -> None:
        self.planner, self.plan, self.emitter, self.tile = planner, plan, emitter, tile
        self.op, self.top = plan.op, emitter.scopes[0]
        self.q, self.k, self.v, self.position, self.mask, self.sinks = plan.op.arguments()
        self.parts = [f"t{scratch + i}" for i in range(3)] if tile.split > 1 else []
        self.ring = bool(plan.op.attribute("ring"))
        write = plan.writes.get(self.k)
        self.start = None if write is None else write.start
        self.count = product(int(a.extent) for a in plan.rows)
        self.depth, self.width = int(self.q.shape[3]), int(self.v.shape[3])
        self.tokens, self.capacity = int(self.q.shape[2]), int(self.k.shape[2])
        self.single = bool(plan.writes) and self.tokens == 1
        self.mine = "(part == 0)"  # who writes the new token
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
        if is_paged(self.k):
            self.emitter.wrong = "bad"  # whether a page was none: stored once, at the end
            line("bad = tl.zeros([KEYS, 1], tl.int1)")
            self._find_own("bad = bad | own_wrong")
        ahead = self._load("low", self.top.block)
        # Caches and position are older than the kernel before this one (`CachedGenerator.early`).
        line(f"{WAIT}()")
        with self._bound(self.rows):
            self.query = self._tile(self.q, (plan.lead[0], *plan.query), self.rows, "DEPTH")
        self._first_sum()
        line("sums = tl.zeros([ROWS, WIDTH], tl.float32)")
        if self.single:
            ahead = self._new_row(ahead)
        elif plan.writes:
            self._new_rows()
        self._attend_block("low", ahead, self.top.block)
        body = Block(self.top.block.names)
        self._attend_block("start", self._load("start", body), body)
        stages = f", num_stages={self.tile.stages}"
        self.top.block.nest(f"for start in tl.range(low + KEYS, high, KEYS{stages}):", body)
        if self.emitter.wrong:
            line("tl.store(status + bad.to(tl.int32) * 0, 1, mask=bad)")
            self.emitter.wrong = ""
        self._finish()
        pairs = product((self.q.shape[0], self.k.shape[1]))
        programs = product((pairs, self.tile.split))
        return Program(self.top.block.source(), [], self.constants, programs, self.tile.warps,
                       list(self.emitter.used), self.emitter.checks)  # fmt: skip

    def _first_sum(self) -> None:
        """The maximum and the sum before any key: none, or in the first part those of the sinks."""
        line = self.top.block.line
        line('top = tl.full([ROWS, 1], float("-inf"), tl.float32)')
        line("total = tl.zeros([ROWS, 1], tl.float32)")
        if self.sinks is not None:
            with self._bound(self.rows):
                sink = self.emitter.element(self.sinks, (self.plan.query[0],))
                self.emitter.block.line(f"top = tl.where(part == 0, {sink} * {LOG2_E!r}, top)")
            line("total = tl.where(part == 0, 1.0, total)")

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
        each = self.plan.lead[:1]  # a position for each text, if not one for all
        given = dtypes.cast(
            emitter.element(self.position, each[: len(self.position.shape)]), "int64"
        )
        last = self.capacity - self.tokens
        self.new = "at"  # the slot of the first new row
        if self.start is self.position:
            line(f"at = {self._checked(given, last)}.to(tl.int32)")
            line("end = at")
        else:
            most = _LARGEST_POSITION if self.ring else last
            line(f"at = tl.minimum(tl.maximum({given}, -{self.tokens}), {most}).to(tl.int32)")
            line(f"end = tl.minimum(at + {self.tokens}, {self.capacity})")
        if self.start is not None and self.start is not self.position:
            place = dtypes.cast(emitter.element(self.start, each[: len(self.start.shape)]), "int64")
            line(f"slot = {self._checked(place, last)}.to(tl.int32)")
            self.new = "slot"
        window = self.op.attribute("window")
        if window is None or self.ring:
            line("first = 0")
        else:
            line(f"first = tl.maximum(at - {int(window) - 1}, 0)")
        self._shares()

    def _shares(self) -> None:
        """The units from `low` to `high` of this program."""
        line = self.top.block.line
        # Unit u is key first + u; of a single new token, unit 0 is its own and the others follow.
        count = "(end - first + 1)" if self.single else "(end - first)"
        line(f"share = (({count} + KEYS - 1) // KEYS + SPLIT - 1) // SPLIT * KEYS")
        line("low = part * share")
        line(f"high = tl.minimum(low + share, {count})")

    def _checked(self, place: Expr, last: int) -> Expr:
        """The place if new rows fit there; else 0, and the kernel reports failure."""
        emitter = self.emitter
        place = emitter.block.let(str(place), "int64", place.dims, "place")
        return emitter._checked(place, "0", str(last), frozenset())

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

    def _tile(self, value: Value, lead: Index, rows: Span, size: str) -> Expr:
        """A tile of `value` as it is stored, with zeros where it has no elements.

        `lead` is the index of all but the last axis, over the axes of `rows`, which are bound.
        """
        emitter, columns = self.emitter, self.columns[size]
        with self._bound(columns):
            block = emitter.block
            emitter.raw = is_stored(value)
            made = emitter.element(value, (*lead, emitter.indexer.of(columns.axes[0])))
            masks = [s.mask for s in (rows, columns) if s.mask]
            if emitter.raw:  # zeros already, where the address depends on the masked axes
                masks = [m for m, s in ((rows.mask, rows), (columns.mask, columns))
                         if m and not s.axes]  # fmt: skip
            else:
                made = dtypes.to_storage(made, value.dtype, block)
            emitter.raw = False
            masked = {d for m, d in ((rows.mask, ROW), (columns.mask, COL)) if m in masks}
            if made.dims | masked != _BOTH:  # else the mask spreads it (Gluon has no broadcast_to)
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
            place = (
                f"({self._first(value)} + {self.new} + new) * {value.shape[3]} + {columns.variable}"
            )
            target = f"y{plan.writes[value].result}"
            block.line(f"tl.store({target} + {place}, {made}, mask={' & '.join(masks)})")
        block.line(f"newest = {self.new} + tl.arange(0, NEW)[None, :]")
        seen = f"(part == 0) & (newest < {self.new} + {self.tokens})"
        if self.new != "at":
            seen += " & (slot <= at)"
        self._attend(keys, values, "newest", seen, block)

    def _new_row(self, ahead: tuple[Expr, Expr]) -> tuple[Expr, Expr]:
        """The new token's key and value: stored by the first part, and its unit 0."""
        emitter, plan, block = self.emitter, self.plan, self.top.block
        made = []
        for value, tile, width in ((self.k, ahead[0], "DEPTH"), (self.v, ahead[1], "WIDTH")):
            columns, write = self.columns[width], plan.writes[value]
            with self._bound(columns):
                index = (*plan.lead, Affine(), emitter.indexer.of(columns.axes[0]))
                row = emitter.element(write.source, index)
                row = dtypes.to_storage(row, value.dtype, block)
                row = block.let(row.text, "stored", row.dims, "new")
            inside = columns.mask or f"({columns.variable} >= 0)"
            place = f"{self._own_row(value)} * {value.shape[3]} + {columns.variable}"
            mask = f"{self.mine} & {inside}"
            block.line(f"tl.store(y{write.result} + {place}, {row}, mask={mask})")
            hit = f"({self.unit} == 0) & {columns.mask}" if columns.mask else f"{self.unit} == 0"
            made.append(block.let(f"tl.where({hit}, {row}, {tile})", "stored", _BOTH, "tile"))
        return made[0], made[1]

    def _find_own(self, report: str) -> None:
        """The page of the new token, where this kernel writes it."""
        write = self.plan.writes.get(self.k)
        if write is not None and write.table is not None:
            found = find_page(self.emitter, write, self.new, report)
            self.mine = f"(part == 0) & {found}"

    def _own_row(self, value: Value) -> str:
        """The row of the cache or pool where the new token goes."""
        write = self.plan.writes[value]
        if write.table is not None:
            return row_of_page(write, self.new)
        return f"({self._first(value)} + {self.new})"

    def _first(self, value: Value) -> str:
        """The row of the cache [B, G, C, E] at which this head's begin, as source."""
        emitter = self.emitter
        flat = emitter.indexer.flatten((*self.plan.lead, Affine()), value.shape[:3])
        return f"({emitter.addresses.code(flat)})"

    def _load(self, start: str, block: Block) -> tuple[Expr, Expr]:
        """The keys and values of a block of units."""
        emitter, plan, fresh = self.emitter, self.plan, block.names.fresh
        self.unit, key, inside = fresh("unit"), fresh("key"), fresh("inside")
        block.line(f"{self.unit} = {start} + tl.arange(0, KEYS)[:, None]")
        shift = "first - 1" if self.single else "first"
        block.line(f"{key} = {self.unit} + ({shift})")
        other = "" if self.new == "at" else f" & ({key} != slot)"
        block.line(f"{inside} = ({self.unit} < high) & ({key} >= first){other}")
        axis = emitter.indexer.axis("t", self.capacity)
        span, made = Span((axis,), key, ROW, "KEYS", inside), []
        with self._bound(span, block=block):  # a key's page is looked up once
            for value, width in ((self.k, "DEPTH"), (self.v, "WIDTH")):
                write = plan.writes.get(value)
                straight = write is not None and write.table is None
                source = write.cache if write is not None and straight else value
                made.append(self._tile(source, (*plan.lead, emitter.indexer.of(axis)), span, width))
        return made[0], made[1]

    def _attend_block(self, start: str, tiles: tuple[Expr, Expr], block: Block) -> None:
        """Attends to a block of units."""
        unit, place = block.names.fresh("unit"), block.names.fresh("place")
        block.line(f"{unit} = {start} + tl.arange(0, KEYS)[None, :]")
        seen = f"({unit} < high)"
        if not self.single:
            block.line(f"{place} = first + {unit}")
        else:
            own = "at" if self.new == "at" else "slot"
            block.line(f"{place} = tl.where({unit} == 0, {own}, first - 1 + {unit})")
            if own == "slot":
                seen += f" & tl.where({unit} == 0, slot <= at, {place} != slot)"
        self._attend(*tiles, place, seen, block)

    def _attend(self, keys: Expr, values: Expr, place: str, seen: str, block: Block) -> None:
        """A tile of keys and values joins the running maximum and sums."""
        line, fresh = block.line, block.names.fresh
        score, weight, base = fresh("score"), fresh("weight"), fresh("base")
        line(f"{score} = tl.dot({self.query}, tl.trans({keys}){self.precision})")
        line(f"{score} = {score} * {float(self.op.attribute('scale'))!r}")
        cap = self.op.attribute("softcap")
        if cap is not None:
            line(f"{score} = libdevice.tanh({score} * {1.0 / float(cap)!r}) * {float(cap)!r}")
        keep = [seen, *self._band(place, block)]
        if self.mask is not None:
            mask = self._mask(place, seen, block)
            if self.mask.dtype == torch.bool:
                keep.append(f"({mask})")
            else:
                line(f"{score} = {score} + {mask}")
        hidden = 'float("-inf")'
        line(f"{score} = tl.where({' & '.join(keep)}, {score} * {LOG2_E!r}, {hidden})")
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

    def _band(self, place: str, block: Block) -> list[str]:
        """Conditions on the position of the key in a slot, and on the query's."""
        query, keep = "at", []
        if self.ring:  # the last position that is congruent to the slot
            last = f"(at + {self.tokens - 1})"
            name = block.names.fresh("held")
            block.line(f"{name} = {last} - ({last} - {place}) % {self.capacity}")
            place = name
            keep.append(f"({place} >= 0)")
        if self.tokens > 1:
            query = f"(at + row % {self.tokens})"
            keep.append(f"({place} <= {query})")
        window = self.op.attribute("window")
        if window is not None:
            keep.append(f"({place} > {query} - {int(window)})")
        return keep

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
