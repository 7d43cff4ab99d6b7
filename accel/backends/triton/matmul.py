"""Kernels of kind "matmul": linears of many rows on tensor cores, with what follows on the tile.

A program computes a tile of ROWS x COLS results in registers: for every DEPTH of K it multiplies a
tile of x with one of the weight (`tl.dot`), several blocks of memory in flight. Then the epilogue
(bias, activation, residual; several results; gate times up as two tiles) is traced on the tile as
any elementwise kernel. Neighbouring programs share rows of the weight or of x, so tiles go by in
groups of GROUP rows of tiles (Triton's matmul tutorial calls it L2 locality).

The vendor's library multiplies faster; what a generated kernel saves is the epilogue's traffic and
launch. `saves` compares the two on rates that were measured, and says no where they do not pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.merge import merged
from accel.backends.loops.phases import Planner
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import decompose, size_text
from accel.backends.triton.emitter import Scope
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import next_power, parts_of
from accel.errors import BackendError
from accel.ir.module import Op, Region, Value
from accel.ir.op import Trait
from accel.ir.types import Dim, product

_MAX_ROUNDS = 8
_MOST_TILES = 2  # accumulators of a program
_SYMBOLIC_ROWS = 4096


@dataclass(frozen=True)
class MatmulTile:
    """Results of one program, the part of K of one step, and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int = 3
    group: int = 8


def reason(op: Op) -> str | None:
    """None if a kernel of kind "matmul" may be built around this op, else the reason why not."""
    if op.name != "linear":
        return f"accel.{op.name} has no generated code"
    x, weight, _ = op.arguments()
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"a product of {x.dtype}"
    if not all(isinstance(d, int) and d > 0 for d in weight.shape):
        return "a weight of symbolic size, or none"
    if product(x.shape[:-1]) in (0, 1) or weight.shape[0] == 1:
        return "a product of one row or column, or of none"
    return None


def choose(rows: Dim, columns: int, depth: int, tiles: int, sms: int) -> MatmulTile:
    """The tile for `rows` x `columns` results, `tiles` accumulators each."""
    count = rows if isinstance(rows, int) else _SYMBOLIC_ROWS
    if count <= _FEW_ROWS:
        best = MatmulTile(max(16, next_power(count)), 32, 128, 4, 5)
    else:
        for waves, best in _TILES:
            wide = best.columns // tiles
            if -(-count // best.rows) * -(-columns // wide) >= sms * waves:
                break
    span = min(best.depth, max(16, next_power(depth)))
    return MatmulTile(best.rows, max(16, best.columns // tiles), span, best.warps, best.stages)


def candidates(kernel: Op, sms: int) -> list[MatmulTile]:
    """Tiles worth timing for a kernel; `columns` is shared by its accumulators."""
    op = next(op for op in kernel.regions[0].ops if op.name == "linear")
    x, weight, _ = op.arguments()
    rows, columns = product(x.shape[:-1]), int(weight.shape[0])
    tallest = max(16, next_power(rows)) if isinstance(rows, int) else 256
    halves = 1 + any(o.name == "slice" for o in kernel.regions[0].ops)
    depth = max(16, next_power(int(x.shape[-1])))
    return [
        MatmulTile(height, width // halves, min(span, depth), warps, stages)
        for height, width, span, warps, stages in _WORTH_TIMING
        if height <= tallest and width <= next_power(columns) and width // halves >= 16
    ]


# rows, columns, depth, warps, stages
_WORTH_TIMING = (
    (128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4),
    (64, 256, 64, 4, 3), (64, 64, 128, 4, 4), (64, 64, 64, 4, 5), (256, 128, 64, 8, 3),
    (64, 32, 128, 4, 5), (128, 64, 64, 4, 4), (32, 128, 128, 4, 4), (32, 64, 128, 4, 5),
    (16, 128, 128, 4, 4), (16, 64, 128, 4, 5), (16, 32, 256, 4, 5), (16, 32, 128, 4, 6),
)  # fmt: skip


# From the largest down; the first that fills the multiprocessors to its share of a wave is taken.
# Measured on an H200 with K = 768 and 3072: smaller problems are bound by the latency of the loop
# over K, for which deep pipelines of long steps are best (benchmarks/results/gpu_products.json).
_TILES = (
    (1.0, MatmulTile(128, 256, 64, 8, 3)),
    (1.0, MatmulTile(64, 128, 64, 4, 3)),
    (0.5, MatmulTile(64, 64, 128, 4, 5)),
    (0.0, MatmulTile(64, 32, 128, 4, 5)),
)
_FEW_ROWS = 32  # tiles no taller than this: the weight's stream is the limit


# -- whether it pays -------------------------------------------------------------------------

_LIBRARY_RATE, _OWN_RATE = 580e12, 380e12  # FLOP/s of 16-bit products, measured on an H200
_BANDWIDTH = 4.3e12  # bytes/s, likewise
_LAUNCH = 1.5e-6  # seconds from one kernel of a CUDA graph to the next
_DEFAULT_SMS = 132


def saves(op: Op, members: Sequence[Op], sms: int) -> str | None:
    """Why cuBLAS and kernels for the rest are faster than one kernel; None if they are not.

    The library computes `op` alone. An epilogue in `members` then needs a launch, a read of the
    result and a write; so does the decoding of a compressed weight. A lone addition needs nothing:
    the next norm reads both of its operands anyway. Against that stand the two rates of
    multiplication, and that a second wave of tiles costs as much as the first.
    """
    x, weight, _ = op.arguments()
    rest = [m for m in members if m is not op and m.name not in ("slice", "add")]
    decoded = weight.op is not None and weight.op.name != "constant"
    if not rest and not decoded:
        return "an epilogue that saves no launch"
    rows, columns, depth = product(x.shape[:-1]), int(weight.shape[0]), int(x.shape[-1])
    if not isinstance(rows, int):
        return "an unknown number of rows"
    flops, width = 2 * rows * columns * depth, x.dtype.itemsize
    lost = (flops / _OWN_RATE - flops / _LIBRARY_RATE) * _DEFAULT_SMS / sms
    saved = 0.0
    if rest:
        saved += _LAUNCH + 2 * rows * columns * width / _BANDWIDTH
    if decoded:
        saved += _LAUNCH + 2 * columns * depth * width / _BANDWIDTH
    if lost >= saved:
        return f"cuBLAS saves {1e6 * lost:.1f} us, one kernel {1e6 * saved:.1f} us"
    halves = 1 + any(m.name == "slice" for m in members)
    results = columns // halves
    tile = choose(rows, results, depth, halves, sms)
    count = -(-rows // tile.rows) * -(-results // tile.columns)
    if count > sms and not decoded:
        return f"{count} tiles on {sms} multiprocessors"
    return None


# -- the plan --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which axes there are, and the elements of the linear's result that one result needs."""

    op: Op
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    left: tuple[Axis, ...]  # K as x is read
    right: tuple[Axis, ...]  # K as the weight is read
    stores: tuple[tuple[Value, Index], ...]
    places: tuple[Index, ...]
    x_index: Index
    weight_indices: tuple[Index, ...]
    survey: Survey


def plan(planner: Planner) -> Plan:
    """Plans a region with one linear whose results all have its rows."""
    region, indexer = planner.region, planner.indexer
    op = next(op for op in region.ops if op.name == "linear")
    x, weight, _ = op.arguments()
    shape = region.results[0].shape
    if any(r.shape != shape for r in region.results) or shape[:-1] != op.result.shape[:-1]:
        raise BackendError("a matmul kernel whose results differ in shape")
    lead = [indexer.axis(f"m{i}", d) for i, d in enumerate(shape[:-1])]
    column = indexer.axis("n", shape[-1])
    left, right = indexer.axis("k", x.shape[-1]), indexer.axis("k", x.shape[-1])

    def of(axis: Axis) -> tuple[Affine, tuple[Axis, ...]]:
        return planner._as_index(axis) if axis.extent != 1 else (Affine(), ())

    for _ in range(_MAX_ROUNDS):
        survey = Survey(indexer, {op.result: None})
        index = tuple(of(a)[0] for a in (*lead, column))
        for value in region.results:
            survey.element(value, index)
        places = tuple(at for value, at in survey.costly if value is op.result)
        x_index = (*index[:-1], of(left)[0])
        weights = tuple((at[-1], of(right)[0]) for at in places)
        operands = Survey(indexer, {})
        operands.element(x, x_index)
        for at in weights:
            operands.element(weight, at)
        if planner.apply_splits():
            continue
        if not 0 < len(places) <= _MOST_TILES or any(p[:-1] != index[:-1] for p in places):
            raise BackendError("a matmul kernel that reads its product at other rows")
        survey.reads += operands.reads
        survey.fixed |= operands.fixed
        rows = tuple(axis for a in lead for axis in of(a)[1])
        stores = tuple((value, index) for value in region.results)
        return Plan(op, rows, of(column)[1], of(left)[1], of(right)[1], stores, places, x_index,
                    weights, survey)  # fmt: skip
    raise BackendError("a matmul kernel whose index does not come to rest")


# -- the code --------------------------------------------------------------------------------


class MatmulWriter:
    """Writes the one program of a matmul kernel."""

    def __init__(
        self, plan: Plan, emitter: StoredOperands, targets: Sequence[str], tile: MatmulTile
    ):
        self.plan, self.emitter, self.targets, self.tile = plan, emitter, targets, tile
        self.rows: Dim = product(a.extent for a in plan.rows)
        self.columns = product(a.extent for a in plan.columns)
        self.depth = int(product(a.extent for a in plan.left))

    def write(self) -> Program:
        emitter, tile = self.emitter, self.tile
        top = emitter.scopes[0]
        self._place()
        tops = [f"acc_{i}" for i in range(len(self.plan.places))]
        for name in tops:
            top.block.line(f"{name} = tl.zeros([ROWS, COLS], tl.float32)")
        body = Block(top.block.names)
        self._step(body, tops)
        head = f"for start in tl.range(0, {self.depth}, DEPTH, num_stages={tile.stages}):"
        top.block.nest(head, body)
        self._finish(tops)
        programs = product((parts_of(self.rows, tile.rows), parts_of(self.columns, tile.columns)))
        constants = {"ROWS": tile.rows, "COLS": tile.columns, "DEPTH": tile.depth,
                     "GROUP": tile.group}  # fmt: skip
        return Program(top.block.source(), [], constants, programs, tile.warps,
                       list(emitter.used), emitter.checks)  # fmt: skip

    def _place(self) -> None:
        """Which tile this program computes."""
        block, wide = self.emitter.block, ""
        if self.emitter.kind == "int64":
            wide = ".to(tl.int64)"
        down = size_text(parts_of(self.rows, self.tile.rows))
        across = size_text(parts_of(self.columns, self.tile.columns))
        block.line(f"part = tl.program_id(0){wide}")
        block.line(f"first = part // (GROUP * {across}) * GROUP")
        block.line(f"height = tl.minimum({down} - first, GROUP)")
        block.line(f"inside = part % (GROUP * {across})")
        block.line("row = (first + inside % height) * ROWS + tl.arange(0, ROWS)[:, None]")
        block.line("col = inside // height * COLS + tl.arange(0, COLS)[None, :]")

    def _bind(self, axes: Sequence[Axis], variable: str, dim: str, size: int) -> None:
        """Axes of a range of positions, and the mask where blocks of `size` overrun it."""
        emitter, extent = self.emitter, product(a.extent for a in axes)
        if not axes:
            return
        groups = merged(axes, self.plan.survey.reads, self.plan.survey.fixed)
        flat = Expr(variable, emitter.kind, frozenset((dim,)))
        decompose(flat, groups, emitter.block, emitter.addresses)
        if not isinstance(extent, int) or extent % size:
            name = f"{variable}_ok"
            emitter.block.line(f"{name} = {variable} < {size_text(extent)}")
            for axis in axes:
                emitter.masks[axis] = name

    def _step(self, body: Block, sums: Sequence[str]) -> None:
        """One block of K: x's tile, and one of the weight for each accumulator."""
        plan, tile, emitter = self.plan, self.tile, self.emitter
        x, weight, _ = plan.op.arguments()
        bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
        known = frozenset((*plan.rows, *plan.left))
        with emitter.inside(Scope(body, known)):
            body.line("k = start + tl.arange(0, DEPTH)[None, :]")
            self._bind(plan.rows, "row", ROW, tile.rows)
            self._bind(plan.left, "k", COL, tile.depth)
            left = self._operand(x, plan.x_index, "[ROWS, DEPTH]", plan.left)
        emitter.addresses.groups, emitter.masks = list(bound), dict(masks)
        with emitter.inside(Scope(body, frozenset((*plan.columns, *plan.right)))):
            body.line("depth = start + tl.arange(0, DEPTH)[:, None]")
            self._bind(plan.columns, "col", COL, tile.columns)
            self._bind(plan.right, "depth", ROW, tile.depth)
            for name, index in zip(sums, plan.weight_indices, strict=True):
                right = self._operand(weight, index, "[DEPTH, COLS]", plan.right)
                body.line(f"{name} = tl.dot({left}, {right}, {name})")
        emitter.addresses.groups, emitter.masks = bound, masks

    def _operand(self, value: Value, index: Index, shape: str, summed: Sequence[Axis]) -> Expr:
        emitter = self.emitter
        emitter.raw = _is_stored(value)
        made = emitter.element(value, index)
        mask = next((emitter.masks[a] for a in summed if a in emitter.masks), "")
        if not emitter.raw:
            made = dtypes.to_storage(made, value.dtype, emitter.block)
            text = f"tl.where({mask}, {made}, 0.0)" if mask else str(made)
            made = emitter.block.let(text, "stored", made.dims, "operand")
        emitter.raw = False
        if made.dims != frozenset((ROW, COL)):
            text = f"tl.broadcast_to({made}, {shape})"
            made = emitter.block.let(text, "stored", frozenset((ROW, COL)), "operand")
        return made

    def _finish(self, sums: Sequence[str]) -> None:
        """The epilogue on the tile."""
        plan, tile, emitter = self.plan, self.tile, self.emitter
        block, both = emitter.block, frozenset((ROW, COL))
        bias = plan.op.arguments()[2]
        with emitter.inside(Scope(block, frozenset((*plan.rows, *plan.columns)))) as _:
            scope = emitter.scopes[-1]
            self._bind(plan.rows, "row", ROW, tile.rows)
            self._bind(plan.columns, "col", COL, tile.columns)
            for name, place in zip(sums, plan.places, strict=True):
                value = Expr(name, "float32", both)
                if bias is not None:
                    added = emitter.element(bias, place[-1:])
                    value = block.let(f"{value} + {added}", "float32", both, "add")
                value = dtypes.rounded(value, plan.op.result.dtype, block)
                made = block.let(str(value), "float32", both, "linear")
                scope.known[(plan.op.result, place)] = made
            for target, (value_, index) in zip(self.targets, plan.stores, strict=True):
                self._store(target, value_, index)

    def _store(self, target: str, value: Value, index: Index) -> None:
        emitter = self.emitter
        made = emitter.element(value, index)
        made = dtypes.to_storage(made, value.dtype, emitter.block)
        address = emitter.indexer.flatten(index, value.shape)
        mask = emitter.mask(address.axes)
        tail = f", mask={mask}" if mask else ""
        code = emitter.addresses.code(address)
        emitter.block.line(f"tl.store({target} + {code}, {made}{tail})")


def _is_stored(value: Value) -> bool:
    """Whether an element is one load of a 16-bit float: an argument, behind views or not."""
    while value.op is not None and value.op.has(Trait.VIEW):
        value = value.op.operands[0]
    return value.op is None


class MatmulGenerator(Generator):
    """A matmul kernel: one launch."""

    tile: MatmulTile | None = None

    def run(self) -> KernelCode:
        made = plan(self.planner)
        self.kind = index_kind(self.region, [])
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        emitter = StoredOperands(self.planner.indexer, pointers, set(), self.kind)
        writes = [Slot("result", i) for i in range(len(made.stores))]
        rows, columns = made.op.result.shape[:-1], made.stores[0][0].shape[-1]
        depth, tiles = int(made.op.operands[0].shape[-1]), len(made.places)
        tile = self.tile or choose(product(rows), int(columns), depth, tiles, self.sms)
        program = MatmulWriter(made, emitter, [w.name for w in writes], tile).write()
        reads = [Slot("input", self.region.args.index(v)) for v in program.reads]
        reads.sort(key=lambda s: (s.kind, s.number))
        self._launch(program, reads, writes, [])
        return KernelCode(self.name, self.launches, [])


def generate(
    name: str, region: Region, comment: str, sms: int, tile: MatmulTile | None = None
) -> KernelCode:
    """The source of a region with one linear. Raises BackendError for what has none."""
    generator = MatmulGenerator(name, region, comment, sms)
    generator.tile = tile
    return generator.run()
