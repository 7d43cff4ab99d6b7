"""Max pools of channels-last images as Triton kernels: interpreted, and compiled for three GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend
from accel.ir import WeightStore, interpret
from tests.backends.kernels import function_of, kernel_of
from tests.backends.test_triton_gemv import inputs_for
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def pooled(b: Any, x: Any, **changes: Any) -> Any:
    geometry = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    y = b.max_pool(b.permute(x, axes=(0, 3, 1, 2)), **{**geometry, **changes})
    return b.permute(y, axes=(0, 2, 3, 1))


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "resnet's": ((2, 16, 14, 16), {}),
    "odd sizes": ((1, 9, 7, 8), {}),
    "no padding": ((2, 8, 9, 24), {"padding": (0, 0), "kernel": (2, 2)}),
    "ceil_mode": ((1, 8, 10, 8), {"padding": (0, 0), "ceil_mode": True}),
    "dilation": ((1, 9, 9, 8), {"dilation": (2, 2), "stride": (1, 1)}),
    "channels one by one": ((1, 6, 6, 3), {}),
    "uneven": ((1, 9, 12, 8), {"kernel": (3, 2), "stride": (1, 2), "padding": (1, 0)}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_of_each_window(worker: Worker, name: str, dtype: torch.dtype) -> None:
    shape, changes = CASES[name]
    types = [typed(dtype, *shape)]
    torch.manual_seed(0)
    inputs = inputs_for(types)
    inputs[0].view(-1)[5], inputs[0].view(-1)[-3] = math.nan, -math.inf
    function = function_of(types, lambda b, x: pooled(b, x, **changes))
    (got,) = InterpretedKernels([function], worker, ["pool"])(0, inputs)
    (wanted,) = interpret(function, inputs, WeightStore())
    assert torch.equal(got.nan_to_num(nan=1e4), wanted.nan_to_num(nan=1e4))
    assert bool(got.isnan().any())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_loads_are_vectors_of_16_bytes(arch: str) -> None:
    function = function_of([typed(torch.float16, 64, 112, 112, 64)], pooled)
    made = TritonBackend(arch).compile([kernel_of(function, "pool")])
    ((launch,),) = made.launches.values()
    assert "ld.global.v4" in launch.binary.ptx and "st.global.v4" in launch.binary.ptx
    assert "ld.global.b16" not in launch.binary.ptx
