"""select_products: linears of few rows become kernels, with their decoding and epilogue."""

from __future__ import annotations

from collections.abc import Callable
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


def selected(module: Module, generator: Any = None) -> list[list[str]]:
    """The ops of each kernel made."""
    context = Context(generator=generator or TvmBackend())
    PassManager(["select_products"], context, validate=True).run(module)
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


# -- what rides along where the generator takes it -------------------------------------------


def gated(b: Any, x: Any, w: Any, low: int = 16, act: str = "silu") -> Any:
    y = b.linear(b.rms_norm(x, b.weight(torch.randn(8), "g"), eps=1e-5), w)
    gate = b.slice(y, axis=1, start=0, stop=low)
    return b.mul(getattr(b, act)(gate), b.slice(y, axis=1, start=low, stop=low + 16))


def test_norm_and_halves_ride_along_on_gpus() -> None:
    module = program(lambda b, x: gated(b, x, b.weight(torch.randn(32, 8))), t(2, 8))
    inputs = [torch.randn(2, 8)]
    (before,) = interpret(module.main, inputs, module.weights)
    ops = ["rms_norm", "linear", "slice", "silu", "slice", "mul"]
    assert selected(module, TritonBackend()) == [ops]
    (after,) = interpret(module.main, inputs, module.weights)
    assert torch.equal(before, after)


def test_only_what_the_generator_takes_rides_along() -> None:
    module = program(lambda b, x: gated(b, x, b.weight(torch.randn(32, 8))), t(1, 8))
    assert selected(module) == [["linear"]]


def thirds(b: Any, x: Any) -> Any:
    """Two slices of one size that are no halves."""
    y = b.linear(x, b.weight(torch.randn(24, 8)))
    return b.mul(b.slice(y, axis=1, start=0, stop=8), b.slice(y, axis=1, start=8, stop=16))


def normed_for_others(b: Any, x: Any) -> Any:
    """The norm has a reader that is no product, so it is computed anyway."""
    y = b.rms_norm(x, b.weight(torch.randn(8), "g"), eps=1e-5)
    return b.linear(y, plain(b)), b.exp(y)


def apart(b: Any, x: Any) -> Any:
    """The halves meet in different ops."""
    y = b.linear(x, b.weight(torch.randn(32, 8)))
    return b.silu(b.slice(y, axis=1, start=0, stop=16)), b.exp(
        b.slice(y, axis=1, start=16, stop=32)
    )


@pytest.mark.parametrize("build", [thirds, normed_for_others, apart])
def test_near_misses_of_neighbours(build: Callable[..., Any]) -> None:
    assert selected(program(build, t(1, 8)), TritonBackend()) == [["linear"]]


def scaled(b: Any, x: Any, s: Any, *, others: bool = False) -> Any:
    y = b.mul(s, x)
    made = b.linear(y, b.weight(torch.randn(40, 120).half()))
    return (made, b.relu(y)) if others else made


def test_what_scales_channels_rides_along_with_a_product_of_many_rows() -> None:
    """Squeeze-excite: one factor for each image and channel, before a product of its pixels."""
    image, factors = t(64, 28, 28, 120, dtype=torch.float16), t(64, 1, 1, 120, dtype=torch.float16)
    assert selected(program(scaled, image, factors), TritonBackend()) == [["mul", "linear"]]
    many = t(64, 28, 28, 120, dtype=torch.float16)  # a factor for each element
    assert selected(program(scaled, image, many), TritonBackend()) == []
    twice = program(lambda b, x, s: scaled(b, x, s, others=True), image, factors)
    assert selected(twice, TritonBackend()) == []


class TakesAll(TritonBackend):
    """Leaves no product to a library."""

    def product_kind(self, op: Any, members: Any) -> tuple[str, str | None]:
        return super().product_kind(op, members)[0], None


def attention_of(b: Any, x: Any, cos: Any, sin: Any, *, late: bool = False) -> Any:
    """Four heads of queries, two of keys and of values; `late`: other cosines for the keys."""
    y = b.linear(x, b.weight(torch.randn(128, 64).bfloat16()))

    def heads(start: int, stop: int) -> Any:
        part = b.slice(y, axis=2, start=start, stop=stop)
        split = b.reshape(part, shape=(2, 96, (stop - start) // 16, 16))
        return b.permute(split, axes=(0, 2, 1, 3))

    q = b.rope(heads(0, 64), cos, sin)
    k = b.rope(heads(64, 96), b.neg(cos) if late else cos, sin)
    return q, k, heads(96, 128)


ROTATED = [t(2, 96, 64, dtype=torch.bfloat16), *[t(1, 96, 16, dtype=torch.bfloat16)] * 2]


def test_a_projection_takes_the_rotary_embedding_of_its_heads() -> None:
    module = program(attention_of, *ROTATED)
    inputs = [torch.randn(*a.shape).bfloat16() for a in ROTATED]
    before = interpret(module.main, inputs, module.weights)
    (ops,) = selected(module, TakesAll("sm_90"))
    assert ops.count("rope") == 1 and ops[0] == "linear" and ops[-1] == "cat"
    assert all(op.name != "rope" for op in module.main.ops)
    for one, other in zip(before, interpret(module.main, inputs, module.weights), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_projection_keeps_away_what_is_turned_otherwise(arch: str) -> None:
    module = program(lambda b, *a: attention_of(b, *a, late=True), *ROTATED)
    assert selected(module, TakesAll(arch)) == [["linear"]]
