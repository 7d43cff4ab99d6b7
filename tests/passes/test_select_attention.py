"""select_attention: attention and its views become one kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend
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


def masked(b: Any, x: Any, k: Any, pad: Any, full: Any) -> Any:
    """Keys that are no padding, up to the query: read from one flag a key."""
    band = b.tri_mask(rows=20, columns=50, diagonal=30)
    keep = b.logical_and(band, b.reshape(pad, shape=(2, 1, 1, 50)))
    return b.attention(heads(b, x), k, k, keep, scale=1.0)


def masked_by_pairs(b: Any, x: Any, k: Any, pad: Any, full: Any) -> Any:
    """The mask reads a flag for every pair, so that computing it again saves nothing."""
    keep = b.logical_and(full, b.reshape(pad, shape=(2, 1, 1, 50)))
    return b.attention(heads(b, x), k, k, keep, scale=1.0)


@pytest.mark.parametrize(("build", "inside"), [(masked, True), (masked_by_pairs, False)])
def test_masks_are_computed_inside_where_they_read_little(build: Any, inside: bool) -> None:
    args = (*ARGS, t(2, 50, dtype=torch.bool), t(2, 1, 20, 50, dtype=torch.bool))
    module = program(build, *args)
    inputs = [
        torch.rand(tuple(map(int, a.shape))) < 0.8
        if a.dtype == torch.bool
        else torch.randn(tuple(map(int, a.shape)))
        for a in args
    ]
    (before,) = interpret(module.main, inputs, module.weights)
    context = Context(generator=TritonBackend(measures=True))
    PassManager(["select_attention{masks=true}"], context, validate=True).run(module)
    (kernel,) = [op for op in module.main.ops if op.name == "kernel"]
    names = {o.name for o in kernel.regions[0].ops}
    assert ({"tri_mask", "logical_and"} <= names) == inside
    assert ("logical_and" in names) == inside
    (after,) = interpret(module.main, inputs, module.weights)
    torch.testing.assert_close(after, before)
