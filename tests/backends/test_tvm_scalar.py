"""Every elementwise op that the generator claims, on every dtype, against the definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir import Function, TensorType, definitions, interpret
from accel.ir.capability import KernelGenerator
from accel.ir.module import Value
from accel.ir.op import OpDefinition, Trait
from tests.backends.kernels import BACKEND, Runner, function_of, reference

# An op's name, the dtype of its operands, its attributes, a function of it, inputs.
Claim = tuple[str, torch.dtype, dict[str, Any], Function, list[Tensor]]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
DTYPES = (*FLOATS, *INTEGERS, torch.bool)

# Ops with attributes that have no default, or that need more than one set of them.
ATTRIBUTES: dict[str, list[dict[str, Any]]] = {
    "cast": [{"dtype": d} for d in DTYPES],
    "bitcast": [],
    "clamp": [{"min": -1, "max": 2}, {"min": 0}, {"max": 1}],
    "hardtanh_backward": [{"min": -1.0, "max": 1.0}],
    "gelu": [{"approximate": "none"}, {"approximate": "tanh"}],
}
# Composites and differences cancel: there the error is a few units of the largest term, which is
# the operand (or 1).
RELATIVE_TO_OPERAND = {
    "gelu", "silu", "mish", "log_sigmoid", "elu", "softplus", "hardswish", "remainder", "fmod",
    "erfc", "lgamma", "atan2",
}  # fmt: skip
ULPS = 4.0


def samples(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Special values, then random ones of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(200, generator=generator) < 0.5
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        special = torch.tensor([info.min, info.max, 0, 1, 2, 7], dtype=dtype)
        low, high = max(info.min, -(2**40)), min(info.max, 2**40)
        wide = torch.randint(low, high, (150,), generator=generator).to(dtype)
        return torch.cat([special, wide, torch.randint(0, 9, (44,), generator=generator).to(dtype)])
    info = torch.finfo(dtype)
    specials = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, info.tiny, -info.tiny,
                info.tiny / 4, info.max, info.min, 0.5, 1.5, 2.5, -2.5, math.pi]  # fmt: skip
    normal = torch.randn(300, generator=generator, dtype=torch.float64)
    powers = torch.exp2(torch.randint(-20, 12, (300,), generator=generator).double())
    return torch.cat([torch.tensor(specials, dtype=torch.float64), normal, normal * powers]).to(
        dtype
    )


def operands(op: OpDefinition, dtype: torch.dtype) -> list[Tensor]:
    count = len(op.operands)
    first = samples(dtype)
    made = [first]
    for i in range(1, count):
        other = samples(dtype, seed=i)
        made.append(other[torch.randperm(len(other), generator=torch.Generator().manual_seed(i))])
    if op.name == "where":
        made[0] = torch.arange(len(first)) % 3 == 0
    return made


def cases() -> Iterator[tuple[str, torch.dtype, dict[str, Any]]]:
    for op in definitions():
        if not op.has(Trait.ELEMENTWISE) or op.name in ("bitcast",):
            continue
        for attributes in ATTRIBUTES.get(op.name, [{}]):
            for dtype in DTYPES:
                yield op.name, dtype, attributes


def claimed(backend: KernelGenerator) -> list[Claim]:
    """Cases that the definition allows and the generator takes."""
    by_name = {d.name: d for d in definitions()}
    found = []
    for name, dtype, attributes in cases():
        definition = by_name[name]
        inputs = operands(definition, dtype)
        if dtype in INTEGERS and name in ("clamp",) and dtype == torch.uint8:
            attributes = {k: max(v, 0) for k, v in attributes.items()}
        types = [TensorType(tuple(t.shape), t.dtype) for t in inputs]

        def build(b: Any, *values: Value, name: str = name, kw: Any = attributes) -> Value:
            return getattr(b, name)(*values, **kw)

        try:
            function = function_of(types, build)
        except TypeInferenceError:
            continue
        op = next(iter(function.ops))
        if backend.supports(op) is None:
            found.append((name, dtype, attributes, function, inputs))
    return found


CASES = claimed(BACKEND)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner([c[3] for c in CASES])


def unit(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a dtype, at each float64 value."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.abs().clamp(info.tiny, info.max))
    return torch.exp2((exponent - 1).double()) * info.eps


def test_most_ops_are_claimed() -> None:
    claimed_names = {c[0] for c in CASES}
    everything = {d.name for d in definitions() if d.has(Trait.ELEMENTWISE)} - {"bitcast"}
    assert everything - claimed_names <= {"erfinv", "digamma", "rope"}


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{c[0]}-{c[1]}-{i}" for i, c in enumerate(CASES)]
)
def test_elementwise(runner: Runner, number: int) -> None:
    check_elementwise(CASES[number], lambda inputs: runner(number, inputs))


def check_elementwise(
    case: Claim, run: Callable[[list[Tensor]], list[Tensor]], ulps: float = ULPS
) -> None:
    """Runs one case and compares it with the float64 oracle and with torch itself."""
    name, dtype, attributes, function, inputs = case
    if name == "cast" and dtype.is_floating_point:
        target = attributes["dtype"]
        if not (target.is_floating_point or target == torch.bool):
            inputs = [_in_range(inputs[0], target)]
    (got,) = run(inputs)
    (same_dtype,) = reference(function, inputs)
    assert got.dtype == same_dtype.dtype and got.shape == same_dtype.shape
    if not got.dtype.is_floating_point:
        _assert_equal(name, got, same_dtype, inputs)
        return
    (exact,) = interpret(function, [_widened(t) for t in inputs], oracle=True)
    wanted = exact.double()
    limit = wanted.to(got.dtype).double()  # infinite where the result does not fit
    scale = wanted.abs()
    if name.endswith("_backward"):
        scale = inputs[0].double().abs() * inputs[1].double().square().clamp(min=1.0)
    if name in RELATIVE_TO_OPERAND:
        for t in inputs:
            scale = torch.maximum(scale, t.double().abs().nan_to_num(0, 0, 0))
        scale = scale.clamp(min=1.0)
    error = (got.double() - wanted).abs()
    allowed = ulps * unit(scale.nan_to_num(0.0, 0.0, 0.0), got.dtype)
    good = (error <= allowed) | (got.double() == limit) | (got.isnan() & wanted.isnan())
    # Where torch itself, in this dtype, says the same, overflow inside of a composite is shared.
    good |= (got == same_dtype) | (got.isnan() & same_dtype.isnan())
    if dtype == torch.float64 and name in ("fmod", "remainder"):
        good |= (inputs[0] / inputs[1]).abs() > 2.0**52  # torch's vectorized code gives NaN there
    if dtype == torch.float64 and name.endswith("_backward"):
        good |= inputs[0].abs() >= torch.finfo(dtype).max  # the definition itself overflows
    if dtype in (torch.float16, torch.bfloat16):
        good |= (got.double() - same_dtype.double()).abs() <= allowed
    assert bool(good.all()), _failures(name, good, inputs, got, wanted, same_dtype)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype.is_floating_point else tensor


def _in_range(x: Tensor, target: torch.dtype) -> Tensor:
    """Values that the integer dtype holds: elsewhere C leaves the result open."""
    info = torch.iinfo(target)
    wide = x.double()
    low, high = float(info.min), min(float(info.max), 2.0**62)
    inside = torch.isfinite(x) & (wide > low - 0.5) & (wide < high)
    return torch.where(inside, x, torch.zeros_like(x))


def _assert_equal(name: str, got: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    good = got == wanted
    assert bool(good.all()), _failures(name, good, inputs, got, wanted, wanted)


def _failures(
    name: str, good: Tensor, inputs: list[Tensor], got: Tensor, wanted: Tensor, same: Tensor
) -> str:
    bad = (~good).nonzero().reshape(-1)[:6]
    rows = [
        f"{name}({', '.join(str(t[i].item()) for t in inputs)}) = {got[i].item()!r}, "
        f"exactly {wanted[i].item()!r}, torch {same[i].item()!r}"
        for i in bad.tolist()
    ]
    return f"{int((~good).sum())} of {good.numel()} differ:\n" + "\n".join(rows)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", ["floor_div", "trunc_div", "remainder", "fmod"])
@pytest.mark.parametrize("divisor", [3, -3, 7, 1, -1, 64])
def test_integer_division_by_constants(name: str, divisor: int, dtype: torch.dtype) -> None:
    if dtype == torch.uint8:
        divisor = abs(divisor)
    x = samples(dtype)
    if divisor == -1 and name in ("floor_div", "trunc_div"):
        x = x[x != torch.iinfo(dtype).min]  # torch's own result traps or wraps there

    def build(b: Any, v: Value) -> Value:
        return getattr(b, name)(v, b.scalar(divisor, dtype))

    function = function_of([TensorType(tuple(x.shape), dtype)], build)
    (got,) = Runner([function])(0, [x])
    (wanted,) = reference(function, [x])
    _assert_equal(f"{name} {divisor}", got, wanted, [x])


def test_integer_division_by_unknown_or_zero_is_refused() -> None:
    vector = TensorType((4,), torch.int64)
    run_time = function_of([vector, vector], lambda b, x, y: b.floor_div(x, y))
    reason = BACKEND.supports(next(iter(run_time.ops)))
    assert reason is not None and "run-time" in reason
    zero = function_of([vector], lambda b, x: b.remainder(x, b.scalar(0, torch.int64)))
    reasons = [BACKEND.supports(op) for op in zero.ops if op.name == "remainder"]
    assert reasons[0] is not None and "zero" in reasons[0]
