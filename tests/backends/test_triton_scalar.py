"""Every elementwise op that the Triton generator claims, on every dtype, and its definition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from accel.ir import TensorType, definitions, interpret
from accel.ir.op import Trait
from tests.backends.kernels import function_of
from tests.backends.test_tvm_scalar import (
    _assert_equal,
    check_elementwise,
    claimed,
    reference,
    samples,
)
from tests.backends.triton_kernels import BACKEND, InterpretedKernels
from tests.backends.triton_worker import Worker

CASES = claimed(BACKEND)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


@pytest.fixture(scope="module")
def kernels(worker: Worker) -> InterpretedKernels:
    return InterpretedKernels([c[3] for c in CASES], worker)


def test_most_ops_are_claimed() -> None:
    claimed_names = {c[0] for c in CASES}
    everything = {d.name for d in definitions() if d.has(Trait.ELEMENTWISE)} - {"bitcast"}
    assert everything - claimed_names <= {"digamma", "rope"}


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{c[0]}-{c[1]}-{i}" for i, c in enumerate(CASES)]
)
def test_elementwise(kernels: InterpretedKernels, number: int) -> None:
    check_elementwise(CASES[number], lambda inputs: kernels(number, inputs))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", ["floor_div", "trunc_div", "remainder", "fmod"])
@pytest.mark.parametrize("divisor", [3, -3, 1, -1])
def test_integer_division(worker: Worker, name: str, divisor: int, dtype: torch.dtype) -> None:
    if dtype == torch.uint8:
        divisor = abs(divisor)
    x = samples(dtype)
    if divisor == -1 and name in ("floor_div", "trunc_div"):
        x = x[x != torch.iinfo(dtype).min]
    function = function_of(
        [TensorType(tuple(x.shape), dtype)],
        lambda b, v: getattr(b, name)(v, b.scalar(divisor, dtype)),
    )
    (got,) = InterpretedKernels([function], worker)(0, [x])
    (wanted,) = reference(function, [x])
    _assert_equal(f"{name} {divisor}", got, wanted, [x])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_exact(worker: Worker, dtype: torch.dtype) -> None:
    """Every byte decodes as torch's, and every rounding boundary, subnormals and overflow too."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    decode = function_of([TensorType((256,), dtype)], lambda b, v: b.cast(v, dtype=torch.float32))
    (got,) = InterpretedKernels([decode], worker)(0, [every])
    assert torch.equal(got.nan_to_num(9e9), every.float().nan_to_num(9e9))
    finite = every.float()[every.float().isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    numbers = torch.cat([
        finite, middles, torch.nextafter(middles, torch.tensor(9e9)),
        torch.nextafter(middles, torch.tensor(-9e9)), finite * 1.5,
        torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e30]),
    ])  # fmt: skip
    encode = function_of([TensorType((len(numbers),), torch.float32)],
                         lambda b, v: b.cast(v, dtype=dtype))  # fmt: skip
    (made,) = InterpretedKernels([encode], worker)(0, [numbers])
    wanted = numbers.to(dtype).float()
    if dtype == torch.float8_e4m3fn:  # before torch 2.13 what does not fit became NaN
        wanted = torch.where(numbers.isnan(), wanted, wanted.nan_to_num(448.0))
        wanted = torch.where(numbers == -torch.inf, -448.0, wanted)
        wanted = wanted.copysign(numbers)
    assert torch.equal(made.float().nan_to_num(9e9), wanted.nan_to_num(9e9))
    assert torch.equal(made.float().signbit()[~wanted.isnan()], wanted.signbit()[~wanted.isnan()])


def test_sub_byte_weights_are_read_packed(worker: Worker) -> None:
    from accel.ir import WeightStore
    from accel.runtime.subbyte import unpack

    packed = torch.arange(24, dtype=torch.uint8).reshape(3, 8) * 11
    function = function_of(
        [TensorType((3, 16), torch.int4), TensorType((3, 16), torch.float32)],
        lambda b, q, x: b.mul(b.cast(q, dtype=torch.float32), x),
    )
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    (got,) = InterpretedKernels([function], worker)(0, [packed, x])
    wide = function_of(
        [TensorType((3, 16), torch.int8), TensorType((3, 16), torch.float32)],
        lambda b, q, x: b.mul(b.cast(q, dtype=torch.float32), x),
    )
    (wanted,) = interpret(wide, [unpack(packed, torch.int4, (3, 16)), x], WeightStore())
    assert torch.equal(got, wanted)
