"""The variance of rows that do not fit a tile: two passes, the second over deviations.

One pass over sums and squares would lose everything where the mean is large; these rows say so.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from accel.ir import WeightStore, interpret
from tests.backends.kernels import f32, function_of
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

COUNT = 20_000


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


@pytest.mark.parametrize(("mean", "bound"), [(0.0, 5e-7), (1e3, 1e-6), (1e4, 1e-5)])
def test_a_large_mean_costs_no_digits(worker: Worker, mean: float, bound: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, COUNT) + mean
    function = function_of([f32(3, COUNT)], lambda b, x: b.var(x, axes=(1,), correction=0.0))
    (want,) = interpret(function, [x], WeightStore(), oracle=True)
    runner = InterpretedKernels([function], worker, ["rowwise"])
    (got,) = runner(0, [x])
    assert runner.source(0).count("for start") == 2  # a row does not fit
    assert float((got.double() - want).abs().max()) <= bound * float(want.max())
    one_pass = (x * x).mean(1) - x.mean(1) ** 2
    if mean >= 1e3:
        assert float((one_pass.double() - want).abs().max()) > 0.05
