"""cuDNN's convolutions, with bias, residual and ReLU in the same call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.errors import ArtifactError
from accel.runtime.interfaces import LibraryCall, Operand
from accel.runtime.libraries.options import choice, integer, integers

_LAST = torch.channels_last


class CudnnConv:
    """x [B, C, H, W] ([B, H, W, C] for layout nhwc), weight [O, C / groups, KH, KW], bias, other.

    `binary` none or add (of `other`, first), `unary` none or relu. Memory is channels-last. The
    first call of each shape tries cuDNN's algorithms and keeps the fastest.
    """

    name = "cudnn.conv"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        if len(operands) not in (3, 4) or operands[0] is None or operands[1] is None:
            raise ArtifactError(f"{self.name} takes x, weight, an optional bias, and other")
        weight = operands[1].weight
        if weight is None or weight.dim() != 4:
            raise ArtifactError(f"{self.name} needs a constant weight of rank 4")
        bias = operands[2].weight if operands[2] is not None else None
        if operands[2] is not None and bias is None:
            raise ArtifactError(f"{self.name} needs a constant bias")
        add = choice(options, "binary", ("none", "add")) == "add"
        relu = choice(options, "unary", ("none", "relu")) == "relu"
        if add and not relu:
            raise ArtifactError(f"{self.name} adds only before relu")
        geometry = (
            integers(options, "stride"),
            integers(options, "padding"),
            integers(options, "dilation"),
            integer(options, "groups"),
        )
        packed = weight.contiguous(memory_format=_LAST)
        run = _call(packed, bias, geometry, add=add, relu=relu)
        last = choice(options, "layout", ("nchw", "nhwc")) == "nhwc"
        return _laid_out(_tuned(run), last)


def _call(
    weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], *, add: bool, relu: bool
) -> Callable[..., Tensor]:
    stride, padding, dilation, groups = geometry
    if add:
        both = torch.ops.aten.cudnn_convolution_add_relu.default
        return lambda x, z: both(x, weight, z, 1.0, bias, *geometry)
    if relu:
        one = torch.ops.aten.cudnn_convolution_relu.default
        return lambda x: one(x, weight, bias, *geometry)
    plain = torch.ops.aten.convolution.default
    return lambda x: plain(x, weight, bias, stride, padding, dilation, False, [0, 0], groups)


def _tuned(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Lets cuDNN measure its algorithms, whatever the process has chosen for its own models."""

    def call(*operands: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(
            enabled=True,
            benchmark=True,
            deterministic=torch.backends.cudnn.deterministic,
            allow_tf32=torch.backends.cudnn.allow_tf32,
        ):
            return run(*operands)

    return call


def _laid_out(run: Callable[..., Tensor], last: bool) -> LibraryCall:
    if last:

        def nhwc(*operands: Tensor) -> Tensor:
            views = [o.permute(0, 3, 1, 2).contiguous(memory_format=_LAST) for o in operands]
            return run(*views).permute(0, 2, 3, 1)

        return nhwc
    return lambda *operands: run(*[o.contiguous(memory_format=_LAST) for o in operands])
