"""The interpreter: program dtypes, the float64 oracle, sizes, sub-byte values, and memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from accel.errors import InterpretError
from accel.ir import (
    Builder,
    Function,
    Op,
    Region,
    SymbolInfo,
    TensorType,
    Value,
    WeightStore,
    definition,
    interpret,
    symbol,
)
from accel.ir.interpret import bind_symbols
from accel.ir.types import Dim

F32, F16, F64, I64 = torch.float32, torch.float16, torch.float64, torch.int64


def program(*types: TensorType) -> tuple[Function, Builder]:
    function = Function("main", types)
    return function, Builder(function.body)


def sized(*shape: Dim, dtype: torch.dtype = F32) -> TensorType:
    return TensorType(shape, dtype)


def test_program_dtypes_round_and_the_oracle_does_not() -> None:
    function, b = program(sized(1, dtype=F16))
    x = function.args[0]
    big = b.mul(x, b.scalar(2048.0, F16))
    b.op("return", [b.sub(b.add(big, b.scalar(1.0, F16)), big)])
    inputs = [torch.ones(1, dtype=F16)]
    assert interpret(function, inputs)[0].item() == 0.0
    (exact,) = interpret(function, inputs, oracle=True)
    assert (exact.item(), exact.dtype) == (1.0, F64)


def test_the_oracle_keeps_integers_bool_and_rounding_to_eight_bits() -> None:
    function, b = program(sized(3))
    x = function.args[0]
    b.op("return", [
        b.cast(x, dtype=torch.int32),
        b.gt(x, b.scalar(0.0, F32)),
        b.cast(b.cast(x, dtype=torch.float8_e4m3fn), dtype=F32),
        b.cast(b.cast(x, dtype=F16), dtype=F32),
    ])  # fmt: skip
    x = torch.tensor([1.7, -0.3, 0.1])
    ints, signs, eights, halves = interpret(function, [x], oracle=True)
    assert ints.dtype == torch.int32 and signs.dtype == torch.bool
    assert torch.equal(eights, x.to(torch.float8_e4m3fn).double())  # storage formats do round
    assert torch.equal(halves, x.double())


def test_the_oracle_reads_bits_in_the_program_dtype() -> None:
    function, b = program(sized(2))
    bits = b.bitcast(function.args[0], dtype=torch.int32)
    b.op("return", [bits, b.bitcast(bits, dtype=F32)])
    x = torch.tensor([1.0, -2.5])
    bits_, back = interpret(function, [x], oracle=True)
    assert torch.equal(bits_, x.view(torch.int32)) and torch.equal(back, x.double())


def fallback(b: Builder, name: str, type: TensorType, x: Value, *more: object) -> Op:
    """accel.aten of one tensor and literals."""
    attributes = {"name": name, "args": (("operand", 0), *more)}
    return b.op("aten", [x], attributes, types=[type])


def test_the_oracle_runs_a_fallback_in_float64_where_it_can() -> None:
    function, b = program(sized(3))
    b.op("return", fallback(b, "aten::special_i0", sized(3), function.args[0]).results)
    x = torch.rand(3)
    (made,) = interpret(function, [x], oracle=True)
    assert torch.equal(made, torch.special.i0(x.double()))


def test_the_oracle_runs_a_fallback_without_a_float64_kernel_in_its_dtype() -> None:
    types = [sized(4, 32), TensorType((16, 32), torch.int8), sized(16)]
    function, b = program(*types)
    attributes = {
        "name": "aten::_weight_int8pack_mm",
        "args": (("operand", 0), ("operand", 1), ("operand", 2)),
    }
    b.op("return", b.op("aten", function.args, attributes, types=[sized(4, 16)]).results)
    weight = torch.randint(-8, 8, (16, 32), dtype=torch.int8)
    inputs = [torch.rand(4, 32), weight, torch.rand(16)]
    with pytest.raises(RuntimeError):
        torch.ops.aten._weight_int8pack_mm(inputs[0].double(), weight, inputs[2].double())
    (wide,), (made,) = interpret(function, inputs, oracle=True), interpret(function, inputs)
    assert wide.dtype == F64 and torch.equal(wide.float(), made)


def test_a_fallback_reaches_registered_operators_only() -> None:
    wrong = ("aten::add.Nope", "nope::add", "load_library::__call__.__call__", "aten", "os::x",
             "aten::__class__", "aten::add.__class__", "aten::add.Tensor.x")  # fmt: skip
    for name in wrong:
        function, b = program(sized(3))
        b.op("return", fallback(b, name, sized(3), function.args[0]).results)
        with pytest.raises(InterpretError, match="no operator"):
            interpret(function, [torch.rand(3)])


def test_symbols_are_bound_by_shapes_and_expressions() -> None:
    n, m = symbol("n"), symbol("m")
    function, _ = program(sized(n, 2 * n + 1), sized(m * n))
    assert bind_symbols(function, [(3, 7), (12,)]) == {"n": 3, "m": 4}
    only, _ = program(sized(2 * n + 1))
    assert bind_symbols(only, [(7,)]) == {"n": 3}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(3, 8), (12,)], r"size 8 where 2\*n \+ 1 \(= 7\)"),
        ([(3,), (12,)], "rank 1"),
        ([(3, 7), (13,)], "no m makes"),
        ([(100, 201), (400,)], r"n = 100 is outside of 2..64"),
    ],
)
def test_shapes_that_contradict_the_type(shapes: list[tuple[int, ...]], message: str) -> None:
    n, m = symbol("n"), symbol("m")
    function, _ = program(sized(n, 2 * n + 1), sized(m * n))
    function.symbols = {"n": SymbolInfo(2, 64), "m": SymbolInfo(1)}
    with pytest.raises(InterpretError, match=message):
        bind_symbols(function, shapes)


def test_one_symbol_for_two_axes() -> None:
    n = symbol("n")
    function, _ = program(sized(n), sized(n, 3))
    with pytest.raises(InterpretError, match=r"argument 1 has size 5 where n \(= 4\)"):
        bind_symbols(function, [(4,), (5, 3)])
    with pytest.raises(InterpretError, match=r"size 4 where 3"):
        bind_symbols(function, [(4,), (4, 4)])


def test_sizes_in_attributes_need_values() -> None:
    n = symbol("n")
    function, b = program(sized(3))
    b.op("return", [b.size(value=n)])
    with pytest.raises(InterpretError, match="no integer for the size n"):
        interpret(function, [torch.rand(3)])
    half, b = program(sized(n))
    b.op("return", [b.size(value=n / 2)])
    assert interpret(half, [torch.rand(4)])[0].item() == 2
    with pytest.raises(InterpretError, match="no integer for the size n/2"):
        interpret(half, [torch.rand(3)])


def test_inputs_are_checked() -> None:
    function, b = program(sized(3), TensorType((2,), torch.uint4))
    b.op("return", function.args)
    x, q = torch.rand(3), torch.tensor([1, 15], dtype=torch.uint8)
    assert torch.equal(interpret(function, [x, q])[1], q)
    with pytest.raises(InterpretError, match="takes 2 inputs, got 1"):
        interpret(function, [x])
    with pytest.raises(InterpretError, match=r"argument 0 is torch\.float64"):
        interpret(function, [x.double(), q])
    assert interpret(function, [x.double(), q], oracle=True)[0].dtype == F64
    with pytest.raises(InterpretError, match=r"argument 1 is torch\.int64"):
        interpret(function, [x, q.long()])


def test_inputs_and_weights_are_not_written() -> None:
    weights = WeightStore()
    weights.add("w", torch.zeros(4))
    function, b = program(sized(4), sized(2), sized(dtype=I64))
    cache, new, at = function.args
    w = b.constant("w", sized(4))
    b.op("return", [b.dynamic_update(cache, new, at, axis=0), b.add(w, cache)])
    inputs = [torch.zeros(4), torch.ones(2), torch.tensor(1)]
    made = interpret(function, inputs, weights)
    assert made[0].tolist() == [0, 1, 1, 0]
    assert not inputs[0].any() and not weights.tensor("w").any()


def test_sub_byte_weights_are_unpacked_values() -> None:
    weights = WeightStore()
    values = torch.tensor([[-8, 7, 3], [0, -1, 5]], dtype=torch.int8)
    weights.add_sub_byte("q", values, torch.int4)
    function, b = program()
    q = b.constant("q", TensorType((2, 3), torch.int4))
    b.op("return", [q, b.dequantize(q, b.scalar(0.5, F32))])
    same, wide = interpret(function, [], weights)
    assert torch.equal(same, values) and torch.equal(wide, values * 0.5)


def test_an_op_that_fails_names_itself() -> None:
    function, b = program(TensorType((2, 3), F32), sized(2, dtype=I64))
    b.op("return", [b.embedding(*function.args)])
    with pytest.raises(InterpretError, match=r"accel\.embedding failed"):
        interpret(function, [torch.rand(2, 3), torch.tensor([0, 9])])


def test_results_must_have_the_declared_type() -> None:
    function, b = program(sized(3))
    op = fallback(b, "aten::neg", sized(4), function.args[0])
    b.op("return", op.results)
    with pytest.raises(InterpretError, match=r"made torch.float32 \[3\], declared tensor<4xf32>"):
        interpret(function, [torch.rand(3)])
    op.results[0].type = sized(3, dtype=F16)
    with pytest.raises(InterpretError, match="declared tensor<3xf16>"):
        interpret(function, [torch.rand(3)])


def test_kernels_run_their_region() -> None:
    function, b = program(sized(3))
    region = Region([sized(3)])
    inner = Builder(region)
    inner.op("yield", [inner.mul(region.args[0], inner.scalar(3.0, F32))])
    attributes = {"backend": "none", "kind": "pointwise"}
    made = b.op("kernel", function.args, attributes, types=[sized(3)], regions=[region])
    b.op("return", made.results)
    seen: list[str] = []
    x = torch.rand(3)
    (y,) = interpret(function, [x], observe=lambda op, _: seen.append(op.name))
    assert torch.equal(y, x * 3)
    assert seen == ["full", "mul", "kernel"]


def test_values_die_at_their_last_use() -> None:
    function, b = program(sized(64), sized(64))
    value = b.add(*function.args)
    dead = b.neg(value)
    for _ in range(4):
        value = b.exp(value)
    b.op("return", [value])
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def observe(op: Op, results: object) -> None:
        alive.append(sum(r() is not None for r in made))
        made.extend(weakref.ref(r) for r in results)  # type: ignore[attr-defined]

    inputs = [torch.zeros(64), torch.ones(64)]
    interpret(function, inputs, observe=observe)
    assert dead.op is not None and definition("neg") is dead.op.definition
    # add; neg beside it (it dies at once, unused); then each exp beside the one before.
    assert alive == [0, 1, 1, 1, 1, 1]
