"""Linears of a few dozen rows as Triton kernels: through its interpreter, and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend, anchors
from accel.backends.triton.skinny import SkinnyTile, Tile, choose, choose_streamed
from accel.backends.triton.streamed import StreamedTile
from accel.ir import WeightStore, interpret
from accel.ir.module import Value
from accel.ir.storage import pack_sub_byte
from accel.ir.types import SUB_BYTE_BITS
from tests.backends.kernels import function_of, kernel_of
from tests.backends.test_triton_gemv import BF16, FP16, Case, halves, inputs_for, random_case
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import BACKEND, InterpretedKernels
from tests.backends.triton_worker import Worker


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def check(worker: Worker, case: Case, tile: Tile | None, weights: int | None = None) -> str:
    """Compares a kernel with the float64 oracle; returns its source."""
    types, build = case
    function, inputs = function_of(types, build), inputs_for(types)
    backend = TritonBackend(tile=tile)
    runner = InterpretedKernels([function], worker, ["skinny"], backend, weights)
    stored = [
        pack_sub_byte(t, a.dtype) if a.dtype in SUB_BYTE_BITS else t
        for t, a in zip(inputs, function.args, strict=True)
    ]
    exact = interpret(function, inputs, WeightStore(), oracle=True)
    for got, want in zip(runner(0, stored), exact, strict=True):
        bound = 4 * torch.finfo(got.dtype).eps * float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= bound, runner.source(0)
    return runner.source(0)


CASES: dict[str, Case] = {
    "plain": ([typed(BF16, 8, 64), typed(BF16, 48, 64)], lambda b, x, w: b.linear(x, w)),
    "tokens of a batch": (
        [typed(FP16, 5, 1, 100), typed(FP16, 35, 100), typed(FP16, 35)],
        lambda b, x, w, c: b.linear(x, w, c),
    ),
    "gelu, residual": (
        [typed(FP16, 17, 96), typed(FP16, 40, 96), typed(FP16, 40), typed(FP16, 17, 40)],
        lambda b, x, w, c, r: b.add(b.gelu(b.linear(x, w, c)), r),
    ),
    "gate times up": (
        [typed(BF16, 6, 64), typed(BF16, 96, 64)],
        lambda b, x, w: halves(b, b.linear(x, w)),
    ),
    "int8 a channel": (
        [typed(BF16, 9, 64), typed(torch.int8, 24, 64), typed(BF16, 24, 1)],
        lambda b, x, q, s: b.linear(x, b.dequantize(q, s, axis=1, group=64)),
    ),
    "int4 in groups": (
        [typed(BF16, 7, 128), typed(torch.uint4, 24, 128), typed(BF16, 24, 4),
         typed(torch.uint8, 24, 4)],
        lambda b, x, q, s, z: b.linear(x, b.dequantize(q, s, z, axis=1, group=32)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_tiles_and_shared_sums(worker: Worker, name: str, split: int) -> None:
    torch.manual_seed(0)
    source = check(worker, CASES[name], SkinnyTile(16, 32, 4, 3, split), 1 if split == 2 else None)
    assert ("arrived" in source) == (split > 1)


STREAMED: dict[str, Case] = {
    "plain": ([typed(BF16, 8, 512), typed(BF16, 128, 512)], lambda b, x, w: b.linear(x, w)),
    "sizes that fit no tile": (
        [typed(FP16, 5, 1, 520), typed(FP16, 70, 520), typed(FP16, 70), typed(FP16, 5, 1, 70)],
        lambda b, x, w, c, r: b.add(b.gelu(b.linear(x, w, c)), r),
    ),
    "gate times up": (
        [typed(BF16, 20, 384), typed(BF16, 160, 384)],
        lambda b, x, w: halves(b, b.linear(x, w)),
    ),
}


@pytest.mark.parametrize(
    "tile",
    [StreamedTile(64, 64, 3), StreamedTile(64, 128, 2, 2), StreamedTile(128, 64, 2, 3)],
)
@pytest.mark.parametrize("name", STREAMED)
def test_tiles_by_tma(worker: Worker, name: str, tile: StreamedTile) -> None:
    torch.manual_seed(0)
    source = check(worker, STREAMED[name], tile, 1)
    assert (
        source.index("bring_tile(m1") < source.index("gdc_wait()") < source.index("bring_tile(m0")
    )


def test_a_weight_that_is_no_constant_is_read_behind_the_wait(worker: Worker) -> None:
    torch.manual_seed(0)
    source = check(worker, STREAMED["plain"], StreamedTile(64, 64, 3))
    assert source.index("gdc_wait()") < source.index("bring_tile(m1")


@pytest.mark.parametrize("seed", range(12))
def test_random_regions(worker: Worker, seed: int) -> None:
    torch.manual_seed(seed)
    check(worker, random_case(seed, 24), None)


def test_few_results_share_their_sums() -> None:
    assert choose(8, 4096, 14336, 1, 132).split > 1
    assert choose(8, 28672, 4096, 2, 132).split == 1


def test_sums_are_shared_where_few_programs_cannot_take_the_weight_in() -> None:
    """Of a layer of 8 billion parameters at 32 rows: only the product with long sums."""
    shapes = {"qkv": (6144, 4096, 1), "o": (4096, 4096, 1), "gate and up": (14336, 4096, 2),
              "down": (4096, 14336, 1), "head": (128256, 4096, 1)}  # fmt: skip
    tiles = {name: choose_streamed(32, *shape, 132) for name, shape in shapes.items()}
    assert {n: t.split for n, t in tiles.items() if t is not None} == {
        "qkv": 1, "o": 1, "gate and up": 1, "down": 2, "head": 1
    }  # fmt: skip
    for name, tile in tiles.items():
        columns, _, sums = shapes[name]
        assert tile is not None and tile.bytes(32, sums) * min(2, columns // 64 // 132 + 1) < (
            227 << 10
        )


def test_kinds_by_rows_and_weight() -> None:
    def kind(rows: int, dtype: torch.dtype, coded: bool = False) -> str:
        def build(b: Any, x: Value, w: Value, s: Value) -> Value:
            return b.linear(x, b.dequantize(w, s, axis=1) if coded else w)

        stored = typed(torch.int8 if coded else dtype, 8, 64)
        function = function_of([typed(dtype, rows, 64), stored, typed(dtype, 8, 1)], build)
        (op,) = (o for o in function.ops if o.name == "linear")
        return anchors.product_kind(op)

    assert [kind(rows, BF16) for rows in (1, 2, 3, 64, 65)] == [
        "gemv", "gemv", "skinny", "skinny", "matmul"
    ]  # fmt: skip
    assert [kind(rows, torch.float32) for rows in (1, 4)] == ["gemv", "gemv"]
    assert [kind(rows, BF16, coded=True) for rows in (4, 5)] == ["gemv", "skinny"]


def test_refusals_say_why() -> None:
    def reason(rows: int, types: torch.dtype = BF16) -> str:
        function = function_of(
            [typed(types, rows, 64), typed(types, 8, 64)], lambda b, x, w: b.linear(x, w)
        )
        (op,) = (o for o in function.ops if o.name == "linear")
        return str(BACKEND.supports_anchor(op, "skinny"))

    assert reason(8) == "None"
    assert "65 rows" in reason(65) and "one row" in reason(1)
    assert "torch.float32" in reason(8, torch.float32)


@pytest.mark.parametrize("name", STREAMED)
def test_compiles_for_hopper(name: str) -> None:
    types, build = STREAMED[name]
    backend = TritonBackend(tile=StreamedTile(64, 128, 3, 2))
    made = backend.compile([kernel_of(function_of(types, build), "skinny", 1)])
    (launch,) = made.launches[made.names[0]]
    assert launch.binary.shared > 64 * 128 * 2 * 2 and launch.code.dependent


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["gate times up", "gelu, residual", "int4 in groups"])
def test_compiles_without_a_gpu(arch: str, name: str) -> None:
    types, build = CASES[name]
    backend = TritonBackend(arch, tile=SkinnyTile(32, 32, 4, 3, 2))
    made = backend.compile([kernel_of(function_of(types, build), "skinny", 1)])
    (launch,) = made.launches[made.names[0]]
    assert launch.binary.cubin and f".target {arch}" in launch.binary.ptx
    assert made.zeroed[made.names[0]] == [1]
