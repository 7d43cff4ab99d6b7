"""New rows written into state where it is (`accel.dynamic_update`), as phases of a larger kernel.
`update_pages` finds the place through a table of pages.

The loops are over the new rows, and the state's memory is the result's (or a copy of it, which the
runtime makes where the caller keeps the state): the rest of it is neither read nor written.
"""

from __future__ import annotations

from dataclasses import dataclass

from accel.backends.loops.index import Axis
from accel.backends.loops.phases import Phase, Planner
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.backends.tvm import dtypes, tir
from accel.backends.tvm.code import Emitter
from accel.backends.tvm.nests import group_extent
from accel.backends.tvm.tir import Block, Buffer, Expr
from accel.ir.module import Op
from accel.ir.types import Dim, product

_COST = 4  # of an element: rotary embeddings, as a rule


def reason(op: Op) -> str | None:
    """None if a kernel may hold this update, else the reason why not."""
    if op.name == "dynamic_update" and op.attribute("ring"):
        return "an update of several rows of a ring"
    if op.result.dtype != op.operands[1].dtype:
        return "an update of another dtype"
    return None


@dataclass
class UpdatePhase(Phase):
    """Stores `op`'s new rows, element `index` of them, into result number `result`."""

    op: Op | None = None
    index: Index = ()


def plan(planner: Planner, op: Op, number: int) -> None:
    """Plans the phase of an update that is the region's result `number`."""
    source = op.operands[1]
    while True:
        index, axes = planner.index_of(source.shape)
        Survey(planner.indexer, {}).element(source, index)
        if not planner.apply_splits():
            break
    planner.phases.append(UpdatePhase(axes, [], [], op=op, index=index, result=number))


class UpdateNest:
    """Emits an `UpdatePhase`. A row is all of the last axis."""

    def __init__(self, phase: UpdatePhase, emitter: Emitter, result: Buffer) -> None:
        assert phase.op is not None
        self.emitter, self.out, self.index = emitter, result, phase.index
        self.state, self.source, *self.table, self.start = phase.op.operands
        self.axis = 2 if self.table else int(phase.op.attribute("axis")) % len(self.state.shape)
        self.outer: list[tuple[Axis, ...]] = [(a,) for a in phase.outer[:-1]]
        self.last = phase.outer[-1:]
        self.rows: Dim = product(group_extent(g) for g in self.outer)
        self.cost: Dim = product((_COST, *(a.extent for a in self.last)))

    def emit(self, begin: Expr, end: Expr) -> Block:
        emitter = self.emitter
        row = tir.var("row")
        with emitter.scope([a for g in self.outer for a in g], guarded=True) as body:
            rest: Expr = row
            for group in reversed(self.outer):
                extent = emitter.sizes.code(group_extent(group))
                emitter.addresses.bind(group, body.let(tir.tirx.truncmod(rest, extent), "outer"))
                rest = body.let(tir.tirx.truncdiv(rest, extent), "rest")
            address = emitter.indexer.flatten(self._place(), self.state.shape)
            if self.last:
                with emitter.loop(self.last, emitter.sizes.code(self.last[0].extent)):
                    self._store(emitter.addresses.code(address))
            else:
                self._store(emitter.addresses.code(address))
        emitter.block.loop(row, end - begin, body, begin)
        return emitter.scopes[0].block

    def _place(self) -> Index:
        """Where in the state a new element belongs."""
        emitter, count = self.emitter, self.source.shape[self.axis]
        room, page = self.state.shape[self.axis], self.state.shape[self.axis]
        for table in self.table:
            room = product((table.shape[1], page))
        each = self.index[:1] if self.start.shape else ()
        first = emitter.lookup(self.start, each, 0, room - count, wrap=0, clamp=False)
        place = list(self.index)
        place[self.axis] = place[self.axis].plus(first)
        for table in self.table:  # the state is pages: which one, and the slot there
            number, place[self.axis] = emitter.indexer.divide(place[self.axis], page)
            last = self.state.shape[0] - 1
            row = (self.index[0], number)
            place[0] = emitter.lookup(table, row, 0, last, wrap=0, clamp=False)
        return tuple(place)

    def _store(self, address: Expr) -> None:
        emitter = self.emitter
        value = emitter.element(self.source, self.index)
        stored = dtypes.to_storage(value, self.source.dtype, emitter.block)
        emitter.block.store(self.out, stored, address)
