"""select_batched: products of computed tensors become kernels where that saves something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend
from accel.backends.tvm import TvmBackend
from accel.ir import interpret, symbol
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.passes.registry import load_passes
from tests.passes.helpers import BF16, F32, program, t

load_passes()
SIZES = (t(2, 3, 8, 16, dtype=BF16), t(2, 3, 16, 12, dtype=BF16))


def selected(
    make: Callable[..., Any], *types: Any, generator: Any = None
) -> tuple[list[list[str]], list[str], list[str]]:
    """The ops of each kernel made, what stays outside, and the reasons why."""
    module = program(make, *types)
    inputs = [torch.randn([d if isinstance(d, int) else 4 for d in a.shape]).to(a.dtype)
              for a in types]  # fmt: skip
    before = interpret(module.main, inputs, module.weights)
    misses: list[str] = []
    context = Context(
        generator=generator or TritonBackend(), on_miss=lambda rule, op, why: misses.append(why)
    )
    PassManager(["select_batched", "dce"], context, validate=True).run(module)
    after = interpret(module.main, inputs, module.weights)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    kernels = [op for op in module.main.ops if op.name == "kernel"]
    inside = [[o.name for o in op.regions[0].ops if o.name != "yield"] for op in kernels]
    outside = [op.name for op in module.main.ops if op.name not in ("return", "kernel", "full")]
    return inside, outside, misses


def test_epilogue_operands_views_and_turned_results_ride_along() -> None:
    def make(b: Any, q: Any, k: Any, bias: Any) -> Any:
        y = b.matmul(q, b.permute(k, axes=(0, 1, 3, 2)))
        y = b.add(b.mul(y, b.scalar(0.5, BF16)), bias)
        return b.reshape(b.permute(y, axes=(0, 2, 1, 3)), shape=(2, 8, 3 * 12))

    types = (SIZES[0], t(2, 3, 12, 16, dtype=BF16), t(12, dtype=BF16))
    made, outside, _ = selected(make, *types)
    assert made == [["permute", "matmul", "full", "mul", "add", "permute"]]
    assert outside == ["reshape"]


def test_a_second_reader_keeps_what_follows_outside() -> None:
    def make(b: Any, x: Any, y: Any) -> Any:
        z = b.relu(b.matmul(x, y))
        return b.permute(z, axes=(0, 2, 1, 3)), b.exp(z)

    made, outside, _ = selected(make, *SIZES)
    assert made == [["matmul", "relu"]] and outside == ["permute", "exp"]


def test_sizes_may_be_unknown() -> None:
    n = symbol("n")
    types = (t(n, 8, 16, dtype=BF16), t(n, 16, 12, dtype=BF16))
    made, _, _ = selected(lambda b, x, y: b.silu(b.matmul(x, y)), *types)
    assert made == [["matmul", "silu"]]


@pytest.mark.parametrize(
    ("make", "types", "reason"),
    [
        (lambda b, x, y: b.matmul(x, y), SIZES, "an epilogue that saves no launch"),
        (
            lambda b, x, y: b.relu(b.matmul(x, y)),
            (t(2, 8, 16), t(2, 16, 12)),
            "float32 in full precision",
        ),
        (
            lambda b, x, y: b.relu(b.matmul(x, y)),
            (t(2, 1, 16, dtype=BF16), t(2, 16, 12, dtype=BF16)),
            "a product of one row or column",
        ),
    ],
)
def test_what_stays_with_the_library(make: Any, types: Any, reason: str) -> None:
    assert selected(make, *types) == ([], ["matmul", *_rest(make)], [reason])


def _rest(make: Callable[..., Any]) -> list[str]:
    module = program(make, t(2, 8, 16, dtype=F32), t(2, 16, 12, dtype=F32))
    return [op.name for op in module.main.ops if op.name not in ("return", "matmul")]


def test_backends_without_such_kernels_keep_the_op() -> None:
    made, outside, _ = selected(
        lambda b, x, y: b.relu(b.matmul(x, y)), *SIZES, generator=TvmBackend()
    )
    assert made == [] and outside == ["matmul", "relu"]
