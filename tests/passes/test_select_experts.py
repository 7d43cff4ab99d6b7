"""select_experts: products of experts become kernels, with what is around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend
from accel.backends.tvm import TvmBackend
from accel.ir import Module, interpret
from accel.ir.op import Trait
from accel.passes.base import Context
from accel.passes.manager import PassManager, run_pipeline
from accel.passes.registry import load_passes
from tests.backends.test_triton_experts import down, gate_up
from tests.passes.helpers import BF16, F64, I64, program, t

load_passes()


def selected(module: Module, generator: Any = None) -> tuple[list[list[str]], list[str]]:
    """The ops of each kernel made, and the reasons why not."""
    misses: list[str] = []
    context = Context(
        generator=generator or TritonBackend(), on_miss=lambda rule, op, why: misses.append(why)
    )
    PassManager(["select_experts", "dce"], context, validate=True).run(module)
    made = [
        [o.name for o in op.regions[0].ops if o.name != "yield"]
        for op in module.main.ops
        if op.name == "kernel"
    ]
    return made, misses


def mixture(b: Any, x: Any, e: Any, scale: Any) -> Any:
    up = b.weight(torch.randn(4, 12, 8).to(BF16), "up")
    hidden = gate_up(b, x, up, e)
    rows = b.reshape(e, shape=(hidden.shape[0],))
    return down(b, hidden, b.weight(torch.randn(4, 8, 6).to(BF16), "down"), rows, scale)


TYPES = (t(5, 8, dtype=BF16), t(5, 2, dtype=I64), t(10, dtype=BF16))


def test_a_mixture_is_two_kernels_and_copies_no_tokens() -> None:
    module = program(mixture, *TYPES)
    inputs = [torch.randn(5, 8).to(BF16), torch.randint(0, 4, (5, 2)), torch.rand(10).to(BF16)]
    (before,) = interpret(module.main, inputs, module.weights)
    made, misses = selected(module)
    assert not misses
    assert made == [
        ["reshape", "broadcast_to", "reshape", "reshape", "expert_linear", "slice", "silu",
         "slice", "mul"],
        ["reshape", "expert_linear", "mul"],
    ]  # fmt: skip
    rest = [op for op in module.main.ops if not op.has(Trait.TERMINATOR | Trait.CONSTANT)]
    assert {op.name for op in rest} <= {"kernel", "reshape", "constant"}
    (after,) = interpret(module.main, inputs, module.weights)
    assert torch.equal(before, after)


def test_encoded_weights_are_decoded_inside() -> None:
    def make(b: Any, x: Any, e: Any) -> Any:
        codes = b.weight(torch.randint(-127, 128, (4, 12, 8)).to(torch.int8), "q")
        scale = b.weight(torch.rand(4, 12, 1).to(BF16), "s")
        return b.expert_linear(x, b.dequantize(codes, scale, axis=2, group=8), e)

    made, _ = selected(program(make, t(5, 8, dtype=BF16), t(5, dtype=I64)))
    assert made == [["dequantize", "expert_linear"]]


@pytest.mark.parametrize("options", ["bits=8", "bits=4,group=2", "format=fp8"])
def test_quantized_experts_are_read_as_codes(options: str) -> None:
    module = program(mixture, *TYPES)
    inputs = [torch.randn(5, 8).to(BF16), torch.randint(0, 4, (5, 2)), torch.rand(10).to(BF16)]
    (want,) = interpret(module.main, inputs, module.weights, oracle=True)
    run_pipeline(module, f"quantize{{{options},bound=1}},canonicalize,cse,dce",
                 Context())  # fmt: skip
    made, misses = selected(module)
    assert not misses and [kernel.count("dequantize") for kernel in made] == [1, 1]
    assert not [op for op in module.main.ops if op.name == "dequantize"]
    (got,) = interpret(module.main, inputs, module.weights)
    assert 0 < float((got.double() - want).norm() / want.norm()) < 0.3


def test_what_stays() -> None:
    def make(b: Any, x: Any, w: Any, e: Any) -> Any:
        return b.expert_linear(x, w, e)

    wide = (t(5, 8, dtype=F64), t(4, 12, 8, dtype=F64), t(5, dtype=I64))
    assert selected(program(make, *wide)) == ([], ["a product of torch.float64"])
    assert selected(program(mixture, *TYPES), TvmBackend())[0] == []
