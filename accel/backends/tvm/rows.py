"""Loops of phases with reductions: one row at a time, or 64 rows side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from accel.backends.tvm import tir
from accel.backends.tvm.accumulate import Accumulator, accumulator
from accel.backends.tvm.code import Emitter, Kept
from accel.backends.tvm.index import Affine, Axis
from accel.backends.tvm.nests import Nest, Pass, group_extent, kept_kind, parts_of
from accel.backends.tvm.phases import Phase, Reduce
from accel.backends.tvm.survey import shared_costly
from accel.backends.tvm.tir import Buffer, Expr
from accel.ir.types import Dim, product

_LANES = 64
_KEPT_ELEMENTS = 4096  # of a row kept on the stack


class RowNest(Nest):
    """A row computes its reductions, level by level, then its stores."""

    def __init__(self, phase: Phase, emitter: Emitter, targets: dict[int, Buffer]) -> None:
        super().__init__(phase, emitter, targets)
        self.reduces = self._reduce_passes()

    def _reduce_passes(self) -> list[Pass]:
        found: dict[tuple[object, ...], Pass] = {}
        for reduce in sorted(self.phase.reduces, key=lambda r: r.level):
            key = (reduce.level, reduce.axes)
            if key not in found:
                found[key] = Pass(reduce.axes, self._survey(), [], [])
            found[key].reduces.append(reduce)
            found[key].survey.element(reduce.op.operands[0], reduce.source)
            if reduce.op.name in ("argmax", "argmin"):
                found[key].survey.fixed |= set(reduce.axes)
        return list(found.values())

    def _lane_group(self) -> tuple[Axis, ...] | None:
        """The outer axes to put side by side: contiguous where the reduced ones are not."""
        groups = self._merge(self.phase.outer, [*self.reduces, *self.stores])
        if not groups or not all(p.axes for p in self.reduces):
            return None
        lane = groups[-1][-1]
        along = across = 0
        for one in self.reduces:
            for read in one.survey.reads:
                along += read.coefficient(one.axes[-1]) == 1
                across += read.coefficient(lane) == 1
        return groups[-1] if across > along else None

    def _emit(self, begin: Expr, end: Expr) -> None:
        emitter = self.emitter
        lane = self._lane_group()
        passes = [*self.reduces, *self.stores]
        groups = self._merge(self.phase.outer, passes)
        rows = [g for g in groups if g != lane]
        self.rows = product(group_extent(g) for g in rows)
        costs: list[Dim] = [p.cost for p in passes]
        self.cost = sum(costs[1:], costs[0])
        row = tir.var("row")
        # Nothing moves out of the row: a result of its reductions may depend on no axis at all.
        with emitter.scope([a for g in rows for a in g], guarded=True) as body:
            if lane is None:
                self._bind_rows(rows, row)
                self._keep_costly()
                for one in self.reduces:
                    self._reduce_row(one)
                for one in self.stores:
                    self._loops(one, partial(self._store, one))
            else:
                extent = group_extent(lane)
                width = min(_LANES, extent) if isinstance(extent, int) else _LANES
                pieces = parts_of(extent, width)
                self.rows, self.cost = product((self.rows, pieces)), product((self.cost, width))
                count = self.sizes.code(pieces)
                self._bind_rows(rows, body.let(tir.tirx.truncdiv(row, count), "part"))
                base, steps = self._cut(tir.tirx.truncmod(row, count), extent, width)
                self._emit_lanes(lane, base, steps, width)
        emitter.block.loop(row, end - begin, body, begin)

    def _keep_costly(self) -> None:
        """Plans local arrays for what several passes over the same axes would compute again."""
        by_axes: dict[tuple[Axis, ...], list[Pass]] = {}
        for one in (*self.reduces, *self.stores):
            by_axes.setdefault(one.axes, []).append(one)
        for axes, passes in by_axes.items():
            extent = product(a.extent for a in axes)
            if len(passes) < 2 or not isinstance(extent, int) or not 1 < extent <= _KEPT_ELEMENTS:
                continue
            for key in shared_costly([p.survey for p in passes]):
                if not set(axes) <= {a for i in key[1] for a in i.axes}:
                    continue
                place = self.emitter.indexer.flatten(
                    [self.emitter.indexer.of(a) for a in axes], [a.extent for a in axes]
                )
                kind = kept_kind(key[0].dtype)
                if kind is not None:
                    buffer = tir.local_array("kept", extent, kind)
                    self.emitter.block.allocate(buffer)
                    self.emitter.kept[key] = Kept(buffer, place, tir.i64(0))

    def _loops(self, one: Pass, body: Callable[[], None]) -> None:
        """Nested loops over the merged axes of a pass, without partial results."""
        with ExitStack() as stack:
            for group in self._merge(one.axes, [one]):
                extent = self.sizes.code(group_extent(group))
                stack.enter_context(self.emitter.loop(group, extent))
            body()

    def _reduce_row(self, one: Pass) -> None:
        emitter = self.emitter
        groups = self._merge(one.axes, [one])
        extent: Dim = group_extent(groups[-1]) if groups else 1
        width = _width(extent)
        block = emitter.block
        parts = [accumulator(r, width, block) for r in one.reduces]
        lane = tir.var("lane")
        start = tir.Block()
        for part in parts:
            part.start(start, lane)
        block.loop(lane, tir.i64(width), start)
        with ExitStack() as stack:
            for group in groups[:-1]:
                stack.enter_context(emitter.loop(group, self.sizes.code(group_extent(group))))
            self._reduce_inner(groups[-1:], extent, width, parts)
        self._mark_kept(one)
        while width > 1:
            width //= 2
            for part in parts:
                part.fold(block, width)
        for part in parts:
            value = part.result(block, tir.i64(0))
            emitter.results[(part.reduce.op.result, part.reduce.index)] = partial(_same, value)

    def _reduce_inner(
        self, groups: list[tuple[Axis, ...]], extent: Dim, width: int, parts: list[Accumulator]
    ) -> None:
        """The innermost loop in steps of `width` lanes, then what is left."""
        emitter = self.emitter
        if not groups:
            self._steps(parts, tir.i64(0))
            return
        (group,) = groups
        if width == 1:
            with emitter.loop(group, self.sizes.code(extent)):
                self._steps(parts, tir.i64(0))
            return
        count = self.sizes.code(extent)
        whole = emitter.block.let(tir.tirx.floordiv(count, tir.i64(width)), "whole")
        step = tir.var("step")
        with emitter.scope() as body:
            self._lanes(group, step * tir.i64(width), tir.i64(width), parts)
        emitter.block.loop(step, whole, body)
        if not (isinstance(extent, int) and extent % width == 0):
            base = emitter.block.let(whole * tir.i64(width), "base")
            self._lanes(group, base, count - base, parts)

    def _lanes(
        self, group: tuple[Axis, ...], base: Expr, steps: Expr, parts: list[Accumulator]
    ) -> None:
        emitter = self.emitter
        lane = tir.var("lane")
        emitter.addresses.bind(group, base + lane)
        with emitter.scope(group) as body:
            self._steps(parts, lane)
        emitter.addresses.unbind(group)
        emitter.block.loop(lane, steps, body)

    def _steps(self, parts: list[Accumulator], lane: Expr) -> None:
        for part in parts:
            reduce = part.reduce
            element = self.emitter.element(reduce.op.operands[0], reduce.source)
            part.step(self.emitter.block, lane, element, self._position(reduce, part))

    def _position(self, reduce: Reduce, part: Accumulator) -> Expr | None:
        if part.places is None:
            return None
        axis = int(reduce.op.attribute("axis")) % max(reduce.op.operands[0].type.rank, 1)
        return self.emitter.addresses.code(reduce.source[axis] if reduce.source else Affine())

    def _mark_kept(self, one: Pass) -> None:
        for key, kept in self.emitter.kept.items():
            if key in one.survey.costly:
                kept.filled = True

    # -- lanes -----------------------------------------------------------------------------

    def _emit_lanes(self, lane: tuple[Axis, ...], base: Expr, steps: Expr, width: int) -> None:
        """All passes with the lanes as their innermost loop."""
        emitter = self.emitter
        for one in self.reduces:
            block = emitter.block
            parts = [accumulator(r, width, block) for r in one.reduces]
            variable = tir.var("lane")
            start = tir.Block()
            for part in parts:
                part.start(start, variable)
            block.loop(variable, tir.i64(width), start)

            def body(parts: list[Accumulator] = parts) -> None:
                self._lanes(lane, base, steps, parts)

            self._loops(one, body)
            for part in parts:
                self._result_of_lane(part, lane, base)
        for one in self.stores:

            def store(one: Pass = one) -> None:
                with emitter.loop(lane, steps, base):
                    self._store(one)

            self._loops(one, store)

    def _result_of_lane(self, part: Accumulator, lane: tuple[Axis, ...], base: Expr) -> None:
        emitter = self.emitter
        key = (part.reduce.op.result, part.reduce.index)

        def read() -> Expr:
            # The lane's number is the merged loop's value, from which `base` is taken away again.
            position = emitter.indexer.flatten(
                [emitter.indexer.of(a) for a in lane], [a.extent for a in lane]
            )
            return part.result(emitter.block, emitter.addresses.code(position) - base)

        emitter.results[key] = read


def _same(value: Expr) -> Expr:
    return value


def _width(extent: Dim) -> int:
    if not isinstance(extent, int) or extent >= _LANES:
        return _LANES
    return 16 if extent >= 16 else 1
