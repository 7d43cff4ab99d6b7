"""Writes products as one loop of `tl.dot` over blocks of K, for any GPU and any operands.

An operand may be computed element by element (a weight that is decoded, an activation before the
linear) or lie anyhow in memory: it is traced as any elementwise value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from accel.backends.loops.index import Axis
from accel.backends.loops.merge import merged
from accel.backends.loops.trace import Index
from accel.backends.triton import dtypes, float8
from accel.backends.triton.addresses import decompose, size_text
from accel.backends.triton.emitter import Scope
from accel.backends.triton.operands import StoredOperands, is_stored
from accel.backends.triton.product_plan import Plan, codes_of
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import parts_of
from accel.errors import BackendError
from accel.ir.module import Value
from accel.ir.types import Dim, product

_FLOAT8_SPAN = 128  # of K
FULL_PRECISION, TF32_PRECISION = 'input_precision="ieee"', 'input_precision="tf32"'


class MatmulWriter:
    """Writes the one program of a matmul kernel."""

    def __init__(
        self, plan: Plan, emitter: StoredOperands, targets: Sequence[str], tile: Any
    ) -> None:
        self.plan, self.emitter, self.targets, self.tile = plan, emitter, targets, tile
        self.rows: Dim = product(a.extent for a in plan.rows)
        self.columns = product(a.extent for a in plan.columns)
        self.depth = int(product(a.extent for a in plan.left))
        self._made: dict[tuple[str, str, int], Expr] = {}

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
        x, weight = codes_of(plan.op) or plan.op.operands[:2]
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
                body.line(self._dot(name, left, right))
        emitter.addresses.groups, emitter.masks = bound, masks

    def _dot(self, sum: str, left: Expr, right: Expr) -> str:
        """One product of tiles, added to a sum; float32 in full precision. Hopper adds products of
        float8 with 14 bits: _FLOAT8_SPAN of them, then they are added to the sum in float32."""
        options = ""
        if codes_of(self.plan.op) is not None:
            options = f", max_num_imprecise_acc={min(_FLOAT8_SPAN, self.tile.depth)}"
        elif self.plan.op.operands[0].dtype == torch.float32:
            options = f", {FULL_PRECISION}"
        return f"{sum} = tl.dot({left}, {right}, {sum}{options})"

    def _operand(self, value: Value, index: Index, shape: str, summed: Sequence[Axis]) -> Expr:
        emitter = self.emitter
        emitter.raw = is_stored(value)
        made = emitter.element(value, index)
        mask = next((emitter.masks[a] for a in summed if a in emitter.masks), "")
        if not emitter.raw:
            made = dtypes.to_storage(made, value.dtype, emitter.block)
            text = f"tl.where({mask}, {made}, 0.0)" if mask else str(made)
            made = emitter.block.let(text, "stored", made.dims, "operand")
        emitter.raw = False
        if value.dtype == torch.float8_e4m3fn:
            text = f"{float8.OPERAND}({made})"
            made = emitter.block.let(text, "stored", made.dims, "operand")
        if made.dims != frozenset((ROW, COL)):
            text = f"tl.broadcast_to({made}, {shape})"
            made = emitter.block.let(text, "stored", frozenset((ROW, COL)), "operand")
        return made

    def _finish(self, sums: Sequence[str]) -> None:
        """The epilogue on the tile."""
        plan, tile, emitter = self.plan, self.tile, self.emitter
        block, both = emitter.block, frozenset((ROW, COL))
        with emitter.inside(Scope(block, frozenset((*plan.rows, *plan.columns)))) as _:
            scope = emitter.scopes[-1]
            self._bind(plan.rows, "row", ROW, tile.rows)
            self._bind(plan.columns, "col", COL, tile.columns)
            for name, place in zip(sums, plan.places, strict=True):
                value = Expr(name, "float32", both)
                added = self._bias(place)
                if added is not None:
                    value = block.let(f"{value} + {added}", "float32", both, "add")
                value = dtypes.rounded(value, plan.op.result.dtype, block)
                made = block.let(str(value), "float32", both, "linear")
                scope.known[(plan.op.result, place)] = made
                for other in plan.swapped:
                    scope.known[(plan.op.result, other.place)] = self._swap(made, other.distance)
            for target, (value_, index) in zip(self.targets, plan.stores, strict=True):
                self._store(target, value_, index)

    def _bias(self, place: Index) -> Expr | None:
        """What is added to the product before it is rounded."""
        bias = self.plan.op.arguments()[2]
        return None if bias is None else self.emitter.element(bias, place[-1:])

    def _swap(self, value: Expr, distance: int) -> Expr:
        """The tile with neighbouring pieces of its columns exchanged: a matter of names where
        each thread has both."""
        block, columns = self.emitter.block, self._tile_columns()
        if columns % (2 * distance):
            raise BackendError(f"pairs {distance} columns apart in tiles of {columns}")
        pieces = f"[ROWS, {columns // (2 * distance)}, 2, {distance}]"
        key = ("swapped", str(value), distance)
        found = self._made.get(key)
        if found is not None:
            return found
        block.line(f"lower, upper = {value}.reshape({pieces}).permute([0, 1, 3, 2]).split()")
        joined = f"tl.join(upper, lower).permute([0, 1, 3, 2]).reshape([ROWS, {columns}])"
        made = block.let(self._laid_out(joined), value.kind, value.dims, "swapped")
        self._made[key] = made
        return made

    def _tile_columns(self) -> int:
        return int(self.tile.columns)

    def _laid_out(self, value: str) -> str:
        """A tile in the layout of the epilogue."""
        return value

    def _store(self, target: str, value: Value, index: Index) -> None:
        emitter = self.emitter
        made = emitter.element(value, index)
        made = dtypes.to_storage(made, value.dtype, emitter.block)
        address = emitter.indexer.flatten(index, value.shape)
        mask = emitter.mask(address.axes)
        tail = f", mask={mask}" if mask else ""
        code = emitter.addresses.code(address)
        emitter.block.line(f"tl.store({target} + {code}, {made}{tail})")
