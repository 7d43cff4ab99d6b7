"""Backward ops of convolution, pooling, attention, embedding and losses, as AOTAutograd's graphs
hold them. Names follow ATen; `grad` is the gradient of the forward op's result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from accel.errors import TypeInferenceError
from accel.ir.op import Arg, Aten, Lit, Trait, aten, define
from accel.ir.ops.contract import CONTRACTION
from accel.ir.ops.elementwise import check_dtype
from accel.ir.ops.norm_backward import check_grad, wanted
from accel.ir.ops.pool import POOL, check_upsample, pooled, spatial_forms, upsample_forms
from accel.ir.ops.training import REDUCTIONS, class_axis, nll_weights
from accel.ir.types import Shape, TensorType, same_dim, same_shape, simplify_dim

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value


@define("conv_backward", CONTRACTION)
class ConvBackward:
    """Gradients of `conv` (or, `transposed`, of `conv_transpose`) for x, weight and bias."""

    @staticmethod
    def infer(
        grad: TensorType,
        x: TensorType,
        weight: TensorType,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        transposed: bool = False,
        output_padding: tuple[int, ...] = (),
        groups: int = 1,
        mask: tuple[bool, ...] = (True, True, True),
    ) -> tuple[TensorType, ...]:
        check_dtype("conv_backward", "f", grad, x, weight)
        outputs = simplify_dim(weight.shape[1] * groups) if transposed else weight.shape[0]
        inputs = weight.shape[0] if transposed else simplify_dim(weight.shape[1] * groups)
        fits = grad.rank == x.rank == weight.rank and x.rank - 2 == len(stride)
        if not fits or not same_dim(grad.shape[1], outputs) or not same_dim(x.shape[1], inputs):
            raise TypeInferenceError(f"accel.conv_backward: {grad}, {x}, {weight}")
        return wanted("conv_backward", mask, (x, weight, x.with_shape((outputs,))))

    evaluate = aten(
        "convolution_backward", "grad", "x", "weight", Arg(lambda v: [v["grad"].shape[1]]),
        "stride", "padding", "dilation", "transposed",
        Arg(lambda v: v["output_padding"] or [0] * len(v["stride"])), "groups", "mask",
    )  # fmt: skip


@define("max_pool_backward", POOL)
class MaxPoolBackward:
    """Gradient of `max_pool_with_indices` for x."""

    @staticmethod
    def infer(
        grad: TensorType,
        x: TensorType,
        indices: TensorType,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        ceil_mode: bool = False,
    ) -> TensorType:
        check_dtype("max_pool_backward", "f", grad, x)
        y = pooled("max_pool_backward", x, kernel, stride, padding, dilation, ceil_mode)
        check_grad("max_pool_backward", grad, y)
        if indices.dtype != torch.int64 or not same_shape(indices.shape, grad.shape):
            raise TypeInferenceError(f"accel.max_pool_backward: {grad} at {indices}")
        return x

    evaluate = spatial_forms(
        "max_pool{}d_with_indices_backward", "kernel", "grad", "x", "kernel", "stride", "padding",
        "dilation", "ceil_mode", "indices", ranks=(2, 3),
    )  # fmt: skip


@define("avg_pool_backward", POOL)
class AvgPoolBackward:
    """Gradient of `avg_pool` over two or three axes for x."""

    @staticmethod
    def infer(
        grad: TensorType,
        x: TensorType,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> TensorType:
        check_dtype("avg_pool_backward", "f", grad, x)
        ones = (1,) * len(kernel)
        y = pooled("avg_pool_backward", x, kernel, stride, padding, ones, ceil_mode)
        check_grad("avg_pool_backward", grad, y)
        return x

    evaluate = spatial_forms(
        "avg_pool{}d_backward", "kernel", "grad", "x", "kernel", "stride", "padding", "ceil_mode",
        "count_include_pad", "divisor", ranks=(2, 3),
    )  # fmt: skip


def _ranked_forms(name: str, *args: str) -> tuple[Aten, ...]:
    return tuple(aten(name.format(rank), *args, when=_of_rank(rank)) for rank in (2, 3))


def _of_rank(rank: int) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: values["rank"] == rank


@define("adaptive_avg_pool_backward", POOL)
class AdaptiveAvgPoolBackward:
    """Gradient of `adaptive_avg_pool` over `rank` axes (2 or 3) for x."""

    @staticmethod
    def infer(grad: TensorType, x: TensorType, *, rank: int = 2) -> TensorType:
        check_dtype("adaptive_avg_pool_backward", "f", grad, x)
        return x

    evaluate = _ranked_forms("_adaptive_avg_pool{}d_backward", "grad", "x")


@define("adaptive_max_pool_backward", POOL)
class AdaptiveMaxPoolBackward:
    """Gradient of `adaptive_max_pool` over `rank` axes (2 or 3) for x."""

    @staticmethod
    def infer(grad: TensorType, x: TensorType, indices: TensorType, *, rank: int = 2) -> TensorType:
        check_dtype("adaptive_max_pool_backward", "f", grad, x)
        return x

    evaluate = _ranked_forms("adaptive_max_pool{}d_backward", "grad", "x", "indices")


@define("upsample_backward", Trait.PURE)
class UpsampleBackward:
    """Gradient of `upsample` of a tensor of `input_shape`; `x` is the gradient of its result."""

    @staticmethod
    def infer(
        x: TensorType,
        *,
        input_shape: Shape,
        mode: str,
        align_corners: bool = False,
        scales: tuple[float, ...] = (),
    ) -> TensorType:
        check_upsample("upsample_backward", x, input_shape[2:], mode, scales)
        return x.with_shape(input_shape)

    evaluate = upsample_forms("_backward", Arg(lambda v: v["x"].shape[2:]), "input_shape")


@define("embedding_backward", Trait.PURE)
class EmbeddingBackward:
    """Gradient of `embedding` for a table of `rows` rows: grad [..., D], indices [...]."""

    @staticmethod
    def infer(
        grad: TensorType, indices: TensorType, *, rows: int, padding_index: int = -1
    ) -> TensorType:
        check_dtype("embedding_backward", "f", grad)
        if indices.dtype not in (torch.int64, torch.int32) or not same_shape(
            grad.shape[:-1], indices.shape
        ):
            raise TypeInferenceError(f"accel.embedding_backward: {grad} at {indices}")
        return grad.with_shape((rows, grad.shape[-1]))

    evaluate = aten(
        "embedding_dense_backward", "grad", "indices", "rows", "padding_index", Lit(False)
    )

    @staticmethod
    def decompose(
        b: Builder, grad: Value, indices: Value, *, rows: int, padding_index: int = -1
    ) -> Value:
        wide = b.widen(grad)
        if padding_index >= 0:
            keep = b.ne(indices, b.scalar(padding_index, indices.dtype))
            keep = b.reshape(keep, shape=(*indices.shape, 1))
            wide = b.where(keep, wide, b.scalar(0.0, wide.dtype))
        empty = b.full_of((rows, grad.shape[-1]), 0.0, wide.dtype)
        total = b.index_put(empty, wide, indices, axes=(0,), accumulate=True)
        return b.cast_to(total, grad.dtype)


@define("nll_loss_backward", Trait.PURE)
class NllLossBackward:
    """Gradient of `nll_loss` for x; `total` is the total weight that it returned."""

    @staticmethod
    def infer(
        grad: TensorType,
        x: TensorType,
        target: TensorType,
        total: TensorType,
        weight: TensorType | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> TensorType:
        name = "nll_loss_backward"
        class_axis(name, x, target, weight)
        check_dtype(name, "f", x, grad, total)
        shape = target.shape if reduction == "none" else ()
        if reduction not in REDUCTIONS or not same_shape(grad.shape, shape) or total.rank:
            raise TypeInferenceError(f"accel.{name}: {grad}, reduction = '{reduction}'")
        return x

    evaluate = tuple(
        aten(
            name, "grad", "x", "target", "weight", Arg(lambda v: REDUCTIONS[v["reduction"]]),
            "ignore_index", "total", when=when,
        )
        for name, when in (
            ("nll_loss2d_backward", lambda v: len(v["x"].shape) == 4),
            ("nll_loss_backward", None),
        )
    )  # fmt: skip

    @staticmethod
    def decompose(
        b: Builder,
        grad: Value,
        x: Value,
        target: Value,
        total: Value,
        weight: Value | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> Value:
        axis = 0 if len(x.shape) == 1 else 1
        weights, safe = nll_weights(b, x, target, weight, ignore_index)
        g = b.neg(b.mul(b.widen(grad), weights))
        if reduction == "mean":
            g = b.div(g, b.widen(total))
        one = (*target.shape[:axis], 1, *target.shape[axis:])
        classes = (x.shape[axis], *(1 for _ in x.shape[axis + 1 :]))
        line = b.iota(shape=classes, axis=0, dtype=torch.int64)
        here = b.eq(b.reshape(safe, shape=one), line)
        zero = b.scalar(0.0, g.dtype)
        # An ignored target has weight 0 and so gradient 0, also where the total weight is 0.
        g = b.where(b.eq(weights, zero), zero, g)
        return b.cast_to(b.where(here, b.reshape(g, shape=one), zero), x.dtype)
