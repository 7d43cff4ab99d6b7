"""select_products: linears of few rows become kernels, with their decoding and epilogue."""

from __future__ import annotations

from collections.abc import Callable
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
    PassManager(["select_products"], Context(generator=TvmBackend()), validate=True).run(module)
    return [
        [o.name for o in op.regions[0].ops if o.name != "yield"]
        for op in module.main.ops
        if op.name == "kernel"
    ]


def quantized(b: Any) -> Any:
    q = b.weight(torch.randint(-127, 128, (16, 8)).to(torch.int8), "q")
    return b.dequantize(q, b.weight(torch.rand(16, 1), "s"), axis=1)


def plain(b: Any) -> Any:
    return b.weight(torch.randn(16, 8))


def with_epilogue(b: Any, x: Any, other: Any) -> Any:
    return b.add(b.silu(b.linear(x, quantized(b))), other)


def test_a_compressed_linear_takes_its_decoding_and_epilogue() -> None:
    module = program(with_epilogue, t(2, 8), t(2, 16))
    inputs = [torch.randn(2, 8), torch.randn(2, 16)]
    (before,) = interpret(module.main, inputs, module.weights)
    assert selected(module) == [["dequantize", "linear", "silu", "add"]]
    (after,) = interpret(module.main, inputs, module.weights)
    assert torch.equal(before, after)


def test_one_row_of_a_plain_weight_is_taken_with_its_bias() -> None:
    module = program(lambda b, x: b.linear(x, plain(b), b.weight(torch.randn(16), "c")), t(1, 8))
    assert selected(module) == [["linear"]]


def reused(b: Any, x: Any) -> Any:
    """The product has a second user, so its activation stays outside."""
    y = b.linear(x, quantized(b))
    return b.relu(y), b.exp(y)


def broadcast(b: Any, x: Any, other: Any) -> Any:
    """The sum has another shape than the product."""
    return b.add(b.linear(x, quantized(b)), other)


def tied(b: Any, x: Any, i: Any) -> Any:
    """A decoded table that a lookup uses too is decoded twice, not shared."""
    table = quantized(b)
    return b.linear(x, table), b.embedding(table, i)


def test_what_stays_outside() -> None:
    assert selected(program(reused, t(1, 8))) == [["dequantize", "linear"]]
    assert selected(program(broadcast, t(1, 8), t(3, 16))) == [["dequantize", "linear"]]
    module = program(tied, t(1, 8), t(3, dtype=torch.int64))
    assert selected(module) == [["dequantize", "linear"]]
    assert [op.name for op in module.main.ops].count("dequantize") == 1


@pytest.mark.parametrize(
    ("build", "types"),
    [
        (lambda b, x: b.linear(x, quantized(b)), [t(9, 8)]),
        (lambda b, x: b.linear(x, plain(b)), [t(2, 8)]),
        (lambda b, x, w: b.linear(x, w), [t(1, 8), t(16, 8)]),
        (lambda b, x: b.linear(x, b.exp(plain(b))), [t(1, 8)]),
    ],
    ids=["many rows", "plain weight", "live weight", "computed weight"],
)
def test_near_misses(build: Callable[..., Any], types: list[Any]) -> None:
    misses: list[str] = []
    module = program(build, *types)
    context = Context(generator=TvmBackend(), on_miss=lambda rule, op, why: misses.append(why))
    PassManager(["select_products"], context, validate=True).run(module)
    assert all(op.name != "kernel" for op in module.main.ops)
    assert len(misses) == 1
