"""Autocast around a compile, around a call, and inside of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accel


def test_autocast_is_part_of_what_is_compiled(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)).eval(), torch.randn(2, 8)
    fast = accel.compile(model)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            assert fast(x).dtype == model(x).dtype
            torch.testing.assert_close(fast(x), model(x), rtol=1e-2, atol=1e-2)
            accel.package(model, (x,), path=tmp_path / "m.accel")
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
            with torch.autocast("cpu", dtype=dtype):
                wanted = model(x)
            torch.testing.assert_close(
                accel.load(tmp_path / "m.accel")(x), wanted, rtol=1e-2, atol=1e-2
            )


class Mixed(nn.Module):
    """Regions with and without autocast, operators that it widens, and one that it promotes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = self.linear(x)
            with torch.autocast("cpu", enabled=False):
                wide = self.linear(x)
            again = self.linear(narrow).softmax(-1)
            both = torch.cat([narrow, wide])
            image = self.conv(x[:, None])
        return narrow, self.norm(wide), again, both, image, x @ x.t()


@pytest.mark.parametrize("ambient", [False, True])
@pytest.mark.parametrize("how", ["compile", "torch"])
def test_regions_inside_of_a_model(ambient: bool, how: str) -> None:
    model, x = Mixed().eval(), torch.randn(3, 8)
    torch._dynamo.reset()
    fast: Any = accel.compile(model) if how == "compile" else torch.compile(model, backend="accel")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient):
        for got, wanted in zip(fast(x), model(x), strict=True):
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
