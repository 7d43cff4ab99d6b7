"""Pooling and resampling over the trailing (spatial) axes of [B, C, ...] or [C, ...]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from accel.errors import TypeInferenceError
from accel.ir.op import Arg, Aten, Lit, Trait, aten, define
from accel.ir.ops.elementwise import check_dtype
from accel.ir.types import Dim, Shape, TensorType, same_dim, simplify_dim

POOL = Trait.PURE | Trait.REDUCTION

Values = Mapping[str, Any]


def spatial_forms(
    name: str, attribute: str, *args: str | Lit | Arg, ranks: tuple[int, ...] = (1, 2, 3)
) -> tuple[Aten, ...]:
    """One ATen form for each number of spatial axes: `{}` in the name, len(attribute) decides."""

    def when(rank: int) -> Callable[[Values], bool]:
        return lambda values: len(values[attribute]) == rank

    return tuple(aten(name.format(rank), *args, when=when(rank)) for rank in ranks)


def pooled(
    name: str,
    x: TensorType,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> TensorType:
    """The type of x after pooling; TypeInferenceError where the windows do not fit."""
    rank = len(kernel)
    lengths = {len(stride), len(padding), len(dilation)}
    lead = x.rank - rank
    if not 1 <= rank <= 3 or lengths != {rank} or lead not in (1, 2):
        raise TypeInferenceError(f"accel.{name}: kernel {kernel}, stride {stride} for {x}")
    if any(2 * p > k for p, k in zip(padding, kernel)) or any(s < 1 for s in stride):
        raise TypeInferenceError(f"accel.{name}: padding {padding} for kernel {kernel}")
    if rank == 3 and name.startswith("avg") and x.dtype.itemsize == 2:
        raise TypeInferenceError(
            f"accel.{name}: {x.dtype} over three axes", advice="insert accel.cast"
        )
    out: list[Dim] = []
    for size, k, s, p, d in zip(x.shape[lead:], kernel, stride, padding, dilation):
        span = simplify_dim(size + 2 * p - d * (k - 1) - 1)
        if isinstance(span, int) and span < 0:
            raise TypeInferenceError(f"accel.{name}: kernel {kernel} does not fit {x}")
        length = (span + s - 1) // s + 1 if ceil_mode else span // s + 1
        if ceil_mode and s > 1:
            # The last window must start inside the input or its left padding.
            if not isinstance(length, int) or not isinstance(size, int):
                raise TypeInferenceError(f"accel.{name}: ceil_mode needs static sizes")
            length -= (length - 1) * s >= size + p
        out.append(simplify_dim(length))
    return x.with_shape((*x.shape[:lead], *out))


def _check_size(name: str, x: TensorType, size: Shape) -> TensorType:
    check_dtype(name, "f", x)
    lead = x.rank - len(size)
    if not 1 <= len(size) <= 3 or lead not in (1, 2):
        raise TypeInferenceError(f"accel.{name}: size {size} for {x}")
    if any(d == 0 for d in x.shape[lead:]):
        raise TypeInferenceError(f"accel.{name}: {x} is empty")
    return x.with_shape((*x.shape[:lead], *size))


@define("max_pool", POOL)
class MaxPool:
    """Largest element of each window over the last len(kernel) axes; padding never wins."""

    @staticmethod
    def infer(
        x: TensorType,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        ceil_mode: bool = False,
    ) -> TensorType:
        check_dtype("max_pool", "f", x)
        return pooled("max_pool", x, kernel, stride, padding, dilation, ceil_mode)

    evaluate = spatial_forms(
        "max_pool{}d", "kernel", "x", "kernel", "stride", "padding", "dilation", "ceil_mode"
    )


@define("max_pool_with_indices", POOL)
class MaxPoolWithIndices:
    """`max_pool` over two or three axes, and where each maximum is: int64, flat over those axes."""

    @staticmethod
    def infer(
        x: TensorType,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        ceil_mode: bool = False,
    ) -> tuple[TensorType, TensorType]:
        check_dtype("max_pool_with_indices", "f", x)
        if len(kernel) < 2:
            raise TypeInferenceError("accel.max_pool_with_indices: needs two or three axes")
        y = pooled("max_pool_with_indices", x, kernel, stride, padding, dilation, ceil_mode)
        return y, y.with_dtype(torch.int64)

    evaluate = spatial_forms(
        "max_pool{}d_with_indices",
        "kernel", "x", "kernel", "stride", "padding", "dilation", "ceil_mode",
        ranks=(2, 3),
    )  # fmt: skip


@define("avg_pool", POOL)
class AvgPool:
    """Mean of each window over the last len(kernel) axes.

    The sum of a window is divided by `divisor` if given, else by its size, padding counted only
    with `count_include_pad`.
    """

    @staticmethod
    def infer(
        x: TensorType,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> TensorType:
        check_dtype("avg_pool", "f", x)
        if divisor == 0 or (divisor is not None and len(kernel) == 1):
            raise TypeInferenceError(f"accel.avg_pool: divisor {divisor} for kernel {kernel}")
        return pooled("avg_pool", x, kernel, stride, padding, (1,) * len(kernel), ceil_mode)

    evaluate = (
        aten(
            "avg_pool1d", "x", "kernel", "stride", "padding", "ceil_mode", "count_include_pad",
            when=lambda v: len(v["kernel"]) == 1,
        ),
        *spatial_forms(
            "avg_pool{}d", "kernel", "x", "kernel", "stride", "padding", "ceil_mode",
            "count_include_pad", "divisor", ranks=(2, 3),
        ),
    )  # fmt: skip


@define("adaptive_avg_pool", POOL)
class AdaptiveAvgPool:
    """Mean over windows that divide the last len(size) axes into `size` parts."""

    @staticmethod
    def infer(x: TensorType, *, size: Shape) -> TensorType:
        return _check_size("adaptive_avg_pool", x, size)

    evaluate = spatial_forms("adaptive_avg_pool{}d", "size", "x", "size")


@define("adaptive_max_pool", POOL)
class AdaptiveMaxPool:
    """Maximum over windows that divide the last len(size) axes, and where it is (int64, flat)."""

    @staticmethod
    def infer(x: TensorType, *, size: Shape) -> tuple[TensorType, TensorType]:
        y = _check_size("adaptive_max_pool", x, size)
        return y, y.with_dtype(torch.int64)

    evaluate = spatial_forms("adaptive_max_pool{}d", "size", "x", "size")


_UPSAMPLE = {  # (mode, spatial axes) -> ATen's name
    ("nearest", 1): "upsample_nearest1d",
    ("nearest", 2): "upsample_nearest2d",
    ("nearest", 3): "upsample_nearest3d",
    ("nearest-exact", 1): "_upsample_nearest_exact1d",
    ("nearest-exact", 2): "_upsample_nearest_exact2d",
    ("nearest-exact", 3): "_upsample_nearest_exact3d",
    ("linear", 1): "upsample_linear1d",
    ("linear", 2): "upsample_bilinear2d",
    ("linear", 3): "upsample_trilinear3d",
    ("cubic", 2): "upsample_bicubic2d",
}


def upsample_forms(suffix: str, *sizes: str | Arg) -> tuple[Aten, ...]:
    """The ATen form for each mode and number of axes; `sizes` follow the first operand."""

    def scale(i: int) -> Arg:
        return Arg(lambda values: values["scales"][i] if values["scales"] else None)

    def form(mode: str, rank: int, name: str) -> Aten:
        corners = () if mode.startswith("nearest") else ("align_corners",)
        scales = tuple(scale(i) for i in range(rank))
        return aten(
            name + suffix, "x", *sizes, *corners, *scales,
            when=lambda v: v["mode"] == mode and len(v["x"].shape) == rank + 2,
        )  # fmt: skip

    return tuple(form(mode, rank, name) for (mode, rank), name in _UPSAMPLE.items())


def check_upsample(name: str, x: TensorType, size: Shape, mode: str, scales: Shape) -> None:
    """TypeInferenceError unless x is [B, C, ...] with as many spatial axes as `size`."""
    check_dtype(name, "f", x)
    rank = len(size)
    if x.rank != rank + 2 or (mode, rank) not in _UPSAMPLE or len(scales) not in (0, rank):
        raise TypeInferenceError(f"accel.{name}: mode '{mode}', size {size} for {x}")
    if any(d == 0 for d in (*x.shape[1:], *size)):
        raise TypeInferenceError(f"accel.{name}: {x} to {size} is empty")


@define("upsample", Trait.PURE)
class Upsample:
    """Interpolation of [B, C, ...] to spatial `size`: nearest, nearest-exact, linear or cubic.

    `scales` are the factors as given by the user (empty: from the sizes), as in torch.
    """

    @staticmethod
    def infer(
        x: TensorType,
        *,
        size: Shape,
        mode: str,
        align_corners: bool = False,
        scales: tuple[float, ...] = (),
    ) -> TensorType:
        check_upsample("upsample", x, size, mode, scales)
        return x.with_shape((*x.shape[:2], *size))

    evaluate = upsample_forms("", "size")


_GRID_MODES = {"bilinear": 0, "nearest": 1, "bicubic": 2}
_GRID_PADDING = {"zeros": 0, "border": 1, "reflection": 2}


@define("grid_sample", Trait.PURE)
class GridSample:
    """x [B, C, ...] read at positions grid [B, ..., n] in [-1, 1] (Jaderberg et al., 2015).

    `mode` bilinear, nearest or bicubic (two axes only); `padding` zeros, border or reflection.
    """

    @staticmethod
    def infer(
        x: TensorType,
        grid: TensorType,
        *,
        mode: str = "bilinear",
        padding: str = "zeros",
        align_corners: bool = False,
    ) -> TensorType:
        check_dtype("grid_sample", "f", x, grid)
        rank = x.rank - 2
        if mode not in _GRID_MODES or padding not in _GRID_PADDING:
            raise TypeInferenceError(f"accel.grid_sample: mode '{mode}', padding '{padding}'")
        fits = rank in (2, 3) and grid.rank == x.rank and same_dim(grid.shape[0], x.shape[0])
        if not fits or grid.shape[-1] != rank or (mode == "bicubic" and rank == 3):
            raise TypeInferenceError(f"accel.grid_sample: {x} at {grid}")
        return x.with_shape((*x.shape[:2], *grid.shape[1:-1]))

    evaluate = aten(
        "grid_sampler",
        "x",
        "grid",
        Arg(lambda v: _GRID_MODES[v["mode"]]),
        Arg(lambda v: _GRID_PADDING[v["padding"]]),
        "align_corners",
    )


@define("col2im", Trait.PURE)
class Col2Im:
    """Sums the columns [B, C * prod(kernel), L] of sliding windows back into [B, C, *size].

    Its inverse (im2col) is `pad`, `unfold` and `reshape`.
    """

    @staticmethod
    def infer(
        x: TensorType,
        *,
        size: Shape,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> TensorType:
        check_dtype("col2im", "fc", x)
        block = 1
        windows: Dim = 1
        for d, k, s, p, step in zip(size, kernel, stride, padding, dilation, strict=True):
            block *= k
            windows = windows * ((d + 2 * p - step * (k - 1) - 1) // s + 1)
        channels = x.shape[1] if x.rank == 3 else None
        if len(size) != 2 or not isinstance(channels, int) or channels % block:
            raise TypeInferenceError(f"accel.col2im: {x} for kernel {kernel}, size {size}")
        if not same_dim(x.shape[2], simplify_dim(windows)):
            raise TypeInferenceError(f"accel.col2im: {x} has not {windows} windows")
        return x.with_shape((x.shape[0], channels // block, *size))

    evaluate = aten("col2im", "x", "size", "kernel", "dilation", "padding", "stride")
