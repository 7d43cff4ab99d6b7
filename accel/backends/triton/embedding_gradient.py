"""Kernels of kind "embedding_gradient": a table's gradient, with what is done to it elementwise.

A row of the result is the sum of the gradients of the tokens that have read it: few rows have any.
No atomics, so the order of each sum is that of the tokens, and no sorting library: three launches.

- `RANK`: a token's place among all in the order of (id, place in the text) is how many of these
  pairs are smaller: all pairs are compared. That leaves `order` (tokens) and `ids`, sorted.
- `BOUNDS`: where each id's tokens start and end. Of a run that goes on from one block of `RUN`
  sorted tokens to the next, the next block's part is added up here, so that an id that is
  everywhere (a padding token, "the") costs no program thousands of steps.
- The table: some rows and columns a program. It adds up an id's first tokens, and the blocks after
  them, and computes what follows in the region: the gradient of a tied head is read and added here.

What BOUNDS leaves for an id that no token has is whatever lay in that memory: a start is believed
only if the sorted id there is the row's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from accel.backends.loops.index import Axis
from accel.backends.loops.merge import merged
from accel.backends.loops.phases import Planner
from accel.backends.loops.places import read_in_place
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import decompose
from accel.backends.triton.emitter import Emitter, Scope
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr, Names
from accel.backends.triton.tiles import next_power
from accel.errors import BackendError
from accel.ir.module import Op, Region, Value
from accel.ir.types import product

OPS = ("embedding_backward",)
RUN = 32  # sorted tokens that one program adds up
_MOST_TOKENS = 1 << 14  # all pairs are compared: 8192 tokens take 8 microseconds, time grows as n^2
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_RANK_TOKENS, _RANK_OTHERS = 32, 256
_ORDER, _IDS, _FIRST, _END, _RUNS = range(5)  # scratch buffers


def reason(op: Op) -> str | None:
    """None if a kernel of this kind may be built around the op, else the reason why not."""
    gradient, ids = op.operands
    count = product(ids.shape)
    if gradient.dtype not in _FLOATS:
        return f"an embedding's gradient of {gradient.dtype}"
    if not isinstance(count, int) or not all(isinstance(d, int) for d in op.result.shape):
        return "an embedding's gradient of symbolic size"
    if not 0 < count <= _MOST_TOKENS:
        return f"an embedding's gradient from {count} tokens"
    if 0 in op.result.shape or int(op.attribute("rows")) * count >= 1 << 62:
        return "an embedding's gradient for such a table"
    return None


@dataclass(frozen=True)
class TableTile:
    """Rows and columns of the table that one program makes, and its warps."""

    rows: int
    columns: int
    warps: int


def choose(width: int) -> TableTile:
    """A warp reads a row's columns at once: 16 bytes a thread in 16 bits."""
    columns = 256 if width % 256 == 0 else min(256, next_power(width))
    return TableTile(8, columns, max(1, 8 * columns // 512))


@dataclass(frozen=True)
class Plan:
    """The table's axes and index, and what is read there."""

    op: Op
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    index: Index
    survey: Survey


def plan(planner: Planner) -> Plan:
    """Plans a region whose results all have the table's shape, and read its gradient in place."""
    op = next(op for op in planner.region.ops if op.name in OPS)
    if any(v.op is not None for v in op.operands):
        raise BackendError("an embedding's gradient of what its own kernel computes")
    index, axes, survey = read_in_place(planner, op)
    rows = tuple(a for a in axes if a in index[0].axes)
    return Plan(op, rows, tuple(a for a in axes if a not in rows), index, survey)


class EmbeddingGradientGenerator(Generator):
    """Three launches."""

    tile: TableTile | None = None
    cut: list[str]  # masks of the table's rows and columns, where blocks overrun it

    def run(self) -> KernelCode:
        made = plan(self.planner)
        self.kind = index_kind(self.region, [])
        op, args = made.op, self.region.args
        gradient, ids = (Slot("input", args.index(v)) for v in op.operands)
        self.tokens = int(product(op.operands[1].shape))
        self.table, self.width = (int(d) for d in op.result.shape)
        runs = -(-self.tokens // RUN)
        counts = (self.tokens, self.tokens, self.table, self.table, runs * self.width)
        self.scratch = [("int32", 4 * n) for n in counts]
        self.scratch[_RUNS] = ("float32", 4 * counts[_RUNS])
        slots = [Slot("scratch", i) for i in range(len(counts))]
        self._launch(self._rank(ids.name), [ids], slots[:_FIRST], [])
        self._launch(self._bounds(op, gradient.name), [gradient, *slots[:_FIRST]],
                     slots[_FIRST:], [])  # fmt: skip
        reads, program = self._write_table(made)
        reads = sorted({*reads, gradient}, key=lambda s: s.number)
        writes = [Slot("result", i) for i in range(len(self.region.results))]
        self._launch(program, [*reads, *slots], writes, [])
        return KernelCode(self.name, self.launches, [size for _, size in self.scratch])

    def _rank(self, ids: str) -> Program:
        block, body = Block(Names()), Block(Names())
        wide = self.table * self.tokens >= 1 << 31
        kind, most = ("int64", (1 << 63) - 1) if wide else ("int32", (1 << 31) - 1)
        mask, inner = "", ""
        block.line("token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)")
        if self.tokens % _RANK_TOKENS:
            block.line(f"inside = token < {self.tokens}")
            mask = ", mask=inside"
        block.line(f"own = tl.load({ids} + token{mask})")
        block.line(f"key = own.to(tl.{kind}) * {self.tokens} + token")
        block.line("smaller = tl.zeros([TOKENS, OTHERS], tl.int32)")
        body.line("other = start + tl.arange(0, OTHERS)")
        if self.tokens % _RANK_OTHERS:
            inner = f", mask=other < {self.tokens}"
        body.line(f"beside = tl.load({ids} + other{inner}).to(tl.{kind}) * {self.tokens} + other")
        if inner:
            body.line(f"beside = tl.where(other < {self.tokens}, beside, {most})")
        body.line("smaller += (beside[None, :] < key[:, None]).to(tl.int32)")
        block.nest(f"for start in range(0, {self.tokens}, OTHERS):", body)
        block.line("place = tl.sum(smaller, axis=1)")
        block.line(f"tl.store(t{_ORDER} + place, token{mask})")
        block.line(f"tl.store(t{_IDS} + place, own.to(tl.int32){mask})")
        constants = {"TOKENS": _RANK_TOKENS, "OTHERS": _RANK_OTHERS}
        return Program(block.source(), [], constants, -(-self.tokens // _RANK_TOKENS), 4, [], False)

    def _bounds(self, op: Op, gradient: str) -> Program:
        last, width, padding = (
            self.tokens - 1,
            next_power(self.width),
            op.attribute("padding_index"),
        )
        block, body, more = (Block(Names()) for _ in range(3))
        cut = f", mask=col < {self.width}" if width != self.width else ""
        for line in (
            "run = tl.program_id(0)",
            "place = run * RUN + tl.arange(0, RUN)",
            f"inside = place <= {last}",
            f"own = tl.load(t{_IDS} + place, mask=inside, other=-1)",
            f"before = tl.load(t{_IDS} + tl.maximum(place - 1, 0), mask=inside, other=-1)",
            f"after = tl.load(t{_IDS} + tl.minimum(place + 1, {last}), mask=inside, other=-1)",
            f"wrong = inside & ((own < 0) | (own >= {self.table}))",
            "tl.store(status + wrong.to(tl.int32) * 0, 1, mask=wrong)",
            "starts = (place == 0) | (before != own)",
            f"ends = (place == {last}) | (after != own)",
            f"known = inside & (wrong == 0) & (own != {padding})",
            f"tl.store(t{_FIRST} + own, place, mask=known & starts)",
            f"tl.store(t{_END} + own, place + 1, mask=known & ends)",
            "head = tl.max(tl.where(place == run * RUN, own, -1), axis=0)",
            "goes_on = tl.max((known & (place == run * RUN) & (starts == 0)).to(tl.int32), axis=0)",
        ):
            block.line(line)
        more.line("count = tl.sum((inside & (own == head)).to(tl.int32), axis=0)")
        more.line("col = tl.arange(0, COLS)")
        more.line("total = tl.zeros([COLS], tl.float32)")
        body.line(f"token = tl.load(t{_ORDER} + run * RUN + step){self._wide}")
        body.line(f"total += tl.load({gradient} + token * {self.width} + col{cut}).to(tl.float32)")
        more.nest("for step in range(0, count):", body)
        more.line(f"tl.store(t{_RUNS} + run * {self.width} + col, total{cut})")
        block.nest("if goes_on > 0:", more)
        return Program(block.source(), [], {"RUN": RUN, "COLS": width}, -(-self.tokens // RUN), 4,
                       [], True)  # fmt: skip

    @property
    def _wide(self) -> str:
        return ".to(tl.int64)" if self.kind == "int64" else ""

    def _write_table(self, made: Plan) -> tuple[list[Slot], Program]:
        tile, self.cut = self.tile or choose(self.width), []
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        emitter = Emitter(self.planner.indexer, pointers, set(), self.kind)
        block, parts = emitter.block, -(-self.width // tile.columns)
        first = "tl.program_id(0)" if parts == 1 else f"(tl.program_id(0) // {parts})"
        start = "" if parts == 1 else f"(tl.program_id(0) % {parts}) * COLS + "
        block.line(f"row = {first}{self._wide} * ROWS + tl.arange(0, ROWS)[:, None]")
        block.line(f"col = {start}tl.arange(0, COLS)[None, :]")
        self._bind(emitter, made, "row", ROW, made.rows, self.table, tile.rows)
        self._bind(emitter, made, "col", COL, made.columns, self.width, tile.columns)
        both = frozenset((*made.rows, *made.columns))
        with emitter.inside(Scope(block, both)):
            for value, at in made.survey.costly:
                if value.op is None and not made.survey.bounds:  # which reads have conditions
                    emitter.element(value, at)  # on its way while the sums' loops run
            self._add_up(emitter, made)
            total = Expr("total", "float32", frozenset((ROW, COL)))
            total = dtypes.rounded(total, made.op.result.dtype, block)
            emitter.scopes[-1].known[made.op.result, made.index] = total
            for number, value in enumerate(self.region.results):
                self._store(emitter, made, number, value)
        slots = [Slot("input", self.region.args.index(v)) for v in emitter.used]
        constants = {"ROWS": tile.rows, "COLS": tile.columns}
        programs = -(-self.table // tile.rows) * parts
        return slots, Program(block.source(), [], constants, programs, tile.warps,
                              list(emitter.used), emitter.checks)  # fmt: skip

    def _bind(
        self,
        emitter: Emitter,
        made: Plan,
        name: str,
        dim: str,
        axes: tuple[Axis, ...],
        extent: int,
        size: int,
    ) -> None:
        if extent % size:
            self.cut.append(f"{name}_ok")
            emitter.block.line(f"{name}_ok = {name} < {extent}")
            emitter.masks.update(dict.fromkeys(axes, f"{name}_ok"))
        groups = merged(axes, made.survey.reads, made.survey.fixed)
        if groups:
            flat = Expr(name, emitter.kind, frozenset((dim,)))
            decompose(flat, groups, emitter.block, emitter.addresses)

    def _add_up(self, emitter: Emitter, made: Plan) -> None:
        """`total`: the sums of the program's rows and columns in float32."""
        block = emitter.block
        gradient = emitter.pointers[made.op.operands[0]]
        rows = ", mask=row_ok, other=-1" if "row_ok" in self.cut else ""
        cut = " & col_ok" if "col_ok" in self.cut else ""
        for line in (
            f"first = tl.load(t{_FIRST} + row{rows})",
            f"end = tl.load(t{_END} + row{rows})",
            f"there = (first >= 0) & (first < {self.tokens})",
            f"found = tl.load(t{_IDS} + first, mask=there, other=-1)",
            f"there = there & (found == row) & (row != {made.op.attribute('padding_index')})",
            "first = tl.where(there, first, 0)",
            "end = tl.where(there, end, 0)",
            f"near = tl.minimum(end, (first // {RUN} + 1) * {RUN})",
            "total = tl.zeros([ROWS, COLS], tl.float32)",
        ):
            block.line(line)
        near, far = Block(block.names), Block(block.names)
        near.line("taken = first + step < near")
        near.line(f"token = tl.load(t{_ORDER} + first + step, mask=taken, other=0){self._wide}")
        place = f"{gradient} + token * {self.width} + col"
        near.line(f"total += tl.load({place}, mask=taken{cut}, other=0.0).to(tl.float32)")
        block.nest("for step in range(0, tl.max(tl.max(near - first, axis=1), axis=0)):", near)
        block.line(f"runs = (end - near + {RUN - 1}) // {RUN}")
        place = f"t{_RUNS} + (near // {RUN} + step) * {self.width} + col"
        far.line(f"total += tl.load({place}, mask=(step < runs){cut}, other=0.0)")
        block.nest("for step in range(0, tl.max(tl.max(runs, axis=1), axis=0)):", far)

    def _store(self, emitter: Emitter, made: Plan, number: int, value: Value) -> None:
        block = emitter.block
        code = dtypes.to_storage(emitter.element(value, made.index), value.dtype, block)
        address = emitter.addresses.code(emitter.indexer.flatten(made.index, value.shape))
        place = f"y{number} + {address}"
        for dim, name in ((ROW, "row"), (COL, "col")):
            if dim not in address.dims:
                place = f"{place} + {name} * 0"
        tail = f", mask={' & '.join(self.cut)}" if self.cut else ""
        block.line(f"tl.store({place}, {code}{tail})")


def generate(name: str, region: Region, comment: str, sms: int, tile: Any = None) -> KernelCode:
    """The sources of a region with one embedding's gradient. Raises BackendError for others."""
    generator = EmbeddingGradientGenerator(name, region, comment, sms)
    generator.tile = tile
    return generator.run()
