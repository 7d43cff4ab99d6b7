"""Kernels of kind "scan": running sums and products along an axis, with what is around them.

A program takes a few rows and walks along them in blocks of COLS: each block is scanned at once
(`tl.cumsum`, a tree over the lanes) and joined to what came before. Elementwise ops before the scan
(a comparison, a cast) and after it (minus one) are traced on the same block, so that a row is read
once and written once. Few long rows, which would leave most of the device idle, are left to torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accel.backends.loops.index import Axis
from accel.backends.loops.merge import merged
from accel.backends.loops.phases import Planner
from accel.backends.loops.places import read_in_place
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import decompose, size_text
from accel.backends.triton.emitter import Emitter, Scope
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import next_power, parts_of
from accel.ir.module import Op, Region, Value
from accel.ir.types import Dim, product

OPS = ("cumsum", "cumprod")
_MOST_COLUMNS, _TILE = 2048, 4096
_LONG, _FEW_ROWS = 1 << 15, 16  # elements of a row: fewer rows are torch's

_PRODUCT = """@triton.jit
def _product(a, b):
    return a * b
"""


def reason(op: Op) -> str | None:
    """None if a kernel of kind "scan" may be built around this op, else the reason why not."""
    x, axis = op.operands[0], int(op.attribute("axis"))
    if x.type.rank == 0:
        return "a scan of a scalar"
    if x.dtype.is_complex:
        return f"a scan of {x.dtype}"
    axis %= x.type.rank
    length, count = x.shape[axis], product((*x.shape[:axis], *x.shape[axis + 1 :]))
    if length == 0 or count == 0:
        return "a scan of nothing"
    long = not isinstance(length, int) or length > _LONG
    if long and isinstance(count, int) and count < _FEW_ROWS:
        return f"a scan of {count} long rows"
    return None


@dataclass(frozen=True)
class Plan:
    """The axes of a scan, and where its operand and the results are."""

    op: Op
    rows: tuple[Axis, ...]
    along: tuple[Axis, ...]
    index: Index
    survey: Survey


def plan(planner: Planner) -> Plan:
    """Plans a region whose results all have the shape of its one scan, and are read where it is."""
    op = next(op for op in planner.region.ops if op.name in OPS)
    axis = int(op.attribute("axis")) % op.result.type.rank
    index, axes, survey = read_in_place(planner, op, op.operands[0])
    along = tuple(a for a in axes if a in index[axis].axes)
    return Plan(op, tuple(a for a in axes if a not in along), along, index, survey)


@dataclass(frozen=True)
class ScanTile:
    """Rows of one program, elements of one step, and how it is run."""

    rows: int
    columns: int
    warps: int


def choose(rows: Dim, length: Dim, sms: int) -> ScanTile:
    """The tile for `rows` rows of `length` elements."""
    columns = min(_MOST_COLUMNS, next_power(length) if isinstance(length, int) else _MOST_COLUMNS)
    count = rows if isinstance(rows, int) else 4096
    room = 1 << (max(1, count // (4 * sms)).bit_length() - 1)
    height = max(1, min(_TILE // columns, room, next_power(count)))
    return ScanTile(height, columns, max(1, min(8, height * columns // 256)))


class ScanWriter:
    """Writes the one program of a scan kernel."""

    def __init__(self, plan: Plan, emitter: Emitter, targets: list[str], tile: ScanTile) -> None:
        self.plan, self.emitter, self.targets, self.tile = plan, emitter, targets, tile

    def write(self, results: list[Value]) -> Program:
        emitter, tile, plan = self.emitter, self.tile, self.plan
        top = emitter.scopes[0]
        count, length = (product(a.extent for a in axes) for axes in (plan.rows, plan.along))
        wide = ".to(tl.int64)" if emitter.kind == "int64" else ""
        first = f"tl.program_id(0){wide} * ROWS"
        top.block.line(f"row = {first} + tl.arange(0, ROWS)[:, None]")
        self._bind("row", ROW, plan.rows, count, tile.rows)
        top.axes = frozenset(plan.rows)
        kind = dtypes.compute(plan.op.result.dtype)
        sums = plan.op.name == "cumsum"
        top.block.line(f"before = tl.full([ROWS, 1], {0 if sums else 1}, tl.{kind})")
        body = Block(top.block.names)
        with emitter.inside(Scope(body, frozenset((*plan.rows, *plan.along)))):
            body.line("col = start + tl.arange(0, COLS)[None, :]")
            self._bind("col", COL, plan.along, length, tile.columns)
            self._scan(body, kind, sums)
            for target, value in zip(self.targets, results, strict=True):
                self._store(target, value)
        top.block.nest(f"for start in range(0, {size_text(length)}, COLS):", body)
        constants = {"ROWS": tile.rows, "COLS": tile.columns}
        return Program(top.block.source(), [] if sums else [_PRODUCT], constants,
                       parts_of(count, tile.rows), tile.warps, list(emitter.used),
                       emitter.checks)  # fmt: skip

    def _bind(self, name: str, dim: str, axes: tuple[Axis, ...], extent: Dim, size: int) -> None:
        emitter = self.emitter
        if not isinstance(extent, int) or extent % size:
            emitter.block.line(f"{name}_ok = {name} < {size_text(extent)}")
            emitter.masks.update(dict.fromkeys(axes, f"{name}_ok"))
        groups = merged(axes, self.plan.survey.reads, self.plan.survey.fixed)
        flat = Expr(name, emitter.kind, frozenset((dim,)))
        if groups:
            decompose(flat, groups, emitter.block, emitter.addresses)

    def _scan(self, body: Block, kind: str, sums: bool) -> None:
        """One block: what it adds, its own scan, and what comes before."""
        emitter, plan = self.emitter, self.plan
        made = emitter.element(plan.op.operands[0], plan.index)
        made = dtypes.convert(made, plan.op.operands[0].dtype, plan.op.result.dtype, body)
        unit = 0 if sums else 1
        body.line(f"x = {made} + tl.zeros([ROWS, COLS], tl.{kind})")
        if any(a in emitter.masks for a in plan.along):
            body.line(f"x = tl.where(col_ok, x, {unit})")
        sign, scan = ("+", "tl.cumsum") if sums else ("*", "tl.cumprod")
        whole = (
            "tl.sum(x, axis=1, keep_dims=True)"
            if sums
            else ("tl.reduce(x, 1, _product, keep_dims=True)")
        )
        body.line(f"run = {scan}(x, axis=1) {sign} before")
        body.line(f"before = before {sign} {whole}")
        value = Expr("run", kind, frozenset((ROW, COL)))
        value = dtypes.rounded(value, plan.op.result.dtype, body)
        emitter.scopes[-1].known[plan.op.result, plan.index] = value

    def _store(self, target: str, value: Value) -> None:
        emitter, index = self.emitter, self.plan.index
        made = dtypes.to_storage(emitter.element(value, index), value.dtype, emitter.block)
        address = emitter.indexer.flatten(index, value.shape)
        mask = " & ".join(n for n in ("row_ok", "col_ok") if n in emitter.masks.values())
        code = emitter.addresses.code(address)
        place = f"{target} + {code}"
        for dim, name in ((ROW, "row"), (COL, "col")):
            if dim not in code.dims:
                place = f"{place} + {name} * 0"
        tail = f", mask={mask}" if mask else ""
        emitter.block.line(f"tl.store({place}, {made}{tail})")


class ScanGenerator(Generator):
    """A scan kernel: one launch."""

    def run(self) -> KernelCode:
        made = plan(self.planner)
        self.kind = index_kind(self.region, [])
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        emitter = Emitter(self.planner.indexer, pointers, set(), self.kind)
        writes = [Slot("result", i) for i in range(len(self.region.results))]
        rows, length = (product(a.extent for a in axes) for axes in (made.rows, made.along))
        tile = choose(rows, length, self.sms)
        writer = ScanWriter(made, emitter, [w.name for w in writes], tile)
        program = writer.write(list(self.region.results))
        reads = [Slot("input", self.region.args.index(v)) for v in program.reads]
        reads.sort(key=lambda s: (s.kind, s.number))
        self._launch(program, reads, writes, [])
        return KernelCode(self.name, self.launches, [])


def generate(name: str, region: Region, comment: str, sms: int, tile: Any = None) -> KernelCode:
    """The source of a region with one scan. Raises BackendError for what has none."""
    return ScanGenerator(name, region, comment, sms).run()
