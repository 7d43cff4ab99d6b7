"""Depthwise convolutions, channels-last: pixels side by side, channels in vector registers.

A task is a run of pixels of one output row. Where the whole window of a tile of pixels lies inside
the image, the tile is computed at once, so that neighbours share what they read of x and of the
weight; at the borders, one pixel at a time with a smaller window. Padding is never written out,
neither the convolution's own nor that of a pad before it. The weight is read through the views
that give it its shape back; it should be stored as [KH, KW, C].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.phases import Phase, Place, Planner, Store
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Key
from accel.backends.tvm import dtypes, tir
from accel.backends.tvm.blocked import registers
from accel.backends.tvm.code import Emitter
from accel.backends.tvm.nests import parts_of
from accel.backends.tvm.tir import Block, Buffer, Expr
from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.types import Dim, product

_PIXELS = 4  # of a tile
_VECTORS = 4  # of channels in a tile
_LARGEST_WINDOW = 7
_MAX_ROUNDS = 8


def reason(op: Op) -> str | None:
    """None if a kernel of kind "depthwise" may hold this op, else the reason why not."""
    if op.name != "conv" or op.result.type.rank != 4 or op.attribute("layout") != "nhwc":
        return f"accel.{op.name} is no channels-last 2-d convolution"
    x, weight, _ = op.arguments()
    channels, window = x.shape[3], weight.shape[2:]
    if not isinstance(channels, int) or op.attribute("groups") != channels:
        return "a convolution that is not depthwise"
    if weight.shape[0] != channels:
        return "several outputs of each channel"
    if x.dtype != torch.float32:
        return f"a depthwise convolution of {x.dtype}"
    if any(not isinstance(k, int) or k > _LARGEST_WINDOW for k in window):
        return f"a depthwise convolution of window {window}"
    if set(op.attribute("dilation")) != {1}:
        return "a depthwise convolution with dilation"
    if _lanes(channels) is None:
        return f"a depthwise convolution of {channels} channels"
    return None


def _lanes(channels: int) -> int | None:
    """Channels of a tile: a divisor, so that no vector reaches into the next pixel."""
    lanes = registers().lanes
    half = max(lanes // 2, 4)
    sizes = [d for d in range(half, _VECTORS * lanes + 1, half) if channels % d == 0]
    return max(sizes, key=lambda d: (d % lanes == 0, d), default=None)


@dataclass(frozen=True)
class Window:
    """One axis of the image: positions `place * stride + k - low`, k < size, within `extent`."""

    size: int
    stride: int
    low: int
    extent: Dim


@dataclass
class DepthwisePhase(Phase):
    """The one phase of a depthwise kernel. `outer` are batch and row; `pixel` and `lane` follow."""

    op: Op | None = None
    store: Store | None = None
    pixel: Axis | None = None
    lane: Axis | None = None
    block: Axis | None = None


def plan(planner: Planner, op: Op) -> None:
    """Plans a region whose one result has the shape of the convolution's."""
    (result,) = planner.region.results
    channels = int(result.shape[3])
    lanes = _lanes(channels)
    assert lanes is not None
    indexer = planner.indexer
    pixel, lane = indexer.axis("pixel", result.shape[2]), indexer.axis("lane", lanes)
    block = indexer.axis("block", channels // lanes) if channels > lanes else None
    column = indexer.of(lane)
    if block is not None:
        column = indexer.of(block).times(lanes).plus(column)
    source, _, _ = _source(op)
    if source.op is not None:
        planner.materialize(source)
    place = indexer.of(pixel) if result.shape[2] != 1 else Affine()
    for _ in range(_MAX_ROUNDS):
        index, axes = planner.index_of((*result.shape[:2], 1, 1))
        store = Store(result, Place("result", 0), (*index[:2], place, column), (lane,))
        Survey(indexer, {op.result: None}).element(result, store.index)
        if planner.apply_splits():
            continue
        phase = DepthwisePhase(axes, [], [], op=op, store=store, pixel=pixel, lane=lane)
        phase.block = block
        phase.needs = set(planner.scratch)
        planner.phases.append(phase)
        return
    raise BackendError("no loop nest found for a convolution", where=str(op.location or ""))


def _source(op: Op) -> tuple[Value, Window, Window]:
    """The image that the convolution reads, without the padding before it, and its two axes."""
    x, weight, _ = op.arguments()
    low = [int(p) for p in op.attribute("padding")]
    before = x.op
    if before is not None and before.name == "pad" and _is_border_of_zeros(before):
        pads = before.attribute("low")
        # The convolution's own padding lies outside of the other, and is zeros as well.
        low = [low[0] + int(pads[1]), low[1] + int(pads[2])]
        x = before.operands[0]
    rows, columns = (
        Window(int(k), int(s), p, n)
        for k, s, p, n in zip(weight.shape[2:], op.attribute("stride"), low, x.shape[1:3])
    )
    return x, rows, columns


def _is_border_of_zeros(pad: Op) -> bool:
    """Whether a pad only adds zeros around the pixels."""
    low, high = pad.attribute("low"), pad.attribute("high")
    amounts = (*low, *high)
    if not all(isinstance(a, int) and a >= 0 for a in amounts) or pad.attribute("value") != 0:
        return False
    return not any((low[0], low[3], high[0], high[3]))


class DepthwiseNest:
    """Emits a `DepthwisePhase`. A row is one task: a tile of pixels, all channels."""

    def __init__(self, phase: DepthwisePhase, emitter: Emitter, result: Buffer) -> None:
        assert phase.op is not None and phase.store is not None
        assert phase.pixel is not None and phase.lane is not None
        self.emitter, self.out, self.op, self.store = emitter, result, phase.op, phase.store
        self.pixel, self.lane, self.block = phase.pixel, phase.lane, phase.block
        self.outer = phase.outer
        self.sizes = emitter.sizes
        self.x, self.window, self.across = _source(phase.op)
        _, self.weight, self.bias = phase.op.arguments()
        self.index = phase.store.index
        survey = Survey(emitter.indexer, {self.op.result: None})
        survey.element(self.store.value, self.index)
        self.key: Key = next(k for k in survey.costly if k[0] is self.op.result)
        self.lanes = int(self.lane.extent)
        self.width = self.store.value.shape[2]
        self.tiles = parts_of(self.width, _PIXELS)
        self.rows: Dim = product((*(a.extent for a in self.outer), self.tiles))
        blocks = self.block.extent if self.block is not None else 1
        work = _PIXELS * self.window.size * self.across.size * self.lanes // 8 + 1
        self.cost: Dim = product((work, blocks))
        self.down = emitter.indexer.axis("down", self.window.size)
        self.right = emitter.indexer.axis("right", self.across.size)

    def emit(self, begin: Expr, end: Expr) -> Block:
        emitter = self.emitter
        row = tir.var("row")
        with emitter.scope(guarded=True) as body:
            count = self.sizes.code(self.tiles)
            self.first = body.let(tir.tirx.truncmod(row, count) * tir.i64(_PIXELS), "first")
            rest = body.let(tir.tirx.truncdiv(row, count), "rest")
            for axis in reversed(self.outer):
                extent = self.sizes.code(axis.extent)
                emitter.addresses.bind((axis,), body.let(tir.tirx.truncmod(rest, extent), "i"))
                rest = body.let(tir.tirx.truncdiv(rest, extent), "rest")
            with emitter.scope(self.outer) as task:
                top = emitter.addresses.code(self.index[1]) * tir.i64(self.window.stride)
                self.top = task.let(top - tir.i64(self.window.low), "top")
                self.rows_seen = self._seen(self.top, self.window, task)
                self._tile()
            body.statements.extend(task.statements)
        emitter.block.loop(row, end - begin, body, begin)
        return emitter.scopes[0].block

    def _seen(self, start: Expr, window: Window, block: Block) -> tuple[Expr, Expr]:
        """The steps of the window that lie inside the image: from, and how many."""
        low = block.let(tir.tirx.max(tir.i64(0), tir.i64(0) - start), "low")
        end = tir.tirx.min(tir.i64(window.size), self.sizes.code(window.extent) - start)
        return low, block.let(tir.tirx.max(end - low, tir.i64(0)), "seen")

    def _tile(self) -> None:
        """All pixels at once if their windows lie inside the image, else one at a time."""
        block, across = self.emitter.block, self.across
        left = self.first * tir.i64(across.stride) - tir.i64(across.low)
        span = (_PIXELS - 1) * across.stride + across.size
        inside = tir.tirx.And(
            tir.tirx.And(
                left >= tir.i64(0), left + tir.i64(span) <= self.sizes.code(across.extent)
            ),
            self.first + tir.i64(_PIXELS) <= self.sizes.code(self.width),
        )
        with self.emitter.scope(guarded=True) as whole:
            self._channels(partial(self._pixels, clipped=False))
        with self.emitter.scope(guarded=True) as clipped:
            self._channels(partial(self._pixels, clipped=True))
        block.branch(inside, whole, clipped)

    def _channels(self, body: Callable[[], None]) -> None:
        """A loop over the blocks of channels."""
        if self.block is None:
            body()
            return
        with self.emitter.loop((self.block,), self.sizes.code(self.block.extent), guarded=True):
            body()

    def _pixels(self, *, clipped: bool) -> None:
        """The tile's results for one block of channels."""
        emitter, block = self.emitter, self.emitter.block
        names = [f"sums{m}" for m in range(_PIXELS)]
        sums = [tir.local_array(name, self.lanes, "float32") for name in names]
        for total in sums:
            block.allocate(total)
            lane, zero = tir.var("lane"), Block()
            zero.store(total, tir.f32(0.0), lane)
            block.loop(lane, tir.i64(self.lanes), zero)
        places = [block.let(self.first + tir.i64(m), "place") for m in range(_PIXELS)]
        low, seen = self.rows_seen
        with emitter.loop((self.down,), seen, low):
            for k in range(self.across.size):
                if not clipped:
                    self._step(sums, places, tir.i64(k))
                    continue
                for total, place in zip(sums, places):
                    at = place * tir.i64(self.across.stride) + tir.i64(k - self.across.low)
                    inside = tir.tirx.And(
                        at >= tir.i64(0), at < self.sizes.code(self.across.extent)
                    )
                    with emitter.scope(guarded=True) as body:
                        self._step([total], [place], tir.i64(k))
                    emitter.block.branch(inside, body)
        for total, place in zip(sums, places):
            with emitter.scope(guarded=True) as body:
                self._finish(total, place)
            if clipped:
                block.branch(place < self.sizes.code(self.width), body)
            else:
                block.statements.extend(body.statements)

    def _step(self, sums: Sequence[Buffer], places: Sequence[Expr], k: Expr) -> None:
        """sums[m] += x[row, places[m] * stride + k] * weight[down, k], for the block's channels."""
        emitter, across = self.emitter, self.across
        column = self.index[3]
        down, right = emitter.indexer.of(self.down), emitter.indexer.of(self.right)
        line = emitter.addresses.code(down) + self.top
        height, width, depth = (self.sizes.code(d) for d in self.x.shape[1:])
        image = emitter.addresses.code(self.index[0]) * height + line
        source = emitter.buffers[self.x]
        emitter.addresses.bind((self.right,), k)
        lanes = tir.i64(self.lanes)
        with emitter.scope((self.right,)) as body, emitter.loop((self.lane,), lanes):
            lane = emitter.addresses.code(emitter.indexer.of(self.lane))
            weight = emitter.element(self.weight, (column, Affine(), down, right))
            for total, place in zip(sums, places):
                at = place * tir.i64(across.stride) + k - tir.i64(across.low)
                address = (image * width + at) * depth + emitter.addresses.code(column)
                read = tir.load(source, address)
                emitter.block.store(total, tir.load(total, lane) + read * weight, lane)
        emitter.addresses.unbind((self.right,))
        emitter.block.statements.extend(body.statements)

    def _finish(self, sums: Buffer, place: Expr) -> None:
        emitter, value = self.emitter, self.store.value
        emitter.addresses.bind((self.pixel,), place)
        # Guarded: where nothing depends on the lane, the sum still does.
        lanes = emitter.loop((self.lane,), tir.i64(self.lanes), guarded=True)
        with emitter.scope((self.pixel,)) as body, lanes:
            lane = emitter.addresses.code(emitter.indexer.of(self.lane))
            total = tir.load(sums, lane)
            if self.bias is not None:
                total = total + emitter.element(self.bias, (self.index[3],))
            emitter.scopes[-1].known[self.key] = emitter.block.let(total, "total")
            made = emitter.element(value, self.index)
            stored = dtypes.to_storage(made, value.dtype, emitter.block)
            address = emitter.indexer.flatten(self.index, value.shape)
            emitter.block.store(self.out, stored, emitter.addresses.code(address))
        emitter.addresses.unbind((self.pixel,))
        emitter.block.statements.extend(body.statements)
