"""Kernels of kind "pool": the largest element of each window, channels-last.

As a depthwise convolution (`depthwise`) a thread computes a vector of channels of some neighbouring
windows, which share what they read; beyond the border lies minus infinity. NaN wins, as in torch,
whose own kernel writes the position of each maximum as well.
"""

from __future__ import annotations

import math

import torch

from accel.backends.triton.depthwise import DepthwiseTile, PatchGenerator, choose
from accel.backends.triton.kernel import KernelCode
from accel.ir.builder import Builder
from accel.ir.module import Op, Region, Value

_LARGEST_WINDOW = 25


def reason(op: Op) -> str | None:
    """None if a kernel of kind "pool" may hold this op, else the reason why not."""
    kernel = op.attribute("kernel")
    if len(kernel) != 2 or op.result.type.rank != 4:
        return "no pooling of images"
    if op.result.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"pooling of {op.result.dtype}"
    if not all(isinstance(d, int) for d in op.operands[0].shape[1:]):
        return "images of symbolic size"
    if kernel[0] * kernel[1] > _LARGEST_WINDOW:
        return f"pooling of windows {kernel}"
    return None


def generate(
    name: str, region: Region, comment: str, sms: int, tile: DepthwiseTile | None = None
) -> KernelCode:
    """The source of a region with one max_pool, between permutes from and to channels-last."""
    op = next(op for op in region.ops if op.name == "max_pool")
    generator = PatchGenerator(name, region, comment, sms)
    generator.step = int(op.attribute("stride")[0])
    generator.dilation = int(op.attribute("dilation")[0])
    batch, channels, height, width = op.result.shape
    generator.shape, generator.axes = (batch, height, width, channels), (0, 3, 1, 2)
    kernel = op.attribute("kernel")
    generator.tile = tile or choose(generator.shape, kernel[0] * kernel[1])
    total, generator.sums = _windows(Builder(before=op), op)
    op.replace_with([total])
    return generator.run()


def _windows(b: Builder, op: Op) -> tuple[Value, list[Value]]:
    """The largest of each window, and the largest so far after each of the window's rows."""
    x, kernel = op.operands[0], op.attribute("kernel")
    padding, strides = op.attribute("padding"), op.attribute("stride")
    dilations = op.attribute("dilation")
    high = [0, 0]  # windows of ceil_mode reach beyond the padding
    for axis, (k, p, s, d) in enumerate(zip(kernel, padding, strides, dilations, strict=True)):
        last = (op.result.shape[2 + axis] - 1) * s + (k - 1) * d + 1
        high.append(max(0, last - p - x.shape[2 + axis]))
    padded = b.pad(x, low=(0, 0, *padding), high=tuple(high), value=-math.inf)
    total: Value | None = None
    rows: list[Value] = []
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            part = padded
            for axis, k in ((2, i), (3, j)):
                start, step = k * dilations[axis - 2], strides[axis - 2]
                stop = start + (op.result.shape[axis] - 1) * step + 1
                part = b.slice(part, axis=axis, start=start, stop=stop, step=step)
            wide = b.widen(part)
            total = wide if total is None else b.maximum(total, wide)
        assert total is not None
        rows.append(total)
    assert total is not None
    return b.cast_to(total, op.result.dtype), rows
