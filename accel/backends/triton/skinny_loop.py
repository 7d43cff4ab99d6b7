"""Writes skinny products as one loop of `tl.dot`, for any GPU and any operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accel.backends.triton import dtypes
from accel.backends.triton.emitter import Scope
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.product_loop import MatmulWriter
from accel.backends.triton.product_plan import Plan, codes_of
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import next_power

_LEAST_ROWS = 16  # of a tile: what a tensor core takes at once
_BOTH = frozenset((ROW, COL))


@dataclass(frozen=True)
class SkinnyTile:
    """Rows of the weight of one program, the part of K of one step, programs that share a sum."""

    columns: int
    depth: int
    warps: int
    stages: int = 4
    split: int = 1


class SkinnyWriter(MatmulWriter):
    """Writes the one program of a skinny kernel. `parts` are scratch: partial sums, arrivals."""

    parts = ("t0", "t1")
    cell, blank, meet = (
        "tl.arange(0, COLS)[:, None] * ROWS + row",
        "tl.zeros([COLS, ROWS], tl.float32)",
        "tl.debug_barrier()",
    )

    def __init__(
        self, plan: Plan, emitter: StoredOperands, targets: Sequence[str], tile: Any
    ) -> None:
        super().__init__(plan, emitter, targets, tile)
        self.width = max(_LEAST_ROWS, next_power(int(self.rows)))

    def write(self) -> Program:
        tile, top = self.tile, self.emitter.scopes[0]
        self._place()
        sums = [f"acc_{i}" for i in range(len(self.plan.places))]
        for name in sums:
            top.block.line(f"{name} = tl.zeros([COLS, ROWS], tl.float32)")
        body = Block(top.block.names)
        self._step(body, sums)
        top.block.nest(f"for start in tl.range({self._bounds()}, DEPTH, num_stages=STAGES):", body)
        if tile.split == 1:
            self._finish(sums)
        else:
            self._share(sums)
        constants = {"ROWS": self.width, "COLS": tile.columns, "DEPTH": tile.depth,
                     "STAGES": tile.stages}  # fmt: skip
        if tile.split > 1:
            constants["SPLIT"] = tile.split
        return Program(top.block.source(), [], constants, self.tiles * tile.split, tile.warps,
                       list(self.emitter.used), self.emitter.checks)  # fmt: skip

    @property
    def tiles(self) -> int:
        return -(-int(self.columns) // self.tile.columns)

    def _place(self) -> None:
        block = self.emitter.block
        wide = ".to(tl.int64)" if self.emitter.kind == "int64" else ""
        if self.tile.split == 1:
            block.line(f"tile = tl.program_id(0){wide}")
        else:
            block.line(f"tile = tl.program_id(0){wide} // SPLIT")
            block.line("part = tl.program_id(0) % SPLIT")
        block.line("col = tile * COLS + tl.arange(0, COLS)[:, None]")
        block.line("row = tl.arange(0, ROWS)[None, :]")

    def _bounds(self) -> str:
        """This program's part of K."""
        if self.tile.split == 1:
            return f"0, {self.depth}"
        share = -(-self.depth // (self.tile.depth * self.tile.split)) * self.tile.depth
        if share * self.tile.split == self.depth:
            return f"part * {share}, part * {share} + {share}"
        return f"part * {share}, tl.minimum(part * {share} + {share}, {self.depth})"

    def _step(self, body: Block, sums: Sequence[str]) -> None:
        """One block of K: a tile of the weight for each sum, and x's."""
        plan, tile, emitter = self.plan, self.tile, self.emitter
        x, weight = codes_of(plan.op) or plan.op.operands[:2]
        bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
        with emitter.inside(Scope(body, frozenset((*plan.rows, *plan.left)))):
            body.line("depth = start + tl.arange(0, DEPTH)[:, None]")
            self._bind(plan.rows, "row", COL, self.width)
            self._bind(plan.left, "depth", ROW, tile.depth)
            right = self._operand(x, plan.x_index, "[DEPTH, ROWS]", plan.left)
        emitter.addresses.groups, emitter.masks = list(bound), dict(masks)
        with emitter.inside(Scope(body, frozenset((*plan.columns, *plan.right)))):
            body.line("k = start + tl.arange(0, DEPTH)[None, :]")
            self._bind(plan.columns, "col", ROW, tile.columns)
            self._bind(plan.right, "k", COL, tile.depth)
            for name, index in zip(sums, plan.weight_indices, strict=True):
                left = self._operand(weight, index, "[COLS, DEPTH]", plan.right)
                body.line(self._dot(name, left, right))
        emitter.addresses.groups, emitter.masks = bound, masks

    def _share(self, sums: Sequence[str]) -> None:
        """Leaves this program's part; the last one adds all up and goes on."""
        block, (parts, arrivals) = self.emitter.block, self.parts
        size = self.tile.columns * self.width
        block.line(f"cell = {self.cell}")
        for number, name in enumerate(sums):
            place = f"((tile * {len(sums)} + {number}) * SPLIT + part) * {size}"
            block.line(f"tl.store({parts} + {place} + cell, {name})")
        block.line(self.meet)
        block.line(f'arrived = tl.atomic_add({arrivals} + tile, 1, sem="acq_rel")')
        body = Block(block.names)
        body.line(f"tl.store({arrivals} + tile, 0)")
        for number, name in enumerate(sums):
            body.line(f"{name} = {self.blank}")
            inner = Block(block.names)
            place = f"((tile * {len(sums)} + {number}) * SPLIT + other) * {size}"
            inner.line(f"{name} += tl.load({parts} + {place} + cell)")
            body.nest("for other in range(SPLIT):", inner)
        with self.emitter.inside(Scope(body, frozenset())):
            self._finish(sums)
        block.nest("if arrived == SPLIT - 1:", body)

    def _finish(self, sums: Sequence[str]) -> None:
        plan, emitter = self.plan, self.emitter
        block = emitter.block
        with emitter.inside(Scope(block, frozenset((*plan.rows, *plan.columns)))):
            scope = emitter.scopes[-1]
            self._bind(plan.rows, "row", COL, self.width)
            self._bind(plan.columns, "col", ROW, self.tile.columns)
            for name, place in zip(sums, plan.places, strict=True):
                value = Expr(name, "float32", _BOTH)
                added = self._bias(place)
                if added is not None:
                    value = block.let(f"{value} + {added}", "float32", _BOTH, "add")
                value = dtypes.rounded(value, plan.op.result.dtype, block)
                made = block.let(str(value), "float32", _BOTH, "linear")
                scope.known[(plan.op.result, place)] = made
            for target, (value_, index) in zip(self.targets, plan.stores, strict=True):
                self._store(target, value_, index)
