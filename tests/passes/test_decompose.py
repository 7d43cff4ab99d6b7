"""decompose without a kernel generator: what torch runs by one call stays whole."""

from __future__ import annotations

import torch

from accel.passes.base import Context
from accel.passes.decompose import Decompose
from tests.passes.helpers import F64, compute, program, run, t


def test_an_op_with_a_form_for_its_operands_stays_whole() -> None:
    """Some ops have a call for some attributes or dtypes only."""

    def make(b, x):
        return b.mean(x, axes=(1,)), b.clamp(x, max=1.0), b.hardsigmoid_backward(x, x)

    module = program(make, t(3, 4))
    Decompose().run(module, Context())
    assert compute(module) == ["mean", "clamp", "hardsigmoid_backward"]


def test_an_op_without_a_form_for_its_operands_is_decomposed() -> None:
    module = program(lambda b, x: b.hardsigmoid_backward(x, x), t(3, 4, dtype=F64))
    inputs = [torch.randn(3, 4, dtype=F64)]
    wanted = run(module, inputs)
    Decompose().run(module, Context())
    made = [op for op in module.main.ops if op.name != "return"]
    assert len(made) > 1 and all(op.name != "hardsigmoid_backward" for op in made)
    assert all(op.made_by == "decompose" for op in made)
    torch.testing.assert_close(run(module, inputs), wanted)
