"""Matrix products and convolutions: register tiles over a weight stored in blocks of columns.

A task computes `rows` x `lanes` results, all of which stay in vector registers while the sum runs:
each step reads one row of the weight's block and one element of each row of x, and adds their outer
product (Goto and van de Geijn, 2008). A channels-last convolution is the same with pixels as rows
and a sum over the window too (implicit GEMM; Chetlur et al., 2014); an image with a border is
copied first. The weight's block is contiguous where it was stored as [N / lanes, K, lanes] and is
read through the views that give it its shape back. What follows (bias, activation, residual) is
computed on the tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from accel.backends.loops.index import Affine, Axis, Indexer
from accel.backends.loops.merge import merged
from accel.backends.loops.phases import Phase, Place, Planner, Store
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.backends.tvm import dtypes, tir
from accel.backends.tvm.code import Emitter
from accel.backends.tvm.nests import group_extent, parts_of
from accel.backends.tvm.tir import Block, Buffer, Expr, select
from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.types import Dim, product
from accel.runtime.manifest import cpu_features

_BLOCK_BYTES = 640 << 10  # of the weight, to stay in the second-level cache
_INNER_BLOCKS_BYTES = 1 << 18  # a weight that stays in cache while rows of x go by
_LINE = 16  # float32 elements of a cache line
_AHEAD = 2048  # float32 elements: how far prefetches go where a weight is read once
_UNROLLED = 4  # steps of a loop that LLVM may unroll
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
_FEW = ((8, 205), (5, 237), (3, 228), (3, 235), (2, 235), (2, 240))


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
    """Columns of one block of the op's weight. The last block may be part empty."""
    rows, columns = product(op.result.shape[:-1]), int(op.operands[1].shape[0])
    unit = registers()

    def cost(lanes: int) -> float:
        wide = -(-columns // lanes) * lanes
        tile = tile_rows(lanes, rows)
        tall = -(-rows // tile) * tile if isinstance(rows, int) else 1
        return wide * tall / unit.tiles[lanes // unit.lanes - 1][1]

    sizes = [unit.lanes * (i + 1) for i in range(len(unit.tiles))]
    depth = int(product(op.operands[1].shape[1:]))
    return min((n for n in sizes if n == sizes[0] or depth * n * 4 <= _BLOCK_BYTES), key=cost)


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
    x, weight, _ = op.arguments()
    if x.dtype != torch.float32:
        return f"a product of {x.dtype}"
    if op.name == "conv":
        if x.type.rank != 4 or op.attribute("layout") != "nhwc":
            return "not a channels-last 2-d convolution"
        if op.attribute("groups") != 1:
            return "a convolution in groups"
    sizes = (*weight.shape, x.shape[-1])
    if not all(isinstance(d, int) for d in sizes):
        return "a product of symbolic width"
    if 0 in sizes or 0 in op.result.shape:
        return "an empty product"
    if int(product(weight.shape[1:])) * registers().lanes * 4 > _BLOCK_BYTES:
        return f"a sum over {product(weight.shape[1:])} elements"
    return None


@dataclass(frozen=True)
class Factors:
    """A linear or convolution as a product: result[row, column] = sum of x * weight over `summed`.

    `summed` are in the order in which the weight is stored.
    """

    op: Op
    x: Value
    weight: Value
    bias: Value | None
    summed: tuple[Axis, ...]

    @staticmethod
    def of(op: Op, indexer: Indexer) -> Factors:
        x, weight, bias = op.arguments()
        if op.name == "conv":
            _, channels, height, width = weight.shape
            sizes = {"down": height, "right": width, "channel": channels}
            summed = tuple(indexer.axis(n, d) for n, d in sizes.items())
        else:
            summed = (indexer.axis("depth", x.shape[-1]),)
        return Factors(op, x, weight, bias, summed)

    @property
    def depth(self) -> Dim:
        return product(a.extent for a in self.summed)

    def x_index(self, rows: Index, indexer: Indexer) -> Index:
        """Where x is read for a row (the result's index without its last axis)."""
        steps = [_place(a, indexer) for a in self.summed]
        if self.op.name == "linear":
            return (*rows, *steps)
        down, right, channel = steps
        (s, t), (d, e) = self.op.attribute("stride"), self.op.attribute("dilation")
        batch, i, j = rows
        return batch, i.times(s).plus(down.times(d)), j.times(t).plus(right.times(e)), channel

    def weight_index(self, column: Affine, indexer: Indexer) -> Index:
        steps = [_place(a, indexer) for a in self.summed]
        return (column, *steps) if len(steps) == 1 else (column, steps[2], steps[0], steps[1])


def _place(axis: Axis, indexer: Indexer) -> Affine:
    return Affine() if axis.extent == 1 else indexer.of(axis)


@dataclass
class BlockedPhase(Phase):
    """The one phase of a matmul kernel: rows are tasks, `lane` the columns of a block."""

    factors: Factors | None = None
    store: Store | None = None
    lane: Axis | None = None
    block: Axis | None = None


def plan(planner: Planner, op: Op) -> None:
    """Plans a region whose one result has the shape of the product."""
    (result,) = planner.region.results
    lanes = int(_stored(op.operands[1]).shape[-1])
    blocks = -(-int(op.operands[1].shape[0]) // lanes)
    indexer = planner.indexer
    factors = Factors.of(op, indexer)
    if op.name == "conv" and _is_padded(factors.x):
        planner.materialize(factors.x)
    lane = indexer.axis("lane", lanes)
    block = indexer.axis("block", blocks) if blocks > 1 else None
    column = indexer.of(lane)
    if block is not None:
        column = indexer.of(block).times(lanes).plus(column)
    for _ in range(_MAX_ROUNDS):
        index, axes = planner.index_of(result.shape[:-1])
        store = Store(result, Place("result", 0), (*index, column), (lane,))
        Survey(indexer, {op.result: None}).element(result, store.index)
        Survey(indexer, planner.scratch).element(factors.x, factors.x_index(index, indexer))
        if planner.apply_splits():
            continue
        phase = BlockedPhase(axes, [], [], factors=factors, store=store, lane=lane, block=block)
        phase.needs = set(planner.scratch)
        planner.phases.append(phase)
        return
    raise BackendError("no loop nest found for a product", where=str(op.location or ""))


def _is_padded(x: Value) -> bool:
    """Whether reading x takes a choice at each element."""
    op = x.op
    while op is not None and op.has(Trait.VIEW):
        op = op.operands[0].op
    return op is not None


def _stored(weight: Value) -> Value:
    """The argument [blocks, ..., columns] that the weight is a view of."""
    shaped = weight.op
    turned = shaped.operands[0].op if shaped is not None and shaped.name == "reshape" else None
    if turned is not None and turned.attributes.get("axes") in ((0, 2, 1), (0, 4, 3, 1, 2)):
        return turned.operands[0]
    raise BackendError("a matmul kernel's weight is not stored in blocks")


class BlockedNest:
    """Emits a `BlockedPhase`. A row is one task: a tile of rows of x, and a block of columns."""

    def __init__(self, phase: BlockedPhase, emitter: Emitter, result: Buffer) -> None:
        assert phase.factors is not None and phase.store is not None and phase.lane is not None
        self.phase, self.emitter, self.out, self.factors = phase, emitter, result, phase.factors
        self.lane, self.block = phase.lane, phase.block
        self.sizes = emitter.sizes
        self.weight, self.store = phase.factors.weight, phase.store
        self.index = self.store.index
        self.x_index = phase.factors.x_index(self.index[:-1], emitter.indexer)
        self.groups = self._row_groups()
        self.count: Dim = product(group_extent(g) for g in self.groups)
        self.lanes = int(self.lane.extent)
        self.tile = tile_rows(self.lanes, self.count)
        self.tiles = parts_of(self.count, self.tile)
        self.blocks = int(self.block.extent) if self.block is not None else 1
        self.rows: Dim = product((self.blocks, self.tiles))
        self.cost: Dim = product((self.tile * self.lanes // 8 + 1, self.factors.depth))

    def _row_groups(self) -> list[tuple[Axis, ...]]:
        indexer = self.emitter.indexer
        made = self.factors.op.result
        survey = Survey(indexer, dict.fromkeys((made, *self.phase.needs)))
        survey.element(self.store.value, self.index)
        survey.element(self.factors.x, self.x_index)
        survey.reads.append(indexer.flatten(self.index, self.store.value.shape))
        self.key = next(key for key in survey.costly if key[0] is made)
        return merged(self.phase.outer, survey.reads, survey.fixed)

    def emit(self, begin: Expr, end: Expr) -> Block:
        emitter = self.emitter
        row = tir.var("row")
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
        self.places = self._find_rows()
        with ExitStack() as stack:
            for axis in self.factors.summed:
                if axis.extent != 1:
                    extent = self.sizes.code(axis.extent)
                    if axis.extent > _UNROLLED:
                        # The sum with `zero` keeps LLVM from unrolling the loop, see `rows`.
                        extent = extent + self.sizes.zero
                    stack.enter_context(emitter.loop((axis,), extent))
            self._step()
        self.steps = self._stored_lanes()
        for m in range(self.tile):
            self._finish(m)

    def _step(self) -> None:
        """One outer product: an element of each row of x, and a row of the weight's block."""
        emitter = self.emitter
        factors = []
        for m in range(self.tile):
            with self._row(m) as body:
                factors.append(emitter.element(self.factors.x, self.x_index))
            emitter.block.statements.extend(body.statements)
        self._prefetch()
        with emitter.loop((self.lane,), tir.i64(self.lanes)):
            lane = emitter.addresses.code(emitter.indexer.of(self.lane))
            place = self.factors.weight_index(self.index[-1], emitter.indexer)
            weight = emitter.element(self.weight, place)
            for sums, factor in zip(self.sums, factors):
                emitter.block.store(sums, tir.load(sums, lane) + factor * weight, lane)

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

        A step of the sum fetches `lines` lines, so that the first tiles fetch all of them. A weight
        that is read once is a stream: a step fetches as much as it reads, a little further on.
        """
        if self.block is None or self._blocks_inside():
            return
        emitter, vectors = self.emitter, -(-self.lanes // _LINE)
        tiles = self.tiles if isinstance(self.tiles, int) else vectors
        lines = max(1, vectors // tiles)
        last = tir.i64(-(-vectors // lines) - 1)
        tile = tir.tirx.min(tir.tirx.truncdiv(self.first, tir.i64(self.tile)), last)
        indexer, summed = emitter.indexer, self.factors.summed
        done = indexer.flatten([_place(a, indexer) for a in summed], [a.extent for a in summed])
        depth = self.sizes.code(self.factors.depth)
        step = tile * depth + emitter.addresses.code(done)
        size = tir.i64(self.lanes) * depth
        ahead, stride = (tir.i64(_AHEAD), self.lanes) if tiles == 1 else (size, lines * _LINE)
        start = emitter.addresses.code(indexer.of(self.block)) * size + ahead
        (argument,) = (a for a in self.emitter.buffers if a is _stored(self.weight))
        for line in range(lines):
            place = start + step * tir.i64(stride) + tir.i64(line * _LINE)
            tir.prefetch(emitter.block, emitter.buffers[argument], place)

    def _find_rows(self) -> list[list[tuple[tuple[Axis, ...], Expr]]]:
        """Where the rows of the tile are, by loop; rows past the end repeat the last one.

        The first is found by division, the others by counting on.
        """
        block, number = self.emitter.block, self.first
        here: list[Expr] = []
        for group in reversed(self.groups[1:]):
            extent = self.sizes.code(group_extent(group))
            here.append(block.cell(tir.tirx.truncmod(number, extent), "i"))
            number = block.cell(tir.tirx.truncdiv(number, extent), "rest")
        if self.groups:
            here.append(number)
        found = [list(zip(reversed(self.groups), here))]
        whole = isinstance(self.count, int) and self.count % self.tile == 0
        zero, one = tir.i64(0), tir.i64(1)
        for m in range(1, self.tile):
            carry = one
            if not whole:
                inside = self.first + tir.i64(m) < self.sizes.code(self.count)
                carry = block.cell(select(inside, one, zero), "carry")
            following = []
            for group, code in found[-1][:-1]:
                step = block.cell(code + carry, "i")
                over = block.let(step >= self.sizes.code(group_extent(group)), "over")
                following.append((group, block.cell(select(over, zero, step), "i")))
                carry = block.cell(select(over, one, zero), "carry")
            following += [(g, block.cell(code + carry, "i")) for g, code in found[-1][-1:]]
            found.append(following)
        return found

    @contextmanager
    def _row(self, m: int) -> Iterator[Block]:
        """Code for one row; what does not depend on it moves out."""
        emitter = self.emitter
        with emitter.scope([a for g in self.groups for a in g]) as body:
            for group, code in self.places[m]:
                emitter.addresses.bind(group, code)
            yield body
            for group in self.groups:
                emitter.addresses.unbind(group)

    def _finish(self, m: int) -> None:
        # Guarded: in a result of one column nothing depends on the lane, but the sum is its own.
        emitter, value = self.emitter, self.store.value
        with self._row(m) as body, emitter.loop((self.lane,), self.steps, guarded=True):
            lane = emitter.indexer.of(self.lane)
            total = tir.load(self.sums[m], emitter.addresses.code(lane))
            if self.factors.bias is not None:
                total = total + emitter.element(self.factors.bias, (self.index[-1],))
            emitter.scopes[-1].known[self.key] = emitter.block.let(total, "total")
            made = dtypes.to_storage(emitter.element(value, self.index), value.dtype, emitter.block)
            address = emitter.addresses.code(emitter.indexer.flatten(self.index, value.shape))
            emitter.block.store(self.out, made, address)
        if isinstance(self.count, int) and self.count % self.tile == 0:
            emitter.block.statements.extend(body.statements)
        else:
            last = self.sizes.code(self.count)
            emitter.block.branch(self.first + tir.i64(m) < last, body)
