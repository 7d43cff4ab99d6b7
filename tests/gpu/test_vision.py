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
