"""Snapshots tell programs apart, and what may be taken as verified before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from accel.errors import VerifyError
from accel.ir.builder import Builder
from accel.ir.cost import CostMeter, module_cost
from accel.ir.fingerprint import fingerprint
from accel.ir.module import Function, Module, Op, Region, clone_region_into
from accel.ir.snapshot import Snapshot
from accel.ir.types import TensorType
from accel.ir.verify import verify

F32 = torch.float32
SHAPE = TensorType((2, 3), F32)


def program() -> Module:
    """relu(x + x), softmax of it, and a kernel that holds an exp."""
    module = Module()
    function = module.add(Function("main", [SHAPE], ["x"]))
    b = Builder(function.body)
    (x,) = function.args
    y = b.softmax(b.relu(b.add(x, x)), axis=1)
    body = Region([SHAPE])
    inner = Builder(body)
    inner.op("yield", [inner.exp(body.args[0])])
    made = b.op("kernel", [y], {"backend": "tvm", "kind": "pointwise"}, types=[SHAPE],
                regions=[body])  # fmt: skip
    b.op("return", [made.result])
    return module


def find(module: Module, name: str) -> Op:
    return next(op for op in module.walk() if op.name == name)


def swap_op(module: Module) -> None:
    old = find(module, "relu")
    old.replace_with([Builder(before=old).tanh(old.operands[0])])


def swap_inner_op(module: Module) -> None:
    old = find(module, "exp")
    old.replace_with([Builder(before=old).tanh(old.operands[0])])


def set_attribute(module: Module) -> None:
    find(module, "softmax").attributes["axis"] = 0


def retype_attribute(module: Module) -> None:
    find(module, "softmax").attributes["axis"] = True


def retype_result(module: Module) -> None:
    find(module, "relu").result.type = TensorType((2, 3), torch.float64)


def retype_argument(module: Module) -> None:
    module.main.args[0].type = TensorType((2, 4), F32)


def retype_inner_argument(module: Module) -> None:
    find(module, "kernel").regions[0].args[0].type = TensorType((2, 4), F32)


def declare_symbol(module: Module) -> None:
    module.main.metadata["note"] = 1


CHANGES = [
    swap_op, swap_inner_op, set_attribute, retype_attribute, retype_result, retype_argument,
    retype_inner_argument, declare_symbol,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__ for c in CHANGES])
def test_every_change_is_seen(change: Callable[[Module], None]) -> None:
    module = program()
    before = Snapshot(module)
    assert Snapshot(module).same_program(before)
    change(module)
    after = Snapshot(module)
    assert not after.same_program(before)


def test_an_equal_program_built_anew_is_the_same() -> None:
    module = program()
    before, text = Snapshot(module), fingerprint(module)
    old = find(module, "relu")
    old.replace_with([Builder(before=old).relu(old.operands[0])])
    kernel = find(module, "kernel")
    copy = Region([SHAPE])
    clone_region_into(kernel.regions[0], copy, {})
    copy.parent, kernel.regions[0] = kernel, copy
    assert Snapshot(module).same_program(before) and fingerprint(module) == text


def test_settled_ops_are_those_that_stayed() -> None:
    module = program()
    before = Snapshot(module)
    swap_inner_op(module)
    settled = Snapshot(module).settled(before)
    assert sorted(op.name for op in settled) == ["add", "relu", "return", "softmax"]


@pytest.mark.parametrize(
    "change", [retype_result, retype_argument, retype_inner_argument, declare_symbol]
)
def test_nothing_is_settled_where_types_changed_under_ops(change: Callable[[Module], None]) -> None:
    module = program()
    before = Snapshot(module)
    change(module)
    assert not Snapshot(module).settled(before)


@pytest.mark.parametrize(
    "change", [set_attribute, retype_attribute, retype_result, retype_argument,
               retype_inner_argument]
)  # fmt: skip
def test_verifying_with_settled_ops_finds_what_a_full_check_finds(
    change: Callable[[Module], None],
) -> None:
    module = program()
    before = Snapshot(module)
    change(module)
    settled = Snapshot(module).settled(before)
    if change is set_attribute:  # still a valid program
        verify(module)
        verify(module, settled)
        return
    with pytest.raises(VerifyError) as full:
        verify(module)
    with pytest.raises(VerifyError) as quick:
        verify(module, settled)
    assert str(full.value) == str(quick.value)


def test_settled_ops_must_still_come_after_what_they_read() -> None:
    module = program()
    before = Snapshot(module)
    find(module, "softmax").move_before(find(module, "add"))
    settled = Snapshot(module).settled(before)
    assert find(module, "softmax") in settled
    with pytest.raises(VerifyError, match="not defined before its use"):
        verify(module, settled)


def test_the_meter_agrees_with_a_full_count() -> None:
    module = program()
    meter = CostMeter()
    assert meter.measure(module) == module_cost(module)
    for change in (swap_op, swap_inner_op, set_attribute):
        before = Snapshot(module)
        change(module)
        settled = Snapshot(module).settled(before)
        assert meter.measure(module, settled) == module_cost(module)
