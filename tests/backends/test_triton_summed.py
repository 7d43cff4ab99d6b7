"""Kernels that add up columns on their way over the rows: results and sums against float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.summed import SummedTile, candidates, reason
from accel.ir import TensorType, WeightStore, interpret
from tests.backends.kernels import function_of, kernel_of
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def norm_gradient(b: Any, g: Any, x: Any, mean: Any, rstd: Any, w: Any, other: Any) -> list[Any]:
    """A layer norm's gradients, and the sum that is the bias's before it."""
    g, x, other = (b.cast(v, dtype=F32) for v in (g, x, other))
    hat = b.mul(b.sub(x, mean), rstd)
    own = b.mul(g, w)
    inner = b.mean(b.mul(own, hat), axes=(2,), keepdim=True)
    dx = b.sub(b.sub(own, b.mean(own, axes=(2,), keepdim=True)), b.mul(hat, inner))
    made = b.cast(b.add(b.mul(dx, rstd), other), dtype=BF16)
    flat = b.reshape(made, shape=(x.shape[0] * x.shape[1], x.shape[2]))
    bias = b.sum(flat, axes=(0,), keepdim=True)
    weight = b.cast(b.sum(b.mul(g, hat), axes=(0, 1)), dtype=BF16)
    return [made, bias, weight, b.sum(g, axes=(0, 1))]


def gelu_gradient(b: Any, g: Any, x: Any) -> list[Any]:
    made = b.gelu_backward(g, x, approximate="tanh")
    return [made, b.sum(made, axes=(0, 1), keepdim=True)]


def parts(b: Any, x: Any, y: Any) -> list[Any]:
    """Rows of two tensors beside each other, as heads are put together, and a sum."""
    flat = [b.reshape(v, shape=(*v.shape[:2], v.shape[2] * v.shape[3])) for v in (x, y)]
    made = b.cat(*flat, axis=2)
    return [made, b.sum(made, axes=(0, 1))]


def norm_types(rows: tuple[int, int], columns: int) -> list[TensorType]:
    whole, one = (*rows, columns), (*rows, 1)
    return [TensorType(whole, BF16), TensorType(whole, BF16), TensorType(one, F32),
            TensorType(one, F32), TensorType((columns,), F32), TensorType(whole, BF16)]  # fmt: skip


CASES: list[tuple[str, Any, list[TensorType], SummedTile | None]] = [
    ("norm", norm_gradient, norm_types((3, 40), 48), None),
    ("norm, strips with a rest", norm_gradient, norm_types((3, 37), 100),
     SummedTile(16, 4, 128, 4)),
    ("norm, blocks of columns", norm_gradient, norm_types((2, 24), 96), SummedTile(12, 4, 32, 2)),
    ("norm, blocks with a rest", norm_gradient, norm_types((3, 9), 100), SummedTile(8, 4, 32, 2)),
    ("norm, a row at a time", norm_gradient, norm_types((2, 21), 64), SummedTile(8, 1, 64, 2)),
    ("norm, a row in blocks", norm_gradient, norm_types((2, 10), 80), SummedTile(8, 1, 32, 2)),
    ("gelu", gelu_gradient, [TensorType((2, 50, 256), BF16)] * 2, None),
    ("gelu, blocks with a rest", gelu_gradient, [TensorType((2, 25, 200), BF16)] * 2,
     SummedTile(16, 2, 64, 2)),
    ("parts", parts, [TensorType((2, 40, 3, 16), BF16)] * 2, SummedTile(32, 4, 32, 2)),
    ("parts, a row at a time", parts, [TensorType((2, 9, 3, 16), F32)] * 2,
     SummedTile(4, 1, 64, 2)),
]  # fmt: skip


def fresh(types: Sequence[TensorType]) -> list[Tensor]:
    return [torch.randn([int(d) for d in t.shape]).to(t.dtype) for t in types]


@pytest.mark.parametrize("name", [c[0] for c in CASES])
def test_rows_and_sums(worker: Worker, name: str) -> None:
    _, build, types, tile = next(c for c in CASES if c[0] == name)
    torch.manual_seed(len(name))
    inputs = fresh(types)
    function = function_of(types, build)
    kernel = kernel_of(function, "summed")
    assert reason(kernel) is None
    backend = TritonBackend()
    chosen = TritonBackend(tile=tile) if tile else backend
    runner = InterpretedKernels([function], worker, ["summed"], backend=chosen)
    got = runner(0, inputs)
    wanted = interpret(function, inputs, WeightStore(), oracle=True)
    for i, (a, b, result) in enumerate(zip(got, wanted, function.results, strict=True)):
        assert a.dtype == result.dtype
        digits = 4e-3 if result.dtype == BF16 else 2e-6
        # A sum's terms are rounded to 16 bits where the sum is over what is stored.
        bound = digits if i == 0 or result.dtype == BF16 else 2e-5
        error = (a.double() - b.double()).abs().max() / b.double().abs().max()
        assert float(error) < 2 * bound


def test_what_is_no_such_kernel() -> None:
    def other_columns(b: Any, x: Any) -> list[Any]:
        half = b.slice(x, axis=1, start=0, stop=32)
        return [b.mul(x, x), b.sum(half, axes=(0,))]

    def only_sums(b: Any, x: Any) -> list[Any]:
        return [b.sum(x, axes=(0,))]

    def two_passes(b: Any, x: Any) -> list[Any]:
        deviation = b.sub(x, b.sum(x, axes=(0,), keepdim=True))
        return [deviation, b.sum(deviation, axes=(0,))]

    for build in (other_columns, only_sums, two_passes):
        function = function_of([TensorType((64, 64), F32)], build)
        assert "a kernel of sums" in str(reason(kernel_of(function, "summed")))


def test_compiles_for_all_architectures() -> None:
    kernel = kernel_of(function_of(norm_types((8, 1024), 768), norm_gradient), "summed")
    tiles = candidates(kernel, 132)
    assert tiles and all(tile.strip % tile.rows == 0 for tile in tiles)
    for arch, tile in (("sm_80", None), ("sm_90", tiles[0]), ("sm_100", tiles[-1])):
        made = TritonBackend(arch, tile=tile).compile([kernel])
        assert [len(launches) for launches in made.launches.values()] == [2]
