"""Convolutional models on the device: depthwise kernels, 1x1 products, squeeze-excite."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import accel
from accel.compiler.targets import target_of
from benchmarks.gpu_workloads import with_statistics
from benchmarks.vision import Inverted, MobileNetV3Large

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def check(model: nn.Module, x: Tensor, bound: float) -> None:
    """Three calls (step by step, recorded, replayed) against eager float64."""
    fast = accel.compile(model, inputs=(x,), target=target_of(torch.device("cuda")))
    exact = copy.deepcopy(model).double().cuda()
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn_like(x)
            wanted = exact(x.double().cuda())
            got = fast(x.cuda())
            error = (got.double() - wanted).abs().max() / wanted.abs().max()
            assert float(error) < bound


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_inverted_residuals(kernel: int, stride: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = with_statistics(Inverted(24, kernel, 72, 24, True, True, stride)).to(dtype).eval()
    x = torch.randn(3, 24, 19, 23, dtype=dtype)
    check(model, x, 1e-2 if dtype == torch.float16 else 5e-3)  # cuDNN: TF32


def test_mobilenet() -> None:
    torch.manual_seed(0)
    model = with_statistics(MobileNetV3Large()).half().eval()
    check(model, torch.randn(2, 3, 96, 96).half(), 3e-2)


class Stem(nn.Module):
    """A photograph's first layers: few channels, a max pool, a shortcut, and patches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 7, 2, 3)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.main, self.short = nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(32, 48, 1)
        self.patches, self.gate = nn.Conv2d(48, 64, 4, 4), nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.first(x)))
        return self.gate(self.patches(torch.relu(self.main(x) + self.short(x))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_first_layers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Stem().to(dtype).eval(), torch.randn(2, 3, 64, 96, dtype=dtype)
    check(model, x, {torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float32: 5e-3}[dtype])
