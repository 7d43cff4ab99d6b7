"""Products of a mixture's experts as Triton kernels: through its interpreter, and compiled."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend, experts
from accel.backends.triton.expert_loop import most_tiles
from accel.backends.triton.experts import Tile, choose
from accel.backends.triton.product_plan import MatmulTile
from accel.backends.triton.skinny_loop import SkinnyTile
from accel.ir import TensorType, WeightStore, interpret
from accel.ir.module import Value
from accel.ir.types import symbol
from tests.backends.kernels import function_of, kernel_of
from tests.backends.test_triton_gemv import BF16, FP16, Case, halves
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import IndexFailure, InterpretedKernels
from tests.backends.triton_worker import Worker

F32, I64, I32 = torch.float32, torch.int64, torch.int32
FEW, MANY = SkinnyTile(16, 32, 4, 3), MatmulTile(16, 16, 32, 4, 2)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def inputs_for(types: Sequence[TensorType], count: int, rows: int = 0) -> list[Tensor]:
    """Random tensors; integers name one of `count` experts, some more often than others."""
    made: list[Tensor] = []
    for t in types:
        shape = [d if isinstance(d, int) else rows for d in t.shape]
        if t.dtype.is_floating_point:
            made.append(torch.randn(shape).to(t.dtype))
        else:
            some = torch.randperm(count)[: max(1, count - 1)]
            made.append(some[torch.randint(0, len(some), shape)].to(t.dtype))
    return made


def check(
    worker: Worker, case: Case, count: int, tile: Tile | None, weights: int | None = None,
    rows: int = 0,
) -> str:  # fmt: skip
    """Compares a kernel with the float64 oracle; returns its source."""
    types, build = case
    function, inputs = function_of(types, build), inputs_for(types, count, rows)
    backend = TritonBackend(tile=tile)
    runner = InterpretedKernels([function], worker, ["experts"], backend, weights)
    exact = interpret(function, inputs, WeightStore(), oracle=True)
    for got, want in zip(runner(0, inputs), exact, strict=True):
        bound = 4 * torch.finfo(got.dtype).eps * float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= bound, runner.source(0)
    return runner.source(0)


def spread(b: Any, x: Value, k: int) -> Value:
    """Each token k times, as a top-k routes it."""
    tokens, width = x.shape
    apart = b.reshape(x, shape=(tokens, 1, width))
    wide = b.broadcast_to(apart, shape=(tokens, k, width))
    return b.reshape(wide, shape=(tokens * k, width))


def gate_up(b: Any, x: Value, w: Value, e: Value) -> Value:
    return halves(b, b.expert_linear(spread(b, x, 2), w, b.reshape(e, shape=(2 * x.shape[0],))))


def down(b: Any, x: Value, w: Value, e: Value, scale: Value) -> Value:
    y = b.expert_linear(x, w, e)
    return b.mul(y, b.reshape(scale, shape=(x.shape[0], 1)))


def cases(rows: int) -> dict[str, Case]:
    half = rows // 2
    return {
        "plain": (
            [typed(BF16, rows, 64), typed(BF16, 5, 48, 64), typed(I64, rows)],
            lambda b, x, w, e: b.expert_linear(x, w, e),
        ),
        "bias, sizes that fit no tile": (
            [typed(FP16, rows, 50), typed(FP16, 3, 35, 50), typed(I32, rows), typed(FP16, 3, 35)],
            lambda b, x, w, e, c: b.relu(b.expert_linear(x, w, e, c)),
        ),
        "float32": (
            [typed(F32, rows, 40), typed(F32, 6, 33, 40), typed(I64, rows)],
            lambda b, x, w, e: b.expert_linear(x, w, e),
        ),
        "tokens, gate times up": (
            [typed(BF16, half, 64), typed(BF16, 7, 96, 64), typed(I64, half, 2)],
            gate_up,
        ),
        "weights of rows": (
            [typed(BF16, rows, 48), typed(BF16, 4, 64, 48), typed(I64, rows), typed(BF16, rows)],
            down,
        ),
        "two axes": (
            [typed(FP16, half, 2, 32), typed(FP16, 4, 24, 32), typed(I64, half, 2)],
            lambda b, x, w, e: b.silu(b.expert_linear(x, w, e)),
        ),
        "weights the other way round": (
            [typed(FP16, rows, 32), typed(FP16, 4, 32, 24), typed(I64, rows)],
            lambda b, x, w, e: b.expert_linear(x, b.permute(w, axes=(0, 2, 1)), e),
        ),
    }


COUNTS = {"plain": 5, "bias, sizes that fit no tile": 3, "float32": 6, "tokens, gate times up": 7,
          "weights of rows": 4, "two axes": 4, "weights the other way round": 4}  # fmt: skip


def encoded(b: Any, x: Value, q: Value, s: Value, e: Value) -> Value:
    """Codes of all experts as one matrix, as the quantizing passes leave them."""
    w = b.reshape(b.dequantize(q, s, axis=1), shape=(6, 24, 48))
    return b.silu(b.expert_linear(x, w, e))


@pytest.mark.parametrize("rows", [12, 100])
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_encoded_weights(worker: Worker, rows: int, codes: torch.dtype) -> None:
    torch.manual_seed(4)
    types = [typed(BF16, rows, 48), typed(codes, 144, 48), typed(BF16, 144, 1), typed(I64, rows)]
    check(worker, (types, encoded), 6, FEW if rows < 64 else MANY)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("name", COUNTS)
def test_few_rows(worker: Worker, name: str, split: int) -> None:
    torch.manual_seed(0)
    tile = SkinnyTile(16, 16, 4, 3, split)
    source = check(worker, cases(18)[name], COUNTS[name], tile, 1 if split == 1 else None)
    assert ("arrived" in source) == (split > 1)


@pytest.mark.parametrize("name", COUNTS)
def test_many_rows(worker: Worker, name: str) -> None:
    torch.manual_seed(1)
    source = check(worker, cases(150)[name], COUNTS[name], MANY)
    assert "tl.histogram" in source


def test_an_unknown_number_of_rows(worker: Worker) -> None:
    torch.manual_seed(2)
    n = symbol("n")
    types = [TensorType((n, 64), BF16), typed(BF16, 7, 96, 64), TensorType((n, 2), I64)]
    for rows in (1, 3, 70):
        check(worker, (types, gate_up), 7, MANY, rows=rows)


@pytest.mark.parametrize("rows", [4, 150])
def test_an_expert_that_is_none_is_reported(worker: Worker, rows: int) -> None:
    types, build = cases(rows)["plain"]
    inputs = inputs_for(types, 5)
    inputs[2][3] = 5
    tile: Tile = FEW if rows < 64 else MANY
    runner = InterpretedKernels([function_of(types, build)], worker, ["experts"],
                                TritonBackend(tile=tile))  # fmt: skip
    with pytest.raises(IndexFailure):
        runner(0, inputs)


@pytest.mark.parametrize("seed", range(8))
def test_random_routings(worker: Worker, seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, count = draw.choice([2, 6, 33, 64, 65, 200]), draw.choice([1, 2, 9, 16, 31])
    columns, depth = draw.randint(2, 70), draw.randint(1, 90)
    types = [typed(BF16, rows, depth), typed(BF16, count, columns, depth), typed(I64, rows)]
    check(worker, (types, lambda b, x, w, e: b.expert_linear(x, w, e)), count, None)


def test_rows_of_several_programs_that_sort(worker: Worker) -> None:
    torch.manual_seed(3)
    types = [typed(BF16, 5000, 16), typed(BF16, 9, 16, 16), typed(I32, 5000)]
    tile = MatmulTile(128, 16, 16, 4, 2)
    check(worker, (types, lambda b, x, w, e: b.expert_linear(x, w, e)), 9, tile)


def test_most_tiles_is_what_the_worst_routing_makes() -> None:
    for rows, count, height in ((7, 3, 4), (64, 8, 16), (3, 8, 16), (100, 1, 16)):
        worst = 0
        some = min(rows, count)
        for first in range(rows - some + 1):
            sizes = [1] * (some - 1)
            left = rows - sum(sizes)
            worst = max(worst, sum(-(-s // height) for s in (*sizes, left)))
            assert first >= 0
        assert most_tiles(rows, count, height) >= worst


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("rows", [8, 512])
def test_compiles(arch: str, rows: int) -> None:
    half = rows // 2
    types = [typed(BF16, half, 256), typed(BF16, 8, 256, 256), typed(I64, half, 2)]
    kernel = kernel_of(function_of(types, gate_up), "experts", 1)
    compiled = TritonBackend(arch).compile([kernel])
    launches = compiled.launches[compiled.names[0]]
    assert len(launches) == (1 if rows <= experts.MOST_FEW else 2)
    assert all(one.binary.cubin for one in launches)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_positions_of_64_bits_compile(arch: str) -> None:
    """Of an unknown number of rows."""
    n = symbol("n")
    types = [TensorType((n, 64), BF16), typed(BF16, 8, 128, 64), TensorType((n, 2), I64)]
    compiled = TritonBackend(arch).compile([kernel_of(function_of(types, gate_up), "experts", 1)])
    first, second = compiled.launches[compiled.names[0]]
    assert first.binary.cubin and "tl.int64" in second.code.source


@pytest.mark.parametrize(("arch", "stages"), [("sm_80", 3), ("sm_90", 4), ("sm_100", 4)])
def test_steps_on_their_way_fit_the_gpu(arch: str, stages: int) -> None:
    types = [typed(BF16, 2048, 512), typed(BF16, 8, 512, 512), typed(I64, 2048, 2)]
    compiled = TritonBackend(arch).compile([kernel_of(function_of(types, gate_up), "experts", 1)])
    _, second = compiled.launches[compiled.names[0]]
    assert f"num_stages={stages}" in second.code.source
    assert second.binary.shared <= (163 if arch == "sm_80" else 227) << 10


def test_the_choice_fills_the_device() -> None:
    one = choose(8, 64, 1024, 2048, 2, 132)
    assert isinstance(one, SkinnyTile) and one.split == 1
    narrow = choose(2, 8, 64, 4096, 1, 132)
    assert isinstance(narrow, SkinnyTile) and narrow.split == 8
    many = choose(4096 * 8, 64, 1024, 2048, 2, 132)
    assert isinstance(many, MatmulTile) and many.rows == 128
