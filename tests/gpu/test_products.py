"""Generated products on the device, and chains of launches that start before their turn."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accel
from accel.ir import WeightStore, interpret
from accel.runtime import cuda
from accel.runtime.cuda_code import CudaCode
from tests.backends import test_triton_gemv as gemv
from tests.backends import test_triton_skinny as skinny
from tests.backends.kernels import function_of
from tests.backends.test_tvm_kernels import typed
from tests.gpu.device_kernels import DeviceKernels, Kernel
from tests.gpu.test_models import target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BF16 = torch.bfloat16
SHAPES = [(1, 2048, 3072), (2, 4096, 1024), (1, 14336, 512), (1, 576, 1536)]
SKINNY_SHAPES = [(8, 4096, 512), (33, 14336, 256), (64, 1024, 4096), (5, 100, 35), (16, 576, 1536)]


def _linears(shapes: list[tuple[int, int, int]]) -> list[gemv.Case]:
    return [
        (
            [typed(BF16, m, k), typed(BF16, n, k), typed(BF16, n), typed(BF16, m, n)],
            lambda b, x, w, c, r: b.add(b.silu(b.linear(x, w, c)), r),
        )
        for m, k, n in shapes
    ]


def gemv_cases() -> list[gemv.Case]:
    return [*gemv.CASES.values(), *(gemv.random_case(s, 4) for s in range(12)), *_linears(SHAPES)]


def skinny_cases() -> list[gemv.Case]:
    some = (gemv.random_case(s, 24) for s in range(12))
    return [*skinny.CASES.values(), *some, *_linears(SKINNY_SHAPES)]


def gemv_kernels(weights: int | None) -> list[Kernel]:
    return [Kernel(function_of(*case), "gemv", weights) for case in gemv_cases()]


def skinny_kernels(weights: int | None) -> list[Kernel]:
    return [Kernel(function_of(*case), "skinny", weights) for case in skinny_cases()]


def check(kernels: DeviceKernels, cases: list[gemv.Case]) -> None:
    for number, (types, _) in enumerate(cases):
        torch.manual_seed(number)
        function, inputs = kernels.functions[number], gemv.inputs_for(types)
        exact = interpret(function, inputs, WeightStore(), oracle=True)
        for got, want in zip(kernels(number, inputs), exact, strict=True):
            roundings = 4 if got.dtype.itemsize < 4 else 16
            bound = roundings * torch.finfo(got.dtype).eps * float(want.abs().max())
            error = float((got.double() - want).abs().max())
            assert error <= bound, f"case {number}: {error} > {bound}\n{kernels.source(number)}"


@pytest.mark.parametrize("weights", [None, 1])
def test_gemv(weights: int | None) -> None:
    check(DeviceKernels(partial(gemv_kernels, weights)), gemv_cases())


@pytest.mark.parametrize("weights", [None, 1])
def test_skinny(weights: int | None) -> None:
    check(DeviceKernels(partial(skinny_kernels, weights)), skinny_cases())


class Chain(nn.Module):
    """Small kernels that depend on one another, some of them not generated."""

    def __init__(self, size: int = 512, layers: int = 12) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(size) for _ in range(layers))
        self.first = nn.ModuleList(nn.Linear(size, 3 * size, bias=False) for _ in range(layers))
        self.second = nn.ModuleList(nn.Linear(3 * size, size) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for i, (norm, up, down) in enumerate(zip(self.norms, self.first, self.second, strict=True)):
            y = down(nn.functional.silu(up(norm(x))))
            if i % 3 == 1:
                y = torch.sort(y, dim=-1).values
            if i % 4 == 2:
                y = torch.softmax(y.roll(1, -1), -1) * y.shape[-1] + y
            x = x + y
        return x


@pytest.mark.parametrize("rows", [1, 2, 8, 40, 300])
def test_launches_ahead_of_their_turn_change_nothing(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Chain().to(BF16).eval()
    inputs = [torch.randn(rows, 512).to(BF16) for _ in range(4)]
    ahead = accel.compile(model, inputs=(inputs[0],), target=target(), options={"cache": False})
    on_device = [x.cuda() for x in inputs]
    early = [[ahead(x).clone() for x in on_device] for _ in range(50)]

    def in_turn(data: bytes) -> CudaCode:
        code = unpack(data)
        kernels = {n: replace(k, dependent=False) for n, k in code.kernels.items()}
        assert any(k.dependent for k in code.kernels.values())
        return replace(code, kernels=kernels)

    unpack: Any = cuda.unpack
    monkeypatch.setattr(cuda, "unpack", in_turn)
    plain = accel.compile(model, inputs=(inputs[0],), target=target(), options={"cache": False})
    wanted = [plain(x).clone() for x in on_device]
    for made in early:
        for got, want in zip(made, wanted, strict=True):
            assert torch.equal(got, want)
    exact = model.float()(inputs[0].float())
    assert float((wanted[0].cpu().float() - exact).norm() / exact.norm()) < 5e-2
