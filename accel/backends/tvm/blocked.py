"""Matrix products of many rows: register tiles over a weight that is stored in blocks of columns.

A task computes `rows` x `lanes` results, all of which stay in vector registers while the sum runs:
each step reads one row of the weight's block and one element of each row of x, and adds their outer
product (Goto and van de Geijn, 2008). The weight's block is contiguous where it was stored as
[N / lanes, K, lanes] and is read through the views that give it its shape back; other layouts are
right too, but slow. What follows the product (bias, activation, residual) is computed on the tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from accel.backends.tvm import dtypes, tir
from accel.backends.tvm.code import Emitter
from accel.backends.tvm.index import Affine, Axis
from accel.backends.tvm.merge import merged
from accel.backends.tvm.nests import group_extent, parts_of
from accel.backends.tvm.phases import Phase, Place, Planner, Store
from accel.backends.tvm.survey import Survey
from accel.backends.tvm.tir import Block, Buffer, Expr
from accel.backends.tvm.trace import Index
from accel.errors import BackendError
from accel.ir.module import Op, Region, Value
from accel.ir.types import Dim, product
from accel.runtime.manifest import cpu_features

_MOST_DEPTH = 4096  # above, a block of the weight does not stay in the second-level cache
_INNER_BLOCKS_BYTES = 1 << 18  # a weight that stays in cache while rows of x go by
_LINE = 16  # float32 elements of a cache line
_MAX_ROUNDS = 8


@dataclass(frozen=True)
class Registers:
    """A vector unit: float32 lanes of a register, and tiles by registers of a row.

    A tile is (rows, relative speed). More rows than these spill in LLVM's allocation; fewer leave
    the multipliers waiting. Speeds are GFLOP/s measured with AVX-512 and with AVX2 code on Zen 5.
    """

    lanes: int
    tiles: tuple[tuple[int, int], ...]


# 32 registers, of which a tile's sums take up to 25; and 16.
_MANY = ((20, 390), (10, 450), (7, 475), (6, 470), (5, 455), (4, 450))
_FEW = ((8, 205), (5, 237), (3, 228), (3, 235))


@cache
def registers() -> Registers:
    """This machine's vector unit."""
    features = cpu_features()
    if "avx512f" in features:
        return Registers(16, _MANY)
    if "avx2" in features:
        return Registers(8, _FEW)
    return Registers(4, _MANY if "asimd" in features else _FEW)


def block_columns(op: Op) -> int:
    """Columns of one block of the linear's weight. The last block may be part empty."""
    rows, columns = product(op.operands[0].shape[:-1]), int(op.operands[1].shape[0])
    unit = registers()

    def cost(lanes: int) -> float:
        wide = -(-columns // lanes) * lanes
        tile = tile_rows(lanes, rows)
        tall = -(-rows // tile) * tile if isinstance(rows, int) else 1
        return wide * tall / unit.tiles[lanes // unit.lanes - 1][1]

    return min((unit.lanes * (i + 1) for i in range(len(unit.tiles))), key=cost)


def tile_rows(lanes: int, rows: Dim) -> int:
    """Rows of a tile: as many as fit the registers, so that few are left over at the end.

    `lanes` may come from another machine's artifact.
    """
    unit = registers()
    vectors = min(-(-lanes // unit.lanes), len(unit.tiles))
    most = unit.tiles[vectors - 1][0]
    if not isinstance(rows, int):
        return most
    tiles = -(-rows // most)
    return -(-rows // tiles)


def reason(op: Op) -> str | None:
    """None if a kernel of kind "matmul" may hold this op, else the reason why not."""
    if op.name != "linear":
        return f"accel.{op.name} has no generated code"
    x, weight, _ = op.arguments()
    if x.dtype != torch.float32:
        return f"a linear of {x.dtype}"
    rows, depth = product(x.shape[:-1]), x.shape[-1]
    if not isinstance(weight.shape[0], int) or not isinstance(depth, int):
        return "a linear of symbolic width"
    if depth > _MOST_DEPTH:
        return f"a linear over {depth} elements"
    if rows == 0 or depth == 0:
        return "an empty linear"
    return None


@dataclass
class BlockedPhase(Phase):
    """The one phase of a matmul kernel: rows are tasks, `lane` the columns of a block."""

    op: Op | None = None
    store: Store | None = None
    lane: Axis | None = None
    block: Axis | None = None


def find(region: Region) -> Op | None:
    """The linear of a region."""
    return next((op for op in region.ops if op.name == "linear"), None)


def plan(planner: Planner, op: Op) -> None:
    """Plans a region whose one result has the shape of the linear's."""
    (result,) = planner.region.results
    lanes = int(_stored(op.operands[1]).shape[2])
    blocks = -(-int(op.operands[1].shape[0]) // lanes)
    indexer = planner.indexer
    lane = indexer.axis("lane", lanes)
    block = indexer.axis("block", blocks) if blocks > 1 else None
    column = indexer.of(lane)
    if block is not None:
        column = indexer.of(block).times(lanes).plus(column)
    for _ in range(_MAX_ROUNDS):
        index, axes = planner.index_of(result.shape[:-1])
        store = Store(result, Place("result", 0), (*index, column), (lane,))
        Survey(indexer, {op.result: None}).element(result, store.index)
        Survey(indexer, {}).element(op.operands[0], (*index, Affine()))
        if planner.apply_splits():
            continue
        planner.phases.append(
            BlockedPhase(axes, [], [], op=op, store=store, lane=lane, block=block)
        )
        return
    raise BackendError("no loop nest found for a product", where=str(op.location or ""))


def _stored(weight: Value) -> Value:
    """The argument [blocks, K, columns] that the weight is a view of."""
    shaped = weight.op
    turned = shaped.operands[0].op if shaped is not None and shaped.name == "reshape" else None
    if turned is not None and turned.attributes.get("axes") == (0, 2, 1):
        return turned.operands[0]
    raise BackendError("a matmul kernel's weight is not stored in blocks")


class BlockedNest:
    """Emits a `BlockedPhase`. A row is one task: a tile of rows of x, and a block of columns."""

    def __init__(self, phase: BlockedPhase, emitter: Emitter, result: Buffer) -> None:
        assert phase.op is not None and phase.store is not None and phase.lane is not None
        self.phase, self.emitter, self.out, self.op = phase, emitter, result, phase.op
        self.lane, self.block = phase.lane, phase.block
        self.sizes = emitter.sizes
        self.x, self.weight, self.bias = phase.op.arguments()
        self.store = phase.store
        self.index = self.store.index
        self.depth = emitter.indexer.axis("depth", self.x.shape[-1])
        self.groups = self._row_groups()
        self.count: Dim = product(group_extent(g) for g in self.groups)
        self.lanes = int(self.lane.extent)
        self.tile = tile_rows(self.lanes, self.count)
        self.tiles = parts_of(self.count, self.tile)
        self.blocks = int(self.block.extent) if self.block is not None else 1
        self.rows: Dim = product((self.blocks, self.tiles))
        self.cost: Dim = product((self.tile * self.lanes // 8 + 1, self.x.shape[-1]))

    def _row_groups(self) -> list[tuple[Axis, ...]]:
        indexer = self.emitter.indexer
        survey = Survey(indexer, {self.op.result: None})
        survey.element(self.store.value, self.index)
        survey.element(self.x, self._x_index())
        survey.reads.append(indexer.flatten(self.index, self.store.value.shape))
        self.key = next(key for key in survey.costly if key[0] is self.op.result)
        return merged(self.phase.outer, survey.reads, survey.fixed)

    def _x_index(self) -> Index:
        return (*self.index[:-1], self.emitter.indexer.of(self.depth))

    def emit(self, begin: Expr, end: Expr) -> Block:
        emitter = self.emitter
        row = tir.var("row")
        axes = [a for g in self.groups for a in g]
        if self.block is not None:
            axes.append(self.block)
        with emitter.scope(guarded=True) as body:
            tile, part = self._order(row)
            self.first = body.let(tile * tir.i64(self.tile), "first")
            if self.block is not None:
                emitter.addresses.bind((self.block,), body.let(part, "block"))
            with emitter.scope([self.block] if self.block is not None else []) as inner:
                self._task()
            body.statements.extend(inner.statements)
        emitter.block.loop(row, end - begin, body, begin)
        return emitter.scopes[0].block

    def _order(self, row: Expr) -> tuple[Expr, Expr]:
        """The tile and the block of a task. What is read again at once should be in cache."""
        divide, rest = tir.tirx.truncdiv, tir.tirx.truncmod
        if self._blocks_inside():
            blocks = tir.i64(self.blocks)
            return divide(row, blocks), rest(row, blocks)
        tiles = self.sizes.code(self.tiles)
        return rest(row, tiles), divide(row, tiles)

    def _blocks_inside(self) -> bool:
        """Whether all blocks of the weight stay in cache while rows of x go by."""
        return int(product(self.weight.shape)) * 4 <= _INNER_BLOCKS_BYTES

    def _task(self) -> None:
        emitter = self.emitter
        names = [f"sums{m}" for m in range(self.tile)]
        self.sums = [tir.local_array(name, self.lanes, "float32") for name in names]
        for sums in self.sums:
            emitter.block.allocate(sums)
            lane, zero = tir.var("lane"), Block()
            zero.store(sums, tir.f32(0.0), lane)
            emitter.block.loop(lane, tir.i64(self.lanes), zero)
        self.numbers = [self._number(m) for m in range(self.tile)]
        # The sum with `zero` keeps LLVM from unrolling the loop, see `rows`.
        extent = self.sizes.code(self.x.shape[-1]) + self.sizes.zero
        with emitter.loop((self.depth,), extent):
            factors = []
            for m in range(self.tile):
                with self._row(m) as body:
                    factors.append(emitter.element(self.x, self._x_index()))
                emitter.block.statements.extend(body.statements)
            self._prefetch()
            column = self.index[-1]
            with emitter.loop((self.lane,), tir.i64(self.lanes)):
                lane = emitter.addresses.code(emitter.indexer.of(self.lane))
                place = (column, emitter.indexer.of(self.depth))
                weight = emitter.element(self.weight, place)
                for sums, factor in zip(self.sums, factors):
                    emitter.block.store(sums, tir.load(sums, lane) + factor * weight, lane)
        self.steps = self._stored_lanes()
        for m in range(self.tile):
            self._finish(m)

    def _stored_lanes(self) -> Expr:
        """How many columns of the block the result has."""
        columns = int(self.store.value.shape[-1])
        if columns % self.lanes == 0:
            return tir.i64(self.lanes)
        if self.block is None:
            return tir.i64(columns)
        start = self.emitter.addresses.code(self.emitter.indexer.of(self.block))
        left = tir.i64(columns) - start * tir.i64(self.lanes)
        return self.emitter.block.let(tir.tirx.min(left, tir.i64(self.lanes)), "steps")

    def _prefetch(self) -> None:
        """While a block's tiles go by, the next block comes into the second-level cache.

        A step of the sum fetches `lines` lines, so that the first tiles fetch all of them.
        """
        if self.block is None or self._blocks_inside():
            return
        emitter, vectors = self.emitter, -(-self.lanes // _LINE)
        tiles = self.tiles if isinstance(self.tiles, int) else vectors
        lines = max(1, vectors // tiles)
        last = tir.i64(-(-vectors // lines) - 1)
        tile = tir.tirx.min(tir.tirx.truncdiv(self.first, tir.i64(self.tile)), last)
        depth = emitter.addresses.code(emitter.indexer.of(self.depth))
        step = tile * self.sizes.code(self.depth.extent) + depth
        following = emitter.addresses.code(emitter.indexer.of(self.block)) + tir.i64(1)
        start = following * tir.i64(self.lanes) * self.sizes.code(self.depth.extent)
        (argument,) = (a for a in self.emitter.buffers if a is _stored(self.weight))
        for line in range(lines):
            place = start + (step * tir.i64(lines) + tir.i64(line)) * tir.i64(_LINE)
            tir.prefetch(emitter.block, emitter.buffers[argument], place)

    def _number(self, m: int) -> Expr:
        """The number of row m of the tile; those past the end repeat the last one."""
        number = self.first + tir.i64(m)
        if not isinstance(self.count, int) or self.count % self.tile:
            number = tir.tirx.min(number, self.sizes.code(self.count) - tir.i64(1))
        return self.emitter.block.let(number, "number")

    @contextmanager
    def _row(self, m: int) -> Iterator[Block]:
        """Code for one row; what does not depend on it moves out."""
        emitter = self.emitter
        with emitter.scope([a for g in self.groups for a in g]) as body:
            number = self.numbers[m]
            for group in reversed(self.groups[1:]):
                extent = self.sizes.code(group_extent(group))
                emitter.addresses.bind(group, body.let(tir.tirx.truncmod(number, extent), "i"))
                number = body.let(tir.tirx.truncdiv(number, extent), "rest")
            if self.groups:
                emitter.addresses.bind(self.groups[0], number)
            yield body
            for group in self.groups:
                emitter.addresses.unbind(group)

    def _finish(self, m: int) -> None:
        # Guarded: in a result of one column nothing depends on the lane, but the sum is its own.
        emitter, value = self.emitter, self.store.value
        with self._row(m) as body, emitter.loop((self.lane,), self.steps, guarded=True):
            lane = emitter.indexer.of(self.lane)
            total = tir.load(self.sums[m], emitter.addresses.code(lane))
            if self.bias is not None:
                total = total + emitter.element(self.bias, (self.index[-1],))
            emitter.scopes[-1].known[self.key] = emitter.block.let(total, "total")
            made = dtypes.to_storage(emitter.element(value, self.index), value.dtype, emitter.block)
            address = emitter.addresses.code(emitter.indexer.flatten(self.index, value.shape))
            emitter.block.store(self.out, made, address)
        if isinstance(self.count, int) and self.count % self.tile == 0:
            emitter.block.statements.extend(body.statements)
        else:
            last = self.sizes.code(self.count)
            emitter.block.branch(self.first + tir.i64(m) < last, body)
