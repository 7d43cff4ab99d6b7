"""select_attention: attention and its views become one kernel."""

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
WIDTH = 32


def selected(module: Module) -> list[list[str]]:
    """The ops of each kernel made."""
    PassManager(["select_attention"], Context(generator=TvmBackend()), validate=True).run(module)
    return [
        [o.name for o in op.regions[0].ops if o.name != "yield"]
        for op in module.main.ops
        if op.name == "kernel"
    ]


def heads(b: Any, x: Any) -> Any:
    return b.permute(b.reshape(x, shape=(2, 20, 2, WIDTH)), axes=(0, 2, 1, 3))


def attend(b: Any, x: Any, k: Any) -> Any:
    return b.attention(heads(b, x), k, k, scale=1.0)


def merged(b: Any, x: Any, k: Any) -> Any:
    return b.reshape(b.permute(attend(b, x, k), axes=(0, 2, 1, 3)), shape=(2, 20, 2 * WIDTH))


def used_twice(b: Any, x: Any, k: Any) -> Any:
    """The result has a second user, so the merge stays outside."""
    y = attend(b, x, k)
    return b.permute(y, axes=(0, 2, 1, 3)), b.exp(y)


def few(b: Any, x: Any, k: Any) -> Any:
    """Four queries: copying the keys would cost more than it gains."""
    return b.attention(b.slice(heads(b, x), axis=2, start=0, stop=4, step=1), k, k, scale=1.0)


ARGS = (t(2, 20, 2 * WIDTH), t(2, 1, 50, WIDTH))


def test_views_on_both_sides_are_taken() -> None:
    module = program(merged, *ARGS)
    inputs = [torch.randn(tuple(map(int, a.shape))) for a in ARGS]
    (before,) = interpret(module.main, inputs, module.weights)
    assert selected(module) == [["reshape", "permute", "attention", "permute", "reshape"]]
    (after,) = interpret(module.main, inputs, module.weights)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("build", "wanted"), [(used_twice, [["reshape", "permute", "attention"]]), (few, [])]
)
def test_near_misses(build: Any, wanted: list[list[str]]) -> None:
    assert selected(program(build, *ARGS)) == wanted
