"""Contractions: matmul, linear, convolutions, distances.

Accumulation is part of the meaning: contractions of 16-bit floats accumulate in float32, of float32
in float32, of float64 in float64, of int8 in int32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Arg, Lit, Trait, aten, define
from accel.ir.ops.elementwise import check_dtype
from accel.ir.types import (
    Dim,
    TensorType,
    broadcast_shapes,
    format_shape,
    same_dim,
    simplify_dim,
)

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value

CONTRACTION = Trait.PURE | Trait.CONTRACTION


@define("matmul", CONTRACTION)
class MatMul:
    """[..., M, K] x [..., K, N] to [..., M, N]; leading axes broadcast. int8 gives int32."""

    @staticmethod
    def infer(x: TensorType, y: TensorType) -> TensorType:
        check_dtype("matmul", "fic", x, y)
        if x.rank < 2 or y.rank < 2 or not same_dim(x.shape[-1], y.shape[-2]):
            raise TypeInferenceError(
                f"accel.matmul: {format_shape(x.shape)} x {format_shape(y.shape)}"
            )
        batch = broadcast_shapes(x.shape[:-2], y.shape[:-2])
        dtype = torch.int32 if x.dtype == torch.int8 else x.dtype
        return TensorType((*batch, x.shape[-2], y.shape[-1]), dtype)

    @staticmethod
    def evaluate(x: Tensor, y: Tensor) -> Tensor:
        if x.dtype == torch.int8:
            return torch.matmul(x.to(torch.int32), y.to(torch.int32))
        return torch.matmul(x, y)

    call = aten("matmul", "x", "y", when=lambda v: v["x"].dtype != torch.int8)


@define("linear", CONTRACTION)
class Linear:
    """x [..., K] times weight [N, K] transposed, plus bias [N]."""

    @staticmethod
    def infer(x: TensorType, weight: TensorType, bias: TensorType | None = None) -> TensorType:
        if check_dtype("linear", "fic", x, weight, bias) == torch.int8:
            raise TypeInferenceError("accel.linear does not take int8", advice="use accel.matmul")
        if x.rank < 1 or weight.rank != 2 or not same_dim(x.shape[-1], weight.shape[1]):
            raise TypeInferenceError(
                f"accel.linear: {format_shape(x.shape)} with weight {format_shape(weight.shape)}"
            )
        _check_bias("linear", bias, weight.shape[0])
        return x.with_shape((*x.shape[:-1], weight.shape[0]))

    evaluate = aten("linear", "x", "weight", "bias")

    @staticmethod
    def decompose(b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Value:
        transposed = b.permute(weight, axes=(1, 0))
        if len(x.shape) == 1:
            rows = b.reshape(x, shape=(1, x.shape[0]))
            y = b.reshape(b.matmul(rows, transposed), shape=(weight.shape[0],))
        else:
            y = b.matmul(x, transposed)
        return y if bias is None else b.add(y, bias)


def _conv_output(size: Dim, kernel: Dim, stride: int, padding: int, dilation: int) -> Dim:
    span = simplify_dim(size + 2 * padding - dilation * (kernel - 1) - 1)
    if isinstance(span, int) and span < 0:
        raise TypeInferenceError(f"a kernel of {kernel} does not fit {size} elements")
    return simplify_dim(span // stride + 1)


def _check_bias(name: str, bias: TensorType | None, outputs: Dim) -> None:
    if bias is not None and (bias.rank != 1 or not same_dim(bias.shape[0], outputs)):
        raise TypeInferenceError(f"accel.{name}: bias {bias} for {outputs} outputs")


@define("conv", CONTRACTION)
class Conv:
    """1-, 2- or 3-d convolution: x [B, C, ...], weight [O, C / groups, ...], bias [O].

    `layout` "nchw" or, for a channels-last program, "nhwc": then x is [B, ..., C] and so is the
    result; the weight's layout does not change.
    """

    @staticmethod
    def infer(
        x: TensorType,
        weight: TensorType,
        bias: TensorType | None = None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int = 1,
        layout: str = "nchw",
    ) -> TensorType:
        check_dtype("conv", "f", x, weight, bias)
        if layout not in ("nchw", "nhwc"):
            raise TypeInferenceError(f"accel.conv: layout = '{layout}'")
        last = layout == "nhwc"
        spatial = x.shape[1:-1] if last else x.shape[2:]
        channels = x.shape[-1] if last else x.shape[1]
        rank = x.rank - 2
        if (
            x.rank != weight.rank
            or not 1 <= rank <= 3
            or not len(stride) == len(padding) == len(dilation) == rank
        ):
            raise TypeInferenceError(
                f"accel.conv: {format_shape(x.shape)} with weight {format_shape(weight.shape)}, "
                f"stride {stride}"
            )
        if not same_dim(channels, weight.shape[1] * groups):
            raise TypeInferenceError(
                f"accel.conv: {channels} channels, weight {format_shape(weight.shape)}, "
                f"groups {groups}"
            )
        outputs = weight.shape[0]
        if isinstance(outputs, int) and (groups < 1 or outputs % groups):
            raise TypeInferenceError(f"accel.conv: {outputs} outputs in {groups} groups")
        _check_bias("conv", bias, outputs)
        out = [
            _conv_output(s, k, *p)
            for s, k, p in zip(spatial, weight.shape[2:], zip(stride, padding, dilation))
        ]
        if last:
            return x.with_shape((x.shape[0], *out, weight.shape[0]))
        return x.with_shape((x.shape[0], weight.shape[0], *out))

    @staticmethod
    def evaluate(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int = 1,
        layout: str = "nchw",
    ) -> Tensor:
        last = layout == "nhwc"
        y = torch.ops.aten.convolution(
            x.movedim(-1, 1) if last else x,
            weight, bias, stride, padding, dilation, False, [0] * len(stride), groups,
        )  # fmt: skip
        return y.movedim(1, -1) if last else y

    call = aten(
        "convolution", "x", "weight", "bias", "stride", "padding", "dilation", Lit(False),
        Arg(lambda v: [0] * len(v["stride"])), "groups", when=lambda v: v["layout"] == "nchw",
    )  # fmt: skip


@define("conv_transpose", CONTRACTION)
class ConvTranspose:
    """Transposed convolution: x [B, C, ...], weight [C, O / groups, ...], bias [O]."""

    @staticmethod
    def infer(
        x: TensorType,
        weight: TensorType,
        bias: TensorType | None = None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        output_padding: tuple[int, ...],
        groups: int = 1,
    ) -> TensorType:
        check_dtype("conv_transpose", "f", x, weight, bias)
        rank = x.rank - 2
        lengths = {len(stride), len(padding), len(dilation), len(output_padding)}
        if x.rank != weight.rank or not 1 <= rank <= 3 or lengths != {rank}:
            raise TypeInferenceError(f"accel.conv_transpose: {x} with weight {weight}")
        if not same_dim(x.shape[1], weight.shape[0]):
            raise TypeInferenceError(f"accel.conv_transpose: {x} with weight {weight}")
        outputs = simplify_dim(weight.shape[1] * groups)
        _check_bias("conv_transpose", bias, outputs)
        out = [
            simplify_dim((s - 1) * st - 2 * p + d * (k - 1) + op + 1)
            for s, k, st, p, d, op in zip(
                x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding
            )
        ]
        if 0 in x.shape[2:] or any(isinstance(d, int) and d < 1 for d in out):
            raise TypeInferenceError(
                f"accel.conv_transpose: an output of {format_shape(tuple(out))}"
            )
        return x.with_shape((x.shape[0], outputs, *out))

    evaluate = aten(
        "convolution", "x", "weight", "bias", "stride", "padding", "dilation", Lit(True),
        "output_padding", "groups",
    )  # fmt: skip


@define("cdist", CONTRACTION)
class CDist:
    """p-norm distances of the rows of x [..., M, K] and y [..., N, K]: [..., M, N]."""

    @staticmethod
    def infer(x: TensorType, y: TensorType, *, p: float = 2.0) -> TensorType:
        check_dtype("cdist", "f", x, y)
        if x.rank < 2 or y.rank < 2 or not same_dim(x.shape[-1], y.shape[-1]):
            raise TypeInferenceError(f"accel.cdist: {x} and {y}")
        if x.dtype.itemsize < 4:
            raise TypeInferenceError(f"accel.cdist: {x.dtype}", advice="insert accel.cast")
        batch = broadcast_shapes(x.shape[:-2], y.shape[:-2])
        return x.with_shape((*batch, x.shape[-2], y.shape[-2]))

    # Mode 2: no matrix product, whose cancellation is severe for near rows.
    evaluate = aten("cdist", "x", "y", "p", Lit(2))

    @staticmethod
    def decompose(b: Builder, x: Value, y: Value, *, p: float = 2.0) -> Value:
        rows = b.reshape(x, shape=(*x.shape[:-1], 1, x.shape[-1]))
        columns = b.reshape(y, shape=(*y.shape[:-2], 1, *y.shape[-2:]))
        d = b.abs(b.sub(rows, columns))
        axes = (len(d.shape) - 1,)
        if p == 0:
            return b.sum(b.cast_to(b.ne(d, b.scalar(0.0, d.dtype)), d.dtype), axes=axes)
        if p == float("inf"):
            return b.amax(d, axes=axes)
        if p == 1:
            return b.sum(d, axes=axes)
        if p == 2:
            return b.sqrt(b.sum(b.mul(d, d), axes=axes))
        total = b.sum(b.pow(d, b.scalar(p, d.dtype)), axes=axes)
        return b.pow(total, b.scalar(1 / p, d.dtype))
