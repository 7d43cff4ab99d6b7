"""Triton kernels through its interpreter: index maps, reductions, symbolic sizes; the CPU's cases.

The second half compiles a representative set for three architectures, on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.errors import BackendError
from accel.ir import TensorType, WeightStore, interpret
from accel.ir.module import Value
from tests.backends.kernels import f32, function_of, kernel_of
from tests.backends.test_tvm_kernels import (
    INDEX_CASES,
    REDUCTION_CASES,
    SYMBOLIC,
    randn,
    typed,
)
from tests.backends.triton_kernels import BACKEND, IndexFailure, InterpretedKernels
from tests.backends.triton_worker import Worker


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def check(
    worker: Worker,
    types: Sequence[TensorType],
    build: Callable[..., Any],
    inputs: Sequence[Tensor],
    tolerance: float = 2e-6,
) -> InterpretedKernels:
    """Runs a kernel; integers must be equal, floats close to the float64 oracle."""
    function = function_of(types, build)
    runner = InterpretedKernels([function], worker)
    got = runner(0, inputs)
    same = interpret(function, inputs, WeightStore())
    exact = interpret(function, inputs, WeightStore(), oracle=True)
    for g, s, e in zip(got, same, exact, strict=True):
        assert g.shape == s.shape and g.dtype == s.dtype
        if not g.dtype.is_floating_point:
            assert torch.equal(g, s), runner.source(0)
            continue
        finite = e.isfinite()
        assert torch.equal(finite, g.isfinite()), runner.source(0)
        assert torch.equal(g[~finite].nan_to_num(7.0), s[~finite].nan_to_num(7.0))
        scale = float(e[finite].abs().max()) if bool(finite.any()) else 1.0
        epsilon = torch.finfo(g.dtype).eps if g.dtype.itemsize < 4 else 0.0
        error = (g.double() - e.double())[finite].abs()
        worst = float(error.max()) if error.numel() else 0.0
        assert worst <= (tolerance + epsilon) * max(scale, 1e-30), runner.source(0)
    return runner


@pytest.mark.parametrize("name", INDEX_CASES)
def test_index_maps(worker: Worker, name: str) -> None:
    case = INDEX_CASES[name]
    check(worker, case.types, case.build, case.inputs, case.tolerance)


@pytest.mark.parametrize("name", REDUCTION_CASES)
def test_reductions(worker: Worker, name: str) -> None:
    case = REDUCTION_CASES[name]
    check(worker, case.types, case.build, case.inputs, case.tolerance)


@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (20, 70)])
@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes(worker: Worker, name: str, sizes: tuple[int, int]) -> None:
    types, build, inputs = SYMBOLIC[name]
    check(worker, types, build, inputs(*sizes))


LONG: dict[str, tuple[list[TensorType], Callable[..., Any], list[Tensor]]] = {
    "softmax of blocks": ([f32(3, 20000)], lambda b, x: b.softmax(x, axis=1), [randn(3, 20000)]),
    "layer norm of blocks": (
        [f32(2, 17000), f32(17000)],
        lambda b, x, w: b.layer_norm(x, w, rank=1, eps=1e-5),
        [randn(2, 17000), randn(17000)],
    ),
    "argmax of blocks": ([f32(2, 17000)], lambda b, x: b.argmax(x, axis=1), [randn(2, 17000)]),
    "one long sum": ([f32(200000)], lambda b, x: b.sum(x, axes=(0,)), [randn(200000)]),
    "tall columns": ([f32(5000, 70)], lambda b, x: b.sum(x, axes=(0,)), [randn(5000, 70)]),
    "one argmax": ([f32(20000)], lambda b, x: b.argmax(x, axis=0), [randn(20000).round()]),
}


@pytest.mark.parametrize("name", LONG)
def test_long_rows(worker: Worker, name: str) -> None:
    types, build, inputs = LONG[name]
    check(worker, types, build, inputs, 1e-5)


@pytest.mark.parametrize("bad", [7, -1, 2**33])
def test_an_index_out_of_range_is_reported(worker: Worker, bad: int) -> None:
    function = function_of([f32(7, 4), typed(torch.int64, 2)], lambda b, t, i: b.embedding(t, i))
    runner = InterpretedKernels([function], worker)
    runner(0, [randn(7, 4), torch.tensor([6, 0])])
    with pytest.raises(IndexFailure):
        runner(0, [randn(7, 4), torch.tensor([0, bad])])


def test_equal_regions_have_one_source() -> None:
    one = function_of([f32(4, 8), f32(8)], lambda b, x, y: b.relu(b.add(x, y)))
    two = function_of([f32(4, 8), f32(8)], lambda b, x, y: b.relu(b.add(x, y)))
    other = function_of([f32(4, 9), f32(9)], lambda b, x, y: b.relu(b.add(x, y)))
    two.args[0].name = "another"
    names, made = BACKEND.generate([kernel_of(f) for f in (one, two, other)])
    assert names[0] == names[1] != names[2]
    assert len(made) == 2


def test_large_tensors_use_64_bit_positions() -> None:
    def source(size: int) -> str:
        function = function_of([f32(size, 1024)], lambda b, x: b.exp(x))
        _, made = BACKEND.generate([kernel_of(function)])
        (code,) = made.values()
        return code.launches[0].source

    assert "int64" in source(1 << 21)
    assert "int64" not in source(1 << 20)


def test_refusals_say_why() -> None:
    function = function_of([f32(4, 6)], lambda b, x: b.cumsum(x, axis=1))
    assert "cumsum" in str(BACKEND.supports(next(iter(function.ops))))
    with pytest.raises(BackendError, match="cumsum"):
        BACKEND.generate([kernel_of(function)])


def norm_of_sum(b: Any, x: Value, y: Value, w: Value, c: Value) -> tuple[Value, Value]:
    total = b.add(x, y)
    return total, b.layer_norm(total, w, c, rank=1, eps=1e-5)


def representative() -> list[Any]:
    half, brain = torch.float16, torch.bfloat16
    float8 = torch.float8_e4m3fn
    return [
        function_of([typed(half, 128, 3072)], lambda b, x: b.gelu(x)),
        function_of([typed(half, 128, 768)] * 2 + [typed(half, 768)] * 2, norm_of_sum),
        function_of([typed(brain, 4, 12, 128, 128)], lambda b, x: b.softmax(x, axis=3)),
        function_of([f32(50, 30000)], lambda b, x: b.log_softmax(x, axis=1)),
        function_of([f32(64, 512, 128)], lambda b, x: b.exp(b.permute(x, axes=(0, 2, 1)))),
        function_of([typed(half, 100, 64), typed(torch.int64, 7)],
                    lambda b, t, i: b.embedding(t, i)),
        function_of([typed(float8, 64, 64), f32(64)], lambda b, q, s: b.mul(b.cast(
            q, dtype=torch.float32), s)),
        function_of([f32(64, 64)], lambda b, x: b.cast(x, dtype=float8)),
        function_of([f32(900, 70)], lambda b, x: (b.argmax(x, axis=0), b.amax(x, axes=(0,)))),
        function_of([typed(torch.bool, 40, 50)], lambda b, x: b.any(x, axes=(1,))),
        function_of([typed(torch.float64, 40, 50)], lambda b, x: b.tanh(b.sum(x, axes=(1,)))),
        function_of(SYMBOLIC["softmax"][0], SYMBOLIC["softmax"][1]),
        function_of(SYMBOLIC["append"][0], SYMBOLIC["append"][1]),
        function_of([f32(40, 20), typed(torch.int64, 5)],
                    lambda b, x, i: b.pad(b.gather(x, i, axis=0), low=(1, 0), high=(0, 2))),
    ]  # fmt: skip


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles_without_a_gpu(arch: str) -> None:
    compiled = TritonBackend(arch).compile([kernel_of(f) for f in representative()])
    for launches in compiled.launches.values():
        for one in launches:
            assert one.binary.cubin.startswith(b"\x7fELF")
            assert f".target {arch}" in one.binary.ptx
            assert one.binary.symbol in one.binary.ptx
            assert one.binary.spare >= 0
