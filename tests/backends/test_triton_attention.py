"""Generated attention for GPUs: through Triton's interpreter, and compiled for three GPUs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.attention_tiles import AttentionTile
from accel.errors import BackendError
from accel.ir import Function, TensorType, WeightStore, interpret
from tests.backends.kernels import f32, function_of, kernel_of, sym
from tests.backends.test_tvm_attention import BOOL, CASES, Case
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import BACKEND, InterpretedKernels
from tests.backends.triton_worker import Worker

BF16, FP16 = torch.bfloat16, torch.float16
# Largest error over the largest value: weights are at most 1 and sum to 1; those of 16-bit floats
# are rounded before they meet the values, and so is the result.
LIMITS = {torch.float32: 3e-6, BF16: 1.2e-2, FP16: 1.5e-3}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def inputs_of(types: Sequence[TensorType], size: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for t in types:
        shape = [size if not isinstance(d, int) else d for d in t.shape]
        if t.dtype == BOOL:
            made.append(torch.rand(shape, generator=generator) < 0.7)
        else:
            made.append(torch.randn(shape, generator=generator).to(t.dtype))
    return made


def check(
    worker: Worker, function: Function, inputs: Sequence[Tensor], tile: AttentionTile | None = None
) -> str:
    """Compares a kernel with the float64 oracle; returns its source."""
    backend = BACKEND if tile is None else TritonBackend(tile=tile)
    runner = InterpretedKernels([function], worker, ["attention"], backend)
    (want,) = interpret(function, inputs, WeightStore(), oracle=True)
    (got,) = runner(0, inputs)
    (result,) = function.results
    assert got.dtype == result.dtype and got.shape == want.shape
    bound = LIMITS[got.dtype] * max(float(want.abs().max()), 1e-3)
    assert float((got.double() - want).abs().max()) <= bound, runner.source(0)
    return runner.source(0)


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(worker: Worker, name: str) -> None:
    case = CASES[name]
    check(worker, case.function(), inputs_of(case.types(), case.size))
