"""What ops and kernels cost: a kernel moves what crosses its border, and of that what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from accel.ir import Builder, Function, Module, TensorType, Value
from accel.ir.cost import CostMeter, module_cost, op_cost
from accel.ir.module import Op
from accel.passes.outline import finish_outline, outline

Build = Callable[..., Value]
KIB = 1024


def t(*shape: int, dtype: torch.dtype = torch.float32) -> TensorType:
    return TensorType(shape, dtype)


def module_of(types: Sequence[TensorType], build: Build) -> Module:
    module = Module()
    function = module.add(Function("main", types))
    b = Builder(function.body)
    b.op("return", [build(b, *function.args)])
    return module


def kernel(module: Module) -> Op:
    """All ops of the function as one kernel."""
    ops = [op for op in module.main.ops if op.results]
    made = outline(ops, "kernel", {"backend": "none", "kind": "pointwise"}, "test")
    module.main.body.insert_before(made, ops[-1])
    finish_outline(made, ops)
    return made


def slices(b: Builder, x: Value) -> Value:
    left = b.slice(x, axis=1, start=0, stop=64, step=1)
    return b.mul(left, b.relu(b.slice(x, axis=1, start=64, stop=128, step=1)))


CASES: dict[str, tuple[list[TensorType], Build, int]] = {
    # name: arguments, region, KiB that the kernel moves
    "a chain": ([t(256, 4)], lambda b, x: b.exp(b.relu(x)), 8),
    "an argument read twice": ([t(256)], lambda b, x: b.mul(b.relu(x), b.exp(x)), 2),
    "half of an argument": (
        [t(16, 128)],
        lambda b, x: b.relu(b.slice(x, axis=1, start=0, stop=64, step=1)),
        8,
    ),
    "both halves": ([t(16, 128)], slices, 12),
    "rows of a table": (
        [t(1 << 16, 256), t(8, dtype=torch.int64)],
        lambda b, table, i: b.relu(b.embedding(table, i)),
        16,
    ),
    "a broadcast": (
        [t(256), t(4, 256)],
        lambda b, x, y: b.add(b.broadcast_to(b.reshape(x, shape=(1, 256)), shape=(4, 256)), y),
        9,
    ),
    "the update of a cache": (
        [t(1024, 256), t(4, 256), t(dtype=torch.int64)],
        lambda b, x, y, at: b.dynamic_update(x, b.relu(y), at, axis=0),
        8,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_moves_what_its_region_reads(name: str) -> None:
    types, build, kib = CASES[name]
    module = module_of(types, build)
    plain = module_cost(module).bytes
    made = kernel(module)
    small = sum(8 for a in types if a.dtype == torch.int64 and not a.shape)
    small += sum(64 for a in types if a.dtype == torch.int64 and a.shape)
    assert op_cost(made).bytes == kib * KIB + small
    assert module_cost(module).bytes <= plain  # fusing adds no traffic
    assert CostMeter().measure(module).bytes == module_cost(module).bytes
