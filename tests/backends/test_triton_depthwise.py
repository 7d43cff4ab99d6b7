"""Depthwise convolutions as Triton kernels: interpreted, and compiled for three GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend, depthwise
from accel.errors import BackendError
from accel.ir import Op, TensorType
from tests.backends.kernels import function_of, kernel_of
from tests.backends.test_triton_gemv import check, inputs_for
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_worker import Worker

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def convolution(
    image: tuple[int, int, int, int],
    window: tuple[int, int],
    *,
    dtype: torch.dtype = FP16,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    after: Callable[..., Any] = lambda b, y: y,
) -> tuple[list[TensorType], Callable[..., Any]]:
    channels, (height, width) = image[3], window

    def build(b: Any, x: Any, w: Any, bias: Any) -> Any:
        weight = b.reshape(b.permute(w, axes=(2, 0, 1)), shape=(channels, 1, height, width))
        y = b.conv(
            x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=channels,
            layout="nhwc",
        )  # fmt: skip
        return after(b, y)

    types = [typed(dtype, *image), typed(dtype, height, width, channels), typed(dtype, channels)]
    return types, build


CASES: dict[str, tuple[list[TensorType], Callable[..., Any]]] = {
    "plain": convolution((2, 9, 11, 24), (3, 3)),
    "padded": convolution((1, 7, 7, 16), (5, 5), padding=(2, 2), after=lambda b, y: b.relu(y)),
    "stride": convolution((2, 12, 13, 8), (3, 3), stride=(2, 2), padding=(1, 1), dtype=BF16),
    "float32": convolution((1, 6, 9, 5), (5, 3), padding=(1, 2), dtype=FP32),
    "dilation": convolution((1, 9, 9, 8), (3, 3), padding=(2, 2), dilation=(2, 2)),
    "window larger than the image": convolution((1, 2, 2, 16), (5, 5), padding=(2, 2)),
    "hardswish": convolution(
        (2, 6, 6, 16), (3, 3), padding=(1, 1), after=lambda b, y: b.hardswish(y)
    ),
    "two results": convolution(
        (2, 6, 6, 16), (3, 3), padding=(1, 1), after=lambda b, y: [y, b.silu(y)]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_taps_equal_the_convolution(worker: Worker, name: str) -> None:
    types, build = CASES[name]
    torch.manual_seed(0)
    check(worker, function_of(types, build), inputs_for(types), "depthwise")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_loads_are_vectors_of_16_bytes(arch: str) -> None:
    types, build = convolution((64, 56, 56, 72), (3, 3), padding=(1, 1))
    backend = TritonBackend(arch)
    made = backend.compile([kernel_of(function_of(types, build), "depthwise")])
    ((launch,),) = made.launches.values()
    assert "ld.global.v4" in launch.binary.ptx and "st.global.v4" in launch.binary.ptx
    assert "ld.global.b16" not in launch.binary.ptx


def conv_of(types: list[TensorType], build: Callable[..., Any]) -> Op:
    return next(op for op in function_of(types, build).ops if op.name == "conv")


def test_what_is_no_depthwise_convolution() -> None:
    def grouped(b: Any, x: Any, w: Any) -> Any:
        return b.conv(x, w, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=2,
                      layout="nhwc")  # fmt: skip

    types = [typed(FP16, 1, 4, 4, 8), typed(FP16, 8, 4, 3, 3)]
    assert "not depthwise" in str(depthwise.reason(conv_of(types, grouped)))
    wide = convolution((1, 16, 16, 8), (9, 9))
    assert "window" in str(depthwise.reason(conv_of(*wide)))
    double = convolution((1, 6, 6, 8), (3, 3), dtype=torch.float64)
    assert "float64" in str(depthwise.reason(conv_of(*double)))


def test_another_kind_of_kernel_is_an_error() -> None:
    types, build = CASES["plain"]
    with pytest.raises(BackendError):
        TritonBackend().generate([kernel_of(function_of(types, build), "pointwise")])
