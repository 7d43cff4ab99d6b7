"""Each rule of the verifier, broken once by hand; the error names the rule and the place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch

from accel.errors import TypeInferenceError, VerifyError
from accel.ir import (
    Builder,
    Function,
    Location,
    Module,
    Op,
    Region,
    SymbolInfo,
    TensorType,
    Value,
    definition,
    symbol,
    verify,
)

F32 = torch.float32
N = symbol("n")


def sized(*shape: object, dtype: torch.dtype = F32) -> TensorType:
    return TensorType(shape, dtype)  # type: ignore[arg-type]


def valid() -> Module:
    """A program that uses what the verifier looks at: weights, symbols, donation, a kernel."""
    module = Module()
    module.weights.add("w", torch.ones(4))
    function = module.add(Function("main", [sized(N, 4), sized(N, 4)], ["x", "cache"]))
    function.symbols["n"] = SymbolInfo(2, 64)
    function.donates[1] = 1
    b = Builder(function.body, location=Location("model.py", 7))
    x, cache = function.args
    y = b.add(b.mul(x, b.constant("w", sized(4))), cache)
    region = Region([y.type])
    inner = Builder(region)
    inner.op("yield", [inner.exp(inner.neg(region.args[0]))])
    attributes = {"backend": "none", "kind": "pointwise"}
    kernel = b.op("kernel", [y], attributes, types=[y.type], regions=[region])
    soft = b.softmax(kernel.result, axis=1)
    b.op("return", [b.amax(soft, axes=(1,)), y])
    return module


def op(module: Module, name: str) -> Op:
    return next(o for o in module.walk() if o.name == name)


def region(module: Module) -> Region:
    return op(module, "kernel").regions[0]


def unlinked_terminator(m: Module) -> None:
    op(m, "return").erase()


def early_terminator(m: Module) -> None:
    op(m, "return").move_before(op(m, "softmax"))
    Builder(m.main.body).op("return", [])


def foreign_operand(m: Module) -> None:
    op(m, "softmax").set_operand(0, valid().main.args[0])


def operand_of_a_region(m: Module) -> None:
    inner = next(o for o in region(m).ops if o.name == "neg")
    inner.set_operand(0, m.main.args[0])


def use_before_definition(m: Module) -> None:
    op(m, "softmax").move_before(op(m, "kernel"))


def lost_use(m: Module) -> None:
    user = op(m, "softmax")
    user.operands[0].uses.clear()


def stale_use(m: Module) -> None:
    Builder(Region()).neg(m.main.args[0])


def wrong_result_shape(m: Module) -> None:
    op(m, "softmax").results[0].type = sized(N, 5)


def wrong_result_dtype(m: Module) -> None:
    op(m, "softmax").results[0].type = sized(N, 4, dtype=torch.float16)


def too_many_results(m: Module) -> None:
    o = op(m, "softmax")
    o.results.append(Value(o.result.type, o, 1))


def result_of_another_op(m: Module) -> None:
    op(m, "softmax").results[0].owner = op(m, "amax")


def argument_of_another_region(m: Module) -> None:
    m.main.args[0].index = 3


def unknown_attribute(m: Module) -> None:
    op(m, "softmax").attributes["colour"] = 1


def missing_attribute(m: Module) -> None:
    del op(m, "softmax").attributes["axis"]


def attribute_of_another_kind(m: Module) -> None:
    op(m, "softmax").attributes["axis"] = 1.5


def attribute_out_of_range(m: Module) -> None:
    op(m, "softmax").attributes["axis"] = 2


def operands_that_do_not_fit(m: Module) -> None:
    o = op(m, "mul")
    o.set_operand(1, Builder(before=o).full(value=1.0, dtype=torch.float64))


def wrong_segments(m: Module) -> None:
    o = op(m, "softmax")
    o.segments = (2,)


def region_of_a_plain_op(m: Module) -> None:
    o = op(m, "softmax")
    extra = Region()
    extra.parent = o
    o.regions.append(extra)


def kernel_without_a_region(m: Module) -> None:
    op(m, "kernel").regions.clear()


def region_argument_type(m: Module) -> None:
    region(m).args[0].type = sized(N, 3)


def region_result_type(m: Module) -> None:
    op(m, "kernel").results[0].type = sized(N, 3)


def region_without_yield(m: Module) -> None:
    op(m, "yield").erase()


def region_that_returns(m: Module) -> None:
    end = op(m, "yield")
    Builder(region(m)).op("return", end.operands)
    end.erase()


def region_parent(m: Module) -> None:
    region(m).parent = op(m, "softmax")


def kernel_attribute(m: Module) -> None:
    op(m, "kernel").attributes["kind"] = 3


def undeclared_symbol_in_an_argument(m: Module) -> None:
    m.main.body.add_arg(sized(symbol("other")))


def undeclared_symbol_in_a_result(m: Module) -> None:
    b = Builder(before=op(m, "return"))
    b.iota(shape=(symbol("other"),), axis=0, dtype=torch.int64)


def negative_size(m: Module) -> None:
    m.main.body.add_arg(sized(-1))


def size_that_is_none(m: Module) -> None:
    m.main.body.add_arg(sized(2.5))


def dtype_that_is_none(m: Module) -> None:
    m.main.body.add_arg(sized(2, dtype="float32"))  # type: ignore[arg-type]


def missing_weight(m: Module) -> None:
    op(m, "constant").attributes["name"] = "other"


def weight_of_another_type(m: Module) -> None:
    m.weights.remove("w")
    m.weights.add("w", torch.ones(4, dtype=torch.float64))


def symbolic_constant(m: Module) -> None:
    op(m, "constant").results[0].type = sized(N)


def donation_out_of_range(m: Module) -> None:
    m.main.donates[5] = 0


def donation_of_another_type(m: Module) -> None:
    m.main.donates[0] = 0


def donation_twice(m: Module) -> None:
    m.main.donates = {1: 1}
    end = op(m, "return")
    end.set_operands([*end.operands, end.operands[1]])
    m.main.donates[2] = 1


def symbol_without_values(m: Module) -> None:
    m.main.symbols["n"] = SymbolInfo(9, 3)


def symbol_name(m: Module) -> None:
    m.main.symbols["n m"] = SymbolInfo()


def filed_name(m: Module) -> None:
    m.main.name = "other"


def body_parent(m: Module) -> None:
    m.main.body.parent = None


def broken_links(m: Module) -> None:
    op(m, "softmax").prev = None


def wrong_count(m: Module) -> None:
    m.main.body.size += 1


RULES: list[tuple[Callable[[Module], None], str]] = [
    (unlinked_terminator, r"must end with accel\.return"),
    (early_terminator, "terminator in the middle"),
    (foreign_operand, r"operand 0 .* not defined before its use"),
    (operand_of_a_region, r"operand 0 \(%x\) is not defined before its use"),
    (use_before_definition, "not defined before its use"),
    (lost_use, "operand 0 does not list this op as a user"),
    (stale_use, r"%x lists a user, accel\.neg"),
    (wrong_result_shape, "with sizes n, 5, inferred .* with sizes n, 4"),
    (wrong_result_dtype, r"tensor<\?x4xf16> .*, inferred tensor<\?x4xf32>"),
    (too_many_results, "2 results, inferred 1"),
    (result_of_another_op, "result 0 does not belong"),
    (argument_of_another_region, "argument 0 does not belong"),
    (unknown_attribute, "no attribute 'colour'"),
    (missing_attribute, "needs the attribute 'axis'"),
    (attribute_of_another_kind, r"axis = 1\.5 is not int"),
    (attribute_out_of_range, "axis 2 is out of range"),
    (operands_that_do_not_fit, "operands have dtypes"),
    (wrong_segments, "operand_segments"),
    (region_of_a_plain_op, "takes no regions"),
    (kernel_without_a_region, "0 regions where 1 belongs"),
    (region_argument_type, "region arguments do not match"),
    (region_result_type, "region results do not match"),
    (region_without_yield, r"must end with accel\.yield"),
    (region_that_returns, r"must end with accel\.yield"),
    (region_parent, "region's parent is not the op"),
    (kernel_attribute, "kind = 3 is not str"),
    (undeclared_symbol_in_an_argument, "no symbol 'other'"),
    (undeclared_symbol_in_a_result, "no symbol 'other'"),
    (negative_size, "negative size"),
    (size_that_is_none, r"2\.5 is no size"),
    (dtype_that_is_none, "'float32' is not a dtype"),
    (missing_weight, "no weight named 'other'"),
    (weight_of_another_type, "weight 'w' is tensor<4xf64>"),
    (symbolic_constant, "constant of symbolic type"),
    (donation_out_of_range, r"\{5: 0\} is out of range"),
    (donation_of_another_type, "types differ"),
    (donation_twice, "gives one argument away twice"),
    (symbol_without_values, "symbol n has no values"),
    (symbol_name, "'n m' is no name"),
    (filed_name, "filed under 'main'"),
    (body_parent, "body's parent is not the function"),
    (broken_links, "links do not agree"),
    (wrong_count, "links 7"),
]


def test_the_program_is_valid() -> None:
    verify(valid())


@pytest.mark.parametrize(("break_it", "message"), RULES, ids=[f.__name__ for f, _ in RULES])
def test_a_broken_rule_is_found(break_it: Callable[[Module], None], message: str) -> None:
    module = valid()
    break_it(module)
    with pytest.raises(VerifyError, match=message):
        verify(module)


def test_errors_say_where() -> None:
    module = valid()
    attribute_out_of_range(module)
    with pytest.raises(TypeInferenceError) as error:
        verify(module)
    assert error.value.where == "@main: accel.softmax at model.py:7"


def test_equal_sizes_written_differently_are_equal() -> None:
    module = valid()
    function = module.main
    b = Builder(before=op(module, "return"))
    grown = b.cat(function.args[0], function.args[0], axis=0)
    grown.type = sized(sympy.Add(N, N, evaluate=False), 4)
    verify(module)


def test_remembered_types_tell_apart_what_python_calls_equal() -> None:
    """`axis = True` equals `axis = 1` and hashes alike; only one of them is an int."""
    d = definition("softmax")
    types = [sized(3, 4)]
    assert d.infer_types(types, {"axis": 1}) == (sized(3, 4),)
    for wrong in (True, 1.0):
        with pytest.raises(TypeInferenceError, match="is not int"):
            d.infer_types(types, {"axis": wrong})
    with pytest.raises(TypeInferenceError, match="unhashable"):
        definition("permute").infer_types(types, {"axes": [1, 0]})  # type: ignore[dict-item]


def test_infer_never_raises_an_untyped_error() -> None:
    """Whatever `infer` did not expect becomes a TypeInferenceError."""
    types = [sized(), sized(dtype=torch.int64)]
    with pytest.raises(TypeInferenceError, match="do not fit: IndexError"):
        definition("embedding_backward").infer_types(types, {"rows": 3})
