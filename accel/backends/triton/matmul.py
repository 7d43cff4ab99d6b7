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
from dataclasses import dataclass, replace

from accel.backends.triton.cooperative import CooperativeTile, CooperativeWriter
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.maps import MULTIPLE
from accel.backends.triton.operands import StoredOperands, TileEmitter
from accel.backends.triton.overlapped import (
    OverlappedTile,
    OverlappedWriter,
    operands_of,
)
from accel.backends.triton.paired import PairedTile, PairedWriter
from accel.backends.triton.product_costs import (
    BANDWIDTH,
    LAUNCH,
    MARGIN,
    choose_overlapped,
    fills,
    library_seconds,
    overlapped_seconds,
    rest_seconds,
)
from accel.backends.triton.product_loop import MatmulWriter
from accel.backends.triton.product_plan import (
    MatmulTile,
    codes_of,
    plan,
    shallower,
    tensor_core_reason,
)
from accel.backends.triton.tiles import next_power
from accel.ir.module import Op, Region, Value
from accel.ir.op import Trait
from accel.ir.types import Dim, product


@dataclass(frozen=True)
class Either:
    """The overlapped kernel if the operands are matrices that TMA can copy, else the plain loop."""

    overlapped: OverlappedTile
    loop: MatmulTile


Tile = MatmulTile | OverlappedTile | Either
_SYMBOLIC_ROWS = 4096
_NARROW = 128  # columns: fewer are less than the narrowest tile of an overlapped kernel
_ONE_STEP = 128  # the depth that is brought at once, where memory is the limit


def reason(op: Op, tf32: bool = False) -> str | None:
    """None if a kernel of kind "matmul" may be built around this op, else the reason why not."""
    return tensor_core_reason(op, tf32)


def choose(rows: Dim, columns: int, depth: int, tiles: int, sms: int) -> MatmulTile:
    """The tile for `rows` x `columns` results, `tiles` accumulators each."""
    count = rows if isinstance(rows, int) else _SYMBOLIC_ROWS
    many = tiles == 1 and count >= 64 * sms
    if many and depth <= _ONE_STEP and _streams(count, columns, depth, 2):
        wide = min(128, max(16, next_power(columns)))
        return MatmulTile(64, wide, max(16, next_power(depth)), 4, 2)
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


def _of_bytes(tile: Tile, depth: int) -> Tile:
    """A tile for operands of a byte: twice the depth, and room for sums of two precisions."""
    if not isinstance(tile, MatmulTile):
        return tile
    span = min(2 * tile.depth, max(32, next_power(depth)))
    return replace(
        tile, columns=min(tile.columns, 128), depth=span, warps=8 if tile.rows > 64 else 4
    )


def _of_words(tile: MatmulTile) -> MatmulTile:
    """A tile for operands of tf32. Hopper's instruction multiplies 64 rows; the older ones, of 16,
    turn words around in registers first. Measured on an H200: 16 rows take two thirds of the time
    in tiles of 64, and one more stage saves an eighth."""
    rows = max(64, tile.rows)
    return replace(tile, rows=rows, stages=max(4, tile.stages) if rows == 64 else tile.stages)


def choose_tile(kernel: Op, sms: int, capability: int) -> Tile | None:
    """The tile of a kernel that nobody has measured; None leaves it to `choose`."""
    ops = list(kernel.regions[0].ops)
    op = next(op for op in ops if op.name == "linear")
    x, weight, _ = op.arguments()
    if capability != OverlappedTile.capability or not _may_overlap(x, weight):
        return None
    given, columns, depth = product(x.shape[:-1]), int(weight.shape[0]), int(x.shape[-1])
    rows = given if isinstance(given, int) else _SYMBOLIC_ROWS
    narrow = columns < _NARROW or depth <= _ONE_STEP  # wide tiles would be idle for the most part
    if narrow and _streams(rows, columns, depth, x.dtype.itemsize):
        return None
    halves = _halves(ops)
    tile = choose_overlapped(rows, columns, depth, _rest(ops), sms, halves)
    if not fills(rows, columns, tile, sms):
        return None
    return Either(tile, choose(given, columns // halves, depth, halves, sms))


def candidates(kernel: Op, sms: int) -> list[Tile]:
    """Tiles worth timing for a kernel; `columns` is shared by its accumulators."""
    op = next(op for op in kernel.regions[0].ops if op.name == "linear")
    x, weight, _ = op.arguments()
    rows, columns = product(x.shape[:-1]), int(weight.shape[0])
    tallest = max(16, next_power(rows)) if isinstance(rows, int) else 256
    halves = _halves(list(kernel.regions[0].ops))
    depth = max(16, next_power(int(x.shape[-1])))
    loops: list[Tile] = [
        MatmulTile(height, width // halves, min(span, depth), warps, stages)
        for height, width, span, warps, stages in _WORTH_TIMING
        if height <= tallest and width <= next_power(columns) and width // halves >= 16
    ]
    overlapped = [
        OverlappedTile(height, width, 64, stages, group)
        for height, width, stages, group in _OVERLAPPED
        if height <= tallest and width <= next_power(columns) and _may_overlap(x, weight)
    ]
    if tallest >= 128 and next_power(columns) >= 256 and _may_overlap(x, weight):
        overlapped = [*_COOPERATIVE, *overlapped]
    return [*overlapped, *loops]


# rows, columns, stages, group
_OVERLAPPED = ((128, 128, 5, 8), (128, 128, 5, 16), (64, 128, 6, 8), (64, 256, 3, 8))
_COOPERATIVE = [
    CooperativeTile(group=16), CooperativeTile(group=8), CooperativeTile(192, 128, groups=3),
    PairedTile(group=16), PairedTile(192, 128, groups=3), CooperativeTile(group=16, early=True),
]  # fmt: skip
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

# FLOP/s of 16-bit products in the plain loop, and the library's beside it, measured on an H200.
_LIBRARY_RATE, _OWN_RATE = 580e12, 380e12
_DEFAULT_SMS = 132
_TOKENS = (512, 4096)  # what an unknown number of rows may be
_SLACK = 1.3  # arithmetic and memory overlap: up to here the epilogue saves more than it costs


def saves(op: Op, members: Sequence[Op], sms: int, capability: int) -> str | None:
    """Why cuBLAS and kernels for the rest are faster than one kernel; None if they are not.

    The library computes `op` alone. An epilogue in `members` then needs a launch, a read of the
    result and a write; so does the decoding of a compressed weight, and what scales x before.
    """
    if codes_of(op) is not None:
        return None  # the library would multiply in float32
    if any(m.name == "rope" for m in members):
        return "an epilogue with the rotary embedding is taken where tuning finds it faster"
    x, weight, _ = op.arguments()
    rows, columns, depth = product(x.shape[:-1]), int(weight.shape[0]), int(x.shape[-1])
    rest = [m for m in members if m is not op and m.name != "slice"]
    scaled = any(m.result is x for m in members)  # which TMA cannot bring
    if rest and not scaled and capability == OverlappedTile.capability and _may_overlap(x, weight):
        many = (rows,) if isinstance(rows, int) else _TOKENS
        if all(_overlapped_pays(n, columns, depth, x, members, sms) for n in many):
            return None
    return _loop_saves(op, members, rows, columns, depth, sms)


def _may_overlap(x: Value, weight: Value) -> bool:
    """Whether both operands are matrices that TMA can copy, as far as the op tells."""
    stored = weight.op is None or weight.op.name == "constant"
    whole = int(x.shape[-1]) * x.dtype.itemsize % MULTIPLE == 0
    return stored and whole and x.dtype == weight.dtype and x.dtype.itemsize == 2


def _overlapped_pays(
    rows: int, columns: int, depth: int, x: Value, members: Sequence[Op], sms: int
) -> bool:
    rest, halves = _rest(members), _halves(members)
    tile = choose_overlapped(rows, columns, depth, rest, sms, halves)
    own = overlapped_seconds(rows, columns, depth, tile, rest, sms, halves)
    apart = rest_seconds(rows, columns, halves, x.dtype.itemsize, rest)
    library = library_seconds(rows, columns, depth, sms) + apart
    return fills(rows, columns, tile, sms) and MARGIN * own < library


def _rest(ops: Sequence[Op]) -> list[Op]:
    """What follows a linear, without index maps."""
    maps = ("linear", "cat", "yield")
    return [o for o in ops if o.name not in maps and not o.has(Trait.VIEW)]


def _halves(ops: Sequence[Op]) -> int:
    """Accumulators: two if both halves of the columns meet in one result."""
    turned = any(o.name in ("rope", "cat") for o in ops)
    return 1 if turned else 1 + any(o.name == "slice" for o in ops)


def _loop_saves(
    op: Op, members: Sequence[Op], rows: Dim, columns: int, depth: int, sms: int
) -> str | None:
    """As `saves`, of the plain loop. A lone addition needs nothing: the next norm reads both of its
    operands anyway. A second wave of tiles costs as much as the first."""
    x, weight, _ = op.arguments()
    streams = isinstance(rows, int) and _streams(rows, columns, depth, x.dtype.itemsize)
    free = ("slice",) if streams else ("slice", "add")
    rest = [m for m in members if m is not op and m.result is not x and m.name not in free]
    scaled = any(m.result is x for m in members)
    decoded = weight.op is not None and weight.op.name != "constant"
    if not rest and not decoded and not scaled:
        return "an epilogue that saves no launch"
    if not isinstance(rows, int):
        return "an unknown number of rows"
    if streams:
        return None
    if scaled:
        return "a product of what is scaled that multiplies more than it reads"
    width = x.dtype.itemsize
    flops = width * rows * columns * depth  # tf32 has half the rate of 16 bits
    lost = (flops / _OWN_RATE - flops / _LIBRARY_RATE) * _DEFAULT_SMS / sms
    saved = 0.0
    if rest:
        saved += LAUNCH + 2 * rows * columns * width / BANDWIDTH
    if decoded:
        saved += LAUNCH + 2 * columns * depth * width / BANDWIDTH
    if lost >= saved:
        return f"cuBLAS saves {1e6 * lost:.1f} us, one kernel {1e6 * saved:.1f} us"
    halves = _halves(members)
    results = columns // halves
    tile = choose(rows, results, depth, halves, sms)
    count = -(-rows // tile.rows) * -(-results // tile.columns)
    if count > sms and not decoded:
        return f"{count} tiles on {sms} multiprocessors"
    return None


def _streams(rows: int, columns: int, depth: int, width: int) -> bool:
    """Whether memory is the limit, however the tiles are computed: few channels of many pixels."""
    moved = (rows * depth + rows * columns + columns * depth) * width
    return width * rows * columns * depth / _OWN_RATE < _SLACK * moved / BANDWIDTH


_WRITERS = ((PairedTile, PairedWriter), (CooperativeTile, CooperativeWriter),
            (OverlappedTile, OverlappedWriter))  # fmt: skip


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
        if self.tile is None and codes_of(made.op) is not None:
            tile = _of_bytes(tile, depth)
        elif self.tile is None and isinstance(tile, MatmulTile):
            dtype = made.op.operands[0].dtype
            tile = _of_words(shallower(tile, dtype)) if dtype.itemsize == 4 else tile
        if isinstance(tile, Either):
            copied = operands_of(made, self.planner.indexer) is not None
            tile = tile.overlapped if copied else tile.loop
        if isinstance(tile, OverlappedTile):
            over = TileEmitter(self.planner.indexer, pointers, set(), self.kind)
            writer = next(w for kind, w in _WRITERS if isinstance(tile, kind))
            program = writer(made, over, self.region, targets, tile, self.sms).write()
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
