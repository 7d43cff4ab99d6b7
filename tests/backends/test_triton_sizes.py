"""Positions are 32-bit numbers where the function's limits on its sizes allow it."""

from __future__ import annotations

import pytest
import torch

from accel.backends.triton import TritonBackend
from accel.backends.triton.backend import kernel_fingerprint
from accel.compiler.kernel_jobs import module_of
from accel.ir import Builder, Function, Op, TensorType
from accel.ir.module import SymbolInfo
from accel.ir.types import symbol
from tests.backends.kernels import kernel_of

LENGTH = symbol("length")


def bounded(limit: int | None, width: int = 128) -> Op:
    """A kernel over [length, width] in a function whose length has this limit."""
    function = Function("main", [TensorType((LENGTH, width), torch.float32)])
    b = Builder(function.body)
    b.op("return", [b.relu(function.args[0])])
    kernel = kernel_of(function)
    outer = Function("outer", [a.type for a in function.args])
    outer.symbols = {"length": SymbolInfo(1, limit)}
    kernel.set_operand(0, outer.args[0])
    outer.body.append(kernel)
    Builder(outer.body).op("return", list(kernel.results))
    return kernel


@pytest.mark.parametrize(
    ("limit", "width", "kind"),
    [(4096, 128, "i32"), (None, 128, "i64"), (1 << 24, 128, "i64"), (1 << 23, 128, "i32")],
)
def test_type_of_sizes(limit: int | None, width: int, kind: str) -> None:
    _, made = TritonBackend().generate([bounded(limit, width)])
    (code,) = made.values()
    assert [launch.signature["length_"] for launch in code.launches] == [kind]


def test_limits_are_part_of_what_makes_kernels_equal() -> None:
    prints = {kernel_fingerprint(bounded(limit)) for limit in (4096, 1 << 24, None)}
    assert len(prints) == 3


def test_a_kernel_by_itself_keeps_its_limits() -> None:
    kernel = bounded(4096)
    (copy,) = (op for op in module_of(kernel).main.ops if op.name == "kernel")
    assert kernel_fingerprint(copy) == kernel_fingerprint(kernel)
