"""Kernels that follow one another run as one call: same results, same errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import accel
from accel.errors import ExecutionError
from tests.passes.causal_models import tiny

pytest.importorskip("tvm")


def test_a_decoding_step_is_few_calls_and_computes_the_same():
    pytest.importorskip("transformers")
    model = accel.compile_generator(tiny("llama"), capacity=32)
    loop = model.generator.loop
    function = model.entry_points["decode"].function
    ids, tokens = torch.tensor([[5, 6, 7]]), torch.tensor([9])
    results = []
    with torch.no_grad():
        for _ in range(3):  # the first call runs step by step
            _, state = loop.prefill(ids, loop.empty(1))
            results.append(loop.decode(tokens, torch.tensor(3), state)[0])
        bound = function._lanes[-1].current
        assert len(bound._merged) < len(bound._runs) // 4
        assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
        with pytest.raises(ExecutionError, match="out of range") as caught:
            loop.decode(tokens, torch.tensor(32), loop.empty(1))
        assert caught.value.where.startswith("accel_")


class Chain(nn.Module):
    """Kernels, and between them an operation that torch runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.softmax(x.sin(), -1).cumsum(-1)
        return torch.sort(x.cos(), dim=-1).values.softmax(-1).cumsum(0)


def test_other_steps_come_between():
    model = Chain().eval()
    fast = accel.compile(model, inputs=(torch.randn(8, 8),))
    for _ in range(3):
        x = torch.randn(8, 8)
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
        strided = torch.randn(8, 16)[:, ::2]
        torch.testing.assert_close(fast(strided), model(strided), atol=1e-5, rtol=1e-5)
