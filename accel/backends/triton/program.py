"""One phase of a kernel as one Triton program.

A program computes some rows (the phase's `outer` axes) with all their columns: reductions first, in
order of what needs what, then stores. Columns that fit a tile are held in registers from the first
reduction to the last store; more are read block by block, once for each pass over them. A phase
without reductions has no rows: all its axes that merge are one range, cut into blocks. Where it
reads memory across the direction in which it writes, two directions make a two-dimensional tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.merge import group_extent, merged
from accel.backends.loops.phases import Phase, Reduce, Store
from accel.backends.loops.survey import Survey
from accel.backends.triton import dtypes, online
from accel.backends.triton.addresses import Group, decompose, size_text
from accel.backends.triton.emitter import Emitter, Scope
from accel.backends.triton.maps import MapCode
from accel.backends.triton.reductions import HELPERS, Reduction, Tile
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import (
    MODEL_TILE,
    SHORT,
    Columns,
    Shape,
    choose_flat,
    choose_rows,
    parts_of,
)
from accel.ir.module import Value
from accel.ir.types import Dim, product


@dataclass
class Program:
    """Code of one launch.

    Attributes:
        lines: the body of the Triton function.
        helpers: functions for `tl.reduce` that it uses.
        constants: its compile-time parameters: block sizes.
        programs: how many programs to launch.
        reads: values it reads, in order; writes: positions in the phase's stores.
        checks: it reports indices out of range.
        maps: matrices that it copies a tile at a time.
        gluon: it is written in Gluon, Triton's dialect with layouts and barriers in sight.
    """

    lines: str
    helpers: list[str]
    constants: dict[str, int]
    programs: Dim
    warps: int
    reads: list[Value]
    checks: bool
    maps: tuple[MapCode, ...] = ()
    gluon: bool = False


@dataclass
class Pass:
    """Stores or reductions over one set of columns, and where they read and write."""

    axes: tuple[Axis, ...]
    stores: list[Store] = field(default_factory=list)
    reduces: list[Reduce] = field(default_factory=list)


_Held = tuple[Scope, str, list[tuple[Group, Expr]]]


class ProgramWriter:
    """Writes one phase."""

    def __init__(self, phase: Phase, emitter: Emitter, targets: Sequence[str], sms: int) -> None:
        self.phase, self.emitter, self.targets, self.sms = phase, emitter, targets, sms
        self.indexer = emitter.indexer
        self.top = emitter.scopes[0]
        self.kernel_tile = MODEL_TILE
        self.constants: dict[str, int] = {}
        self.helpers: set[str] = set()
        self.program = "tl.program_id(0)"  # which block of rows
        self.held: dict[frozenset[Axis], _Held] = {}  # columns that stay in registers
        self.survey = Survey(self.indexer, dict.fromkeys(phase.needs))
        for store in phase.stores:
            self.survey.element(store.value, store.index)
            self.survey.reads.append(self._address(store))
        for reduce in phase.reduces:
            self.survey.element(reduce.op.operands[0], reduce.source)

    def write(self) -> Program:
        programs, warps = self._rows() if self.phase.reduces else self._flat()
        return Program(
            self.top.block.source(),
            [HELPERS[name] for name in sorted(self.helpers)],
            self.constants,
            programs,
            warps,
            list(self.emitter.used),
            self.emitter.checks,
        )

    def _address(self, store: Store) -> Affine:
        return self.indexer.flatten(store.index, store.value.shape)

    def _merged(self, axes: Sequence[Axis]) -> list[Group]:
        survey = self.survey
        return merged(axes, [*survey.reads, *survey.bounds], survey.numbers)

    def _wide(self, text: str) -> str:
        if self.emitter.kind == "int64":
            return f"{text}.to(tl.int64)"
        return text.removeprefix("(").removesuffix(")") if text.startswith("(") else text

    def _let(self, name: str, text: str) -> None:
        self.emitter.block.line(f"{name} = {text}")

    def _limit(self, axes: Sequence[Axis], variable: str, extent: Dim, size: int) -> str:
        """The mask of a range that blocks of `size` may overrun; "" if they do not."""
        if isinstance(extent, int) and extent % size == 0 and extent:
            return ""
        name = f"{variable}_ok"
        self._let(name, f"{variable} < {size_text(extent)}")
        for axis in axes:
            self.emitter.masks[axis] = name
        return name

    # -- without reductions ----------------------------------------------------------------

    def _flat(self) -> tuple[Dim, int]:
        groups = self._merged(self.phase.outer)
        widest = max(s.value.dtype.itemsize for s in self.phase.stores)
        shape = choose_flat(groups, self.survey.reads, widest, self.sms, self.kernel_tile)
        if not groups:
            self._store_all()
            return 1, 1
        if shape.crossed is not None:
            return self._crossed(groups, shape), shape.warps
        self.constants["BLOCK"] = shape.columns
        total = product(group_extent(g) for g in groups)
        self._let("i", f"{self._wide('tl.program_id(0)')} * BLOCK + tl.arange(0, BLOCK)")
        self._limit(self.phase.outer, "i", total, shape.columns)
        flat = Expr("i", self.emitter.kind, frozenset((COL,)))
        decompose(flat, groups, self.emitter.block, self.emitter.addresses)
        with self.emitter.inside(self.emitter.column_scope(self.phase.outer)):
            self._store_all()
        return parts_of(total, shape.columns), shape.warps

    def _crossed(self, groups: list[Group], shape: Shape) -> Dim:
        """A tile of ROWS steps along the direction of reads and COLS along that of writes."""
        assert shape.crossed is not None
        across, along = shape.crossed, groups[-1]
        others = [g for g in groups if g is not across and g is not along]
        self.constants |= {"ROWS": shape.rows, "COLS": shape.columns}
        row_parts = parts_of(group_extent(across), shape.rows)
        col_parts = parts_of(group_extent(along), shape.columns)
        emitter = self.emitter
        self._let("part", self._wide("tl.program_id(0)"))
        self._let("row", f"(part % {size_text(row_parts)}) * ROWS + tl.arange(0, ROWS)[:, None]")
        self._let("part", f"part // {size_text(row_parts)}")
        self._let("col", f"(part % {size_text(col_parts)}) * COLS + tl.arange(0, COLS)[None, :]")
        self._let("part", f"part // {size_text(col_parts)}")
        self._limit(across, "row", group_extent(across), shape.rows)
        self._limit(along, "col", group_extent(along), shape.columns)
        decompose(Expr("part", emitter.kind), others, emitter.block, emitter.addresses)
        emitter.addresses.bind(across, Expr("row", emitter.kind, frozenset((ROW,))))
        emitter.addresses.bind(along, Expr("col", emitter.kind, frozenset((COL,))))
        with emitter.inside(emitter.column_scope(self.phase.outer)):
            self._store_all()
        return product((row_parts, col_parts, *(group_extent(g) for g in others)))

    def _store_all(self) -> None:
        for number, store in enumerate(self.phase.stores):
            self._store(number, store)

    def _store(self, number: int, store: Store) -> None:
        emitter = self.emitter
        value = emitter.element(store.value, store.index)
        if store.place.kind == "result":
            value = dtypes.to_storage(value, store.value.dtype, emitter.block)
        address = self._address(store)
        code = emitter.addresses.code(address)
        place = self.targets[number]
        place = place if code.text == "0" else f"{place} + {code}"
        mask = emitter.mask(address.axes)
        emitter.block.line(
            f"tl.store({place}, {value}, mask={mask})" if mask else f"tl.store({place}, {value})"
        )

    # -- with reductions -------------------------------------------------------------------

    def _rows(self) -> tuple[Dim, int]:
        groups = self._merged(self.phase.outer)
        passes = self._passes()
        sets = {frozenset(p.axes): p.axes for p in reversed(passes) if p.axes or p.reduces}
        columns = {key: Columns(axes, self._merged(axes)) for key, axes in sets.items()}
        count = product(group_extent(g) for g in groups)
        shape = self._shape(groups, columns)
        self._bind_rows(groups, shape.rows)
        for number, key in enumerate(columns):
            span = columns[key]
            span.name = f"COLS_{number}" if number else "COLS"
            self.constants[span.name] = span.size
        warps = shape.warps
        apart = [r for r in self.phase.reduces if r.level == 0]
        short = all(c.held and shape.rows * c.size <= SHORT for c in columns.values())
        if short and 1 < warps <= shape.rows and len(apart) == len(self.phase.reduces) > 1:
            warps //= 2  # a norm's gradient: sums that do not wait for each other
        while passes:
            one = passes.pop(0)
            own = columns.get(frozenset(one.axes))
            looped = own is not None and not own.held and shape.rows == 1
            pair = online.pair_of(one, passes[0]) if looped and passes else None
            if pair is not None and own is not None:
                online.write(self, pair, own)
                passes.pop(0)
                warps = max(1, shape.warps // 2)  # twice the elements a thread: loads on their way
            else:
                self._pass(one, own)
        return parts_of(count, shape.rows), warps

    def _shape(self, groups: list[Group], columns: Mapping[frozenset[Axis], Columns]) -> Shape:
        """The tile; sets the columns' sizes."""
        return choose_rows(groups, columns, self.survey.reads, self.sms, self.kernel_tile)

    def _bind_rows(self, groups: list[Group], rows: int) -> None:
        """The rows of this program: `row`, and each outer axis from it."""
        phase, emitter = self.phase, self.emitter
        self.tile_rows = rows
        row: Expr | None = None
        if rows > 1:
            self.constants["ROWS"] = rows
            self._let("row", f"{self._wide(self.program)} * ROWS + tl.arange(0, ROWS)[:, None]")
            self._limit(phase.outer, "row", product(a.extent for a in phase.outer), rows)
            row = Expr("row", emitter.kind, frozenset((ROW,)))
        elif groups:
            self._let("row", self._wide(self.program))
            row = Expr("row", emitter.kind)
        if row is not None:
            decompose(row, groups, emitter.block, emitter.addresses)
        self.top.axes = frozenset(phase.outer)

    def _passes(self) -> list[Pass]:
        """Reductions by what they need and over which axes, then stores."""
        found: dict[tuple[int, frozenset[Axis]], Pass] = {}
        for reduce in sorted(self.phase.reduces, key=lambda r: r.level):
            key = (reduce.level, frozenset(reduce.axes))
            found.setdefault(key, Pass(reduce.axes)).reduces.append(reduce)
        last = 1 + max(r.level for r in self.phase.reduces)
        for store in self.phase.stores:
            if store.inner:
                key = (last, frozenset(store.inner))
            else:
                key = (last + 1, frozenset())
            found.setdefault(key, Pass(store.inner)).stores.append(store)
        return [found[key] for key in sorted(found, key=lambda k: k[0])]

    def _tile(self, columns: Columns, reduce: Reduce) -> Tile:
        if self.tile_rows > 1:
            return Tile(f"[ROWS, {columns.name}]", 1, True)
        return Tile(f"[{columns.name}]", 0, False)

    def _pass(self, one: Pass, columns: Columns | None) -> None:
        if columns is None:  # one element a row
            for store in one.stores:
                self._store(self.phase.stores.index(store), store)
        elif columns.held:
            self._held_pass(one, columns)
        else:
            self._looped_pass(one, columns)

    def _range(self, columns: Columns, variable: str, base: str) -> None:
        """Binds the columns' axes to a block of positions, starting at `base`."""
        emitter = self.emitter
        span = f"tl.arange(0, {columns.name})"
        if self.tile_rows > 1:
            span = f"{span}[None, :]"
        self._let(variable, self._wide(f"({base} + {span})") if base else span)
        flat = Expr(variable, emitter.kind, frozenset((COL,)))
        decompose(flat, columns.groups, emitter.block, emitter.addresses)

    def _held_pass(self, one: Pass, columns: Columns) -> None:
        """All columns at once, in registers."""
        with self._held(one.axes, columns) as (scope, mask):
            for reduce in one.reduces:
                with self.emitter.inside(scope):
                    reduction = Reduction(reduce, self._tile(columns, reduce))
                    value, place = self._operand(reduce)
                    reduction.whole(value, place, mask, self.emitter.block)
                self._finish(reduce, reduction)
            with self.emitter.inside(scope):
                for store in one.stores:
                    self._store(self.phase.stores.index(store), store)

    @contextmanager
    def _held(self, axes: Sequence[Axis], columns: Columns) -> Iterator[tuple[Scope, str]]:
        """The columns' scope and mask, made at the first use and the same ever after."""
        emitter, key = self.emitter, frozenset(axes)
        bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
        if key not in self.held:
            variable = f"col{columns.name.removeprefix('COLS')}"
            self._range(columns, variable, "")
            mask = self._limit(axes, variable, columns.extent, columns.size)
            own = emitter.addresses.groups[len(bound) :]
            self.held[key] = (emitter.column_scope(axes), mask, own)
        scope, mask, own = self.held[key]
        emitter.addresses.groups = [*bound, *own]
        if mask:
            emitter.masks.update(dict.fromkeys(axes, mask))
        try:
            yield scope, mask
        finally:
            emitter.addresses.groups, emitter.masks = bound, masks

    def _looped_pass(self, one: Pass, columns: Columns) -> None:
        emitter = self.emitter
        reductions = [Reduction(r, self._tile(columns, r)) for r in one.reduces]
        for reduction in reductions:
            reduction.start(emitter.block)
        self._loop(one, columns, reductions)
        for reduce, reduction in zip(one.reduces, reductions):
            self._finish(reduce, reduction)

    def _loop(self, one: Pass, columns: Columns, reductions: Sequence[Reduction]) -> None:
        """The loop over blocks of columns."""
        names = self.emitter.block.names
        start, body = names.fresh("start"), Block(names)
        self._step(one, columns, reductions, start, body)
        self.emitter.block.nest(f"for {start} in {self._steps(columns)}:", body)

    def _step(
        self,
        one: Pass,
        columns: Columns,
        reductions: Sequence[Reduction],
        base: str,
        body: Block,
    ) -> None:
        """One block of columns, starting at `base`."""
        emitter = self.emitter
        bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
        variable = body.names.fresh("col")
        with emitter.inside(emitter.column_scope(one.axes, body)):
            self._range(columns, variable, base)
            mask = self._limit(one.axes, variable, columns.extent, columns.size)
            for reduce, reduction in zip(one.reduces, reductions):
                value, place = self._operand(reduce)
                reduction.step(value, place, mask, emitter.block)
            for store in one.stores:
                self._store(self.phase.stores.index(store), store)
        emitter.addresses.groups, emitter.masks = bound, masks

    def _steps(self, columns: Columns) -> str:
        """The loop over blocks of columns."""
        return f"range({self._bounds(columns)}, {columns.name})"

    def _bounds(self, columns: Columns) -> str:
        """Where this program's loop over columns starts and ends."""
        return f"0, {size_text(columns.extent)}"

    def _operand(self, reduce: Reduce) -> tuple[Expr, Expr | None]:
        value = self.emitter.element(reduce.op.operands[0], reduce.source)
        if reduce.op.name not in ("argmax", "argmin"):
            return value, None
        axis = int(reduce.op.attribute("axis")) % max(len(reduce.source), 1)
        return value, self.emitter.addresses.code(reduce.source[axis])

    def _finish(self, reduce: Reduce, reduction: Reduction) -> None:
        self.emitter.results[(reduce.op.result, reduce.index)] = reduction.finish(
            self.emitter.block
        )
        self.helpers |= reduction.helpers
