"""Loops of phases with reductions: one row at a time, or 64 rows side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TypeAlias

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.phases import Phase, Reduce
from accel.backends.loops.survey import index_axes, packed_address, shared_costly
from accel.backends.loops.trace import Key
from accel.backends.tvm import tir
from accel.backends.tvm.accumulate import Accumulator, accumulator
from accel.backends.tvm.code import Emitter, Kept
from accel.backends.tvm.nests import Nest, Pass, group_extent, kept_kind, parts_of
from accel.backends.tvm.tir import Buffer, Expr
from accel.ir.types import SUB_BYTE_BITS, Dim, product

_LANES = 64
_MOST_LANES = 256  # of all partial results together: half of the vector registers
_KEPT_ELEMENTS = 4096  # of a row kept on the stack
_LONGEST_COPY = 16384  # elements of what all rows read, there as well
_MOST_BESIDE = 8  # rows of x that share one read of a weight
_MOST_UNROLLED = 4
_LARGE = 1 << 18  # bytes: more than stays in the caches from one call to the next
_AHEAD, _LINE = 8192, 64  # bytes: how far prefetches go, and what one fetches

# Loops that are written out: the step at which a piece of code is.
At: TypeAlias = tuple[tuple[tuple[Axis, ...], int], ...]


@dataclass
class Part:
    """Partial results of one reduction at one step of the loops that are written out."""

    sums: Accumulator
    rows: At
    inner: At


class RowNest(Nest):
    """A row computes its reductions, level by level, then its stores."""

    def __init__(self, phase: Phase, emitter: Emitter, targets: dict[int, Buffer]) -> None:
        super().__init__(phase, emitter, targets)
        self.reduces = self._reduce_passes()
        self.beside: tuple[Axis, ...] | None = None
        self.reuses = False  # whether all rows read some of the same memory
        self._here: At = ()

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
        if lane is None:
            self.beside = self._beside(groups)
        rows = [g for g in groups if g not in (lane, self.beside)]
        among = {a for g in rows for a in g}
        reads = [r for one in self.reduces for r in one.survey.reads]
        self.reuses = any(not r.axes & among for r in reads)
        self.rows = product(group_extent(g) for g in rows)
        costs: list[Dim] = [p.cost for p in passes]
        self.cost = sum(costs[1:], costs[0])
        if lane is None and self.beside is None:
            for one in self.reduces:
                self._split_pairs(one)
        row = tir.var("row")
        # Nothing moves out of the row: a result of its reductions may depend on no axis at all.
        with emitter.scope([a for g in rows for a in g], guarded=True) as body:
            if lane is None:
                self._bind_rows(rows, row)
                if self.beside is None:
                    self._keep_costly()
                for one in self.reduces:
                    self._reduce_row(one)
                for at in self._copies(self.beside):
                    with self._at(at):
                        for one in self.stores:
                            self._loops(one, partial(self._store, one))
            else:
                extent = group_extent(lane)
                width = max(1, min(_LANES, extent)) if isinstance(extent, int) else _LANES
                pieces = parts_of(extent, width)
                self.rows, self.cost = product((self.rows, pieces)), product((self.cost, width))
                count = self.sizes.code(pieces or 1)
                self._bind_rows(rows, body.let(tir.tirx.truncdiv(row, count), "part"))
                base, steps = self._cut(tir.tirx.truncmod(row, count), extent, width)
                self._emit_lanes(lane, base, steps, width)
        emitter.block.loop(row, end - begin, body, begin)

    def _split_pairs(self, one: Pass) -> None:
        """Copies what all rows read in pairs, an element for each nibble of a byte: first all that
        go with low nibbles, then the others, so that vectors of either lie side by side."""
        pair = _short_last(self._merge(one.axes, [one]))
        if pair is None or group_extent(pair) != 2 or not self.reuses:
            return
        emitter, extent = self.emitter, product(a.extent for a in one.axes)
        indexer = emitter.indexer
        if not isinstance(extent, int) or extent > _LONGEST_COPY:
            return
        line = indexer.flatten([indexer.of(a) for a in one.axes], [a.extent for a in one.axes])
        for value, index in one.survey.costly:
            whole = value.dtype == torch.float32 and value in emitter.buffers
            if not whole or indexer.flatten(index, value.shape) != line:
                continue
            copy = tir.local_array("halves", extent, "float32")
            emitter.block.allocate(copy)
            step, body = tir.var("step"), tir.Block()
            for which in (0, 1):
                element = tir.load(emitter.buffers[value], step * tir.i64(2) + tir.i64(which))
                body.store(copy, element, step + tir.i64(which * extent // 2))
            emitter.block.loop(step, tir.i64(extent // 2), body)
            number, half = indexer.divide(line, 2)
            place = number.plus(half, extent // 2)
            emitter.kept[value, index] = Kept(copy, place, tir.i64(0), filled=True)

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

    # -- loops that are written out --------------------------------------------------------

    def _beside(self, groups: Sequence[tuple[Axis, ...]]) -> tuple[Axis, ...] | None:
        """A short row loop to write out, so that its steps share what they all read.

        That is a matrix product of few rows: the weight does not depend on the row of x, and x
        does not depend on the row of the weight.
        """
        reads = [r for one in self.reduces for r in one.survey.reads]
        for group in groups:
            extent, axes = group_extent(group), set(group)
            if not isinstance(extent, int) or not 1 < extent <= _MOST_BESIDE:
                continue
            others = {a for g in groups if g is not group for a in g}
            shared = any(not r.axes & axes and r.axes & others for r in reads)
            if shared and any(r.axes & axes and not r.axes & others for r in reads):
                return group
        return None

    def _copies(self, group: tuple[Axis, ...] | None) -> list[At]:
        """The steps of a loop that is written out; one empty step if there is none."""
        if group is None:
            return [()]
        extent = group_extent(group)
        assert isinstance(extent, int)
        return [((group, step),) for step in range(extent)]

    @contextmanager
    def _at(self, at: At) -> Iterator[None]:
        """Code for one step: what does not depend on it moves out and is shared."""
        if not at:
            yield
            return
        emitter, before = self.emitter, self._here
        for group, step in at:
            emitter.addresses.bind(group, tir.i64(step))
        self._here = (*before, *at)
        with emitter.scope([a for group, _ in at for a in group]) as body:
            yield
        self._here = before
        for group, _ in at:
            emitter.addresses.unbind(group)
        emitter.block.statements.extend(body.statements)

    def _reduce_row(self, one: Pass) -> None:
        emitter = self.emitter
        groups = self._merge(one.axes, [one])
        unrolled = _short_last(groups)
        if unrolled is not None:
            groups.remove(unrolled)
        extent: Dim = group_extent(groups[-1]) if groups else 1
        copies = len(self._copies(self.beside)) * len(self._copies(unrolled))
        width = _width(extent, len(one.reduces) * copies)
        block = emitter.block
        parts = self._parts(one, width, unrolled)
        lane = tir.var("lane")
        start = tir.Block()
        for part in parts:
            part.sums.start(start, lane)
        block.loop(lane, tir.i64(width), start)
        # LLVM would unroll a loop of known length over all of x, move the loads of x out of the row
        # loop, and spill what does not fit the registers. So it is not told the length.
        hidden = self.reuses and len(groups) > 1 and extent == width
        with ExitStack() as stack:
            for group in groups[:-1]:
                steps = self.sizes.code(group_extent(group))
                if hidden and group is groups[-2]:
                    steps = steps + self.sizes.zero
                stack.enter_context(emitter.loop(group, steps))
            self._reduce_inner(one, groups[-1:], extent, width, parts, not hidden and self.reuses)
        self._mark_kept(one)
        self._results(parts, width)

    def _parts(self, one: Pass, width: int, unrolled: tuple[Axis, ...] | None) -> list[Part]:
        """An accumulator for each reduction, row beside the others, and unrolled step."""
        parts: list[Part] = []
        for reduce in one.reduces:
            depends = self.beside is not None and set(self.beside) & index_axes(reduce.index)
            for rows in self._copies(self.beside if depends else None):
                for inner in self._copies(unrolled):
                    sums = accumulator(reduce, width, self.emitter.block)
                    parts.append(Part(sums, rows, inner))
        return parts

    def _results(self, parts: list[Part], width: int) -> None:
        """Adds up unrolled steps and lanes; the results can be read from then on."""
        block = self.emitter.block
        firsts: dict[tuple[object, ...], Part] = {}
        for part in parts:
            key = (part.sums.reduce.op.result, part.sums.reduce.index, part.rows)
            first = firsts.setdefault(key, part)
            if first is not part:
                first.sums.join(block, part.sums, width)
        for part in firsts.values():
            part.sums.fold_all(block, width)
        values: dict[Key, dict[At, Expr]] = {}
        for part in firsts.values():
            reduce = part.sums.reduce
            by_row = values.setdefault((reduce.op.result, reduce.index), {})
            by_row[part.rows] = part.sums.result(block, tir.i64(0))
        for result, by_row in values.items():
            self.emitter.results[result] = partial(self._result_here, by_row)

    def _result_here(self, by_row: dict[At, Expr]) -> Expr:
        rows = tuple(step for step in self._here if step[0] == self.beside)
        return by_row[rows if rows in by_row else ()]

    def _reduce_inner(
        self,
        one: Pass,
        groups: list[tuple[Axis, ...]],
        extent: Dim,
        width: int,
        parts: list[Part],
        hide: bool,
    ) -> None:
        """The innermost loop in steps of `width` lanes, then what is left. `hide`: how many steps
        there are from LLVM."""
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
        steps = tir.tirx.floordiv(count, tir.i64(width))
        if hide:
            steps = steps + emitter.sizes.zero
        whole = emitter.block.let(steps, "whole")
        step = tir.var("step")
        with emitter.scope() as body:
            self._prefetch(one, group, step * tir.i64(width), width)
            self._lanes(group, step * tir.i64(width), tir.i64(width), parts)
        emitter.block.loop(step, whole, body)
        if not (isinstance(extent, int) and extent % width == 0):
            base = emitter.block.let(whole * tir.i64(width), "base")
            self._lanes(group, base, count - base, parts)

    def _prefetch(self, one: Pass, group: tuple[Axis, ...], base: Expr, width: int) -> None:
        """Asks for what a product reads a little later of its large operand, row after row."""
        if not self.reuses:
            return
        emitter = self.emitter
        emitter.addresses.bind(group, base)
        for value, index in one.survey.costly:
            nbytes, size = value.type.nbytes(), value.dtype.itemsize
            large = isinstance(nbytes, int) and nbytes >= _LARGE
            if not large or value not in emitter.buffers:
                continue
            read = emitter.indexer.flatten(index, value.shape)
            if value.dtype in SUB_BYTE_BITS:
                read, _ = packed_address(emitter.indexer, value, index)
            if not all(isinstance(atom, Axis) for atom, _ in read.terms):
                continue  # a row of a table, say: where it lies is data
            if read.coefficient(group[-1]) == 1 and read.axes - set(group):
                place = emitter.addresses.code(read) + tir.i64(_AHEAD // size)
                for line in range(0, width, _LINE // size):
                    at = place + tir.i64(line)
                    tir.prefetch(emitter.block, emitter.buffers[value], at)
        emitter.addresses.unbind(group)

    def _lanes(self, group: tuple[Axis, ...], base: Expr, steps: Expr, parts: list[Part]) -> None:
        emitter = self.emitter
        lane = tir.var("lane")
        emitter.addresses.bind(group, base + lane)
        with emitter.scope(group) as body:
            self._steps(parts, lane)
        emitter.addresses.unbind(group)
        emitter.block.loop(lane, steps, body)

    def _steps(self, parts: list[Part], lane: Expr) -> None:
        for at, same in groupby(parts, lambda part: (*part.rows, *part.inner)):
            with self._at(at):
                for part in same:
                    reduce = part.sums.reduce
                    element = self.emitter.element(reduce.op.operands[0], reduce.source)
                    place = self._position(reduce, part.sums)
                    part.sums.step(self.emitter.block, lane, element, place)

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
            parts = self._parts(one, width, None)
            variable = tir.var("lane")
            start = tir.Block()
            for part in parts:
                part.sums.start(start, variable)
            block.loop(variable, tir.i64(width), start)

            def body(parts: list[Part] = parts) -> None:
                self._lanes(lane, base, steps, parts)

            self._loops(one, body)
            for part in parts:
                self._result_of_lane(part.sums, lane, base)
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


def _short_last(groups: Sequence[tuple[Axis, ...]]) -> tuple[Axis, ...] | None:
    """An innermost loop too short for lanes (two nibbles of a byte): it is written out."""
    if len(groups) < 2:
        return None
    extent = group_extent(groups[-1])
    return groups[-1] if isinstance(extent, int) and extent <= _MOST_UNROLLED else None


def _width(extent: Dim, copies: int) -> int:
    """How many partial results: a power of two, and few enough to stay in registers."""
    lanes = _LANES
    while lanes > 16 and lanes * copies > _MOST_LANES:
        lanes //= 2
    if not isinstance(extent, int) or extent >= lanes:
        return lanes
    return 1 << (extent.bit_length() - 1) if extent >= 16 else 1
