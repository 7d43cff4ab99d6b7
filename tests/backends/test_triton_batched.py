"""Batched products as Triton kernels: through its interpreter, and compiled."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend
from accel.backends.triton.batched import choose, saves
from accel.backends.triton.product_plan import MatmulTile
from accel.ir import TensorType, WeightStore, interpret
from accel.ir.types import symbol
from tests.backends.kernels import function_of, kernel_of
from tests.backends.test_triton_gemv import BF16, FP16
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

F32 = torch.float32
TILE = MatmulTile(16, 32, 16, 4, 2, 2)
Case = tuple[list[TensorType], Callable[..., Any]]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def check(worker: Worker, case: Case, tile: MatmulTile | None, **sizes: int) -> str:
    """Compares a kernel with the float64 oracle; returns its source."""
    types, build = case
    function = function_of(types, build)
    shapes = [[d if isinstance(d, int) else sizes[str(d)] for d in t.shape] for t in types]
    inputs = [torch.randn(shape).to(t.dtype) for shape, t in zip(shapes, types)]
    runner = InterpretedKernels([function], worker, ["batched"], TritonBackend(tile=tile))
    exact = interpret(function, inputs, WeightStore(), oracle=True)
    for got, want in zip(runner(0, inputs), exact, strict=True):
        assert got.shape == want.shape
        bound = 4 * torch.finfo(got.dtype).eps * float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= bound, runner.source(0)
    return runner.source(0)


def scores(b: Any, q: Any, k: Any, mask: Any) -> Any:
    """q k^T of heads that lie side by side, scaled and masked."""
    heads = [
        b.permute(b.reshape(x, shape=(2, x.shape[1], 3, 16)), axes=(0, 2, 1, 3)) for x in (q, k)
    ]
    y = b.matmul(heads[0], b.permute(heads[1], axes=(0, 1, 3, 2)))
    return b.add(b.mul(y, b.scalar(0.25, BF16)), mask)


def merged(b: Any, p: Any, v: Any) -> Any:
    """Heads put side by side again."""
    y = b.permute(b.matmul(p, v), axes=(0, 2, 1, 3))
    return b.reshape(y, shape=(2, 19, 3 * 24))


def turned(b: Any, x: Any, y: Any) -> Any:
    """Two axes of the batch merged, then apart, then all turned."""
    z = b.reshape(b.relu(b.matmul(x, y)), shape=(2, 3, 20, 35))
    return b.permute(z, axes=(3, 0, 2, 1))


CASES: dict[str, Case] = {
    "plain": ([typed(BF16, 3, 20, 40), typed(BF16, 3, 40, 35)], lambda b, x, y: b.matmul(x, y)),
    "no batch": (
        [typed(FP16, 33, 64), typed(FP16, 64, 48)],
        lambda b, x, y: b.relu(b.matmul(x, y)),
    ),
    "broadcast batch": (
        [typed(FP16, 2, 1, 18, 32), typed(FP16, 3, 32, 17), typed(FP16, 17)],
        lambda b, x, y, c: b.gelu(b.add(b.matmul(x, y), c)),
    ),
    "scores of heads": (
        [typed(BF16, 2, 19, 48), typed(BF16, 2, 23, 48), typed(BF16, 2, 1, 19, 23)],
        scores,
    ),
    "heads merged": ([typed(FP16, 2, 3, 19, 30), typed(FP16, 2, 3, 30, 24)], merged),
    "batch taken apart": ([typed(BF16, 6, 20, 16), typed(BF16, 6, 16, 35)], turned),
    "residual": (
        [typed(FP16, 4, 17, 16), typed(FP16, 4, 16, 33), typed(FP16, 4, 17, 33)],
        lambda b, x, y, r: b.add(b.silu(b.matmul(x, y)), r),
    ),
    "float32": ([typed(F32, 2, 20, 40), typed(F32, 2, 40, 35)], lambda b, x, y: b.matmul(x, y)),
    "two results": (
        [typed(FP16, 2, 20, 40), typed(FP16, 2, 40, 35)],
        lambda b, x, y: (b.relu(z := b.matmul(x, y)), z),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_products(worker: Worker, name: str) -> None:
    torch.manual_seed(0)
    check(worker, CASES[name], TILE)


def test_symbolic_sizes(worker: Worker) -> None:
    torch.manual_seed(1)
    a, m, n, k = (symbol(name) for name in "amnk")
    types = [TensorType((a, 2, m, k), BF16), TensorType((a, 2, n, k), BF16)]

    def build(b: Any, x: Any, y: Any) -> Any:
        z = b.matmul(x, b.permute(y, axes=(0, 1, 3, 2)))
        z = b.mul(z, b.scalar(0.5, BF16))
        return b.reshape(b.permute(z, axes=(0, 2, 1, 3)), shape=(a, m, 2 * n))

    for sizes in ({"a": 1, "m": 2, "n": 3, "k": 5}, {"a": 3, "m": 33, "n": 40, "k": 64}):
        check(worker, (types, build), TILE, **sizes)


@pytest.mark.parametrize("seed", range(8))
def test_random_products(worker: Worker, seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch = [draw.randint(1, 3) for _ in range(draw.randint(0, 3))]
    m, n, k = (draw.randint(2, 70) for _ in range(3))
    swap = draw.random() < 0.5
    types = [typed(BF16, *batch, m, k), typed(BF16, *batch, *((n, k) if swap else (k, n)))]
    rank = len(batch) + 2

    def build(b: Any, x: Any, y: Any) -> Any:
        if swap:
            y = b.permute(y, axes=(*range(rank - 2), rank - 1, rank - 2))
        z = b.relu(b.matmul(x, y))
        axes = list(range(rank))
        draw.shuffle(axes)
        return b.permute(z, axes=tuple(axes)) if draw.random() < 0.6 else z

    check(worker, (types, build), None)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles(arch: str) -> None:
    kernel = kernel_of(function_of(*CASES["scores of heads"]), "batched")
    compiled = TritonBackend(arch).compile([kernel])
    assert all(one.binary.cubin for one in compiled.launches[compiled.names[0]])


def test_what_the_library_keeps() -> None:
    def members(batch: int, size: int, dtype: torch.dtype = BF16) -> Any:
        types = [typed(dtype, batch, size, 128), typed(dtype, batch, 128, size)]
        function = function_of(types, lambda b, x, y: b.relu(b.matmul(x, y)))
        return list(function.body.ops)[:-1]

    small = members(8, 512)
    assert saves(small[0], small, 132) is None
    assert saves(small[0], small[:1], 132) == "an epilogue that saves no launch"
    wide = members(8, 512, F32)
    assert saves(wide[0], wide, 132) == "float32 in full precision"
    assert "cuBLAS saves" in (saves(wide[0], wide, 132, tf32=True) or "")
    assert choose(8, 512, 512, 128, 132).rows == 128
    assert choose(1, 20, 20, 128, 132) == MatmulTile(32, 32, 64, 4, 4)
