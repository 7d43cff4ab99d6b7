"""Loop nests of one phase: rows, the loops of reductions, the loops of stores.

Three shapes of phase:
    flat   no reductions: all axes that merge are one loop, cut into ranges for the cores
    row    reductions along the contiguous axis: partial results in lanes, one row at a time
    lanes  reductions across it (a sum over rows, say): 64 rows at a time, side by side
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from accel.backends.tvm import dtypes, tir
from accel.backends.tvm.accumulate import Accumulator, accumulator
from accel.backends.tvm.code import Emitter, Kept
from accel.backends.tvm.index import Affine, Axis
from accel.backends.tvm.merge import group_extent, merged
from accel.backends.tvm.phases import Phase, Reduce, Store
from accel.backends.tvm.survey import Survey, shared_costly
from accel.backends.tvm.tir import Buffer, Expr
from accel.ir.types import Dim, product

_LANES = 64
_KEPT_ELEMENTS = 4096  # of a row kept on the stack
_BLOCK = 1024  # elements of one task where rows are few
_FEW_ROWS = 8


@dataclass
class Pass:
    """Stores or reductions that share their innermost loops, and the notes on them."""

    axes: tuple[Axis, ...]
    work: list[Store] | list[Reduce]
    survey: Survey

    @property
    def cost(self) -> Dim:
        per_element = 1 + self.survey.work + len(self.survey.reads)
        return product((per_element, *(a.extent for a in self.axes)))


class Nest:
    """Emits one phase: `body(begin, end)` is the code for a range of `rows` rows."""

    def __init__(self, phase: Phase, emitter: Emitter, targets: dict[int, Buffer]) -> None:
        self.phase = phase
        self.emitter = emitter
        self.sizes = emitter.sizes
        self.targets = targets  # by position in phase.stores
        self.reduces = self._reduce_passes()
        self.stores = self._store_passes()
        self.rows: Dim = 1
        self.cost: Dim = 0  # of one row, in element operations

    def emit(self, begin: Expr, end: Expr) -> tir.Block:
        if self.phase.reduces:
            lane = self._lane_group()
            self._emit_rows(begin, end, lane)
        else:
            self._emit_flat(begin, end)
        return self.emitter.scopes[0].block

    # -- what there is ---------------------------------------------------------------------

    def _survey(self) -> Survey:
        return Survey(self.emitter.indexer, dict.fromkeys(self.phase.needs))

    def _reduce_passes(self) -> list[Pass]:
        found: dict[tuple[object, ...], Pass] = {}
        for reduce in sorted(self.phase.reduces, key=lambda r: r.level):
            key = (reduce.level, reduce.axes)
            if key not in found:
                found[key] = Pass(reduce.axes, [], self._survey())
            found[key].work.append(reduce)  # type: ignore[arg-type]
            found[key].survey.element(reduce.op.operands[0], reduce.source)
            if reduce.op.name in ("argmax", "argmin"):
                found[key].survey.fixed |= set(reduce.axes)
        return list(found.values())

    def _store_passes(self) -> list[Pass]:
        found: dict[tuple[Axis, ...], Pass] = {}
        for store in self.phase.stores:
            if store.inner not in found:
                found[store.inner] = Pass(store.inner, [], self._survey())
            one = found[store.inner]
            one.work.append(store)  # type: ignore[arg-type]
            one.survey.element(store.value, store.index)
            one.survey.reads.append(self._address(store))
        return list(found.values())

    def _address(self, store: Store) -> Affine:
        return self.emitter.indexer.flatten(store.index, store.value.shape)

    def _merge(self, axes: Sequence[Axis], passes: Sequence[Pass]) -> list[tuple[Axis, ...]]:
        reads = [r for p in passes for r in p.survey.reads]
        fixed: set[Axis] = set().union(*(p.survey.fixed for p in passes))
        return merged(axes, reads, fixed)

    # -- flat ------------------------------------------------------------------------------

    def _emit_flat(self, begin: Expr, end: Expr) -> None:
        (only,) = self.stores
        groups = self._merge(self.phase.outer, [only])
        per_element = 1 + only.survey.work + len(only.survey.reads)
        if len(groups) <= 1:
            self.rows, self.cost = group_extent(self.phase.outer), per_element
            with ExitStack() as stack:
                for group in groups:
                    stack.enter_context(self.emitter.loop(group, end - begin, begin))
                self._store(only)
            return
        *rows, last = groups
        inner = group_extent(last)
        count = product(group_extent(g) for g in rows)
        if isinstance(count, int) and count < _FEW_ROWS and isinstance(inner, int):
            blocks = -(-inner // _BLOCK)
        else:
            blocks = 1
        self.rows = product((count, blocks))
        self.cost = product((per_element, inner if blocks == 1 else min(_BLOCK, int(inner))))
        row = tir.var("row")
        with self.emitter.scope([a for g in rows for a in g]) as body:
            part, base, steps = row, None, self.sizes.code(inner)
            if blocks > 1:
                part = body.let(tir.tirx.floordiv(row, tir.i64(blocks)), "part")
                start = tir.tirx.floormod(row, tir.i64(blocks)) * tir.i64(_BLOCK)
                base = body.let(start, "base")
                steps = body.let(tir.tirx.min(tir.i64(_BLOCK), steps - base), "steps")
            self._bind_rows(rows, part)
            with self.emitter.loop(last, steps, base):
                self._store(only)
        self.emitter.block.loop(row, end - begin, body, begin)

    def _store(self, one: Pass) -> None:
        for store in one.work:
            assert isinstance(store, Store)
            target = self.targets[self.phase.stores.index(store)]
            value = self.emitter.element(store.value, store.index)
            address = self.emitter.addresses.code(self._address(store))
            block = self.emitter.block
            block.store(target, _stored(value, target, store, block), address)

    def _bind_rows(self, groups: Sequence[tuple[Axis, ...]], row: Expr) -> None:
        """Recovers each row loop's variable from the number of the row."""
        block = self.emitter.block
        for group in reversed(groups[1:]):
            extent = self.sizes.code(group_extent(group))
            variable = block.let(tir.tirx.floormod(row, extent), group[0].name)
            row = block.let(tir.tirx.floordiv(row, extent), "row")
            self.emitter.addresses.bind(group, variable)
        if groups:
            self.emitter.addresses.bind(groups[0], row)

    # -- rows ------------------------------------------------------------------------------

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

    def _emit_rows(self, begin: Expr, end: Expr, lane: tuple[Axis, ...] | None) -> None:
        emitter = self.emitter
        passes = [*self.reduces, *self.stores]
        groups = self._merge(self.phase.outer, passes)
        rows = [g for g in groups if g != lane]
        self.rows = product(group_extent(g) for g in rows)
        costs: list[Dim] = [p.cost for p in passes]
        self.cost = sum(costs[1:], costs[0])
        row = tir.var("row")
        with emitter.scope([a for g in rows for a in g]) as body:
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
                blocks = _blocks(extent, width)
                self.rows, self.cost = product((self.rows, blocks)), product((self.cost, width))
                count = self.sizes.code(blocks)
                self._bind_rows(rows, body.let(tir.tirx.floordiv(row, count), "part"))
                base = body.let(tir.tirx.floormod(row, count) * tir.i64(width), "base")
                steps: Expr = tir.i64(width)
                if not (isinstance(extent, int) and extent % width == 0):
                    left = self.sizes.code(extent) - base
                    steps = body.let(tir.tirx.min(tir.i64(width), left), "steps")
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
                kind = _kept_kind(key[0].dtype)
                if kind is not None:
                    buffer = tir.local_array("kept", extent, kind)
                    self.emitter.block.allocate(buffer)
                    self.emitter.kept[key] = Kept(buffer, place)

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
        parts = [accumulator(r, width, block) for r in one.work if isinstance(r, Reduce)]
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
            parts = [accumulator(r, width, block) for r in one.work if isinstance(r, Reduce)]
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


def _blocks(extent: Dim, width: int) -> Dim:
    if isinstance(extent, int):
        return -(-extent // width)
    return (extent + (width - 1)) // width


def _kept_kind(dtype: torch.dtype) -> str | None:
    kind = dtypes.compute(dtype)
    return None if kind == "bool" else kind


def _stored(value: Expr, target: Buffer, store: Store, block: tir.Block) -> Expr:
    if store.place.kind == "scratch":
        return tir.cast(value, tir.element_type(target))
    return dtypes.to_storage(value, store.value.dtype, block)
