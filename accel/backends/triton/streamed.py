"""Writes skinny products for Hopper in Gluon: the weight's tiles come by TMA, the first ones early.

    ring of STAGES slots: a tile of the weight [COLS, DEPTH] for each sum, one of x [ROWS, DEPTH]

The copies of the weight's first tiles are under way before the program waits for earlier kernels,
which may still be at work: a weight is no kernel's result. Once they have ended, x's tiles follow,
and each step multiplies what has arrived and refills the slot of the step before. Rows and columns
outside of the matrices arrive as zeros, so nothing is masked before the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from accel.backends.triton.bringing import plus
from accel.backends.triton.dependent import WAIT, WAIT_AFTER
from accel.backends.triton.emitter import Scope
from accel.backends.triton.maps import MapCode, Matrix
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.overlapped import _TMA_NAMES, SHARED_BYTES, operands_of
from accel.backends.triton.product_plan import Plan
from accel.backends.triton.program import Program
from accel.backends.triton.skinny_loop import SkinnyWriter
from accel.backends.triton.text import Block
from accel.errors import BackendError

__all__ = ["StreamedTile", "StreamedWriter", "operands_of"]
_WARPS = 4
_BARRIER_BYTES = 2 << 10


@dataclass(frozen=True)
class StreamedTile:
    """Rows of the weight of one program and sum (64 or 128), the part of K of one step, steps in
    flight, and programs that share a sum."""

    capability: ClassVar[int] = 90

    columns: int = 64
    depth: int = 128
    stages: int = 5
    split: int = 1

    @property
    def warps(self) -> int:
        return _WARPS

    def bytes(self, rows: int, sums: int) -> int:
        """Shared memory of a program."""
        return (self.columns * sums + rows) * self.depth * 2 * self.stages + _BARRIER_BYTES


class StreamedWriter(SkinnyWriter):
    """Writes the one program. Raises BackendError for other operands than matrices of 16 bits."""

    cell, blank, meet = (
        "row * COLS + inside",
        "tl.zeros([COLS, ROWS], tl.float32, flat)",
        "meet()",
    )

    def __init__(
        self, plan: Plan, emitter: StoredOperands, targets: Sequence[str], tile: StreamedTile
    ) -> None:
        super().__init__(plan, emitter, targets, tile)
        made = operands_of(plan, emitter.indexer)
        if made is None:
            raise BackendError("a product whose operands are no matrices that TMA can copy")
        self.left, self.right = made
        if tile.bytes(self.width, len(self.right)) > SHARED_BYTES:
            raise BackendError(f"{tile} needs more than {SHARED_BYTES} bytes of shared memory")

    def write(self) -> Program:
        tile, emitter = self.tile, self.emitter
        block = emitter.scopes[0].block
        self.steps = -(-self.depth // (tile.depth * tile.split))
        self._allocate(block)
        self._fill(block)
        self._multiply(block)
        sums = [f"acc_{i}" for i in range(len(self.right))]
        with emitter.inside(Scope(block, frozenset())):
            self._finish(sums) if tile.split == 1 else self._share(sums)
        reads = [self.left.value, *(m.value for m in self.right), *emitter.used]
        return Program(block.source(), [self._constants()], {}, self.tiles * tile.split, _WARPS,
                       list(dict.fromkeys(reads)), emitter.checks, self._maps(),
                       gluon=True)  # fmt: skip

    def _constants(self) -> str:
        tile = self.tile
        values = {"ROWS": self.width, "COLS": tile.columns, "DEPTH": tile.depth,
                  "STAGES": min(tile.stages, self.steps), "SPLIT": tile.split,
                  "STEPS": self.steps}  # fmt: skip
        return "\n".join(f"{name} = tl.constexpr({value})" for name, value in values.items())

    def _maps(self) -> tuple[MapCode, ...]:
        def one(number: int, matrix: Matrix, rows: int) -> MapCode:
            most = max((m.rows for m in self.right), key=int) if number else matrix.rows
            pointer = self.emitter.pointers[matrix.value]
            return MapCode(f"m{number}", pointer, _TMA_NAMES[matrix.value.dtype], most,
                           matrix.columns, matrix.stride, (rows, self.tile.depth),
                           shared=True)  # fmt: skip

        return one(0, self.left, self.width), one(1, self.right[0], self.tile.columns)

    # -- the code --------------------------------------------------------------------------

    def _allocate(self, block: Block) -> None:
        columns, count = self.tile.columns, len(self.right)
        wide = ".to(tl.int64)" if self.emitter.kind == "int64" else ""
        for line in (
            f"wide: tl.constexpr = tl.NVMMADistributedLayout([3, 0], [{_WARPS}, 1], "
            "[16, ROWS, 16])",
            f"flat: tl.constexpr = tl.BlockedLayout([4, 1], [{columns // 4}, {128 // columns}], "
            f"[1, {_WARPS}], [0, 1])",
            "tile = tl.program_id(0) // SPLIT",
            "part = tl.program_id(0) % SPLIT",
            f"left = tl.allocate_shared_memory(m1.dtype, [STAGES, {count} * COLS, DEPTH], "
            "m1.layout)",
            "right = tl.allocate_shared_memory(m0.dtype, [STAGES, ROWS, DEPTH], m0.layout)",
            "ready = tl.allocate_shared_memory(tl.int64, [STAGES, 1], mbarrier.MBarrierLayout())",
            "for i in tl.static_range(STAGES):",
            "    mbarrier.init(ready.index(i), count=1)",
            "fence_async_shared()",
            "begin = part * (STEPS * DEPTH)",
            "inside = tl.arange(0, COLS, tl.SliceLayout(1, flat))[:, None]",
            f"col = tile{wide} * COLS + inside",
            "row = tl.arange(0, ROWS, tl.SliceLayout(0, flat))[None, :]",
        ):
            block.line(line)

    def _weights(self, slot: str, step: str) -> list[str]:
        """Copies of a step's tiles of the weight."""
        width = 2 * (len(self.right) * self.tile.columns + self.width) * self.tile.depth
        lines = [f"mbarrier.expect(ready.index({slot}), {width})"]
        for number, one in enumerate(self.right):
            target = f"left.index({slot})"
            if len(self.right) > 1:
                target += f".slice({number} * COLS, COLS, dim=0)"
            place = f"{plus('tile * COLS', one.row0)}, {plus(step, one.col0)}"
            lines.append(f"bring_tile(m1, [{place}], ready.index({slot}), {target})")
        return lines

    def _x(self, slot: str, step: str) -> str:
        place = f"{self.left.row0}, {plus(step, self.left.col0)}"
        return f"bring_tile(m0, [{place}], ready.index({slot}), right.index({slot}))"

    def _fill(self, block: Block) -> None:
        loop = "for i in tl.static_range(STAGES):"
        body = Block(block.names)
        body.lines += self._weights("i", "begin + i * DEPTH")
        block.nest(loop, body)
        pointer = self.emitter.pointers[self.right[0].value]
        block.line(f"{WAIT}()  {WAIT_AFTER}{pointer}")
        body = Block(block.names)
        body.line(self._x("i", "begin + i * DEPTH"))
        block.nest(loop, body)

    def _multiply(self, block: Block) -> None:
        count = len(self.right)
        for number in range(count):
            block.line(f"sum_{number} = warpgroup_mma_init(tl.zeros([COLS, ROWS], tl.float32, "
                       "wide))")  # fmt: skip
        body = Block(block.names)
        body.line("slot = step % STAGES")
        body.line("mbarrier.wait(ready.index(slot), (step // STAGES) & 1)")
        for number in range(count):
            left = "left.index(slot)"
            if count > 1:
                left += f".slice({number} * COLS, COLS, dim=0)"
            body.line(f"sum_{number} = warpgroup_mma({left}, right.index(slot).permute([1, 0]), "
                      f"sum_{number}, is_async=True)")  # fmt: skip
        for number in range(count):
            body.line(f"sum_{number} = warpgroup_mma_init(warpgroup_mma_wait("
                      f"num_outstanding={count}, deps=[sum_{number}]))")  # fmt: skip
        body.line("more = step - 1 + STAGES")
        body.line("last = (step - 1 + STAGES) % STAGES")
        refill = Block(block.names)
        refill.lines += [*self._weights("last", "begin + more * DEPTH"),
                         self._x("last", "begin + more * DEPTH")]  # fmt: skip
        body.nest("if (step > 0) & (more < STEPS):", refill)
        block.nest("for step in range(0, STEPS):", body)
        for number in range(count):
            block.line(f"total_{number} = warpgroup_mma_wait(num_outstanding=0, "
                       f"deps=[sum_{number}])")  # fmt: skip
            block.line(f"acc_{number} = tl.convert_layout(total_{number}, flat)")
