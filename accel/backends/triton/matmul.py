"""Kernels of kind "matmul": linears of many rows on tensor cores, with what follows on the tile.

A program computes a tile of ROWS x COLS results in registers: for every DEPTH of K it multiplies a
tile of x with one of the weight (`tl.dot`), several blocks of memory in flight. Then the epilogue
(bias, activation, residual; several results; gate times up as two tiles) is traced on the tile as
any elementwise kernel. Neighbouring programs share rows of the weight or of x, so tiles go by in
groups of GROUP rows of tiles (Triton's matmul tutorial calls it L2 locality).

The vendor's library multiplies faster; what a generated kernel saves is the epilogue's traffic and
launch. `saves` compares the two on rates that were measured, and says no where they do not pay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.overlapped import OverlappedTile, OverlappedWriter, TileEmitter
from accel.backends.triton.product_loop import MatmulWriter
from accel.backends.triton.product_plan import MatmulTile, plan
from accel.backends.triton.tiles import next_power
from accel.ir.module import Op, Region
from accel.ir.types import Dim, product

Tile = MatmulTile | OverlappedTile
_SYMBOLIC_ROWS = 4096


def reason(op: Op) -> str | None:
    """None if a kernel of kind "matmul" may be built around this op, else the reason why not."""
    if op.name != "linear":
        return f"accel.{op.name} has no generated code"
    x, weight, _ = op.arguments()
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"a product of {x.dtype}"
    if not all(isinstance(d, int) and d > 0 for d in weight.shape):
        return "a weight of symbolic size, or none"
    if product(x.shape[:-1]) in (0, 1) or weight.shape[0] == 1:
        return "a product of one row or column, or of none"
    return None


def choose(rows: Dim, columns: int, depth: int, tiles: int, sms: int) -> MatmulTile:
    """The tile for `rows` x `columns` results, `tiles` accumulators each."""
    count = rows if isinstance(rows, int) else _SYMBOLIC_ROWS
    if tiles == 1 and columns <= 128 and count >= 128 * sms:
        best = MatmulTile(128, max(16, next_power(columns)), 64, 4, 3)
    elif count <= _FEW_ROWS:
        best = MatmulTile(max(16, next_power(count)), 32, 128, 4, 5)
    else:
        for waves, best in _TILES:
            wide = best.columns // tiles
            if -(-count // best.rows) * -(-columns // wide) >= sms * waves:
                break
    span = min(best.depth, max(16, next_power(depth)))
    return MatmulTile(best.rows, max(16, best.columns // tiles), span, best.warps, best.stages)


def candidates(kernel: Op, sms: int) -> list[MatmulTile]:
    """Tiles worth timing for a kernel; `columns` is shared by its accumulators."""
    op = next(op for op in kernel.regions[0].ops if op.name == "linear")
    x, weight, _ = op.arguments()
    rows, columns = product(x.shape[:-1]), int(weight.shape[0])
    tallest = max(16, next_power(rows)) if isinstance(rows, int) else 256
    halves = 1 + any(o.name == "slice" for o in kernel.regions[0].ops)
    depth = max(16, next_power(int(x.shape[-1])))
    return [
        MatmulTile(height, width // halves, min(span, depth), warps, stages)
        for height, width, span, warps, stages in _WORTH_TIMING
        if height <= tallest and width <= next_power(columns) and width // halves >= 16
    ]


# rows, columns, depth, warps, stages
_WORTH_TIMING = (
    (128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4),
    (64, 256, 64, 4, 3), (64, 64, 128, 4, 4), (64, 64, 64, 4, 5), (256, 128, 64, 8, 3),
    (64, 32, 128, 4, 5), (128, 64, 64, 4, 4), (32, 128, 128, 4, 4), (32, 64, 128, 4, 5),
    (16, 128, 128, 4, 4), (16, 64, 128, 4, 5), (16, 32, 256, 4, 5), (16, 32, 128, 4, 6),
)  # fmt: skip


# From the largest down; the first that fills the multiprocessors to its share of a wave is taken.
# Measured on an H200 with K = 768 and 3072: smaller problems are bound by the latency of the loop
# over K, for which deep pipelines of long steps are best (benchmarks/results/gpu_products.json).
_TILES = (
    (1.0, MatmulTile(128, 256, 64, 8, 3)),
    (1.0, MatmulTile(64, 128, 64, 4, 3)),
    (0.5, MatmulTile(64, 64, 128, 4, 5)),
    (0.0, MatmulTile(64, 32, 128, 4, 5)),
)
_FEW_ROWS = 32  # tiles no taller than this: the weight's stream is the limit


# -- whether it pays -------------------------------------------------------------------------

_LIBRARY_RATE, _OWN_RATE = 580e12, 380e12  # FLOP/s of 16-bit products, measured on an H200
_BANDWIDTH = 4.3e12  # bytes/s, likewise
_LAUNCH = 1.5e-6  # seconds from one kernel of a CUDA graph to the next
_DEFAULT_SMS = 132
_SLACK = 1.3  # arithmetic and memory overlap: up to here the epilogue saves more than it costs


def saves(op: Op, members: Sequence[Op], sms: int) -> str | None:
    """Why cuBLAS and kernels for the rest are faster than one kernel; None if they are not.

    The library computes `op` alone. An epilogue in `members` then needs a launch, a read of the
    result and a write; so does the decoding of a compressed weight. A lone addition needs nothing:
    the next norm reads both of its operands anyway. Against that stand the two rates of
    multiplication, and that a second wave of tiles costs as much as the first.
    """
    x, weight, _ = op.arguments()
    rows, columns, depth = product(x.shape[:-1]), int(weight.shape[0]), int(x.shape[-1])
    streams = isinstance(rows, int) and _streams(rows, columns, depth, x.dtype.itemsize)
    free = ("slice",) if streams else ("slice", "add")
    rest = [m for m in members if m is not op and m.name not in free]
    decoded = weight.op is not None and weight.op.name != "constant"
    if not rest and not decoded:
        return "an epilogue that saves no launch"
    if not isinstance(rows, int):
        return "an unknown number of rows"
    if streams:
        return None
    flops, width = 2 * rows * columns * depth, x.dtype.itemsize
    lost = (flops / _OWN_RATE - flops / _LIBRARY_RATE) * _DEFAULT_SMS / sms
    saved = 0.0
    if rest:
        saved += _LAUNCH + 2 * rows * columns * width / _BANDWIDTH
    if decoded:
        saved += _LAUNCH + 2 * columns * depth * width / _BANDWIDTH
    if lost >= saved:
        return f"cuBLAS saves {1e6 * lost:.1f} us, one kernel {1e6 * saved:.1f} us"
    halves = 1 + any(m.name == "slice" for m in members)
    results = columns // halves
    tile = choose(rows, results, depth, halves, sms)
    count = -(-rows // tile.rows) * -(-results // tile.columns)
    if count > sms and not decoded:
        return f"{count} tiles on {sms} multiprocessors"
    return None


def _streams(rows: int, columns: int, depth: int, width: int) -> bool:
    """Whether memory is the limit, however the tiles are computed: few channels of many pixels."""
    moved = (rows * depth + rows * columns + columns * depth) * width
    return 2 * rows * columns * depth / _OWN_RATE < _SLACK * moved / _BANDWIDTH


# -- the code --------------------------------------------------------------------------------


class MatmulGenerator(Generator):
    """A matmul kernel: one launch."""

    tile: Tile | None = None

    def run(self) -> KernelCode:
        made = plan(self.planner)
        self.kind = index_kind(self.region, [])
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        writes = [Slot("result", i) for i in range(len(made.stores))]
        targets = [w.name for w in writes]
        rows, columns = made.op.result.shape[:-1], made.stores[0][0].shape[-1]
        depth, tiles = int(made.op.operands[0].shape[-1]), len(made.places)
        tile = self.tile or choose(product(rows), int(columns), depth, tiles, self.sms)
        if isinstance(tile, OverlappedTile):
            over = TileEmitter(self.planner.indexer, pointers, set(), self.kind)
            program = OverlappedWriter(made, over, self.region, targets, tile, self.sms).write()
        else:
            emitter = StoredOperands(self.planner.indexer, pointers, set(), self.kind)
            program = MatmulWriter(made, emitter, targets, tile).write()
        reads = [Slot("input", self.region.args.index(v)) for v in program.reads]
        reads.sort(key=lambda s: (s.kind, s.number))
        self._launch(program, reads, writes, [])
        return KernelCode(self.name, self.launches, [])


def generate(
    name: str, region: Region, comment: str, sms: int, tile: Tile | None = None
) -> KernelCode:
    """The source of a region with one linear. Raises BackendError for what has none."""
    generator = MatmulGenerator(name, region, comment, sms)
    generator.tile = tile
    return generator.run()
