"""Kernels of kind "depthwise": channels-last depthwise convolutions with what follows.

The convolution becomes its taps: for every place of the window a strided slice of the padded image
times a row of the weight, added up in float32. As an elementwise kernel over channels-last results
each tap is a vector load that neighbours find in the cache; padding is a mask, never written.
"""

from __future__ import annotations

from typing import Any

import torch

from accel.backends.triton import kernel
from accel.backends.triton.kernel import KernelCode
from accel.ir.builder import Builder
from accel.ir.module import Op, Region, Value

_LARGEST_WINDOW = 49


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


def generate(name: str, region: Region, comment: str, sms: int, tile: Any = None) -> KernelCode:
    """The source of a region with one depthwise convolution."""
    op = next(op for op in region.ops if op.name == "conv")
    op.replace_with([_taps(Builder(before=op), op)])
    return kernel.generate(name, region, comment, sms, tile)


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
