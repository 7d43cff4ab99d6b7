"""Linears of many rows as Triton kernels: through its interpreter, and compiled for three GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend
from accel.errors import BackendError
from accel.ir import TensorType
from tests.backends.kernels import f32, function_of, kernel_of, sym
from tests.backends.test_triton_gemv import check, halves, inputs_for, random_case
from tests.backends.test_tvm_kernels import randn, typed
from tests.backends.triton_kernels import BACKEND
from tests.backends.triton_worker import Worker

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


Case = tuple[list[TensorType], Callable[..., Any]]
CASES: dict[str, Case] = {
    "plain": ([typed(FP16, 64, 64), typed(FP16, 32, 64)], lambda b, x, w: b.linear(x, w)),
    "odd sizes": ([typed(BF16, 37, 77), typed(BF16, 19, 77)], lambda b, x, w: b.linear(x, w)),
    "bias, gelu, residual": (
        [typed(FP16, 2, 19, 96), typed(FP16, 72, 96), typed(FP16, 72), typed(FP16, 2, 19, 72)],
        lambda b, x, w, c, r: b.add(b.gelu(b.linear(x, w, c)), r),
    ),
    "two results": (
        [typed(BF16, 20, 64), typed(BF16, 40, 64), typed(BF16, 20, 40)],
        lambda b, x, w, r: (lambda y: [y, b.silu(y)])(b.add(b.linear(x, w), r)),
    ),
    "gate times up": (
        [typed(BF16, 33, 64), typed(BF16, 80, 64)],
        lambda b, x, w: halves(b, b.linear(x, w)),
    ),
    "rows by permuting": (
        [typed(FP16, 5, 4, 8, 16), typed(FP16, 24, 128)],
        lambda b, x, w: b.linear(
            b.reshape(b.permute(x, axes=(0, 2, 1, 3)), shape=(5, 8, 64)),
            b.reshape(w, shape=(48, 64)),
        ),
    ),
    "activation before": (
        [typed(BF16, 20, 40), typed(BF16, 24, 40)],
        lambda b, x, w: b.relu(b.linear(b.silu(x), w)),
    ),
    "channels of images scaled before": (
        [typed(FP16, 3, 5, 5, 72), typed(FP16, 3, 1, 1, 72), typed(FP16, 24, 72),
         typed(FP16, 3, 5, 5, 24)],
        lambda b, x, s, w, r: b.add(r, b.linear(b.mul(x, s), w)),
    ),
    "int8 a channel": (
        [typed(BF16, 20, 64), typed(torch.int8, 24, 64), typed(BF16, 24, 1)],
        lambda b, x, q, s: b.linear(x, b.dequantize(q, s, axis=1, group=64)),
    ),
    "int4 in groups": (
        [typed(FP16, 20, 128), typed(torch.uint4, 24, 128), typed(FP16, 24, 4),
         typed(torch.uint8, 24, 4)],
        lambda b, x, q, s, z: b.linear(x, b.dequantize(q, s, z, axis=1, group=32)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_many_rows(worker: Worker, name: str) -> None:
    types, build = CASES[name]
    torch.manual_seed(0)
    check(worker, function_of(types, build), inputs_for(types), "matmul")


@pytest.mark.parametrize("seed", range(12))
def test_random_regions(worker: Worker, seed: int) -> None:
    types, build = random_case(seed, 80)
    torch.manual_seed(seed)
    check(worker, function_of(types, build), inputs_for(types), "matmul")


def test_symbolic_rows(worker: Worker) -> None:
    types = [typed(BF16, sym("s"), 32), typed(BF16, 16, 32)]
    function = function_of(types, lambda b, x, w: b.silu(b.linear(x, w)))
    for rows in (1, 65, 130):
        inputs = [randn(rows, 32).bfloat16(), randn(16, 32).bfloat16()]
        assert "// (ROWS" not in check(worker, function, inputs, "matmul")


def test_refusals_say_why() -> None:
    types = [f32(64, 64), f32(8, 64)]
    op = next(iter(function_of(types, lambda b, x, w: b.linear(x, w)).ops))
    assert "torch.float32" in str(BACKEND.supports_anchor(op, "matmul"))
    column = [typed(FP16, 64, 64), typed(FP16, 1, 64)]
    op = next(iter(function_of(column, lambda b, x, w: b.linear(x, w)).ops))
    assert "one row or column" in str(BACKEND.supports_anchor(op, "matmul"))
    half = [typed(FP16, 64, 64), typed(FP16, 8, 64)]
    function = function_of(half, lambda b, x, w: b.permute(b.linear(x, w), axes=(1, 0)))
    with pytest.raises(BackendError, match="shape"):
        BACKEND.generate([kernel_of(function, "matmul")])


@pytest.mark.parametrize(("rows", "takes"), [(128, True), (197, False), (4096, True)])
def test_the_library_multiplies_where_the_epilogue_saves_too_little(rows: int, takes: bool) -> None:
    types = [typed(FP16, rows, 768), typed(FP16, 3072, 768)]
    function = function_of(types, lambda b, x, w: b.gelu(b.linear(x, w)))
    linear, gelu = (o for o in function.ops if o.name in ("linear", "gelu"))
    kind, reason = BACKEND.product_kind(linear, [linear, gelu])
    assert kind == "matmul" and (reason is None) == takes
    assert BACKEND.product_kind(linear, [linear])[1] == "an epilogue that saves no launch"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["bias, gelu, residual", "int4 in groups"])
def test_compiles_without_a_gpu(arch: str, name: str) -> None:
    types, build = CASES[name]
    made = TritonBackend(arch).compile([kernel_of(function_of(types, build), "matmul")])
    (launch,) = made.launches[made.names[0]]
    assert launch.binary.cubin and launch.binary.shared <= 160 << 10
