"""Norms that products take along, on the device: partial sums, and rows scaled in the next one."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch import Tensor

from accel.backends.triton.cooperative import CooperativeTile
from accel.backends.triton.overlapped import OverlappedTile
from accel.backends.triton.paired import PairedTile
from accel.backends.triton.product_plan import MatmulTile
from accel.ir import WeightStore, interpret
from tests.backends import test_triton_folded_norms as folded
from tests.backends.kernels import function_of
from tests.backends.test_triton_gemv import inputs_for
from tests.backends.test_tvm_kernels import typed
from tests.gpu.device_kernels import DeviceKernels, Kernel, device_arch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BF16 = torch.bfloat16
PRODUCERS = {
    **folded.PRODUCERS,
    "many tiles": ([typed(BF16, 1111, 96), typed(BF16, 896, 96), typed(BF16, 1111, 896)], 2),
}
READERS = {**folded.CONSUMERS, **folded.INSIDE}
TILES = {"loop": MatmulTile(64, 128, 64, 4), "overlapped": OverlappedTile(),
         "cooperative": CooperativeTile(), "by three": CooperativeTile(192, 128, groups=3),
         "paired": PairedTile(), "paired by three": PairedTile(192, 128, groups=3),
         "chosen": None}  # fmt: skip
SMS = 4  # so that each program has many tiles


def kernels_of(kind: str) -> list[Kernel]:
    functions = [folded.producer(*case) for case in PRODUCERS.values()]
    functions += [function_of(*case) for case in READERS.values()]
    return [Kernel(one, "matmul", sms=SMS, tile=TILES[kind]) for one in functions]


@cache
def compiled(kind: str) -> DeviceKernels:
    if kind not in ("loop", "chosen") and device_arch() != "sm_90":
        pytest.skip("for Hopper")
    return DeviceKernels(partial(kernels_of, kind))


@pytest.mark.parametrize("kind", TILES)
@pytest.mark.parametrize("name", PRODUCERS)
def test_partial_sums(kind: str, name: str) -> None:
    """Of whole numbers small enough that no type rounds them."""
    kernels, number = compiled(kind), list(PRODUCERS).index(name)
    torch.manual_seed(1)
    types = PRODUCERS[name][0]
    inputs: list[Tensor] = [
        torch.randint(-1, 2, [int(d) for d in t.shape]).to(t.dtype) for t in types
    ]
    exact = interpret(kernels.functions[number], inputs, WeightStore(), oracle=True)
    for got, want in zip(kernels(number, inputs), exact, strict=True):
        assert torch.equal(got.double(), want), kernels.source(number)


@pytest.mark.parametrize("kind", TILES)
@pytest.mark.parametrize("name", READERS)
def test_scaled_rows(kind: str, name: str) -> None:
    kernels, number = compiled(kind), len(PRODUCERS) + list(READERS).index(name)
    torch.manual_seed(2)
    inputs = folded.spread(inputs_for(READERS[name][0]), name)
    exact = interpret(kernels.functions[number], inputs, WeightStore(), oracle=True)
    for got, want in zip(kernels(number, inputs), exact, strict=True):
        bound = 4 * torch.finfo(got.dtype).eps * float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= bound, kernels.source(number)
