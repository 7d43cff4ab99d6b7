"""Generated kernels on the device: the cases that the interpreters run on the CPU, and a fuzz."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accel.errors import ExecutionError
from accel.ir import Function, TensorType, WeightStore, interpret, print_function
from tests.backends.kernels import f32, function_of
from tests.backends.test_triton_kernels import LONG
from tests.backends.test_tvm_fuzz import Generator, _agree, inputs_for
from tests.backends.test_tvm_kernels import (
    INDEX_CASES,
    REDUCTION_CASES,
    SYMBOLIC,
    randn,
    typed,
)
from tests.backends.test_tvm_scalar import ULPS, Claim, check_elementwise, claimed
from tests.backends.triton_kernels import BACKEND
from tests.gpu.device_kernels import DeviceKernels, Kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
FUZZ = 300
_CASES = {**INDEX_CASES, **REDUCTION_CASES}


def case_kernels() -> list[Kernel]:
    return [Kernel(function_of(c.types, c.build)) for c in _CASES.values()]


def long_kernels() -> list[Kernel]:
    return [Kernel(function_of(types, build)) for types, build, _ in LONG.values()]


def symbolic_kernels() -> list[Kernel]:
    return [Kernel(function_of(types, build)) for types, build, _ in SYMBOLIC.values()]


def fuzz_kernels() -> list[Kernel]:
    return [Kernel(Generator(seed).run()) for seed in range(FUZZ)]


def elementwise() -> list[Claim]:
    return claimed(BACKEND)


def elementwise_kernels() -> list[Kernel]:
    return [Kernel(c[3]) for c in elementwise()]


def other_kernels() -> list[Kernel]:
    float8 = torch.float8_e4m3fn
    functions = [
        function_of([f32(7, 4), typed(torch.int64, 2)], lambda b, t, i: b.embedding(t, i)),
        function_of([typed(float8, 256)], lambda b, v: b.cast(v, dtype=torch.float32)),
        function_of([f32(512)], lambda b, v: b.cast(v, dtype=float8)),
        function_of(
            [TensorType(((1 << 31) + 4096,), torch.int8)],
            lambda b, v: b.add(v, b.scalar(1, torch.int8)),
        ),
    ]
    return [Kernel(function) for function in functions]


def close(got: list[Tensor], function: Function, inputs: list[Tensor], tolerance: float) -> None:
    same = interpret(function, inputs, WeightStore())
    exact = interpret(function, inputs, WeightStore(), oracle=True)
    for g, s, e in zip(got, same, exact, strict=True):
        assert g.shape == s.shape and g.dtype == s.dtype
        if not g.dtype.is_floating_point:
            assert torch.equal(g, s)
            continue
        finite = e.isfinite()
        assert torch.equal(finite, g.isfinite())
        scale = float(e[finite].abs().max()) if bool(finite.any()) else 1.0
        epsilon = torch.finfo(g.dtype).eps if g.dtype.itemsize < 4 else 0.0
        error = (g.double() - e.double())[finite].abs()
        worst = float(error.max()) if error.numel() else 0.0
        assert worst <= (tolerance + epsilon) * max(scale, 1e-30)


@pytest.fixture(scope="module")
def cases() -> DeviceKernels:
    return DeviceKernels(case_kernels)


@pytest.mark.parametrize("name", _CASES)
def test_cases(cases: DeviceKernels, name: str) -> None:
    case = _CASES[name]
    number = list(_CASES).index(name)
    got = cases(number, case.inputs)
    close(got, cases.functions[number], list(case.inputs), max(case.tolerance, 4e-6))


@pytest.fixture(scope="module")
def long_rows() -> DeviceKernels:
    return DeviceKernels(long_kernels)


@pytest.mark.parametrize("name", LONG)
def test_long_rows(long_rows: DeviceKernels, name: str) -> None:
    number, inputs = list(LONG).index(name), LONG[name][2]
    close(long_rows(number, inputs), long_rows.functions[number], inputs, 1e-5)


@pytest.fixture(scope="module")
def symbolic() -> DeviceKernels:
    return DeviceKernels(symbolic_kernels)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 70), (5, 3), (64, 64), (67, 129), (700, 3000)])
@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes(symbolic: DeviceKernels, name: str, sizes: tuple[int, int]) -> None:
    number = list(SYMBOLIC).index(name)
    inputs = SYMBOLIC[name][2](*sizes)
    close(symbolic(number, inputs), symbolic.functions[number], inputs, 1e-5)


def test_random_regions() -> None:
    kernels = DeviceKernels(fuzz_kernels)
    runs = 0
    for seed, function in enumerate(kernels.functions):
        for size in (1, 7, 33) if seed % 3 == 0 else (1,):
            inputs = inputs_for(function, seed, size)
            got = kernels(seed, inputs)
            runs += 1
            wide = [t.double() if t.dtype.is_floating_point else t for t in inputs]
            wanted = interpret(function, wide, WeightStore(), oracle=True)
            same = interpret(function, inputs, WeightStore())
            half = any(r.dtype == torch.float16 for op in function.ops for r in op.results)
            for g, w, s in zip(got, wanted, same, strict=True):
                assert _agree(g, w, s, 4e-3 if half else 2e-5), (
                    f"seed {seed}, size {size}\n{print_function(function)}\n{kernels.source(seed)}"
                )
    print(f"{len(kernels.functions)} random regions, {runs} runs on the device")


def test_every_elementwise_op() -> None:
    """All claimed ops and dtypes; failures are collected, so that one run shows them all."""
    kernels, claims = DeviceKernels(elementwise_kernels), elementwise()
    failures = []
    for number, claim in enumerate(claims):
        try:
            ulps = 8.0 if claim[0] == "pow" else ULPS  # CUDA's own powf is that far off
            check_elementwise(claim, lambda inputs, number=number: kernels(number, inputs), ulps)
        except AssertionError as error:
            failures.append(f"{claim[0]} {claim[1]} {claim[2]}: {str(error)[:600]}")
    print(f"{len(claims)} elementwise cases on the device, {len(failures)} fail")
    assert not failures, "\n".join(failures)


@pytest.fixture(scope="module")
def others() -> DeviceKernels:
    return DeviceKernels(other_kernels)


@pytest.mark.parametrize("bad", [7, -1, 2**33])
def test_an_index_out_of_range_is_reported(others: DeviceKernels, bad: int) -> None:
    others(0, [randn(7, 4), torch.tensor([6, 0])])
    with pytest.raises(ExecutionError, match="out of range"):
        others(0, [randn(7, 4), torch.tensor([0, bad])])
    others(0, [randn(7, 4), torch.tensor([6, 0])])


def test_float8(others: DeviceKernels) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    (got,) = others(1, [every])
    assert torch.equal(got.nan_to_num(9e9), every.float().nan_to_num(9e9))
    x = torch.linspace(-440, 440, 512)
    (made,) = others(2, [x])
    assert torch.equal(made.float(), x.to(torch.float8_e4m3fn).float())


def test_more_elements_than_32_bits_count(others: DeviceKernels) -> None:
    x = torch.zeros((1 << 31) + 4096, dtype=torch.int8)
    x[-1], x[1 << 31] = 5, 7
    (got,) = others(3, [x])
    assert int(got[-1]) == 6 and int(got[1 << 31]) == 8 and int(got[0]) == 1
    assert int(got.sum(dtype=torch.int64)) == x.numel() + 12
