"""Products of float8 codes that cuBLAS takes, those that stay generated, and the call itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.compiler import gpu
from accel.compiler.lower import _call_inputs
from accel.errors import ArtifactError
from accel.ir import Module, TensorType, interpret
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.passes.registry import load_passes
from accel.runtime.interfaces import Operand
from accel.runtime.libraries import get
from tests.passes.helpers import BF16, F32, program, t

load_passes()
E4M3 = torch.float8_e4m3fn


def codes(*shape: int) -> Tensor:
    return torch.randn(shape).to(E4M3)


def product(
    rows: tuple[int, ...] = (20,),
    columns: int = 32,
    *,
    row: tuple[int, ...] | None = None,
    column: tuple[int, ...] | None = None,
    turned: bool = False,
    bias: torch.dtype | None = None,
    result: torch.dtype | None = BF16,
    twice: bool = False,
) -> tuple[Callable[..., Any], list[TensorType]]:
    """x of codes times a weight of codes, its scales, what follows."""
    row = (*rows, 1) if row is None else row
    column = (columns,) if column is None else column

    def make(b: Any, x: Any, s: Any) -> Any:
        weight = b.cast_to(b.weight(codes(columns, 48)), F32)
        y = b.linear(b.cast_to(x, F32), weight)
        scales = [s, b.weight(torch.rand(column), "scale")]
        for scale in reversed(scales) if turned else scales:
            y = b.mul(y, scale)
        if bias is not None:
            y = b.add(y, b.cast_to(b.weight(torch.randn(columns).to(bias), "bias"), F32))
        made = y if result is None else b.cast_to(y, result)
        return (made, y) if twice else made

    return make, [t(*rows, 48, dtype=E4M3), t(*row)]


def selected(module: Module, arch: str = "sm_90") -> list[str]:
    backend = TritonBackend(arch)
    context = Context(generator=backend, libraries=gpu.libraries(int(arch[3:])))
    PassManager(["select_products", "select_libraries", "dce"], context, validate=True).run(module)
    return [
        str(op.attribute("library" if op.name == "call" else "kind"))
        for op in module.main.ops
        if op.name in ("call", "kernel")
    ]


TAKEN: dict[str, dict[str, Any]] = {
    "rows and columns": {},
    "columns first": {"turned": True},
    "one scale each": {"row": (), "column": ()},
    "one scale each, float16": {"row": (1, 1), "column": (1,), "result": torch.float16},
    "a bias": {"bias": BF16},
    "tokens of a batch": {"rows": (3, 7), "bias": BF16, "column": (1, 1, 32)},
}


@pytest.mark.parametrize("name", TAKEN)
def test_one_call(name: str) -> None:
    torch.manual_seed(0)
    make, types = product(**TAKEN[name])
    module = program(make, *types)
    x, scale = codes(*map(int, types[0].shape)), torch.rand([int(d) for d in types[1].shape])
    (want,) = interpret(module.main, [x, scale], module.weights, oracle=True)
    assert selected(module) == ["torch.scaled_mm"]
    (call,) = (op for op in module.main.ops if op.name == "call")
    assert [v.dtype for v in call.operands].count(E4M3) == 2
    given = {module.main.args[0]: x, module.main.args[1]: scale}
    tensors = []
    for value in _call_inputs(call):
        if value is not None and value not in given:
            assert value.op is not None and value.op.name == "constant"
            given[value] = module.weights.tensor(str(value.op.attribute("name")))
        tensors.append(None if value is None else given[value])
    operands = [None if x is None else Operand(x.dtype, tuple(x.shape), None) for x in tensors]
    run = get("torch.scaled_mm").prepare(dict(call.attribute("options")), operands)
    got = run(*(x for x in tensors if x is not None))
    assert got.dtype == call.result.dtype and got.shape == want.shape
    assert float((got.double() - want).norm() / want.norm()) < 4e-3


LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "few rows": ({"rows": (2,)}, "sm_90"),
    "an older GPU": ({}, "sm_80"),
    "columns that fill no 16": ({"columns": 24}, "sm_90"),
    "a number for rows": ({"row": ()}, "sm_90"),
    "rows in float16": ({"result": torch.float16}, "sm_90"),
    "a result of float32": ({"result": None}, "sm_90"),
    "a bias of another type": ({"bias": torch.float16}, "sm_90"),
    "sums that are read": ({"twice": True}, "sm_90"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_the_call_does_not_take_is_generated(name: str) -> None:
    choices, arch = LEFT[name]
    make, types = product(**choices)
    made = selected(program(make, *types), arch)
    assert len(made) == 1 and made[0] in ("gemv", "skinny", "matmul")


def test_products_of_one_input_share_its_codes() -> None:
    def make(b: Any, x: Any, s: Any) -> Any:
        wide, made = b.cast_to(x, F32), []
        for number in range(2):
            weight = b.cast_to(b.weight(codes(32, 48), f"w{number}"), F32)
            y = b.mul(b.linear(wide, weight), s)
            made.append(b.cast_to(b.mul(y, b.weight(torch.rand(32), f"s{number}")), BF16))
        return made

    module = program(make, t(20, 48, dtype=E4M3), t(20, 1))
    assert selected(module) == ["torch.scaled_mm"] * 2
    assert all(op.name in ("call", "constant", "return") for op in module.main.ops)


def test_damaged_calls_are_refused() -> None:
    entry = get("torch.scaled_mm")
    good = [Operand(E4M3, (20, 48), None), Operand(E4M3, (32, 48), None), None,
            Operand(F32, (20, 1), None), Operand(F32, (32,), None)]  # fmt: skip
    with pytest.raises(ArtifactError):
        entry.prepare({"first": "row", "dtype": "bfloat16"}, good[:3])
    with pytest.raises(ArtifactError):
        entry.prepare({"first": "none", "dtype": "bfloat16"}, good)
    with pytest.raises(ArtifactError):
        entry.prepare({"first": "row", "dtype": "int8"}, good)
    with pytest.raises(ArtifactError):
        entry.prepare(
            {"first": "row", "dtype": "bfloat16"}, [Operand(F32, (20, 48), None), *good[1:]]
        )
