"""GELU and SiLU of 16-bit numbers: all of float16, and bfloat16, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.backends.kernels import function_of
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_numbers(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    function = function_of([typed(dtype, 1 << 16)], lambda b, x: b.gelu(x))
    worker = Worker()
    try:
        (got,) = InterpretedKernels([function], worker)(0, [every])
    finally:
        worker.close()
    exact = torch.nn.functional.gelu(every.double())
    eager = torch.nn.functional.gelu(every)
    assert torch.equal(got.isnan(), exact.isnan()) and bool((got[every == torch.inf] > 0).all())
    compared = exact.isfinite() & (every > -5.5)  # Phi(-5.5) = 2e-8
    wrong = int((got != exact.to(dtype))[compared].sum())
    assert wrong < int((eager != exact.to(dtype))[compared].sum())
    # Where a number has too few bits for 7e-6 to matter, the neighbour of the correct one at most.
    off = got.view(torch.int16).int() - exact.to(dtype).view(torch.int16).int()
    assert int(off[compared].abs().max()) <= 1
    below = every < -5.5
    assert bool((got[below].abs()[~got[below].isnan()] < 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_silu_of_all_numbers(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    function = function_of([typed(dtype, 1 << 16)], lambda b, x: b.silu(x))
    worker = Worker()
    try:
        runner = InterpretedKernels([function], worker)
        (got,) = runner(0, [every])
        assert "exp2" in runner.source(0)
    finally:
        worker.close()
    exact = torch.nn.functional.silu(every.double())
    assert torch.equal(got.isnan(), torch.nn.functional.silu(every).isnan())
    compared = exact.isfinite() & (every > -80)  # exp(88) is the largest one
    off = got.view(torch.int16).int() - exact.to(dtype).view(torch.int16).int()
    assert int(off[compared].abs().max()) <= 1
    assert int((off[compared] != 0).sum()) <= 8
