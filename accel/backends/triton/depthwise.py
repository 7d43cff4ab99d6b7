"""Kernels of kind "depthwise": channels-last depthwise convolutions with what follows.

The convolution becomes its taps: for every place of the window a strided slice of the padded image
times a row of the weight, added up in float32. A thread computes a vector of channels (16 bytes) of
some neighbouring pixels, which share what they read: each place of the image, and of the weight, is
loaded and widened once. What is read beyond the border is zero, and costs no memory.

A program's threads lie side by side in the channels first, then along rows of pixels, then down the
image: neighbours in the window are then mostly read from the first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.phases import Phase, Place, Store
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.backends.triton.addresses import decompose
from accel.backends.triton.emitter import Emitter
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.operands import is_stored
from accel.backends.triton.program import ProgramWriter
from accel.backends.triton.text import COL, ROW, Expr
from accel.backends.triton.tiles import parts_of
from accel.errors import BackendError
from accel.ir.builder import Builder
from accel.ir.module import Op, Region, Value
from accel.ir.types import Dim, Shape, product

_LARGEST_WINDOW = 49
_SMALL_WINDOW = 9
_MAX_ROUNDS = 8
_FEW_ROWS = 3  # of a window: the weights of more take too many registers to be read ahead
_VECTOR = 16  # bytes that a thread moves at once


@dataclass(frozen=True)
class DepthwiseTile:
    """What a thread computes, `rows` x `columns` pixels of one vector of channels, and how many
    threads a program has."""

    rows: int
    columns: int
    threads: int


def reason(op: Op) -> str | None:
    """None if a kernel of kind "depthwise" may hold this op, else the reason why not."""
    if op.result.type.rank != 4 or op.attribute("layout") != "nhwc":
        return "no channels-last 2-d convolution"
    x, weight, _ = op.arguments()
    channels, window = x.shape[3], weight.shape[2:]
    if not isinstance(channels, int) or op.attribute("groups") != channels or channels == 1:
        return "a convolution that is not depthwise"
    if weight.shape[0] != channels:
        return "several outputs of each channel"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"a depthwise convolution of {x.dtype}"
    if not all(isinstance(k, int) for k in window) or window[0] * window[1] > _LARGEST_WINDOW:
        return f"a depthwise convolution of window {window}"
    return None


def candidates(kernel: Op, sms: int) -> list[DepthwiseTile]:
    """Tiles worth timing: they divide the image."""
    _, height, width, _ = kernel.results[0].shape
    if not isinstance(height, int) or not isinstance(width, int):
        return []
    return [
        DepthwiseTile(rows, columns, threads)
        for threads in (128, 256)
        for rows in (1, 2, 7)
        for columns in (1, 2, 4, 7, 8)
        if height % rows == 0 and width % columns == 0 and 2 <= rows * columns <= 8
    ]


def choose(shape: Shape, taps: int) -> DepthwiseTile:
    """The tile that nobody has measured. Of small windows a square of neighbours shares most, of
    large ones a piece of a row, whose sums need fewer rows of the window at a time."""
    _, height, width, _ = shape
    if not isinstance(height, int) or not isinstance(width, int):
        return DepthwiseTile(1, 1, 128)
    if taps <= _SMALL_WINDOW and height % 2 == 0 and width % 2 == 0:
        return DepthwiseTile(2, 2, 128)
    return DepthwiseTile(1, next((n for n in (7, 4, 5, 3, 2) if width % n == 0), 1), 128)


def generate(
    name: str, region: Region, comment: str, sms: int, tile: DepthwiseTile | None = None
) -> KernelCode:
    """The source of a region with one depthwise convolution."""
    op = next(op for op in region.ops if op.name == "conv")
    generator = PatchGenerator(name, region, comment, sms)
    strides, dilations = op.attribute("stride"), op.attribute("dilation")
    generator.step, generator.dilation = int(strides[0]), int(dilations[0])
    generator.shape = op.result.shape
    window = op.operands[1].shape[2:]
    generator.tile = tile or choose(op.result.shape, int(window[0] * window[1]))
    total, generator.sums = _taps(Builder(before=op), op)
    op.replace_with([total])
    return generator.run()


def _vector(result: Value) -> int:
    """How many channels a thread computes at a time: a power of two that divides them."""
    channels, width = int(result.shape[3]), result.dtype.itemsize
    return min(channels & -channels, _VECTOR // width)


def _side_by_side(vectors: int) -> int:
    """How many vectors of a pixel lie side by side in a program: whole sectors of 32 bytes, and
    few enough that a program covers an area of the image."""
    if vectors <= 16:
        return vectors
    found = (n for n in (8, 4, 6, 10, 12, 5, 7, 3) if vectors % n == 0)
    return next(found, vectors)


class PatchGenerator(Generator):
    """One launch for what windows of an image are reduced to, channels-last.

    Attributes:
        sums: for each row of the window what is known at its end.
        shape: of the results, if they have one element for each window and channel.
        axes: where batch, row, column and channel are among the axes of `sums`.
    """

    tile = DepthwiseTile(1, 1, 128)
    step = dilation = vector = 1
    sums: Sequence[Value] = ()
    shape: Shape = ()
    axes = (0, 1, 2, 3)

    def run(self) -> KernelCode:
        results = self.region.results
        self.vector = min(_vector(r) for r in results)
        if self.vector == 1 or any(r.shape != self.shape for r in results):
            return super().run()
        self.kind = index_kind(self.region, [])
        phase, pixels = self._plan()
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        emitter = _Emitter(self.planner.indexer, pointers, set(), self.kind)
        targets = [f"y{store.place.number}" for store in phase.stores]
        writer = _Writer(phase, emitter, targets, self.sms)
        writer.threads = self.tile.threads
        writer.before = self._in_order(pixels)
        writer.hoists = len(self.sums) <= _FEW_ROWS
        reads, program = self._finish(phase, writer.write())
        self._launch(program, reads, [Slot("result", n) for n in range(len(results))], [])
        return KernelCode(self.name, self.launches, [])

    def _plan(self) -> tuple[Phase, list[list[Index]]]:
        """The phase, and the index of each pixel of a thread, by rows."""
        batch, height, width, channels = self.shape
        tile, planner = self.tile, self.planner
        vectors = int(channels) // self.vector
        near = _side_by_side(vectors)
        down, along = _parts(height, tile.rows), _parts(width, tile.columns)
        extents = (batch, vectors // near, down, along, near, self.vector)
        for _ in range(_MAX_ROUNDS):
            index, axes = planner.index_of(extents)
            channel = index[1].times(near).plus(index[4]).times(self.vector).plus(index[5])
            pixels: list[list[Index]] = [
                [
                    (index[0], _part(index[2], tile.rows, r), _part(index[3], tile.columns, c),
                     channel)
                    for c in range(tile.columns)
                ]
                for r in range(tile.rows)
            ]  # fmt: skip
            stores = [
                Store(value, Place("result", n), one, ())
                for row in pixels
                for one in row
                for n, value in enumerate(self.region.results)
            ]
            survey = Survey(planner.indexer, {})
            for store in stores:
                survey.element(store.value, store.index)
            if not planner.apply_splits():
                return Phase(axes, stores, []), pixels
        raise BackendError("no loop nest found for a convolution", where=self.name)

    def _in_order(self, pixels: list[list[Index]]) -> list[tuple[Value, Index]]:
        """Sums in the order of the image's rows that they read, so that few rows are needed at a
        time."""
        made = [
            (r * self.step + i * self.dilation, value, tuple(index[a] for a in self.axes))
            for r, row in enumerate(pixels)
            for i, value in enumerate(self.sums)
            for index in row
        ]
        made.sort(key=lambda m: m[0])
        return [(value, index) for _, value, index in made]


def _parts(extent: Dim, size: int) -> Dim:
    return extent if size == 1 else extent // size


def _part(index: Affine, size: int, number: int) -> Affine:
    return index.times(size).plus(number)


class _Writer(ProgramWriter):
    """A thread a row of the tile, a vector of channels its columns.

    `before`: elements to compute before the stores; `hoists`: weights may be read ahead of time.
    """

    threads = 128
    before: Sequence[tuple[Value, Index]] = ()
    hoists = True

    def _flat(self) -> tuple[Dim, int]:
        *outer, lane = self.phase.outer
        emitter, kind = self.emitter, self.emitter.kind
        self.constants |= {"ROWS": self.threads, "VECTOR": int(lane.extent)}
        total = product(a.extent for a in outer)
        self._let("row", f"{self._wide('tl.program_id(0)')} * ROWS + tl.arange(0, ROWS)[:, None]")
        self._limit(outer, "row", total, self.threads)
        self._let("lane", "tl.arange(0, VECTOR)[None, :]")
        row, column = Expr("row", kind, frozenset((ROW,))), Expr("lane", kind, frozenset((COL,)))
        decompose(row, self._merged(outer), emitter.block, emitter.addresses)
        emitter.addresses.bind((lane,), column)
        if not self.hoists:  # nothing after a statement that is no assignment is moved
            emitter.block.line("tl.static_assert(VECTOR > 1)")
        with emitter.inside(emitter.column_scope(self.phase.outer)):
            for value, index in self.before:
                emitter.element(value, index)
            self._store_all()
        return parts_of(total, self.threads), self.threads // 32


class _Emitter(Emitter):
    """Reads what lies beyond the border (zeros, say) in the load itself."""

    _border: str | None = None  # the next choice is that between a stored image and this number
    _other = "0"

    def compute(self, value: Value, index: Index) -> Expr:
        op = value.op
        self._border = None
        if op is not None and op.name == "pad" and is_stored(op.operands[0]):
            self._border = f'float("{float(op.attribute("value"))}")'
        return super().compute(value, index)

    def choose(
        self,
        nonnegative: Sequence[Affine],
        yes: Callable[[], Expr],
        no: Callable[[], Expr],
        dtype: torch.dtype,
    ) -> Expr:
        if self._border is None:
            return super().choose(nonnegative, yes, no, dtype)
        made = self.condition(nonnegative)
        test = self.block.let(made.text, "bool", made.dims, "inside")
        self._other, before = self._border, self._other
        with self._guarded(test):
            value = yes()
        self._other = before
        return value

    def load_text(self, pointer: str, address: Expr, axes: frozenset[Axis]) -> Expr:
        made = super().load_text(pointer, address, axes)
        if not made.text.endswith(")") or ", mask=" not in made.text:
            return made
        return Expr(f"{made.text[:-1]}, other={self._other})", made.kind, made.dims)


def _taps(b: Builder, op: Op) -> tuple[Value, list[Value]]:
    """The convolution as a sum over its window, in float32, and the sum after each of its rows."""
    x, weight, bias = op.arguments()
    height, width = (int(k) for k in weight.shape[2:])
    strides, dilations = op.attribute("stride"), op.attribute("dilation")
    low = (0, *op.attribute("padding"), 0)
    padded = b.pad(x, low=low, high=low, value=0.0) if any(low) else x
    rows = b.permute(b.reshape(weight, shape=(weight.shape[0], height, width)), axes=(1, 2, 0))
    total: Value | None = None
    sums: list[Value] = []
    for i in range(height):
        for j in range(width):
            part = padded
            for axis, k in ((1, i), (2, j)):
                start = k * dilations[axis - 1]
                step = strides[axis - 1]
                stop = start + (op.result.shape[axis] - 1) * step + 1
                part = b.slice(part, axis=axis, start=start, stop=stop, step=step)
            row = b.slice(b.slice(rows, axis=0, start=i, stop=i + 1, step=1),
                          axis=1, start=j, stop=j + 1, step=1)  # fmt: skip
            row = b.reshape(row, shape=(x.shape[3],))
            made = b.mul(b.widen(part), b.widen(row))
            total = made if total is None else b.add(total, made)
        assert total is not None
        sums.append(total)
    assert total is not None
    if bias is not None:
        total = b.add(total, b.widen(bias))
    result: Value = b.cast_to(total, op.result.dtype)
    return result, sums
