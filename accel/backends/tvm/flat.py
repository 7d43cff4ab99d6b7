"""Loops of phases without reductions."""

from __future__ import annotations

from contextlib import ExitStack

from accel.backends.loops.index import Axis
from accel.backends.loops.trace import Key
from accel.backends.tvm import tir
from accel.backends.tvm.code import Kept
from accel.backends.tvm.nests import Nest, Pass, group_extent, kept_kind, parts_of
from accel.backends.tvm.tir import Expr
from accel.ir.types import Dim, product

_PIECE = 1024  # elements of one task where rows are few
_TILE = 32
_FEW_ROWS = 8


class FlatNest(Nest):
    """All axes that merge are one loop. With more loops than one, the last is the inner one.

    Where memory is read across the inner loop (a transpose), both loops are cut into tiles. What
    is read that way is copied to a local array first, along its own contiguous axis: strides of
    large powers of two would throw each other's lines out of the cache.
    """

    def _emit(self, begin: Expr, end: Expr) -> None:
        (only,) = self.stores
        groups = self._merge(self.phase.outer, [only])
        if len(groups) > 1:
            crossed = self._crossed(groups, only)
            if crossed is not None:
                self._emit_tiles(groups, crossed, only, begin, end)
            else:
                self._emit_rows(groups, only, begin, end)
            return
        self.rows, self.cost = group_extent(self.phase.outer), only.per_element
        with ExitStack() as stack:
            for group in groups:
                stack.enter_context(self.emitter.loop(group, end - begin, begin))
            self._store(only)

    def _emit_rows(
        self, groups: list[tuple[Axis, ...]], only: Pass, begin: Expr, end: Expr
    ) -> None:
        *rows, last = groups
        inner = group_extent(last)
        count = product(group_extent(g) for g in rows)
        few = isinstance(count, int) and count < _FEW_ROWS
        pieces: Dim = parts_of(inner, _PIECE) if few else 1
        self.rows = product((count, pieces))
        self.cost = product((only.per_element, _PIECE if few else inner))
        row = tir.var("row")
        with self.emitter.scope([a for g in rows for a in g]) as body:
            part, base, steps = row, None, self.sizes.code(inner)
            if few:
                across = self.sizes.code(pieces or 1)
                base, steps = self._cut(tir.tirx.truncmod(row, across), inner, _PIECE)
                part = body.let(tir.tirx.truncdiv(row, across), "part")
            self._bind_rows(rows, part)
            with self.emitter.loop(last, steps, base):
                self._store(only)
        self.emitter.block.loop(row, end - begin, body, begin)

    def _crossed(self, groups: list[tuple[Axis, ...]], only: Pass) -> tuple[Axis, ...] | None:
        """A loop that memory is contiguous along where it is not along the inner one."""
        last = groups[-1][-1]
        for read in only.survey.reads:
            if read.coefficient(last) in (0, 1):
                continue
            for group in groups[:-1]:
                if read.coefficient(group[-1]) == 1 and group_extent(group) != 1:
                    return group
        return None

    def _emit_tiles(
        self,
        groups: list[tuple[Axis, ...]],
        crossed: tuple[Axis, ...],
        only: Pass,
        begin: Expr,
        end: Expr,
    ) -> None:
        rows = [g for g in groups[:-1] if g is not crossed]
        last = groups[-1]
        inner, across = group_extent(last), group_extent(crossed)
        high = parts_of(across, _TILE)
        self.rows = product((*(group_extent(g) for g in rows), high))
        self.cost = product((only.per_element, _TILE, inner))
        row, tile = tir.var("row"), tir.var("tile")
        with self.emitter.scope([a for g in rows for a in g]) as body:
            count = self.sizes.code(high or 1)
            base, steps = self._cut(tir.tirx.truncmod(row, count), across, _TILE)
            self._bind_rows(rows, body.let(tir.tirx.truncdiv(row, count), "part"))
            with self.emitter.scope() as tiles:
                inner_base, inner_steps = self._cut(tile, inner, _TILE)
                staged = self._stage(only, crossed, last, inner_base * tir.i64(_TILE) + base)
                with (
                    self.emitter.loop(last, inner_steps, inner_base),
                    self.emitter.loop(crossed, steps, base),
                ):
                    for value, index in staged:
                        self.emitter.element(value, index)
                for key in staged:
                    self.emitter.kept[key].filled = True
                with (
                    self.emitter.loop(crossed, steps, base),
                    self.emitter.loop(last, inner_steps, inner_base),
                ):
                    self._store(only)
            body.loop(tile, self.sizes.code(parts_of(inner, _TILE)), tiles)
        self.emitter.block.loop(row, end - begin, body, begin)

    def _stage(
        self, only: Pass, crossed: tuple[Axis, ...], last: tuple[Axis, ...], offset: Expr
    ) -> list[Key]:
        """Plans local arrays for what is read across the inner loop."""
        indexer = self.emitter.indexer
        keys: list[Key] = []
        for value, index in only.survey.costly:
            kind = kept_kind(value.dtype)
            if value not in self.emitter.buffers or kind is None:
                continue
            read = indexer.flatten(index, value.shape)
            if read.coefficient(last[-1]) in (0, 1) or read.coefficient(crossed[-1]) != 1:
                continue
            high, low = (
                indexer.flatten([indexer.of(a) for a in g], [a.extent for a in g])
                for g in (last, crossed)
            )
            tile = tir.local_array("tile", _TILE * _TILE, kind)
            self.emitter.block.allocate(tile)
            self.emitter.kept[(value, index)] = Kept(tile, high.times(_TILE).plus(low), offset)
            keys.append((value, index))
        return keys
