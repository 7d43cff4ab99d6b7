"""Products of one row whose weight comes by TMA: interpreted, and compiled for Hopper."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from accel.backends.triton import TritonBackend
from accel.backends.triton.gemv import choose_for
from accel.backends.triton.gemv_streamed import StreamedGemvTile, reason
from accel.ir import TensorType, WeightStore, interpret
from tests.backends.kernels import function_of, kernel_of
from tests.backends.test_triton_gemv import BF16, FP16, Case, halves, inputs_for
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

SMS = 3  # so that programs have several tiles
CASES: dict[str, tuple[StreamedGemvTile, Case]] = {
    "plain": (
        StreamedGemvTile(8, 1024, 2),
        ([typed(BF16, 1, 1024), typed(BF16, 80, 1024)], lambda b, x, w: b.linear(x, w)),
    ),
    "ragged columns, parts of K, bias": (
        StreamedGemvTile(4, 1024, 3),
        (
            [typed(FP16, 1, 1, 3072), typed(FP16, 27, 3072), typed(FP16, 27)],
            lambda b, x, w, c: b.linear(x, w, c),
        ),
    ),
    "norm": (
        StreamedGemvTile(2, 2048, 3),
        (
            [typed(BF16, 1, 1, 2048), typed(BF16, 2048), typed(BF16, 24, 2048)],
            lambda b, x, g, w: b.linear(b.rms_norm(x, g, eps=1e-5, cast_before_weight=True), w),
        ),
    ),
    "norm in parts, gate times up": (
        StreamedGemvTile(4, 1024, 2),
        (
            [typed(BF16, 1, 2048), typed(BF16, 2048), typed(BF16, 56, 2048)],
            lambda b, x, g, w: halves(b, b.linear(b.rms_norm(x, g, eps=1e-6), w)),
        ),
    ),
    "gelu, residual, few columns": (
        StreamedGemvTile(8, 2048, 2, 8),
        (
            [typed(FP16, 1, 2048), typed(FP16, 5, 2048), typed(FP16, 5), typed(FP16, 1, 5)],
            lambda b, x, w, c, r: b.add(b.gelu(b.linear(x, w, c)), r),
        ),
    ),
}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


@pytest.mark.parametrize("name", CASES)
def test_programs_that_stay(worker: Worker, name: str) -> None:
    """The weight is a constant: its first tiles are read before the wait, nothing else is."""
    torch.manual_seed(0)
    tile, (types, build) = CASES[name]
    function = function_of(types, build)
    inputs = inputs_for(types)
    backend = TritonBackend(sms=SMS, tile=tile)
    for weights in (None,) if "residual" in name else (None, 1):  # that one is no constant
        runner = InterpretedKernels([function], worker, ["gemv"], backend, weights)
        assert "bring_tile" in runner.source(0)
        exact = interpret(function, inputs, WeightStore(), oracle=True)
        for got, want in zip(runner(0, inputs), exact, strict=True):
            bound = 4 * torch.finfo(got.dtype).eps * float(want.abs().max())
            assert float((got.double() - want).abs().max()) <= bound, runner.source(0)


@pytest.mark.parametrize("name", CASES)
def test_compiles_for_hopper(name: str) -> None:
    tile, (types, build) = CASES[name]
    backend = TritonBackend(tile=tile)
    made = backend.compile([kernel_of(function_of(types, build), "gemv", 1)])
    (launch,) = made.launches[made.names[0]]
    assert launch.binary.maps and launch.code.dependent
    assert launch.binary.shared <= 227 << 10


def test_large_weights_are_streamed() -> None:
    """Of layers of 1 and 8 billion parameters: gate and up, and the head."""

    def chosen(columns: int, depth: int, name: str = "plain", capability: int = 90) -> object:
        build = CASES[name][1][1]
        types = [typed(BF16, 1, depth), typed(BF16, columns, depth)]
        if "gate" in name:
            types.insert(1, typed(BF16, depth))
        return choose_for(kernel_of(function_of(types, build), "gemv"), 132, capability)

    assert chosen(128256, 4096) == StreamedGemvTile(4, 4096, 6)
    gate = "norm in parts, gate times up"
    assert chosen(28672, 4096, gate) == StreamedGemvTile(2, 4096, 6)
    assert chosen(28672, 4096, gate, 80) is None and chosen(28672, 4096, gate, 100) is None
    for columns, depth in ((6144, 4096), (4096, 14336), (16384, 2048), (128256, 2048)):
        assert chosen(columns, depth) is None


def test_what_it_does_not_take_is_said() -> None:
    def said(*types: TensorType, name: str = "plain") -> str:
        return str(reason(kernel_of(function_of(list(types), CASES[name][1][1]), "gemv")))

    assert said(typed(BF16, 1, 1024), typed(BF16, 80, 1024)) == "None"
    assert "2 rows" in said(typed(BF16, 2, 1024), typed(BF16, 80, 1024))
    assert "sums over 96" in said(typed(BF16, 1, 96), typed(BF16, 80, 96))
    assert "16 bits" in said(typed(torch.float32, 1, 1024), typed(torch.float32, 80, 1024))
