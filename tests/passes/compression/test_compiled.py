"""Compressed models through the whole compiler: what runs is what the interpreter says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import accel
from accel.frontends.export import capture
from accel.ir import interpret
from accel.passes.manager import run_pipeline

FORMATS = (
    "quantize",
    "quantize{bits=4,group=32,symmetric=false}",
    "quantize{bits=3,group=32}",
    "quantize{format=fp8}",
    "quantize{format=nf4,group=32}",
    "sparsify",
    "sparsify,quantize",
    "cluster{group=32}",
    "low_rank{gain=0,energy=0.6}",
)


class Tied(nn.Module):
    """A language model's ends: tokens are embedded, and scored against the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.inner = nn.Linear(64, 64)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.inner(self.embed(tokens))))
        return logits


def images() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    return net.eval(), torch.randn(1, 8, 9, 9)


def texts() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Tied().eval(), torch.randint(0, 300, (2, 5))


def check(model: nn.Module, x: Tensor, passes: str) -> Tensor:
    compiled = accel.compile(model, inputs=(x,), options={"passes": passes, "cache": False})
    reference = capture(model, (x,))
    run_pipeline(reference, passes)
    (wanted,) = interpret(reference.main, [x], reference.weights)
    made: Tensor = compiled(x)
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    return made


@pytest.mark.parametrize("passes", FORMATS)
def test_linears(passes: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 32)).eval()
    x = torch.randn(3, 64)
    made = check(net, x, passes)
    with torch.no_grad():
        assert float((made - net(x)).norm()) > 0


@pytest.mark.parametrize("passes", ["quantize", "sparsify", "cluster"])
def test_convolutions(passes: str) -> None:
    check(*images(), passes)


@pytest.mark.parametrize("passes", ["quantize", "quantize{bits=4,group=32}", "cluster", "sparsify"])
def test_tied_tables(passes: str) -> None:
    name, _, options = passes.partition("{")
    options = f"tied=share,{options}" if options else "tied=share}"
    check(*texts(), f"{name}{{{options}")


def test_merged_branches_are_part_of_every_compile() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Conv2d(8, 8, 3, padding=1)
            self.point = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.dense(x) + self.point(x) + x)

    torch.manual_seed(0)
    net, x = Branches().eval(), torch.randn(1, 8, 9, 9)
    compiled = accel.compile(net, inputs=(x,), options={"cache": False})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    assert compiled.ir("kernels").count('"accel.conv"') == 1
