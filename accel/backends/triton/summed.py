"""Kernels of kind "summed": rows, and sums over all rows of what is computed for them on the way.

The gradient of a norm's input needs sums along each row; those of its weight and bias, and of the
bias before it, need sums along all rows of the same elements. One kernel computes both from one
read: a program takes a strip of rows, a few at a time with all their columns (or, where no row is
reduced, some columns), stores what is asked for, and keeps running sums of the columns in
registers. What is left of a strip goes to scratch memory [strips * rows, columns]; a second launch
adds it up. All sums have one order.

A region's results are of two sorts: whole ones [..., columns], and sums over everything but the
columns, each with nothing after it but casts and reshapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from accel.backends.loops.index import Axis
from accel.backends.loops.phases import REDUCTIONS, Phase, Planner, Store, reduced_axes
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import Group, decompose
from accel.backends.triton.emitter import Emitter, Scope
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind, join_stores
from accel.backends.triton.program import Pass, Program, ProgramWriter
from accel.backends.triton.reductions import HELPERS, Reduction, Tile
from accel.backends.triton.text import COL, ROW, Block, Expr, Names
from accel.backends.triton.tiles import next_power
from accel.errors import BackendError
from accel.ir.builder import Builder
from accel.ir.module import Op, Region, Value, clone_region_into
from accel.ir.sums import column_sum
from accel.ir.types import product, same_shape

_SPAN = 256  # elements that a warp reads at once
_BLOCKS = 4  # of columns that a program has of a row that is reduced
_STEP = 4  # rows of a program at a time
_ADDED = (torch.float16, torch.bfloat16, torch.float32)  # all in float32


@dataclass(frozen=True)
class SummedTile:
    """Rows of a strip, and of one step through it; columns of one block, and warps.

    A program has all blocks of columns where rows are reduced, else one.
    """

    strip: int
    rows: int
    columns: int
    warps: int


def reason(kernel: Op) -> str | None:
    """None if there is code for an `accel.kernel` of this kind, else the reason why not."""
    region = Region([a.type for a in kernel.regions[0].args])
    clone_region_into(kernel.regions[0], region, {})
    try:
        take_sums(region)
        directions(_plan(Planner(region)))
    except BackendError as error:
        return error.what
    return None


def sum_below(value: Value) -> Op | None:
    """The sum over rows that a result is, if it is one that a program can keep in float32."""
    op = column_sum(value)
    return op if op is not None and op.result.dtype in _ADDED else None


def choose(rows: int, columns: int, reduced: bool, sms: int) -> SummedTile:
    """The tile of `rows` rows; `reduced`: a program needs all columns of a row.

    A warp or a few have a row of their own, whose sums they find without the other warps; a block
    is as wide as these warps read at once, 16 bytes of 16-bit elements a thread.
    """
    across = max(1, next_power(columns) // (_BLOCKS * _SPAN)) if reduced else 1
    wide = min(across * _SPAN, next_power(columns))
    step = min(_STEP, next_power(rows))
    warps = max(1, min(16, step * wide // _SPAN))
    parts = 1 if reduced else -(-columns // wide)
    if not reduced:
        step = min(2 * step, next_power(rows))  # more loads on their way
    programs = (2 if reduced else 6) * sms  # as many as run at once
    steps = -(-rows // (step * max(1, programs // parts)))
    return SummedTile(step * steps, step, wide, warps)


def candidates(kernel: Op, sms: int) -> list[SummedTile]:
    """Tiles worth timing."""
    whole = kernel.results[0]
    columns = int(whole.shape[-1])
    rows = int(product(whole.shape)) // columns
    usual = choose(rows, columns, _reduces_rows(kernel.regions[0]), sms)
    made = [replace(usual, strip=usual.strip * long // 2) for long in (1, 4)]
    made += [
        replace(usual, rows=usual.rows * high // 2, warps=max(1, usual.warps * high // 2))
        for high in (1, 4)
    ]
    return [t for t in made if t.rows and t.strip % t.rows == 0 and t.warps <= 16]


def _reduces_rows(region: Region) -> bool:
    return any(
        op.name in REDUCTIONS and (op.operands[0].type.rank - 1) in reduced_axes(op)
        for op in region.ops
    )


def generate(
    name: str, region: Region, comment: str, sms: int, tile: SummedTile | None = None
) -> KernelCode:
    """Two launches. Raises BackendError for a region of another form."""
    sums = take_sums(region)
    generator = SummedGenerator(name, region, comment, sms)
    generator.sums, generator.tile = sums, tile
    return generator.run()


def take_sums(region: Region) -> dict[int, torch.dtype]:
    """Makes the region return what sums add up instead of the sums; the dtype of each, by number.

    Every result then has the shape of the whole ones.
    """
    whole = next((v for v in region.results if sum_below(v) is None), None)
    if whole is None or not all(isinstance(d, int) for d in whole.shape):
        raise BackendError("a kernel of sums without a result of known size over all rows")
    end = region.terminator
    found: dict[int, torch.dtype] = {}
    for number, value in enumerate(list(region.results)):
        op = sum_below(value)
        if op is None:
            continue
        x = op.operands[0]
        if product(x.shape) != product(whole.shape) or x.shape[-1] != whole.shape[-1]:
            raise BackendError("a kernel of sums over other rows than it computes")
        if not same_shape(x.shape, whole.shape):
            x = Builder(before=end, location=op.location).reshape(x, shape=whole.shape)
        found[number] = value.dtype
        end.set_operand(number, x)
    return found


def _plan(planner: Planner) -> Phase:
    """The one phase of a region that returns what sums add up."""
    for _ in range(2):  # a later result may have split axes: then all are planned with these
        planner.phases.clear()
        planner.run()
        join_stores(planner.phases)
        if len(planner.phases) == 1 and not planner.scratch_values:
            return planner.phases[0]
    raise BackendError("a kernel of sums that takes more than one pass")


def directions(phase: Phase) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """The axes of rows and of columns, which all stores must share."""
    found = [frozenset(s.index[-1].axes) for s in phase.stores]
    if phase.reduces:
        found += [frozenset(r.axes) for r in phase.reduces]
        found += [frozenset(s.inner) for s in phase.stores]
    if len(set(found)) != 1:
        raise BackendError("a kernel of sums whose results have several kinds of columns")
    axes = (*phase.outer, *phase.stores[0].inner)
    along = tuple(a for a in axes if a in found[0])
    return tuple(a for a in axes if a not in found[0]), along


class SummedGenerator(Generator):
    """Plans the rows as any kernel's; `sums` are the numbers of results that are added up."""

    sums: dict[int, torch.dtype]
    tile: SummedTile | None = None

    def run(self) -> KernelCode:
        phase = _plan(self.planner)
        self.kind = index_kind(self.region, [])
        columns = int(self.region.results[0].shape[-1])
        writer = SummedWriter(phase, self._emitter(phase), self.sums, self.sms, self.tile)
        strips, program = writer.write_strips(columns)
        names = list(writer.partial)
        strips *= writer.constants["ROWS"]
        self.scratch = [("float32", 4 * strips * columns) for _ in names]
        reads, program = self._finish(phase, program)
        wholes = [Slot("result", s.place.number) for s in writer.wholes]
        parts = [Slot("scratch", n) for n in range(len(names))]
        self._launch(program, reads, [*wholes, *parts], [])
        ends = [Slot("result", number) for number in names]
        self._launch(self._total(names, strips, columns), parts, ends, [])
        return KernelCode(self.name, self.launches, [size for _, size in self.scratch])

    def _stored(self, slot: Slot) -> str:
        if slot.kind == "result" and slot.number in self.sums:
            return dtypes.storage(self.sums[slot.number])
        return super()._stored(slot)

    def _total(self, names: list[int], strips: int, columns: int) -> Program:
        """The second launch: the sum of all strips."""
        width, high = 16, min(256, next_power(strips))
        parts = -(-columns // width)
        block = Block(Names())
        block.line(f"col = (tl.program_id(0) % {parts}) * COLS + tl.arange(0, COLS)")
        block.line(f"which = tl.program_id(0) // {parts}")
        block.line(f"col_ok = col < {columns}")
        block.line("row = tl.arange(0, ROWS)[:, None]")
        for i, number in enumerate(names):
            one, body = Block(block.names), Block(block.names)
            one.line("total = tl.zeros([ROWS, COLS], tl.float32)")
            body.line(f"inside = (first + row < {strips}) & col_ok[None, :]")
            place = f"t{i} + (first + row) * {columns} + col[None, :]"
            body.line(f"total += tl.load({place}, mask=inside, other=0.0)")
            loop = "tl.static_range" if strips <= 8 * high else "range"
            one.nest(f"for first in {loop}(0, {strips}, ROWS):", body)
            made = Expr("tl.sum(total, axis=0)", "float32", frozenset((COL,)))
            stored = dtypes.to_storage(made, self.sums[number], one)
            one.line(f"tl.store(y{number} + col, {stored}, mask=col_ok)")
            block.nest(f"if which == {i}:", one)
        constants = {"ROWS": high, "COLS": width}
        return Program(block.source(), [], constants, parts * len(names), 4, [], False)


@dataclass
class _Blocks:
    """One block of columns: what varies with it alone, what varies with rows as well, its mask,
    its axes' places, and its variable."""

    alone: Scope
    within: Scope
    mask: str
    groups: list[tuple[Group, Expr]]
    name: str


class SummedWriter(ProgramWriter):
    """The first launch: strips of rows."""

    def __init__(
        self,
        phase: Phase,
        emitter: Emitter,
        sums: dict[int, torch.dtype],
        sms: int,
        tile: SummedTile | None,
    ) -> None:
        self.wholes = [s for s in phase.stores if s.place.number not in sums]
        added = [s for s in phase.stores if s.place.number in sums]
        ordered = replace(phase, stores=[*self.wholes, *added])
        self.partial = [s.place.number for s in added]
        targets = [f"y{s.place.number}" for s in self.wholes]
        targets += [f"t{i}" for i in range(len(added))]
        super().__init__(ordered, emitter, targets, sms)
        self.chosen = tile
        self.blocks: list[_Blocks] = []
        self.along: tuple[Axis, ...] = ()

    def write_strips(self, columns: int) -> tuple[int, Program]:
        """How many strips there are, and the program."""
        across, along = directions(self.phase)
        rows = product(a.extent for a in across)
        if not isinstance(rows, int) or product(a.extent for a in along) != columns:
            raise BackendError("a kernel of sums whose rows are not those that it stores")
        reduced = bool(self.phase.reduces)
        tile = self.chosen or choose(rows, columns, reduced, self.sms)
        strips, blocks = -(-rows // tile.strip), -(-columns // tile.columns)
        parts, mine = (1, blocks) if reduced else (blocks, 1)
        self.constants |= {"STRIP": tile.strip, "ROWS": tile.rows, "COLS": tile.columns}
        self.tile_rows = tile.rows
        block, emitter = self.emitter.block, self.emitter
        self._let("strip", self._wide(_part_of("//", parts)))
        body = Block(block.names)
        self.along = along
        for number in range(mine):
            first = _part_of("%", parts) if parts > 1 else str(number)
            start = "" if first == "0" else f"{self._wide(first)} * COLS + "
            whole = mine > 1 and (number + 1) * tile.columns <= columns
            self._bind_block(f"col_{number}", f"{start}{_span('COLS', 0, tile)}",
                             Scope(body, frozenset((*along, *across))),
                             tile.columns if whole else columns)  # fmt: skip
        with emitter.inside(Scope(body, frozenset(across))):
            self._bind_step(across, rows, tile)
            self._some_rows(along)
        block.nest("for step in range(0, STRIP, ROWS):", body)
        self._leave(columns, tile)
        return strips, Program(
            self.top.block.source(),
            [HELPERS[name] for name in sorted(self.helpers)],
            self.constants,
            strips * parts,
            tile.warps,
            list(emitter.used),
            emitter.checks,
        )

    def _bind_block(self, name: str, place: str, within: Scope, end: int) -> None:
        """A block of columns up to `end`, and zeros for what is added up there."""
        emitter, along, size = self.emitter, self.along, self.constants["COLS"]
        before, masks = list(emitter.addresses.groups), dict(emitter.masks)
        self._let(name, place)
        mask = self._limit(along, name, end, size)
        flat = Expr(name, emitter.kind, frozenset((COL,)))
        decompose(flat, self._merged(along), emitter.block, emitter.addresses)
        own = emitter.addresses.groups[len(before) :]
        alone = Scope(emitter.block, frozenset(along))
        self.blocks.append(_Blocks(alone, within, mask, own, name))
        emitter.addresses.groups, emitter.masks = before, masks
        shape = "[ROWS, COLS]" if self.tile_rows > 1 else "[COLS]"
        for i in range(len(self.partial)):
            self._let(f"sum_{i}_of_{name}", f"tl.zeros({shape}, tl.float32)")

    @contextmanager
    def _block(self, one: _Blocks) -> Iterator[None]:
        """What is written inside is about this block of columns."""
        emitter = self.emitter
        before, masks = list(emitter.addresses.groups), dict(emitter.masks)
        emitter.addresses.groups = [*before, *one.groups]
        if one.mask:
            emitter.masks.update(dict.fromkeys(self.along, one.mask))
        rows = emitter.scopes[-1]
        self.current = one
        emitter.scopes[-1:] = [one.alone, rows, one.within]
        try:
            yield
        finally:
            emitter.scopes[-3:] = [rows]
            emitter.addresses.groups, emitter.masks = before, masks

    def _bind_step(self, across: tuple[Axis, ...], rows: int, tile: SummedTile) -> None:
        """A few rows of the strip."""
        emitter = self.emitter
        several = f" + {_span('ROWS', 1, tile)}" if tile.rows > 1 else ""
        self._let("row", f"strip * STRIP + step{several}")
        self._limit(across, "row", rows, tile.strip)
        row = Expr("row", emitter.kind, frozenset((ROW,) if tile.rows > 1 else ()))
        decompose(row, self._merged(across), emitter.block, emitter.addresses)

    def _some_rows(self, along: tuple[Axis, ...]) -> None:
        """Everything that is read first, so that all of it is on its way; sums of rows; stores."""
        emitter = self.emitter
        for one in self.blocks if not self.survey.bounds else ():  # else some reads have conditions
            with self._block(one):
                for value, index in self.survey.costly:
                    if value in emitter.pointers:
                        emitter.element(value, index)
        passes = self._passes() if self.phase.reduces else [Pass(along, self.phase.stores)]
        for each in passes:
            tile = Tile("[ROWS, COLS]", 1, True) if self.tile_rows > 1 else Tile("[COLS]", 0, False)
            reductions = [Reduction(r, tile) for r in each.reduces]
            for reduction in reductions:
                reduction.start(emitter.block)
            for one in self.blocks if reductions else ():
                with self._block(one):
                    for reduce, reduction in zip(each.reduces, reductions, strict=True):
                        lane, place = self._operand(reduce)
                        reduction.step(lane, place, one.mask, emitter.block)
            for reduce, reduction in zip(each.reduces, reductions, strict=True):
                self._finish(reduce, reduction)
            for one in self.blocks if each.stores else ():
                with self._block(one):
                    for store in each.stores:
                        self._store(self.phase.stores.index(store), store)

    def _store(self, number: int, store: Store) -> None:
        if number < len(self.wholes):
            super()._store(number, store)
            return
        total = f"sum_{number - len(self.wholes)}_of_{self.current.name}"
        value = dtypes.cast(self.emitter.element(store.value, store.index), "float32")
        mask = self.emitter.mask(self._address(store).axes)
        text = f"tl.where({mask}, {total} + {value}, {total})" if mask else f"{total} + {value}"
        self.emitter.block.line(f"{total} = {text}")

    def _leave(self, columns: int, tile: SummedTile) -> None:
        """Writes the running sums as they are, a row of scratch memory for each of the tile's: to
        add them up here, warps would have to meet for every block of columns."""
        block = self.top.block
        row = f" + {_span('ROWS', 1, tile)}" if tile.rows > 1 else ""
        block.line(f"kept = (strip * ROWS{row}) * {columns}")
        for one in self.blocks:
            mask = f", mask={one.name} < {columns}" if one.mask else ""
            for i in range(len(self.partial)):
                block.line(f"tl.store(t{i} + kept + {one.name}, sum_{i}_of_{one.name}{mask})")


def _part_of(operator: str, parts: int) -> str:
    """This program's strip ("//"), or its block of columns ("%")."""
    if parts == 1:
        return "tl.program_id(0)" if operator == "//" else "0"
    return f"(tl.program_id(0) {operator} {parts})"


def _span(name: str, axis: int, tile: SummedTile) -> str:
    """A range of rows (axis 1 is new) or columns, as wide as the tile's."""
    text = f"tl.arange(0, {name})"
    if tile.rows == 1:
        return text
    return f"{text}[:, None]" if axis else f"{text}[None, :]"
