"""Kernels of kind "depthwise": channels-last depthwise convolutions with what follows.

The convolution becomes its taps: for every place of the window a strided slice of the padded image
times a row of the weight, added up in float32. A thread computes a vector of channels of a few
neighbours in a row of pixels, which share what they read of the image and of the weight: it is
loaded and widened once. Padding is a mask, never written.
"""

from __future__ import annotations

from typing import Any

import torch

from accel.backends.loops.phases import Phase, Place, Store
from accel.backends.loops.survey import Survey
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.program import ProgramWriter
from accel.errors import BackendError
from accel.ir.builder import Builder
from accel.ir.module import Op, Region, Value
from accel.ir.types import Dim

_LARGEST_WINDOW = 49
_MAX_ROUNDS = 8
_MOST_TERMS = 64  # products for each channel of a thread: more do not fit its registers


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


def library_reason(op: Op, capability: int) -> str | None:
    """Why cuDNN is faster: MobileNetV3-L at batch 64 took 1.47 ms with these kernels and 1.28 ms
    with cuDNN's (fp16, H200, two runs). Tuning still times both."""
    return "cuDNN's depthwise convolutions are faster"


def generate(name: str, region: Region, comment: str, sms: int, tile: Any = None) -> KernelCode:
    """The source of a region with one depthwise convolution."""
    op = next(op for op in region.ops if op.name == "conv")
    generator = _Generator(name, region, comment, sms)
    generator.taps = int(op.operands[1].shape[2]) * int(op.operands[1].shape[3])
    op.replace_with([_taps(Builder(before=op), op)])
    return generator.run()


class _Generator(Generator):
    """One launch that stores some neighbours of each result. `taps`: places of the window."""

    taps = 1

    def run(self) -> KernelCode:
        results = self.region.results
        shape = results[0].shape
        pixels = _neighbours(shape[2], self.taps)
        if pixels == 1 or any(r.shape != shape for r in results):
            return super().run()
        self.kind = index_kind(self.region, [])
        phase = self._plan(pixels)
        targets = [f"y{store.place.number}" for store in phase.stores]
        writer = ProgramWriter(phase, self._emitter(phase), targets, self.sms)
        reads, program = self._finish(phase, writer.write())
        self._launch(program, reads, [Slot("result", n) for n in range(len(results))], [])
        return KernelCode(self.name, self.launches, [])

    def _plan(self, pixels: int) -> Phase:
        results, planner = self.region.results, self.planner
        batch, height, width, channels = results[0].shape
        for _ in range(_MAX_ROUNDS):
            index, axes = planner.index_of((batch, height, width // pixels, channels))
            places = [index[2].times(pixels).plus(p) for p in range(pixels)]
            stores = [
                Store(value, Place("result", n), (*index[:2], place, index[3]), ())
                for place in places
                for n, value in enumerate(results)
            ]
            survey = Survey(planner.indexer, {})
            for store in stores:
                survey.element(store.value, store.index)
            if not planner.apply_splits():
                return Phase(axes, stores, [])
        raise BackendError("no loop nest found for a convolution", where=self.name)


def _neighbours(width: Dim, taps: int) -> int:
    """How many pixels of a row one thread computes: a divisor of the row."""
    if not isinstance(width, int):
        return 1
    return next((n for n in (4, 7, 5, 3, 2) if width % n == 0 and n * taps <= _MOST_TERMS), 1)


def _taps(b: Builder, op: Op) -> Value:
    """The convolution as a sum over its window, in float32."""
    x, weight, bias = op.arguments()
    height, width = (int(k) for k in weight.shape[2:])
    strides, dilations = op.attribute("stride"), op.attribute("dilation")
    low = (0, *op.attribute("padding"), 0)
    padded = b.pad(x, low=low, high=low, value=0.0) if any(low) else x
    rows = b.permute(b.reshape(weight, shape=(weight.shape[0], height, width)), axes=(1, 2, 0))
    total: Value | None = None
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
    if bias is not None:
        total = b.add(total, b.widen(bias))
    result: Value = b.cast_to(total, op.result.dtype)
    return result
