"""IR text: print -> parse -> print is the identity, and a stock MLIR parser reads the dumps."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_mlir import ir as mlir

from accel.ir import (
    Builder,
    Function,
    Location,
    Module,
    Region,
    SymbolInfo,
    TensorType,
    parse_module,
    print_module,
    symbol,
    verify,
)
from accel.ir.expr import parse_expr
from accel.ir.printer import format_attribute
from accel.ir.types import DTYPE_NAMES
from tests.ir.random_program import random_program
from tests.ir.samples import DEFAULT_SIZES, REGISTRY, Sample, op_samples

F32 = torch.float32
LARGE = [HealthCheck.too_slow, HealthCheck.data_too_large]
SLOW = settings(max_examples=60, deadline=None, suppress_health_check=LARGE)


def same_after_parsing(module: Module, *, locations: bool = True) -> str:
    """The text, which parses to a program that prints the same and is valid."""
    text = print_module(module, locations=locations)
    back = parse_module(text)
    assert print_module(back, locations=locations) == text
    return text


def mlir_reads(text: str) -> bool:
    with mlir.Context() as context:
        context.allow_unregistered_dialects = True
        module = mlir.Module.parse(text)
        return bool(module.operation.verify())


def module_of(samples: list[Sample]) -> Module:
    """@main with all samples, each on arguments of its own."""
    module = Module()
    function = module.add(Function("main"))
    function.symbols = {name: SymbolInfo(0) for name in DEFAULT_SIZES}
    b = Builder(function.body)
    results = []
    for sample in samples:
        operands = [None if o is None else function.body.add_arg(o.type) for o in sample.operands]
        results.extend(b.op(sample.op, operands, sample.attributes).results)
    b.op("return", results)
    return module


def every_sample(name: str) -> list[Sample]:
    dtypes = sorted(REGISTRY[name].dtypes, key=str)
    dtype = F32 if F32 in dtypes else dtypes[0]
    made = [s for d in dtypes for s in op_samples(name, d)]
    return made + op_samples(name, dtype, None)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_definition_is_read_back_and_read_by_mlir(name: str) -> None:
    text = same_after_parsing(module_of(every_sample(name)))
    assert mlir_reads(text)


# -- odd values ----------------------------------------------------------------------------------

doubles = st.one_of(
    st.floats(),
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, 5e-324, -2.2250738585072014e-308, 1e16, 1e-7]),
    st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]),
)
text = st.one_of(
    st.text(max_size=12),
    st.sampled_from(['"', "\\", "\n", "%x", "\x00", "é", "\ud800", '\\22"', "//", "loc(", ""]),
)
exprs = st.recursive(
    st.sampled_from([symbol("n"), symbol("m") ** 2, symbol("n") + 3, symbol("long_name") - 1]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] + p[1]),
        st.tuples(inner, st.integers(-4, 9)).map(lambda p: p[0] * p[1] + 1),
        st.tuples(inner, inner).map(lambda p: p[0] * p[1]),
        st.tuples(inner, st.integers(2, 5)).map(lambda p: sympy.floor(p[0] / p[1])),
        st.tuples(inner, st.integers(2, 5)).map(lambda p: sympy.Mod(p[0], p[1])),
        st.tuples(inner, inner).map(lambda p: sympy.Max(p[0], p[1])),
    ),
    max_leaves=5,
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    doubles,
    st.builds(complex, doubles, doubles),
    text,
    st.sampled_from(list(DTYPE_NAMES)),
    exprs.map(lambda e: int(e) if sympy.sympify(e).is_Integer else e),
)
attributes = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)
places = st.builds(Location, text, st.integers(0, 10**6), text)


def same_value(a: Any, b: Any) -> bool:
    """Equal and of one kind, NaN and the sign of 0 included."""
    if type(a) is not type(b):
        return isinstance(a, sympy.Basic) and isinstance(b, sympy.Basic) and a == b
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, complex):
        return repr(a) == repr(b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same_value, a, b))
    return bool(a == b)


@st.composite
def modules(draw: st.DrawFn) -> Module:
    """Odd names, strings, numbers, locations, kernels in kernels, and ops of all families."""
    names = draw(st.lists(st.sampled_from(sorted(REGISTRY)), max_size=5))
    samples = []
    for name in names:
        dtype = draw(st.sampled_from(sorted(REGISTRY[name].dtypes, key=str)))
        known = op_samples(name, dtype, draw(st.sampled_from([DEFAULT_SIZES, None])))
        samples.append(draw(st.sampled_from(known)))
    module = module_of(samples)
    module.metadata = draw(st.dictionaries(text, json_values, max_size=2))
    function = module.main
    function.metadata = draw(st.dictionaries(text, json_values, max_size=2))
    function.symbols["m"] = SymbolInfo(draw(st.integers(0, 3)), draw(st.none() | st.just(2**40)))
    for op in function.ops:
        op.location = draw(st.none() | places)
        op.made_by = draw(st.sampled_from(["", "fuse", "a pass", 'q"uote']))
        for value in op.results:
            value.name = draw(st.just("") | st.sampled_from(["x", "x_0", "x_0_0", "7", "é"]) | text)
    b = Builder(before=function.body.last)
    values = function.args[:2]
    region = Region([v.type for v in values], ["x", "x"])
    inner = Builder(region)
    nested = Region([v.type for v in region.args])
    Builder(nested).op("yield", nested.args)
    options = {"backend": draw(text), "kind": draw(text), "options": draw(attributes)}
    types = [v.type for v in values]
    made = inner.op("kernel", region.args, options, types=types, regions=[nested])
    inner.op("yield", made.results)
    b.op("call", values, {"library": draw(text), "options": draw(attributes)}, types=types,
         regions=[region])  # fmt: skip
    rest = draw(st.lists(attributes, max_size=3))
    b.op(
        "aten", values[:1], {"name": draw(text), "args": tuple(rest)}, types=types[:1]
    ) if values else None
    if draw(st.booleans()):
        module.add(Function("f" + draw(text)))
        Builder(list(module.functions.values())[-1].body).op("return", [])
    return module


@SLOW
@given(modules())
def test_random_modules_are_read_back(module: Module) -> None:
    verify(module)
    text = print_module(module, locations=True)
    back = parse_module(text)
    assert print_module(back, locations=True) == text
    assert back.metadata == module.metadata and list(back.functions) == list(module.functions)
    for name, function in module.functions.items():
        other = back.functions[name]
        assert (other.symbols, other.donates, other.metadata) == (
            function.symbols, function.donates, function.metadata,
        )  # fmt: skip
        for a, b in zip(function.walk(), other.walk(), strict=True):
            assert a.definition is b.definition and a.segments == b.segments
            assert list(a.attributes) == list(b.attributes)
            assert all(same_value(v, b.attributes[k]) for k, v in a.attributes.items())
            assert [v.type for v in a.results] == [v.type for v in b.results]
            assert (a.location, a.made_by) == (b.location, b.made_by)


@SLOW
@given(modules())
def test_mlir_reads_random_modules(module: Module) -> None:
    assert mlir_reads(print_module(module, locations=True))


@settings(max_examples=300, deadline=None)
@given(attributes)
def test_attributes_are_read_back(value: Any) -> None:
    function = Function("main")
    attributes = {"name": "aten::x", "args": (value,)}
    b = Builder(function.body)
    b.op("aten", [], attributes, types=[])
    b.op("return", [])
    module = Module({"main": function})
    back = parse_module(print_module(module), check=False)
    assert same_value(next(back.main.ops).attributes["args"], (value,))


@settings(max_examples=200, deadline=None)
@given(exprs)
def test_expressions_are_read_back(expr: sympy.Expr) -> None:
    assert parse_expr(str(expr)) == expr


def test_names_stay_as_they_were_printed() -> None:
    """A number is put behind a name that is taken, and reading it back changes nothing."""
    function = Function("main", [TensorType((2,), F32)], ["x"])
    b = Builder(function.body)
    value = function.args[0]
    for name in ("x", "x_0", "x", "", "3", "x", "x_0_0", "", "a b", "a_b", "$", "_", "9x", ".y"):
        value = b.neg(value)
        value.name = name
    b.op("return", [value])
    text = same_after_parsing(Module({"main": function}))
    names = [line.split()[0] for line in text.splitlines() if "accel.neg" in line]
    assert len(set(names)) == 14


def test_integers_that_do_not_fit_are_refused() -> None:
    assert format_attribute(2**64 - 1).endswith(": ui64")
    with pytest.raises(Exception, match="does not fit 64 bits"):
        format_attribute(2**64)


def test_random_programs_are_read_by_mlir() -> None:
    for seed in range(10):
        assert mlir_reads(print_module(random_program(seed, symbolic=True).module))


def test_a_module_by_hand() -> None:
    """Bare functions, other value names, comments, attributes left out."""
    module = parse_module("""
        // softmax over rows
        "accel.func"() ({
        ^bb0(%rows: tensor<?x8xf32>):
          %p = "accel.softmax"(%rows) {axis = 1, accel.dims = [#accel.expr<"n">]}
            : (tensor<?x8xf32>) -> tensor<?x8xf32>
          "accel.return"(%p) : (tensor<?x8xf32>) -> ()
        }) {
          sym_name = "main", symbols = [["n", 2, -1]], accel.dims = [#accel.expr<"n">]
        } : () -> ()
    """)
    assert module.main.symbols["n"] == SymbolInfo(2, None)
    assert module.main.results[0].shape == (symbol("n"), 8)
