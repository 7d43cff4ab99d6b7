"""select_depthwise: the padding before, the convolution and what follows become one kernel."""

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
IMAGE = t(1, 8, 9, 16)


def selected(module: Module) -> list[list[str]]:
    """The ops of each kernel made."""
    PassManager(["select_depthwise"], Context(generator=TvmBackend()), validate=True).run(module)
    return [
        [o.name for o in op.regions[0].ops if o.name != "yield"]
        for op in module.main.ops
        if op.name == "kernel"
    ]


def conv(b: Any, x: Any, *, groups: int = 16, stored: Any = None) -> Any:
    weight = stored if stored is not None else b.weight(torch.randn(16, 16 // groups, 3, 3))
    geometry = {"stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}
    return b.conv(x, weight, b.weight(torch.randn(16), "b"), **geometry, groups=groups,
                  layout="nhwc")  # fmt: skip


def padded(b: Any, x: Any) -> Any:
    x = b.pad(x, low=(0, 0, 0, 0), high=(0, 1, 1, 0))
    return b.relu(conv(b, x))


def test_the_padding_and_the_activation_are_taken() -> None:
    module = program(padded, IMAGE)
    inputs = [torch.randn(1, 8, 9, 16)]
    (before,) = interpret(module.main, inputs, module.weights, oracle=True)
    assert selected(module) == [["permute", "reshape", "pad", "conv", "relu"]]
    (after,) = interpret(module.main, inputs, module.weights, oracle=True)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert "w" not in module.weights
    assert module.weights.type("w.last").shape == (3, 3, 16)


def twice(b: Any, x: Any) -> Any:
    """Two convolutions of one weight."""
    weight = b.weight(torch.randn(16, 1, 3, 3))
    return conv(b, x, stored=weight), conv(b, b.relu(x), stored=weight)


def test_a_shared_weight_is_stored_once() -> None:
    module = program(twice, IMAGE)
    assert len(selected(module)) == 2
    assert [n for n in module.weights.names() if n.startswith("w")] == ["w.last"]


MISSES = {
    "dense": (lambda b, x: conv(b, x, groups=1), (IMAGE,)),
    "computed weight": (lambda b, x, w: conv(b, x, stored=w), (IMAGE, t(16, 1, 3, 3))),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_misses(name: str) -> None:
    build, types = MISSES[name]
    module = program(build, *types)
    assert selected(module) == []
