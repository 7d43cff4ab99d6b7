"""Rotary embeddings of a prompt: queries go to attention, keys to the update of their cache."""

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
BF16 = torch.bfloat16
LENGTH, SIZE, ROOM = 300, 128, 320
ARGS = (
    t(1, 2, LENGTH, SIZE, dtype=BF16), t(1, 1, LENGTH, SIZE, dtype=BF16),
    t(LENGTH, SIZE, dtype=BF16), t(LENGTH, SIZE, dtype=BF16),
    t(1, 1, ROOM, SIZE, dtype=BF16), t(1, 1, ROOM, SIZE, dtype=BF16),
)  # fmt: skip


def kernels(module: Module, generator: Any = None) -> list[list[str]]:
    """The ops of each kernel made."""
    context = Context(generator=generator or TritonBackend("sm_90"))
    PassManager(["select_cached,select_attention"], context, validate=True).run(module)
    return [
        [o.name for o in op.regions[0].ops if o.name not in ("yield", "full")]
        for op in module.main.ops
        if op.name == "kernel"
    ]


def prompt(
    at: int = 0, ring: bool = False, style: str = "half", early: bool = False, read: bool = False
) -> Callable[..., Any]:
    def build(b: Any, q: Any, k: Any, cos: Any, sin: Any, keys: Any, values: Any) -> Any:
        turned, q = b.rope(k, cos, sin, style="half"), b.rope(q, cos, sin, style=style)
        more = [b.exp(turned)] if early else []
        v = b.neg(b.exp(k)) if early else k
        y = b.attention(q, turned, v, scale=0.1, causal=True)
        start = b.scalar(at, torch.int64)
        one = b.dynamic_update(keys, turned, start, axis=2, ring=ring)
        two = b.dynamic_update(values, v, start, axis=2, ring=ring)
        return (y, one, two, *more, *([q] if read else []))

    return build


UPDATES = ["dynamic_update", "dynamic_update"]


def test_both_are_taken_and_the_prompt_reads_its_keys_from_the_cache() -> None:
    module = program(prompt(), *ARGS)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(a.shape, generator=generator).to(BF16) for a in ARGS]
    before = interpret(module.main, inputs, module.weights)
    assert kernels(module) == [["rope", *UPDATES], ["rope", "slice", "attention"]]
    for got, want in zip(interpret(module.main, inputs, module.weights), before, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (prompt(at=3), [UPDATES, ["rope", "attention"]]),  # where the rows lie is another place
        (prompt(ring=True), [UPDATES, ["rope", "attention"]]),
        (prompt(early=True), [UPDATES, ["rope", "attention"]]),  # read before values are there
        (prompt(style="interleaved"), [["rope", *UPDATES], ["slice", "attention"]]),
        (prompt(read=True), [["rope", *UPDATES], ["slice", "attention"]]),  # somebody reads queries
    ],
    ids=["later", "ring", "early", "interleaved", "read"],
)
def test_near_misses(build: Callable[..., Any], wanted: list[list[str]]) -> None:
    assert kernels(program(build, *ARGS)) == wanted


def test_a_backend_that_turns_nothing_there() -> None:
    made = kernels(program(prompt(), *ARGS), TvmBackend())
    assert all("rope" not in ops for ops in made)
