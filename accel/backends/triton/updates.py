"""Kernels of kind "update": new rows written into state where it is (`dynamic_update`).

The loops are over the new rows, and the state's memory is the result's (or a copy of it, which the
runtime makes where the caller keeps the state), so that the rest of it is neither read nor written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from accel.backends.loops.index import Affine
from accel.backends.loops.phases import Phase, Place, Store
from accel.backends.loops.trace import Tracer
from accel.backends.triton.emitter import Emitter
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.program import Program, ProgramWriter
from accel.errors import BackendError
from accel.ir.builder import Builder
from accel.ir.module import Op, Region, Value
from accel.ir.types import at_least, simplify_dim

_LARGEST_POSITION = (1 << 31) - (1 << 16)  # in a ring, which has no end


def reason(op: Op) -> str | None:
    """None if a kernel of kind "update" may hold this op, else the reason why not."""
    if op.result.dtype != op.operands[1].dtype:
        return "an update of another dtype"
    return None


class _UpdateWriter(ProgramWriter):
    """Stores each source at its place in the state."""

    def __init__(
        self,
        phase: Phase,
        emitter: Emitter,
        targets: Sequence[str],
        sms: int,
        updates: dict[int, Op],
    ) -> None:
        self.updates = updates
        self.writing = False  # else a survey: there are no loops yet
        super().__init__(phase, emitter, targets, sms)

    def write(self) -> Program:
        self.writing = True
        return super().write()

    def _address(self, store: Store) -> Affine:
        op = self.updates[store.place.number]
        state, source, start = op.operands
        axis = int(op.attribute("axis")) % len(state.shape)
        ring = bool(op.attribute("ring"))
        room = _LARGEST_POSITION if ring else state.shape[axis] - source.shape[axis]
        each = store.index[:1] if start.shape else ()  # a position for each row
        tracer: Tracer = self.survey if each and not self.writing else self.emitter
        first = tracer.lookup(start, each, 0, room, wrap=0, clamp=False)
        index = list(store.index)
        index[axis] = index[axis].plus(first)
        if ring:
            _, index[axis] = self.indexer.divide(index[axis], state.shape[axis])
        return self.indexer.flatten(index, state.shape)


def _keep_last(op: Op) -> None:
    """Of more rows than a ring has, only the last ones are written."""
    state, source, start = op.operands
    axis = int(op.attribute("axis")) % len(state.shape)
    count, size = source.shape[axis], state.shape[axis]
    if not op.attribute("ring") or at_least(size, count):
        return
    b = Builder(before=op)
    first = simplify_dim(count - simplify_dim(sympy.Min(count, size)))
    op.set_operand(1, b.slice(source, axis=axis, start=first, stop=count))
    op.set_operand(2, b.add(start, b.size_like(first, start.dtype)))


class UpdateGenerator(Generator):
    """One launch for all updates over the same space."""

    def run(self) -> KernelCode:
        updates: dict[int, Op] = {}
        for number, value in enumerate(self.region.results):
            op = value.op
            if op is None or op.name != "dynamic_update" or op.operands[0].op is not None:
                raise BackendError("an update kernel whose results are no updates of arguments")
            updates[number] = op
            _keep_last(op)
            self.planner._plan(op.operands[1], Place("result", number))
        self.kind = index_kind(self.region, [])
        for phase in self.planner.phases:
            if phase.reduces or phase.needs:
                raise BackendError("an update kernel with reductions")
            self._launch_of(phase, updates)
        return KernelCode(self.name, self.launches, [])

    def _launch_of(self, phase: Phase, updates: dict[int, Op]) -> None:
        """The stores over one space."""
        pointers: dict[Value, str] = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        emitter = Emitter(self.planner.indexer, pointers, set(), self.kind)
        numbers = [s.place.number for s in phase.stores]
        writes = [Slot("result", n) for n in numbers]
        targets = [w.name for w in writes]
        writer = _UpdateWriter(phase, emitter, targets, self.sms, updates)
        reads, program = self._finish(phase, writer.write())
        states = [Slot("input", self.region.args.index(updates[n].operands[0])) for n in numbers]
        reads = [*(r for r in reads if r not in states), *dict.fromkeys(states)]
        pairs = [(i, reads.index(state)) for i, state in enumerate(states)]
        self._launch(program, reads, writes, pairs)
        self.launches[-1].updates = pairs


def generate(name: str, region: Region, comment: str, sms: int, tile: Any = None) -> KernelCode:
    """The source of a region of updates. Raises BackendError for what has none."""
    return UpdateGenerator(name, region, comment, sms).run()
