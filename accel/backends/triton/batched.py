"""Kernels of kind "batched": products of two computed tensors, [..., M, K] x [..., K, N].

A program computes a tile of one product of the batch, as a linear's kernel does (`product_loop`),
with any elementwise epilogue. Operands are read through their views (a transposed key, heads side
by side), and views behind the epilogue become addresses of the stores: no transposed copy is made.
Batch and sizes may be symbolic.

The library multiplies faster; what a generated kernel saves is the epilogue's traffic, or the
copy's. `saves` compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.phases import Planner
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index, broadcast_index
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import size_text
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.product_costs import BANDWIDTH, LAUNCH
from accel.backends.triton.product_loop import MatmulWriter
from accel.backends.triton.product_plan import MatmulTile, Plan, shallower
from accel.backends.triton.program import Program
from accel.backends.triton.text import Block, Expr
from accel.backends.triton.tiles import next_power, parts_of
from accel.errors import BackendError
from accel.ir.module import Op, Region, Value
from accel.ir.op import Trait
from accel.ir.types import Dim, product, same_shape

_MAX_ROUNDS = 8
_TYPICAL = 512  # an unknown size
# FLOP/s of 16-bit products: the plain loop's, and the library's.
_OWN_RATE, _LIBRARY_RATE, _DEFAULT_SMS = 380e12, 580e12, 132
# Of tf32: words of the second operand, whose columns lie side by side, are turned in registers.
_OWN_TF32_RATE, _LIBRARY_TF32_RATE = 51e12, 165e12
_TURNS = ("permute", "reshape")


def reason(op: Op) -> str | None:
    """None if a kernel of kind "batched" may be built around this op, else the reason why not."""
    x, y = op.operands
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"a product of {x.dtype}"
    if 1 in (*op.result.shape[-2:], x.shape[-1]):
        return "a product of one row or column"
    if 0 in (*op.result.shape, *x.shape, *y.shape):
        return "an empty product"
    return None


def saves(op: Op, members: Sequence[Op], sms: int, tf32: bool = False) -> str | None:
    """Why the library and kernels for the rest are faster than one kernel; None if they are not."""
    x = op.operands[0]
    if x.dtype == torch.float32 and not tf32:
        return "float32 in full precision"
    after = members[members.index(op) + 1 :]
    rest = [m for m in after if not m.has(Trait.VIEW)]
    turned = any(m.name == "permute" for m in after)
    if not rest and not turned:
        return "an epilogue that saves no launch"
    results = _count(product(op.result.shape))
    own, library = _OWN_RATE, _LIBRARY_RATE
    if x.dtype == torch.float32:
        own, library = _OWN_TF32_RATE, _LIBRARY_TF32_RATE
    lost = 2 * results * _count(x.shape[-1]) * (1 / own - 1 / library)
    lost *= _DEFAULT_SMS / sms
    saved = LAUNCH + 2 * results * x.dtype.itemsize / BANDWIDTH
    if lost >= saved:
        return f"cuBLAS saves {1e6 * lost:.1f} us, one kernel {1e6 * saved:.1f} us"
    return None


def _count(size: Dim) -> int:
    if isinstance(size, int):
        return size
    return max(1, int(size.subs(dict.fromkeys(size.free_symbols, _TYPICAL))))


def choose(batch: Dim, rows: Dim, columns: Dim, depth: Dim, sms: int) -> MatmulTile:
    """The tile for products of these sizes: the largest that gives each multiprocessor one."""
    b, m, n, k = (_count(d) for d in (batch, rows, columns, depth))
    span = max(16, min(64, next_power(k)))
    wide = (128, 128, 8, 3), (128, 64, 4, 4), (64, 64, 4, 4), (64, 32, 4, 4), (32, 32, 4, 4)
    best = wide[-1]
    for shape in wide:
        best = shape
        if b * -(-m // shape[0]) * -(-n // shape[1]) >= sms:
            break
    height, width, warps, stages = best
    height, width = (max(16, min(s, next_power(d))) for s, d in ((height, m), (width, n)))
    return MatmulTile(height, width, span, warps, stages)


def candidates(kernel: Op, sms: int) -> list[MatmulTile]:
    """Tiles worth timing for a kernel."""
    shapes = ((128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
              (64, 64, 64, 4, 4), (64, 64, 32, 4, 5), (32, 64, 64, 4, 4), (32, 32, 64, 2, 5),
              (128, 256, 64, 8, 3))  # fmt: skip
    return [MatmulTile(*shape) for shape in shapes]


@dataclass(frozen=True)
class BatchedPlan(Plan):
    """Also the batch (names of its variables with their extents, outermost first), and for each
    value that is stored the views behind it."""

    batch: tuple[tuple[str, Dim], ...]
    views: Mapping[Value, tuple[Op, ...]]


def plan(planner: Planner) -> BatchedPlan:
    """Plans a region with one matmul whose results have its elements, in any order."""
    region, indexer = planner.region, planner.indexer
    op = next(op for op in region.ops if op.name == "matmul")
    x, y = op.operands
    shape = op.result.shape
    views = dict(_viewed(value, shape) for value in region.results)
    row, column = indexer.axis("m", shape[-2]), indexer.axis("n", shape[-1])
    left, right = indexer.axis("k", x.shape[-1]), indexer.axis("k", x.shape[-1])
    batch: list[tuple[str, Dim]] = []
    lead: list[Affine] = []
    for number, extent in enumerate(shape[:-2]):
        if extent == 1:
            lead.append(Affine())
            continue
        batch.append((f"batch_{number}", extent))
        lead.append(indexer.datum(Expr(batch[-1][0], "int32"), frozenset()))

    def of(axis: Axis) -> tuple[Affine, tuple[Axis, ...]]:
        return planner._as_index(axis)

    for _ in range(_MAX_ROUNDS):
        survey = Survey(indexer, {op.result: None})
        index = (*lead, of(row)[0], of(column)[0])
        for value in views:
            survey.element(value, index)
        places = tuple(at for value, at in survey.costly if value is op.result)
        x_index = (*_lead(lead, shape, x), of(row)[0], of(left)[0])
        y_index = (*_lead(lead, shape, y), of(right)[0], of(column)[0])
        operands = Survey(indexer, {})
        operands.element(x, x_index)
        operands.element(y, y_index)
        if planner.apply_splits():
            continue
        if places != (index,):
            raise BackendError("a batched kernel that reads its product elsewhere")
        survey.reads += operands.reads
        survey.fixed |= operands.fixed
        stores = tuple((value, index) for value in views)
        return BatchedPlan(
            op=op,
            rows=of(row)[1],
            columns=of(column)[1],
            left=of(left)[1],
            right=of(right)[1],
            stores=stores,
            places=places,
            swapped=(),
            x_index=x_index,
            weight_indices=(y_index,),
            survey=survey,
            batch=tuple(batch),
            views=views,
        )
    raise BackendError("a batched kernel whose index does not come to rest")


def _lead(lead: Sequence[Affine], shape: Sequence[Dim], operand: Value) -> Index:
    return broadcast_index(tuple(lead), tuple(shape[:-2]), operand.shape[:-2])


def _viewed(value: Value, shape: Sequence[Dim]) -> tuple[Value, tuple[Op, ...]]:
    """The value behind views that only reorder it, and the views, first ones first."""
    found: list[Op] = []
    while value.op is not None and value.op.name in _TURNS:
        found.append(value.op)
        value = value.op.operands[0]
    if not same_shape(value.shape, tuple(shape)):
        raise BackendError("a batched kernel whose results are not the product's elements")
    return value, tuple(reversed(found))


class BatchedWriter(MatmulWriter):
    """Writes the one program of a batched kernel."""

    plan: BatchedPlan

    def __init__(
        self, plan: BatchedPlan, emitter: StoredOperands, targets: Sequence[str], tile: Any
    ) -> None:
        self.plan, self.emitter, self.targets, self.tile = plan, emitter, targets, tile
        self.rows = product(a.extent for a in plan.rows)
        self.columns = product(a.extent for a in plan.columns)
        self.summed: Dim = product(a.extent for a in plan.left)

    def write(self) -> Program:
        emitter, tile = self.emitter, self.tile
        top = emitter.scopes[0]
        self._place()
        top.block.line("acc = tl.zeros([ROWS, COLS], tl.float32)")
        body = Block(top.block.names)
        self._step(body, ["acc"])
        head = f"0, {size_text(self.summed)}, DEPTH, num_stages={tile.stages}"
        top.block.nest(f"for start in tl.range({head}):", body)
        self._finish(["acc"])
        tiles = (parts_of(self.rows, tile.rows), parts_of(self.columns, tile.columns))
        programs = product((*tiles, *(extent for _, extent in self.plan.batch)))
        constants = {"ROWS": tile.rows, "COLS": tile.columns, "DEPTH": tile.depth,
                     "GROUP": tile.group}  # fmt: skip
        return Program(top.block.source(), [], constants, programs, tile.warps,
                       list(emitter.used), emitter.checks)  # fmt: skip

    def _place(self) -> None:
        """Which tile of which product this program computes."""
        block, kind = self.emitter.block, self.emitter.kind
        wide = ".to(tl.int64)" if kind == "int64" else ""
        down = size_text(parts_of(self.rows, self.tile.rows))
        across = size_text(parts_of(self.columns, self.tile.columns))
        block.line(f"part = tl.program_id(0){wide}")
        if self.plan.batch:
            block.line(f"batch = part // ({down} * {across})")
            block.line(f"part = part % ({down} * {across})")
        for name, extent in reversed(self.plan.batch[1:]):
            block.line(f"{name} = batch % {size_text(extent)}")
            block.line(f"batch = batch // {size_text(extent)}")
        for name, _ in self.plan.batch[:1]:
            block.line(f"{name} = batch")
        block.line(f"first = part // (GROUP * {across}) * GROUP")
        block.line(f"height = tl.minimum({down} - first, GROUP)")
        block.line(f"inside = part % (GROUP * {across})")
        block.line("row = (first + inside % height) * ROWS + tl.arange(0, ROWS)[:, None]")
        block.line("col = inside // height * COLS + tl.arange(0, COLS)[None, :]")

    def _bias(self, place: Index) -> Expr | None:
        return None

    def _store(self, target: str, value: Value, index: Index) -> None:
        emitter = self.emitter
        made = emitter.element(value, index)
        made = dtypes.to_storage(made, value.dtype, emitter.block)
        shape = value.shape
        for view in self.plan.views[value]:
            if view.name == "permute":
                index = tuple(index[int(a)] for a in view.attribute("axes"))
            else:
                index = emitter.indexer.reshape(index, shape, view.result.shape)
            shape = view.result.shape
        address = emitter.indexer.flatten(index, shape)
        mask = emitter.mask(frozenset((*self.plan.rows, *self.plan.columns)))
        tail = f", mask={mask}" if mask else ""
        emitter.block.line(f"tl.store({target} + {emitter.addresses.code(address)}, {made}{tail})")


class BatchedGenerator(Generator):
    """A batched kernel: one launch."""

    tile: MatmulTile | None = None

    def run(self) -> KernelCode:
        made = plan(self.planner)
        self.kind = index_kind(self.region, [])
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        writes = [Slot("result", i) for i in range(len(self.region.results))]
        if len(made.stores) != len(writes):
            raise BackendError("a batched kernel that gives one value twice")
        *batch, rows, columns = made.op.result.shape
        depth = made.op.operands[0].shape[-1]
        tile = self.tile or shallower(
            choose(product(batch), rows, columns, depth, self.sms), made.op.operands[0].dtype
        )
        emitter = StoredOperands(self.planner.indexer, pointers, set(), self.kind)
        program = BatchedWriter(made, emitter, [w.name for w in writes], tile).write()
        reads = [Slot("input", self.region.args.index(v)) for v in program.reads]
        reads.sort(key=lambda s: s.number)
        self._launch(program, reads, writes, [])
        return KernelCode(self.name, self.launches, [])


def generate(
    name: str, region: Region, comment: str, sms: int, tile: MatmulTile | None = None
) -> KernelCode:
    """The source of a region with one matmul. Raises BackendError for what has none."""
    generator = BatchedGenerator(name, region, comment, sms)
    generator.tile = tile
    return generator.run()
