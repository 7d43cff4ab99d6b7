"""Overlapped products on the device: the cases that the interpreter runs, and larger ones."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton.cooperative import CooperativeTile
from accel.backends.triton.overlapped import OverlappedTile
from accel.backends.triton.paired import PairedTile
from accel.ir import WeightStore, interpret
from tests.backends import test_triton_matmul, test_triton_overlapped
from tests.backends.kernels import function_of, sym
from tests.backends.test_triton_gemv import Case, halves, inputs_for
from tests.backends.test_tvm_kernels import typed
from tests.gpu.device_kernels import DeviceKernels, Kernel, device_arch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BF16, FP16 = torch.bfloat16, torch.float16
LARGE: dict[str, Case] = {
    "many tiles": (
        [typed(FP16, 1000, 200), typed(FP16, 520, 200), typed(FP16, 520), typed(FP16, 1000, 520)],
        lambda b, x, w, c, r: b.add(b.gelu(b.linear(x, w, c)), r),
    ),
    "long sums": ([typed(BF16, 300, 4096), typed(BF16, 264, 4096)], lambda b, x, w: b.linear(x, w)),
    "wide halves": (
        [typed(BF16, 700, 512), typed(BF16, 1056, 512)],
        lambda b, x, w: halves(b, b.linear(x, w)),
    ),
}  # fmt: skip
SYMBOLIC: Case = (
    [typed(BF16, sym("s"), 128), typed(BF16, 264, 128)],
    lambda b, x, w: b.silu(b.linear(x, w)),
)
# The usual tile, a wide one, and what the cost model chooses.
TILES = {"overlapped": OverlappedTile(), "wide": OverlappedTile(64, 256, 64, 3),
         "cooperative": CooperativeTile(), "by three": CooperativeTile(192, 128, groups=3),
         "paired": PairedTile(), "paired by three": PairedTile(192, 128, groups=3),
         "chosen": None}  # fmt: skip
# Few multiprocessors, so that each program has many tiles.
SMS = {"overlapped": 3, "wide": 1, "cooperative": 2, "by three": 3, "paired": 2,
       "paired by three": 4, "chosen": 132}  # fmt: skip
CASES = {**test_triton_overlapped.CASES, **LARGE, "symbolic": SYMBOLIC}
DECODED = {n: test_triton_matmul.CASES[n] for n in ("int8 a channel", "activation before")}


def kernels_of(kind: str) -> list[Kernel]:
    tile = TILES[kind]
    cases = {**CASES, **DECODED} if tile is None else CASES
    sms = SMS[kind]
    return [Kernel(function_of(*c), "matmul", sms=sms, tile=tile) for c in cases.values()]


@cache
def compiled(kind: str) -> DeviceKernels:
    if TILES[kind] is not None and device_arch() != "sm_90":
        pytest.skip("for Hopper")
    return DeviceKernels(partial(kernels_of, kind))


def compare(kind: str, name: str, inputs: list[Tensor]) -> None:
    kernels, number = compiled(kind), [*CASES, *DECODED].index(name)
    exact = interpret(kernels.functions[number], inputs, WeightStore(), oracle=True)
    for got, want in zip(kernels(number, inputs), exact, strict=True):
        bound = 4 * torch.finfo(got.dtype).eps * float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= bound, kernels.source(number)


@pytest.mark.parametrize("kind", TILES)
@pytest.mark.parametrize("name", [n for n in CASES if n != "symbolic"])
def test_products(kind: str, name: str) -> None:
    torch.manual_seed(1)
    compare(kind, name, inputs_for(CASES[name][0]))


@pytest.mark.parametrize("name", DECODED)
def test_computed_operands(name: str) -> None:
    torch.manual_seed(2)
    compare("chosen", name, inputs_for(DECODED[name][0]))


@pytest.mark.parametrize("kind", TILES)
@pytest.mark.parametrize("rows", [1, 64, 1111])
def test_symbolic_rows(kind: str, rows: int) -> None:
    torch.manual_seed(3)
    inputs: list[Any] = [torch.randn(rows, 128).bfloat16(), torch.randn(264, 128).bfloat16()]
    compare(kind, "symbolic", inputs)
