"""select_copies: what a reshape copies for a library, or for a result, is copied by a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from accel.backends.triton import TritonBackend
from accel.ir import interpret, symbol
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.passes.registry import load_passes
from tests.passes.helpers import F32, program, t

load_passes()
IMAGE = t(2, 3, 8, 12)


def selected(make: Callable[..., Any], *types: Any) -> tuple[list[list[str]], list[str]]:
    """The ops of each kernel made, and what stays outside."""
    module = program(make, *types)
    inputs = [torch.randn([d if isinstance(d, int) else 4 for d in a.shape]) for a in types]
    before = interpret(module.main, inputs, module.weights)
    PassManager(["select_copies", "dce"], Context(generator=TritonBackend()), validate=True).run(
        module
    )
    after = interpret(module.main, inputs, module.weights)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    kernels = [op for op in module.main.ops if op.name == "kernel"]
    inside = [[o.name for o in op.regions[0].ops if o.name != "yield"] for op in kernels]
    return inside, [op.name for op in module.main.ops if op.name not in ("return", "kernel")]


def patches(b: Any, x: Any) -> Any:
    cut = b.reshape(x, shape=(2, 3, 2, 4, 3, 4))
    return b.reshape(b.permute(cut, axes=(0, 2, 4, 1, 3, 5)), shape=(2, 6, 48))


def test_patches_of_an_image() -> None:
    assert selected(patches, IMAGE) == ([["reshape", "permute", "reshape"]], [])


def test_behind_views() -> None:
    """The copy comes before a view of it."""
    made, outside = selected(lambda b, x: b.permute(patches(b, x), axes=(0, 2, 1)), IMAGE)
    assert made == [["reshape", "permute", "reshape"]] and outside == ["permute"]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda b, x: b.reshape(x, shape=(6, 96)), id="a view"),
        pytest.param(
            lambda b, x: b.reshape(b.permute(x, axes=(1, 0, 2, 3)), shape=(3, 2, 96)),
            id="a view of a permutation",
        ),
        pytest.param(
            lambda b, x: b.reshape(b.slice(x, axis=2, start=2, stop=6), shape=(6, 48)),
            id="a view of a slice",
        ),
        pytest.param(lambda b, x: b.exp(patches(b, x)), id="read by a kernel to be"),
    ],
)
def test_what_costs_no_copy_stays(make: Callable[..., Any]) -> None:
    assert selected(make, IMAGE)[0] == []


def test_repeated_elements_and_slices() -> None:
    def repeated(b: Any, x: Any) -> Any:
        wide = b.broadcast_to(b.reshape(x, shape=(2, 3, 1, 8, 12)), shape=(2, 3, 4, 8, 12))
        return b.reshape(wide, shape=(2, 12, 8, 12))

    def cut(b: Any, x: Any) -> Any:
        return b.reshape(b.slice(x, axis=3, start=1, stop=9, step=2), shape=(2, 96))

    assert selected(repeated, IMAGE)[0] == [["reshape", "broadcast_to", "reshape"]]
    assert selected(cut, IMAGE)[0] == [["slice", "reshape"]]


def test_views_of_weights_are_copied_once() -> None:
    def make(b: Any, x: Any) -> Any:
        turned = b.permute(b.weight(torch.randn(4, 6)), axes=(1, 0))
        return x, b.reshape(turned, shape=(24,))

    assert selected(make, t(3))[0] == []


def test_sizes_that_are_not_known() -> None:
    def make(b: Any, x: Any) -> Any:
        n = x.shape[0]
        return b.reshape(b.permute(x, axes=(1, 0)), shape=(n * 6,))

    assert selected(make, t(symbol("n"), 6))[0] == []


def test_no_generator() -> None:
    module = program(patches, IMAGE)
    PassManager(["select_copies"], Context(), validate=True).run(module)
    assert [op.name for op in module.main.ops][-2:] == ["reshape", "return"]
    assert module.main.results[0].dtype == F32


def test_arguments_of_a_training_step_may_lie_in_any_order() -> None:
    """A backward gets attention's result as its kernel has laid it out: its views are free."""

    def heads_of(b: Any, x: Any) -> Any:
        return b.reshape(b.permute(x, axes=(0, 2, 1, 3)), shape=(12, 32))

    for training in (False, True):
        module = program(heads_of, t(2, 4, 6, 8))
        if training:
            module.main.metadata["kept"] = []
        PassManager(["select_copies"], Context(generator=TritonBackend()), validate=True).run(
            module
        )
        names = [op.name for op in module.main.ops]
        assert ("kernel" in names) is not training


def test_results_of_libraries_may_lie_in_any_order() -> None:
    def make(b: Any, x: Any, y: Any) -> Any:
        z = b.attention(x, y, y, scale=1.0)
        return b.reshape(b.permute(z, axes=(0, 2, 1, 3)), shape=(2, 6, 32))

    types = (t(2, 4, 6, 8), t(2, 4, 6, 8))
    assert selected(make, *types) == ([], ["attention", "permute", "reshape"])


def test_under_a_fake_mode() -> None:
    """torch.compile calls its backends under one, in which a view that is none fails otherwise."""
    module = program(patches, IMAGE)
    with FakeTensorMode():
        PassManager(["select_copies", "dce"], Context(generator=TritonBackend())).run(module)
    assert [op.name for op in module.main.ops] == ["kernel", "return"]
