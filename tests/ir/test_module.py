"""Modules: def-use chains, lists of ops that change while walked, clones, builders."""

from __future__ import annotations

import pytest
import torch

from accel.errors import TypeInferenceError, VerifyError
from accel.ir import (
    Builder,
    Function,
    Location,
    Module,
    Op,
    TensorType,
    Trait,
    definition,
    definitions,
    print_module,
    symbol,
    verify,
)
from accel.ir.module import clone_function, constant_name
from tests.ir.random_program import random_program

F32 = torch.float32
X = TensorType((2, 3), F32)


def program() -> tuple[Function, Builder]:
    function = Function("main", [X], ["x"])
    return function, Builder(function.body)


def test_uses_follow_operands() -> None:
    function, b = program()
    (x,) = function.args
    y = b.add(x, x)
    z = b.neg(x)
    assert x.users == [y.op, z.op] and len(x.uses) == 3
    assert y.single_user is None and x.single_user is None
    x.replace_all_uses(z)
    assert not x.uses and set(z.users) == {y.op, z.op}


def test_ops_with_users_are_not_erased() -> None:
    function, b = program()
    y = b.neg(function.args[0])
    z = b.exp(y)
    assert y.op is not None and z.op is not None
    with pytest.raises(VerifyError, match="still has users"):
        y.op.erase()
    z.op.erase()
    y.op.erase()
    assert function.body.size == 0 and not function.args[0].uses


def test_replacing_keeps_names_and_users() -> None:
    function, b = program()
    y = b.neg(function.args[0])
    y.name = "y"
    b.op("return", [y])
    other = Builder(before=y.op).abs(function.args[0])
    assert y.op is not None
    y.op.replace_with([other])
    assert function.results == (other,) and other.name == "y"
    verify(Module({"main": function}))


def test_the_list_may_change_while_it_is_walked() -> None:
    function, b = program()
    value = function.args[0]
    for _ in range(6):
        value = b.neg(value)
    b.op("return", [value])
    seen = []
    for op in function.ops:
        seen.append(op.name)
        if op.name == "neg":
            op.replace_with([Builder(before=op).abs(op.operands[0])])
    assert seen == ["neg"] * 6 + ["return"]
    assert [op.name for op in function.ops] == ["abs"] * 6 + ["return"]
    verify(Module({"main": function}))


def test_clones_are_equal_and_apart() -> None:
    for seed in range(6):
        module = random_program(seed, symbolic=True).module
        before = print_module(module)
        copy = module.clone()
        assert print_module(copy) == before
        verify(copy)
        for op in list(copy.main.body.reversed_ops()):
            op.erase()
        assert print_module(module) == before
        verify(module)


def test_a_clone_keeps_what_surrounds_the_ops() -> None:
    function, b = program()
    function.donates = {0: 0}
    function.metadata = {"names": ["x"]}
    b.op("return", [b.neg(function.args[0])])
    copy = clone_function(function, "other")
    assert (copy.name, copy.donates, copy.metadata) == ("other", {0: 0}, {"names": ["x"]})
    copy.donates.clear()
    assert function.donates


def test_the_builder_stamps_places_and_infers() -> None:
    function, _ = program()
    b = Builder(function.body, location=Location("m.py", 3, "layer"), made_by="fuse")
    y = b.softmax(function.args[0], axis=-1)
    op = y.op
    assert op is not None
    assert (str(op.location), op.made_by, y.type) == ("m.py:3 (layer)", "fuse", X)
    with pytest.raises(TypeInferenceError) as error:
        b.softmax(y, axis=5)
    assert error.value.where == "m.py:3 (layer)"
    with pytest.raises(AttributeError, match=r"no op accel\.softmaxx"):
        b.softmaxx(y)
    with pytest.raises(TypeInferenceError, match="no attribute 'dim'"):
        b.softmax(y, dim=1)
    with pytest.raises(TypeInferenceError, match="needs explicit result types"):
        b.op("constant", (), {"name": "w"})


def test_optional_and_variadic_operands() -> None:
    function, b = program()
    (x,) = function.args
    row = b.full(value=1.0, dtype=F32, shape=(3,))
    only_bias = b.layer_norm(x, None, row, rank=1, eps=1e-5)
    op = only_bias.op
    assert op is not None and op.segments == (1, 0, 1)
    assert op.arguments() == [x, None, row] and op.operand("bias") is row
    assert op.operand("weight") is None and op.attribute("eps") == 1e-5
    cat = b.cat(x, x, x, axis=0)
    assert cat.op is not None and cat.op.segments is None and cat.shape == (6, 3)
    with pytest.raises(TypeInferenceError, match="takes 1 operands, got 2"):
        b.neg(x, x)


def test_builder_helpers() -> None:
    function, b = program()
    (x,) = function.args
    assert b.cast_to(x, F32) is x and b.reshape_to(x, (2, 3)) is x and b.widen(x) is x
    half = b.cast_to(x, torch.float16)
    assert half.dtype == torch.float16 and b.widen(half).dtype == F32
    assert b.scalar(2, torch.bool).op.attributes["value"] is True  # type: ignore[union-attr]
    assert b.scalar(2, F32).op.attributes["value"] == 2.0  # type: ignore[union-attr]
    size = b.size_like(symbol("n"), F32)
    assert size.dtype == F32 and size.op is not None and size.op.name == "cast"
    b.constant("layer.w", X)
    assert constant_name(b.constant("layer.w", X)) == "layer.w" and constant_name(x) is None


def test_traits_are_consistent() -> None:
    for d in definitions():
        assert bool(d.decompose) == d.has(Trait.COMPOSITE), d.name
        if d.has(Trait.RANDOM):
            assert not d.has(Trait.PURE), d.name
        if d.has(Trait.ELEMENTWISE | Trait.VIEW | Trait.REDUCTION | Trait.CONTRACTION):
            assert d.has(Trait.PURE), d.name
        if d.has(Trait.COMMUTATIVE):
            assert len(d.operands) == 2, d.name
        if d.has(Trait.OPAQUE):
            assert d.infer is None, d.name


def test_an_aten_call_of_an_op_names_values() -> None:
    function, b = program()
    (x,) = function.args
    y = b.layer_norm(x, rank=1, eps=1e-5)
    assert isinstance(y.op, Op)
    call = y.op.aten_call()
    assert call is not None and call.overload == "aten::layer_norm"
    assert call.args == [x, [3], None, None, 1e-5]
    assert definition("layer_norm").aten is not None
    assert definition("max_pool").aten is None and len(definition("max_pool").calls) == 3
