"""select_matmul: linears over stored weights become kernels, the weights stored in blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel.backends.tvm import TvmBackend
from accel.ir import Module, interpret
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.passes.registry import load_passes
from tests.passes.helpers import program, t

load_passes()


def selected(module: Module) -> list[list[str]]:
    """The ops of each kernel made."""
    PassManager(["select_matmul"], Context(generator=TvmBackend()), validate=True).run(module)
    return [
        [o.name for o in op.regions[0].ops if o.name != "yield"]
        for op in module.main.ops
        if op.name == "kernel"
    ]


def weight(b: Any, n: int = 48, name: str = "w") -> Any:
    return b.weight(torch.randn(n, 8, generator=torch.Generator().manual_seed(n)), name)


def residual(b: Any, x: Any, other: Any) -> Any:
    return b.add(b.gelu(b.linear(x, weight(b, 40), b.weight(torch.randn(40)))), other)


def test_bias_and_epilogue_are_taken_and_the_weight_is_stored_once() -> None:
    module = program(residual, t(2, 20, 8), t(2, 20, 40))
    inputs = [torch.randn(2, 20, 8), torch.randn(2, 20, 40)]
    (before,) = interpret(module.main, inputs, module.weights, oracle=True)
    assert selected(module) == [["permute", "reshape", "linear", "slice", "add", "gelu", "add"]]
    (after,) = interpret(module.main, inputs, module.weights, oracle=True)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert "w" not in module.weights
    assert module.weights.type("w.blocks").shape[1] == 8


def test_two_linears_of_one_weight_share_its_blocks() -> None:
    module = program(lambda b, x, y: b.linear(b.linear(x, w := weight(b, 8)), w), t(9, 8), t(1))
    assert len(selected(module)) == 2
    assert [n for n in module.weights.names() if "blocks" in n] == ["w.blocks"]


def tied(b: Any, x: Any, i: Any) -> Any:
    """An embedding reads the table too."""
    table = weight(b)
    return b.linear(x, table), b.embedding(table, i)


def computed(b: Any, x: Any, w: Any) -> Any:
    return b.linear(x, w)


def as_input(b: Any, x: Any, y: Any) -> Any:
    """The stored matrix is the linear's x."""
    return b.linear(weight(b), y)


def strided(b: Any, x: Any) -> Any:
    """A 1x1 convolution with a stride and a bias, padded."""
    geometry = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "layout": "nhwc"}
    kernel = b.weight(torch.randn(24, 16, 1, 1), "k")
    return b.relu(b.conv(x, kernel, b.weight(torch.randn(24)), **geometry))


def test_a_convolution_takes_its_padding() -> None:
    module = program(strided, t(1, 7, 7, 16))
    inputs = [torch.randn(1, 7, 7, 16)]
    (before,) = interpret(module.main, inputs, module.weights, oracle=True)
    (ops,) = selected(module)
    assert [o for o in ops if o != "slice"] == ["permute", "reshape", "pad", "conv", "add", "relu"]
    (after,) = interpret(module.main, inputs, module.weights, oracle=True)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def grouped(b: Any, x: Any) -> Any:
    """Two groups of channels are two products."""
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "layout": "nhwc"}
    return b.conv(x, b.weight(torch.randn(24, 8, 3, 3), "k"), **geometry, groups=2)


MISSES = {
    "groups": (grouped, (t(1, 7, 7, 16),)),
    "tied": (tied, (t(20, 8), t(3, dtype=torch.int64))),
    "computed": (computed, (t(20, 8), t(16, 8))),
    "as input": (as_input, (t(1), t(16, 8))),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_misses(name: str) -> None:
    build, types = MISSES[name]
    module = program(build, *types)
    names = list(module.weights.names())
    assert selected(module) == []
    assert list(module.weights.names()) == names


def test_a_tied_weight_is_reported() -> None:
    build, types = MISSES["tied"]
    misses: list[str] = []
    context = Context(generator=TvmBackend())
    context.on_miss = lambda rule, op, text: misses.append(text)
    PassManager(["select_matmul"], context).run(program(build, *types))
    assert any("also read by accel.embedding" in m for m in misses)
