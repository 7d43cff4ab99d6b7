"""Writes the products of a mixture's experts: which rows a program has, then a linear's loop.

`FewWriter`: up to 64 rows, not sorted. There is a program for each row and block of columns; the
one of an expert's first row multiplies all of its rows (the others' lanes are masked, and cost no
traffic), the rest have nothing to do. So the weights of the experts that are asked for are read
once, and nothing has to be known before the launch.

`ManyWriter`: a launch before it (`routing`) has left the rows in order of their experts, and where
each expert's end. A tile is some rows of one expert; the grid has room for as many tiles as the
worst routing makes, and programs without one end at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from accel.backends.loops.index import Axis
from accel.backends.loops.merge import merged
from accel.backends.loops.trace import Index
from accel.backends.triton.addresses import decompose, size_text
from accel.backends.triton.emitter import Emitter, Scope
from accel.backends.triton.expert_plan import EXPERT, ExpertPlan
from accel.backends.triton.product_loop import MatmulWriter
from accel.backends.triton.program import Program
from accel.backends.triton.skinny_loop import SkinnyWriter
from accel.backends.triton.text import COL, Block, Expr
from accel.backends.triton.tiles import next_power, parts_of
from accel.ir.types import Dim, product, simplify_dim

ROWS_OK = "row_ok"
_CHUNK = 256  # rows of a program that sorts
_STEP = 2048  # rows that it counts at a time


class _ExpertRows(MatmulWriter):
    """What both writers share. Rows are in order of nothing, and masked by `ROWS_OK`."""

    plan: ExpertPlan

    @property
    def experts(self) -> int:
        return int(self.plan.op.operands[1].shape[0])

    def _bind(self, axes: Sequence[Axis], variable: str, dim: str, size: int) -> None:
        if variable != "row":
            super()._bind(axes, variable, dim, size)
            return
        bind_rows(self.plan, self.emitter, variable, dim)
        self.emitter.masks.update(dict.fromkeys(axes, ROWS_OK))

    def _bias(self, place: Index) -> Expr | None:
        bias = self.plan.op.arguments()[3]
        if bias is None:
            return None
        return self.emitter.element(bias, (self.plan.expert, place[-1]))

    def _wide(self, text: str) -> str:
        return f"({text}).to(tl.int64)" if self.emitter.kind == "int64" else text


def bind_rows(plan: ExpertPlan, emitter: Emitter, variable: str, dim: str) -> None:
    """The rows' axes follow from a variable that numbers them."""
    groups = merged(plan.rows, plan.survey.reads, plan.survey.fixed)
    dims = frozenset((dim,)) if dim else frozenset()
    flat = Expr(variable, emitter.kind, dims)
    decompose(flat, groups, emitter.block, emitter.addresses)


def expert_of(plan: ExpertPlan, emitter: Emitter, variable: str, dim: str, mask: str) -> Expr:
    """The number of a row's expert, as it is stored."""
    bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
    with emitter.inside(Scope(emitter.block, frozenset(plan.rows))):
        bind_rows(plan, emitter, variable, dim)
        if mask:
            emitter.masks.update(dict.fromkeys(plan.rows, mask))
        made = emitter.element(plan.op.operands[2], plan.chosen)
    emitter.addresses.groups, emitter.masks = bound, masks
    return made


def checked(emitter: Emitter, number: str, experts: int) -> None:
    """Reports a number that names no expert, which then counts as 0."""
    emitter.checks = True
    block = emitter.block
    block.line(f"wrong = ({number} < 0) | ({number} >= {experts})")
    block.line("tl.store(status + wrong.to(tl.int32) * 0, 1, mask=wrong)")
    block.line(f"{number} = tl.where(wrong, 0, {number})")


class FewWriter(_ExpertRows, SkinnyWriter):
    """Few rows: tiles of the weight's rows times all rows of x at once."""

    def write(self) -> Program:
        tile, top = self.tile, self.emitter.scopes[0]
        self._place()
        body = Block(top.block.names)
        with self.emitter.inside(Scope(body, frozenset())):
            self._compute(body)
        top.block.nest("if first == slot:", body)
        constants = {"ROWS": self.width, "COLS": tile.columns, "DEPTH": tile.depth,
                     "STAGES": tile.stages}  # fmt: skip
        if tile.split > 1:
            constants["SPLIT"] = tile.split
        return Program(top.block.source(), [], constants, self.tiles * tile.split, tile.warps,
                       list(self.emitter.used), self.emitter.checks)  # fmt: skip

    @property
    def tiles(self) -> int:
        return super().tiles * int(self.rows)

    def _compute(self, block: Block) -> None:
        sums = [f"acc_{i}" for i in range(len(self.plan.places))]
        for name in sums:
            block.line(f"{name} = tl.zeros([COLS, ROWS], tl.float32)")
        body = Block(block.names)
        self._step(body, sums)
        block.nest(f"for start in tl.range({self._bounds()}, DEPTH, num_stages=STAGES):", body)
        if self.tile.split == 1:
            self._finish(sums)
        else:
            self._share(sums)

    def _place(self) -> None:
        """The row and the block of columns of this program, and the rows with the same expert."""
        emitter, block = self.emitter, self.emitter.block
        count = int(self.rows)
        if self.tile.split == 1:
            block.line(f"tile = {self._wide('tl.program_id(0)')}")
        else:
            block.line(f"tile = {self._wide('tl.program_id(0)')} // SPLIT")
            block.line("part = tl.program_id(0) % SPLIT")
        block.line(f"slot = tile % {count}")
        block.line(f"col = tile // {count} * COLS + tl.arange(0, COLS)[:, None]")
        block.line(f"row = {self._wide('tl.arange(0, ROWS)[None, :]')}")
        block.line(f"given = row < {count}")
        own = expert_of(self.plan, emitter, "slot", "", "")
        block.line(f"{EXPERT} = {own}")
        all_ = expert_of(self.plan, emitter, "row", COL, "given")
        block.line(f"{ROWS_OK} = given & ({all_} == {EXPERT})")
        block.line(f"first = tl.min(tl.where({ROWS_OK}, row, ROWS))")
        checked(emitter, EXPERT, self.experts)
        block.line(f"{EXPERT} = {self._wide(EXPERT)}")


class ManyWriter(_ExpertRows):
    """Many rows: tiles of an expert's rows. Reads the scratch that `routing` leaves."""

    scratch = ("t0", "t1")  # rows by expert; where each expert's end

    def write(self) -> Program:
        emitter, tile = self.emitter, self.tile
        top = emitter.scopes[0]
        self._place()
        body = Block(top.block.names)
        with emitter.inside(Scope(body, frozenset())):
            self._rows(body)
            sums = [f"acc_{i}" for i in range(len(self.plan.places))]
            for name in sums:
                body.line(f"{name} = tl.zeros([ROWS, COLS], tl.float32)")
            inner = Block(body.names)
            self._step(inner, sums)
            head = f"for start in tl.range(0, {self.depth}, DEPTH, num_stages={tile.stages}):"
            body.nest(head, inner)
            self._finish(sums)
        top.block.nest(f"if {EXPERT} < {self.experts}:", body)
        constants = {"ROWS": tile.rows, "COLS": tile.columns, "DEPTH": tile.depth,
                     "GROUP": tile.group, "BINS": bins(self.experts)}  # fmt: skip
        across = parts_of(self.columns, tile.columns)
        programs = product((most_tiles(self.rows, self.experts, tile.rows), across))
        return Program(top.block.source(), [], constants, programs, tile.warps,
                       list(emitter.used), emitter.checks)  # fmt: skip

    def _place(self) -> None:
        """Which tile this program computes, and whose."""
        block = self.emitter.block
        down = size_text(most_tiles(self.rows, self.experts, self.tile.rows))
        across = size_text(parts_of(self.columns, self.tile.columns))
        block.line(f"part = {self._wide('tl.program_id(0)')}")
        block.line(f"begun = part // (GROUP * {across}) * GROUP")
        block.line(f"height = tl.minimum({down} - begun, GROUP)")
        block.line(f"inside = part % (GROUP * {across})")
        block.line("tile = begun + inside % height")
        block.line("col = inside // height * COLS + tl.arange(0, COLS)[None, :]")
        block.line("bin = tl.arange(0, BINS)")
        ends = self.scratch[1]
        block.line(f"end = tl.load({ends} + bin)")
        block.line(f"begin = tl.load({ends} + bin - 1, mask=bin > 0, other=0)")
        block.line(f"count = tl.where(bin < {self.experts}, (end - begin + ROWS - 1) // ROWS, 0)")
        block.line("passed = tl.cumsum(count, 0)")
        number = "tl.sum((passed <= tile).to(tl.int32), 0)"
        block.line(f"{EXPERT} = {self._wide(number)}")  # one type in and out of the branch

    def _rows(self, block: Block) -> None:
        """The rows of the tile: those from `start` on that are the expert's."""
        block.line(f"own = bin == {EXPERT}")
        block.line("low = tl.sum(tl.where(own, begin + (tile - passed + count) * ROWS, 0), 0)")
        block.line("high = tl.sum(tl.where(own, end, 0), 0)")
        block.line("place = low + tl.arange(0, ROWS)[:, None]")
        block.line(f"{ROWS_OK} = place < high")
        loaded = f"tl.load({self.scratch[0]} + place, mask={ROWS_OK}, other=0)"
        block.line(f"row = {self._wide(loaded)}")


def bins(experts: int) -> int:
    """Lanes for the experts, and one more for what is none."""
    return next_power(experts + 1)


def most_tiles(rows: Dim, experts: int, height: int) -> Dim:
    """The most tiles that any routing makes: each expert's last one may be nearly empty."""
    if isinstance(rows, int):
        some = min(rows, experts)
        return (rows - some) // height + some
    some = sympy.Min(rows, experts)
    return simplify_dim(sympy.floor((rows - some) / height) + some)


def routing(plan: ExpertPlan, emitter: Emitter, rows: Dim, experts: int) -> Program:
    """The rows in order of their experts (stable, so always the same), and where each's end.

    A program places a chunk of the rows: it counts all experts before the chunk and in all, and
    ranks the chunk's rows among themselves. Writes t0 [rows] and t1 [BINS], int32.
    """
    block, count = emitter.block, size_text(rows)
    wide = ".to(tl.int64)" if emitter.kind == "int64" else ""
    block.line(f"part = tl.program_id(0){wide}")
    block.line("bin = tl.arange(0, BINS)")
    block.line("total = tl.zeros([BINS], tl.int32)")
    block.line("before = tl.zeros([BINS], tl.int32)")
    body = Block(block.names)
    with emitter.inside(Scope(body, frozenset())):
        counted(plan, emitter, "start", count, experts)
        body.line("some = tl.histogram(number_all, BINS)")
        body.line("total += some")
        body.line("before += tl.where(start + STEP <= part * CHUNK, some, 0)")
    block.nest(f"for start in range(0, {count}, STEP):", body)
    block.line("split = part * CHUNK // STEP * STEP")
    counted(plan, emitter, "split", count, experts)
    block.line(f"earlier = tl.where(other < part * CHUNK, number_all, {experts})")
    block.line("before += tl.histogram(earlier, BINS)")
    block.line("ends = tl.cumsum(total, 0)")
    block.line("place = ends - total + before")
    block.line("mine = part * CHUNK + tl.arange(0, CHUNK)")
    block.line(f"valid = mine < {count}")
    number = expert_of(plan, emitter, "mine", COL, "valid")
    block.line(f"wrong = valid & (({number} < 0) | ({number} >= {experts}))")
    block.line("tl.store(status + wrong.to(tl.int32) * 0, 1, mask=wrong)")
    emitter.checks = True
    block.line(f"number = tl.where(valid & (wrong == 0), {number}, {experts}).to(tl.int32)")
    block.line("same = number[:, None] == bin[None, :]")
    block.line("low = tl.sum(tl.where(same, place[None, :], 0), 1)")
    block.line("twin = (number[:, None] == number[None, :]) & (mine[None, :] < mine[:, None])")
    block.line("rank = tl.sum(twin.to(tl.int32), 1)")
    block.line(f"placed = valid & (number < {experts})")
    block.line("tl.store(t0 + low + rank, mine, mask=placed)")
    block.line("tl.store(t1 + bin, ends, mask=(bin >= 0) & (part == 0))")
    constants = {"CHUNK": _CHUNK, "STEP": _STEP, "BINS": bins(experts)}
    return Program(block.source(), [], constants, parts_of(rows, _CHUNK), 8,
                   list(emitter.used), True)  # fmt: skip


def counted(plan: ExpertPlan, emitter: Emitter, start: str, rows: str, experts: int) -> None:
    """The experts of STEP rows from `start` on; what is none counts as one more."""
    block = emitter.block
    block.line(f"other = {start} + tl.arange(0, STEP)")
    block.line(f"known = other < {rows}")
    number = expert_of(plan, emitter, "other", COL, "known")
    block.line(f"fits = known & ({number} >= 0) & ({number} < {experts})")
    block.line(f"number_all = tl.where(fits, {number}, {experts}).to(tl.int32)")


__all__ = ["FewWriter", "ManyWriter", "most_tiles", "routing"]
