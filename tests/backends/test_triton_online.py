"""Softmax and logsumexp of rows that do not fit a tile: one pass for maximum and sum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend
from accel.ir import TensorType, WeightStore, interpret
from tests.backends.kernels import function_of, kernel_of
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

COUNT = 20_003


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def statistics(b: Any, x: Any) -> list[Any]:
    """The logsumexp, and the softmax."""
    wide = x if x.dtype == torch.float32 else b.cast(x, dtype=torch.float32)
    most = b.amax(wide, axes=(1,), keepdim=True)
    total = b.sum(b.exp(b.sub(wide, most)), axes=(1,), keepdim=True)
    found = b.add(b.log(total), most)
    return [found, b.exp(b.sub(wide, found))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_for_maximum_and_sum(worker: Worker, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, COUNT) * 8
    x[1] += 64
    x[2, 100:] = -math.inf
    x[3] = x[3].sort().values  # a new maximum in every block
    x[4, -1] = math.inf
    x[5, 17] = math.nan
    x[6] = -math.inf
    x = x.to(dtype)
    function = function_of([TensorType((7, COUNT), dtype)], statistics)
    wanted = interpret(function, [x], WeightStore(), oracle=True)
    runner = InterpretedKernels([function], worker, ["rowwise"])
    source = runner.source(0)
    assert source.count("for start") == 2, "the statistics, and the softmax"
    assert ("libdevice.exp" in source) == (dtype == torch.float32)
    for got, exact in zip(runner(0, [x]), wanted, strict=True):
        finite = exact.isfinite()
        assert torch.equal(got.isnan(), exact.isnan())
        assert torch.equal(got[~finite & ~exact.isnan()].double(), exact[~finite & ~exact.isnan()])
        error = (got.double() - exact)[finite].abs() / (1e-6 + exact[finite].abs())
        assert float(error.max()) < 3e-5


def test_other_sums_keep_their_pass(worker: Worker) -> None:
    """Of another power, or less something else than the maximum."""

    def squares(b: Any, x: Any) -> Any:
        most = b.amax(x, axes=(1,), keepdim=True)
        return b.sum(b.exp(b.neg(b.sub(x, most))), axes=(1,))

    def other(b: Any, x: Any) -> Any:
        most = b.amax(b.mul(x, x), axes=(1,), keepdim=True)
        return b.sum(b.exp(b.sub(x, most)), axes=(1,))

    x = torch.rand(2, COUNT)
    types = [TensorType((2, COUNT), torch.float32)]
    functions = [function_of(types, build) for build in (squares, other)]
    runner = InterpretedKernels(functions, worker, ["rowwise"] * 2)
    for i, function in enumerate(functions):
        assert runner.source(i).count("for start") == 2
        (got,), (exact,) = runner(i, [x]), interpret(function, [x], WeightStore(), oracle=True)
        assert float((got.double() / exact - 1).abs().max()) < 1e-5


def test_only_short_rows_lose_a_warp() -> None:
    """Two sums of a norm's rows go with one warp; two sums across rows keep all of theirs."""

    def along(b: Any, x: Any, y: Any) -> list[Any]:
        first = b.sum(b.mul(x, y), axes=(1,), keepdim=True)
        return [b.sub(b.mul(x, first), b.sum(x, axes=(1,), keepdim=True))]

    def across(b: Any, x: Any, y: Any) -> list[Any]:
        return [b.sum(b.mul(x, y), axes=(0,)), b.sum(x, axes=(0,))]

    types = [TensorType((8192, 768), torch.bfloat16)] * 2
    kinds = ("rowwise", "reduction")
    kernels = [kernel_of(function_of(types, f), k) for f, k in zip((along, across), kinds)]
    names, made = TritonBackend("sm_90").generate(kernels)
    rows, columns = (made[name].launches[0] for name in names)
    assert rows.constants["ROWS"] == 2 and rows.warps == 1
    assert columns.constants["ROWS"] == 32 and columns.warps == 4
