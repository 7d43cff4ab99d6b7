"""oneDNN through torch: weights packed once, epilogues fused into the call.

Weights are packed without a batch size: measured on AVX-512, that layout is the fastest for every
number of rows, one included, and it does not depend on sizes known only at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.errors import ArtifactError, MissingDependencyError
from accel.runtime.interfaces import LibraryCall, Operand
from accel.runtime.libraries.options import choice, integer, integers, numbers

_UNARY = (
    "none",
    "relu",
    "gelu",
    "swish",
    "sigmoid",
    "tanh",
    "hardswish",
    "hardtanh",
    "leaky_relu",
)


class _Epilogue:
    """binary (none, add) applied first, then unary (for binary: none or relu)."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.binary = choice(options, "binary", ("none", "add"))
        self.unary = choice(options, "unary", _UNARY)
        self.scalars = numbers(options, "scalars")
        self.algorithm = choice(options, "algorithm", ("", "none", "tanh"))
        if self.binary != "none" and self.unary not in ("none", "relu"):
            raise ArtifactError(f"no fused add with {self.unary}")


def _require_onednn() -> None:
    if not torch.backends.mkldnn.is_available():
        raise MissingDependencyError(
            "this build of torch has no oneDNN", advice="install a torch built with oneDNN"
        )


def _weight(operands: Sequence[Operand | None], index: int, label: str) -> Tensor:
    operand = operands[index] if index < len(operands) else None
    if operand is None or operand.weight is None:
        raise ArtifactError(f"{label} needs a constant weight")
    return operand.weight


def _bias(operands: Sequence[Operand | None]) -> tuple[Tensor | None, bool]:
    """The constant bias, and whether the bias is given at each call instead."""
    operand = operands[2] if len(operands) > 2 else None
    if operand is None:
        return None, False
    return operand.weight, operand.weight is None


class OneDnnLinear:
    """x [..., K], weight [N, K], bias [N] or none, other [..., N] for the fused add.

    A weight given at each call (decoded from a compressed one, say) is not packed: that costs
    a tenth of the speed at worst, where packing each time would halve it.
    """

    name = "onednn.linear"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        _require_onednn()
        run = _linear(_Epilogue(options))
        if len(operands) not in (3, 4) or operands[0] is None or operands[1] is None:
            raise ArtifactError(f"{self.name} takes x, weight, bias and perhaps another operand")
        fixed: list[Tensor | None] = [None if o is None else o.weight for o in operands]
        fixed += [None] * (4 - len(fixed))
        live = [i for i, o in enumerate(operands) if o is not None and o.weight is None]
        weight = fixed[1]
        if weight is not None:
            fixed[1] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        packed, bias, other = fixed[1:]
        if live == [0]:
            return lambda x: run(x, packed, bias, other)
        if live == [0, 3]:
            return lambda x, other: run(x, packed, bias, other)

        def call(*given: Tensor) -> Tensor:
            arguments = list(fixed)
            for place, value in zip(live, given):
                arguments[place] = value.contiguous() if place in (1, 2) else value
            return run(*arguments)

        return call


def _linear(epilogue: _Epilogue) -> Callable[..., Tensor]:
    """The call with operands x, weight, bias, other."""
    pointwise = torch.ops.mkldnn._linear_pointwise
    plain, fused = pointwise.default, pointwise.binary
    if epilogue.binary == "none":
        tail = (epilogue.unary, epilogue.scalars, epilogue.algorithm)
        return lambda x, weight, bias, _: plain(x, weight, bias, *tail)
    if epilogue.unary == "none":
        return lambda x, weight, bias, other: fused(x, other, weight, bias, "add")

    def add_then_relu(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
        y: Tensor = plain(x, weight, bias, "none", [], "")
        return y.add_(other).relu_()

    return add_then_relu


class OneDnnConv:
    """x [B, C, H, W] ([B, H, W, C] for layout nhwc), weight [O, C / groups, KH, KW], bias, other.

    Activations are channels-last in memory: what nhwc programs have, and what oneDNN's kernels for
    AVX-512 like best.
    """

    name = "onednn.conv"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        _require_onednn()
        epilogue = _Epilogue(options)
        weight = _weight(operands, 1, self.name)
        bias, live_bias = _bias(operands)
        if live_bias:
            raise ArtifactError(f"{self.name} needs a constant bias")
        last = choice(options, "layout", ("nchw", "nhwc")) == "nhwc"
        stride, padding = integers(options, "stride"), integers(options, "padding")
        dilation, groups = integers(options, "dilation"), integer(options, "groups")
        x = operands[0]
        if x is None or len(x.shape) != 4:
            raise ArtifactError(f"{self.name} needs an input of rank 4")
        shape = list(x.shape)
        if last:
            shape = [shape[0], shape[3], shape[1], shape[2]]
        if any(s is None for s in shape):
            raise ArtifactError(f"{self.name} needs static sizes")
        if last and _is_matrix_product(weight, stride, padding, groups) and _fits_linear(epilogue):
            matrix = Operand(weight.dtype, tuple(weight.shape[:2]), weight.flatten(1))
            return OneDnnLinear().prepare(options, [x, matrix, *operands[2:]])
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(), padding, stride, dilation, groups, shape
        )
        geometry = (padding, stride, dilation, groups)
        tail = (epilogue.unary, epilogue.scalars, epilogue.algorithm)
        if epilogue.binary == "none":
            run = torch.ops.mkldnn._convolution_pointwise.default
            return _laid_out(lambda x: run(x, packed, bias, *geometry, *tail), last)
        fused = torch.ops.mkldnn._convolution_pointwise.binary
        unary = None if epilogue.unary == "none" else epilogue.unary
        end: tuple[Any, ...] = ("add", 1.0, unary, [], "")
        return _laid_out(lambda x, other: fused(x, other, packed, bias, *geometry, *end), last)


def _is_matrix_product(weight: Tensor, stride: list[int], padding: list[int], groups: int) -> bool:
    """A 1x1 convolution that is faster as a linear over [B, H, W, C]: it is, measured, unless it
    narrows the channels by more than half (then oneDNN's convolution blocks better)."""
    rows, columns, *kernel = weight.shape
    plain = kernel == [1, 1] and stride == [1, 1] and padding == [0, 0] and groups == 1
    return plain and (2 * rows > columns or columns <= 256)


def _fits_linear(epilogue: _Epilogue) -> bool:
    return epilogue.binary == "none" or epilogue.unary == "none"


def _laid_out(run: Callable[..., Tensor], last: bool) -> LibraryCall:
    """Runs on channels-last memory; for nhwc programs that is a permuted view, without a copy."""
    channels_last = torch.channels_last
    if last:

        def nhwc(*operands: Tensor) -> Tensor:
            # A view of [B, H, W, C] memory, whatever the strides of axes of size one say.
            views = [
                o.permute(0, 3, 1, 2).contiguous(memory_format=channels_last) for o in operands
            ]
            return run(*views).permute(0, 2, 3, 1)

        return nhwc
    return lambda *operands: run(*[o.contiguous(memory_format=channels_last) for o in operands])
