"""Kernels of kind "topk": the k largest of short rows, as a router of experts asks for.

A row lies in registers. Each of its elements becomes one integer of 64 bits, the number's order
before its place, so that a maximum finds both and equal numbers are taken from the front; k maxima
are taken one after the other. A softmax before it (over the same rows) and what follows on the k
values, their sum included, are computed in the same launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.merge import merged
from accel.backends.loops.phases import Planner
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import decompose, size_text
from accel.backends.triton.emitter import Emitter, Scope
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import next_power, parts_of
from accel.errors import BackendError
from accel.ir.module import Op, Region, Value
from accel.ir.types import Dim, product

MOST_COLUMNS, MOST_WANTED = 1024, 16
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_TILE = 2048  # elements of a program
_BOTH = frozenset((ROW, COL))


def reason(op: Op) -> str | None:
    """None if a kernel of kind "topk" may be built around this op, else the reason why not."""
    x = op.operands[0]
    if x.dtype not in _FLOATS:
        return f"a top-k of {x.dtype}"
    k, columns = op.attribute("k"), x.shape[-1] if x.shape else 1
    if int(op.attribute("axis")) % max(x.type.rank, 1) != x.type.rank - 1:
        return "a top-k that is not along the last axis"
    if not (isinstance(k, int) and isinstance(columns, int)):
        return "a top-k of symbolic size"
    if not (0 < k <= MOST_WANTED and 1 < columns <= MOST_COLUMNS):
        return f"the {k} largest of {columns}"
    if product(x.shape[:-1]) in (0, 1) and x.type.rank == 1:
        return "a top-k of one row without axes"
    return None


@dataclass(frozen=True)
class Plan:
    """The rows, their columns, and the k places of a result."""

    op: Op
    softmax: Op | None
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    slots: tuple[Axis, ...]
    source: Index  # of the elements that are read
    index: Index  # of the results
    survey: Survey


def plan(planner: Planner) -> Plan:
    """Plans a region with one top-k whose results all have its shape."""
    region, indexer = planner.region, planner.indexer
    op = next(op for op in region.ops if op.name == "topk")
    if any(v.shape != op.results[0].shape for v in region.results):
        raise BackendError("a top-k kernel with results of several shapes")
    before = op.operands[0].op
    softmax = before if before is not None and before.name == "softmax" else None
    read = op.operands[0] if softmax is None else softmax.operands[0]
    lead = [indexer.axis(f"r{i}", d) for i, d in enumerate(read.shape[:-1])]
    column = indexer.axis("c", read.shape[-1])
    slot = indexer.axis("j", op.results[0].shape[-1])
    rows = tuple(a for a in lead if a.extent != 1)
    places = tuple(indexer.of(a) if a.extent != 1 else Affine() for a in lead)
    wanted = indexer.of(slot) if slot.extent != 1 else Affine()
    survey = Survey(indexer, {})
    survey.element(read, (*places, indexer.of(column)))
    slots = (slot,) if slot.extent != 1 else ()
    return Plan(op, softmax, rows, (column,), slots, (*places, indexer.of(column)),
                (*places, wanted), survey)  # fmt: skip


class TopKWriter:
    """Writes the one program of a top-k kernel."""

    def __init__(self, plan: Plan, emitter: Emitter, targets: list[str], height: int) -> None:
        self.plan, self.emitter, self.targets, self.height = plan, emitter, targets, height
        self.columns = int(product(a.extent for a in plan.columns))
        self.width = next_power(self.columns)
        self.wanted = int(plan.op.attribute("k"))

    def write(self, results: list[Value]) -> Program:
        emitter, plan = self.emitter, self.plan
        block = emitter.block
        count: Dim = product(a.extent for a in plan.rows)
        wide = ".to(tl.int64)" if emitter.kind == "int64" else ""
        block.line(f"row = tl.program_id(0){wide} * ROWS + tl.arange(0, ROWS)[:, None]")
        block.line("col = tl.arange(0, COLS)[None, :]")
        block.line("slot = tl.arange(0, SLOTS)[None, :]")
        self._bind("row", ROW, plan.rows, count, self.height)
        self._bind("col", COL, plan.columns, self.columns, self.width)
        with emitter.inside(Scope(block, frozenset((*plan.rows, *plan.columns)))):
            self._read()
        emitter.addresses.groups = emitter.addresses.groups[: len(self.groups)]
        self._take(block)
        self._bind("slot", COL, plan.slots, self.wanted, next_power(self.wanted))
        with emitter.inside(Scope(block, frozenset((*plan.rows, *plan.slots)))):
            self._known(results)
            for target, value in zip(self.targets, results, strict=True):
                self._store(target, value)
        constants = {"ROWS": self.height, "COLS": self.width, "SLOTS": next_power(self.wanted)}
        return Program(block.source(), [], constants, parts_of(count, self.height), 4,
                       list(emitter.used), emitter.checks)  # fmt: skip

    def _bind(self, name: str, dim: str, axes: tuple[Axis, ...], extent: Dim, size: int) -> None:
        emitter = self.emitter
        if not isinstance(extent, int) or extent % size:
            emitter.block.line(f"{name}_ok = {name} < {size_text(extent)}")
            emitter.masks.update(dict.fromkeys(axes, f"{name}_ok"))
        groups = merged(axes, self.plan.survey.reads, self.plan.survey.fixed)
        if groups:
            flat = Expr(name, emitter.kind, frozenset((dim,)))
            decompose(flat, groups, emitter.block, emitter.addresses)
        if name == "row":
            self.groups = list(emitter.addresses.groups)

    def _read(self) -> None:
        """The rows in float32, as `x`: of a softmax, rounded to its dtype."""
        emitter, plan = self.emitter, self.plan
        block = emitter.block
        read = plan.op.operands[0] if plan.softmax is None else plan.softmax.operands[0]
        made = emitter.element(read, plan.source)
        block.line(f"x = {made} + tl.zeros([ROWS, COLS], tl.float32)")
        inside = self.columns == self.width
        if plan.softmax is not None:
            if not inside:
                block.line('x = tl.where(col_ok, x, float("-inf"))')
            block.line("x = tl.exp(x - tl.max(x, axis=1, keep_dims=True))")
            block.line("x = x / tl.sum(x, axis=1, keep_dims=True)")
            value = Expr("x", "float32", _BOTH)
            value = dtypes.rounded(value, plan.softmax.result.dtype, block)
            block.line(f"x = {value}")

    def _take(self, block: Block) -> None:
        """The k largest, one after the other: `value` and `place`, a column each."""
        block.line("bits = x.to(tl.int32, bitcast=True)")
        block.line("order = bits ^ ((bits >> 31) & 0x7FFFFFFF)")
        block.line("order = tl.where(x != x, 0x7FFFFFFF, order)")
        if not self.plan.op.attribute("largest"):
            block.line("order = -1 - order")
        block.line("key = (order.to(tl.int64) << 32) + (COLS - 1 - col)")
        if self.columns != self.width:
            block.line("key = tl.where(col_ok, key, -0x8000000000000000)")
        block.line("value = tl.zeros([ROWS, SLOTS], tl.float32)")
        block.line("place = tl.zeros([ROWS, SLOTS], tl.int32)")
        body = Block(block.names)
        body.line("best = tl.max(key, axis=1, keep_dims=True)")
        body.line("best = COLS - 1 - (best & 0xFFFFFFFF).to(tl.int32)")
        body.line("found = tl.sum(tl.where(col == best, x, 0.0), axis=1, keep_dims=True)")
        body.line("value = tl.where(slot == taken, found, value)")
        body.line("place = tl.where(slot == taken, best, place)")
        body.line("key = tl.where(col == best, -0x8000000000000000, key)")
        block.nest(f"for taken in tl.static_range({self.wanted}):", body)

    def _known(self, results: list[Value]) -> None:
        """The top-k's results, and the sum of its values where something divides by it."""
        emitter, plan = self.emitter, self.plan
        known, index = emitter.scopes[-1].known, plan.index
        values, places = plan.op.results
        known[values, index] = Expr("value", "float32", _BOTH)
        known[places, index] = dtypes.cast(Expr("place", "int32", _BOTH), "int64")
        for user in values.users:
            if user.name != "sum":
                continue
            slots = "value" if self.wanted == next_power(self.wanted) else "kept"
            if slots == "kept":
                emitter.block.line("kept = tl.where(slot_ok, value, 0.0)")
            emitter.block.line(f"total = tl.sum({slots}, axis=1, keep_dims=True)")
            total = Expr("total", "float32", frozenset((ROW,)))
            total = dtypes.rounded(total, user.result.dtype, emitter.block)
            kept = (*index[:-1], Affine())
            emitter.results[user.result, kept] = total
            known[user.result, kept] = total

    def _store(self, target: str, value: Value) -> None:
        emitter, index = self.emitter, self.plan.index
        made = dtypes.to_storage(emitter.element(value, index), value.dtype, emitter.block)
        code = emitter.addresses.code(emitter.indexer.flatten(index, value.shape))
        names = [n for n in ("row_ok", "slot_ok") if n in emitter.masks.values()]
        tail = f", mask={' & '.join(names)}" if names else ""
        place = f"{target} + {code}"
        for dim, name in ((ROW, "row"), (COL, "slot")):
            if dim not in code.dims:
                place = f"{place} + {name} * 0"
        emitter.block.line(f"tl.store({place}, {made}{tail})")


class TopKGenerator(Generator):
    """A top-k kernel: one launch."""

    def run(self) -> KernelCode:
        made = plan(self.planner)
        self.kind = index_kind(self.region, [])
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        emitter = Emitter(self.planner.indexer, pointers, set(), self.kind)
        writes = [Slot("result", i) for i in range(len(self.region.results))]
        rows = product(a.extent for a in made.rows)
        count = rows if isinstance(rows, int) else 4096
        width = next_power(int(product(a.extent for a in made.columns)))
        height = max(1, min(_TILE // width, next_power(-(-count // self.sms))))
        writer = TopKWriter(made, emitter, [w.name for w in writes], height)
        program = writer.write(list(self.region.results))
        reads = [Slot("input", self.region.args.index(v)) for v in program.reads]
        reads.sort(key=lambda s: s.number)
        self._launch(program, reads, writes, [])
        return KernelCode(self.name, self.launches, [])


def generate(name: str, region: Region, comment: str, sms: int, tile: Any = None) -> KernelCode:
    """The source of a region with one top-k. Raises BackendError for what has none."""
    return TopKGenerator(name, region, comment, sms).run()
