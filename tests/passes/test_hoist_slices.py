"""hoist_slices: rows that nobody reads are not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel.ir import Builder, Value
from accel.passes.manager import run_pipeline
from tests.passes.helpers import ProgramBuilder, compute, find, program, t


def hoisted(make: Any, *types: Any) -> Any:
    """The program after the pass; the manager compares it with the one before in float64."""
    module = program(make, *types)
    run_pipeline(module, "hoist_slices,cse,dce", validate=True)
    return module


def first(b: Builder, x: Value, axis: int = 1, start: int = 0, stop: int = 1) -> Value:
    made: Value = b.slice(x, axis=axis, start=start, stop=stop)
    return made


def test_a_block_is_computed_of_the_row_that_is_read() -> None:
    def block(b: ProgramBuilder, x: Value) -> Value:
        weight = b.weight(torch.randn(16, 8))
        back = b.weight(torch.randn(8, 16), "v")
        inner = b.linear(b.layer_norm(x, None, None, rank=1, eps=1e-5), weight)
        return first(b, b.add(x, b.linear(b.relu(inner), back)))

    module = hoisted(block, t(2, 6, 8))
    assert compute(module) == ["slice", "layer_norm", "linear", "relu", "linear", "add"]
    assert all(op.result.shape[1] == 1 for op in module.main.ops if len(op.results) == 1
               and len(op.result.shape) == 3)  # fmt: skip
