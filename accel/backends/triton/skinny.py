"""Kernels of kind "skinny": linears of a few dozen rows, which stream their weight once.

With 3 to 64 rows of x a product is still bound by reading its weight, but has too many
multiplications for the units that a gemv runs on. Here the weight's rows are the rows of tensor
core tiles (COLS of them a program) and x's rows are their columns (all of them: ROWS, a power of
two), so that a tile of 64 weights meets as few as 16 rows of x. The loop over K keeps several
blocks of the weight in flight.

Few results make few programs: then SPLIT of them share a tile's sum over K. Each leaves its part in
scratch memory, and the one that is done last adds them up, always in the same order, and computes
the epilogue (bias, activation, gate times up, residual), which is traced as any elementwise kernel.
"""

from __future__ import annotations

from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.overlapped import SHARED_BYTES
from accel.backends.triton.product_plan import Plan, plan, tensor_core_reason
from accel.backends.triton.skinny_loop import SkinnyTile, SkinnyWriter
from accel.backends.triton.streamed import (
    StreamedTile,
    StreamedWriter,
    operands_of,
)
from accel.backends.triton.tiles import next_power
from accel.errors import BackendError
from accel.ir.module import Op, Region
from accel.ir.types import product

Tile = SkinnyTile | StreamedTile
MOST_ROWS = 64
_DEPTH = 128  # of a step: 256 bytes of each row
_MOST_RESIDENT = 2  # programs of a multiprocessor, in its shared memory
_FEWEST_STAGES, _MOST_STAGES = 2, 9
_BARRIERS = 2 << 10
_MEMORY_RATE, _PROGRAM_RATE = 4.2e6, 48e3  # bytes a microsecond: of the device, of a program
_SHARING_COST = 3.0  # microseconds


def reason(op: Op) -> str | None:
    """None if a kernel of kind "skinny" may be built around this op, else the reason why not."""
    rows = product(op.result.shape[:-1])
    if op.name == "linear" and not (isinstance(rows, int) and rows <= MOST_ROWS):
        return f"a linear of {rows} rows"
    return tensor_core_reason(op)


def choose(rows: int, columns: int, depth: int, tiles: int, sms: int) -> SkinnyTile:
    """The tile for `rows` of x and `columns` results, each of `tiles` sums over `depth`."""
    height = 64 // tiles
    programs = -(-columns // height)
    span = min(128, max(16, next_power(depth)))
    split = 1
    while programs * split < sms and split < 8 and depth >= 4 * split * span:
        split *= 2
    return SkinnyTile(height, span, 4, 4, split)


def choose_streamed(
    rows: int, columns: int, depth: int, sums: int, sms: int
) -> StreamedTile | None:
    """The tile where TMA copies; None where a step is too long for K.

    Memory is the limit, or what a multiprocessor can take in, if few have a program. Sharing sums
    helps there, but leaving parts and waiting for the last one costs a few microseconds. What
    shared memory is left is steps in flight; two programs a multiprocessor where there are more
    than that. Measured on an H200.
    """
    if depth < _DEPTH:
        return None
    height = max(16, next_power(rows))
    tiles, steps = -(-columns // 64), -(-depth // _DEPTH)

    def microseconds(split: int) -> float:
        busy = min(tiles * split, sms)
        rate = min(_MEMORY_RATE, busy * _PROGRAM_RATE)
        return 2 * columns * sums * depth / rate + (_SHARING_COST if split > 1 else 0.0)

    shares = [2**i for i in range(4) if i == 0 or steps >= 8 << i]
    split = min(shares, key=microseconds)
    resident = min(_MOST_RESIDENT, -(-tiles * split // sms))
    step = (64 * sums + height) * _DEPTH * 2
    room, span = SHARED_BYTES // resident - _BARRIERS, _DEPTH
    if _FEWEST_STAGES * step > room:
        span //= 2
        step //= 2
    share = -(-depth // (span * split))
    stages = min(_MOST_STAGES, share, room // step)
    return StreamedTile(64, span, stages, split)


def choose_for(kernel: Op, sms: int, capability: int) -> StreamedTile | None:
    """The tile of an `accel.kernel` op where the architecture has TMA; else `choose` does."""
    if capability != StreamedTile.capability:
        return None
    ops = list(kernel.regions[0].ops)
    op = next(o for o in ops if o.name == "linear")
    sums = 1 + any(o.name == "slice" for o in ops)
    x, weight, _ = op.arguments()
    rows, columns = int(product(x.shape[:-1])), int(weight.shape[0]) // sums
    return choose_streamed(rows, columns, int(x.shape[-1]), sums, sms)


def candidates(kernel: Op, sms: int) -> list[Tile]:
    """Tiles worth timing for a kernel."""
    found: list[Tile] = [
        StreamedTile(columns, 128, stages, split)
        for split in (1, 2, 4, 8)
        for columns, stages in ((64, 4), (64, 6), (64, 8), (128, 3), (64, 3))
    ]
    plain = (SkinnyTile(64, 128, 4, 4, split) for split in (1, 2, 4))
    return [*found, *plain]


class SkinnyGenerator(Generator):
    """A skinny kernel: one launch."""

    tile: Tile | None = None

    def run(self) -> KernelCode:
        made: Plan = plan(self.planner)
        self.kind = index_kind(self.region, [])
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        emitter = StoredOperands(self.planner.indexer, pointers, set(), self.kind)
        writes = [Slot("result", i) for i in range(len(made.stores))]
        rows, columns = product(made.op.result.shape[:-1]), int(made.stores[0][0].shape[-1])
        if not isinstance(rows, int):
            raise BackendError(f"a skinny kernel of {rows} rows")
        depth, sums = int(made.op.operands[0].shape[-1]), len(made.places)
        tile = self.tile
        if isinstance(tile, StreamedTile) and operands_of(made, self.planner.indexer) is None:
            tile = None  # a weight that is decoded, say
        tile = tile or choose(rows, columns, depth, sums, self.sms)
        targets = [w.name for w in writes]
        writer = (
            StreamedWriter(made, emitter, targets, tile)
            if isinstance(tile, StreamedTile)
            else SkinnyWriter(made, emitter, targets, tile)
        )
        program = writer.write()
        if tile.split > 1:
            cells = tile.columns * writer.width * sums * tile.split * writer.tiles
            self.scratch = [("float32", 4 * cells), ("int32", 4 * writer.tiles)]
            writes += [Slot("scratch", 0), Slot("scratch", 1)]
        reads = [Slot("input", self.region.args.index(v)) for v in program.reads]
        reads.sort(key=lambda s: s.number)
        self._launch(program, reads, writes, [])
        code = KernelCode(self.name, self.launches, [size for _, size in self.scratch])
        code.zeroed = [1] if tile.split > 1 else []
        return code


def generate(
    name: str, region: Region, comment: str, sms: int, tile: Tile | None = None
) -> KernelCode:
    """The source of a region with one linear of few rows. Raises BackendError for what has none."""
    generator = SkinnyGenerator(name, region, comment, sms)
    generator.tile = tile
    return generator.run()
