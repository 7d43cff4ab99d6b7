"""Products of float8 codes on tensor cores: through Triton's interpreter, and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend, anchors, float8
from accel.backends.triton.product_plan import MatmulTile
from accel.backends.triton.skinny_loop import SkinnyTile
from accel.ir import TensorType, WeightStore, interpret
from tests.backends.kernels import function_of, kernel_of
from tests.backends.test_triton_gemv import BF16
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

E4M3, F32 = torch.float8_e4m3fn, torch.float32
Case = tuple[list[TensorType], Callable[..., Any]]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def scaled(b: Any, x: Any, w: Any, s: Any, t: Any) -> Any:
    y = b.linear(b.cast_to(x, F32), b.cast_to(w, F32))
    return b.cast_to(b.mul(b.mul(y, s), t), BF16)


def activated(b: Any, x: Any, w: Any, s: Any, t: Any, c: Any) -> Any:
    y = b.linear(b.cast_to(x, F32), b.cast_to(w, F32))
    return b.gelu(b.cast_to(b.add(b.mul(b.mul(y, s), t), b.cast_to(c, F32)), BF16))


def case(rows: int, build: Callable[..., Any] = scaled) -> Case:
    types = [typed(E4M3, rows, 96), typed(E4M3, 40, 96), typed(F32, rows, 1), typed(F32, 40)]
    return [*types, *([typed(BF16, 40)] if build is activated else [])], build


def check(worker: Worker, one: Case, kind: str, tile: Any, arch: str) -> str:
    """Compares a kernel with the float64 oracle; returns its source."""
    types, build = one
    function = function_of(types, build)
    inputs = [torch.randn([int(d) for d in t.shape]).to(t.dtype) for t in types]
    backend = TritonBackend(arch, tile=tile)
    runner = InterpretedKernels([function], worker, [kind], backend, 1)
    exact = interpret(function, inputs, WeightStore(), oracle=True)
    for got, want in zip(runner(0, inputs), exact, strict=True):
        bound = 4 * torch.finfo(got.dtype).eps * float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= bound, runner.source(0)
    return runner.source(0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("build", [scaled, activated])
def test_tiles(worker: Worker, build: Callable[..., Any], arch: str) -> None:
    torch.manual_seed(0)
    source = check(worker, case(70, build), "matmul", MatmulTile(32, 16, 32, 4, 2), arch)
    assert float8.OPERAND in source and ("float8e4nv" in source) == (arch == "sm_90")
    check(worker, case(9, build), "skinny", SkinnyTile(16, 64, 4, 3), arch)


@pytest.mark.parametrize(("rows", "kind"), [(1, "gemv"), (20, "skinny"), (300, "matmul")])
def test_chosen_tiles(worker: Worker, rows: int, kind: str) -> None:
    torch.manual_seed(1)
    types, build = case(rows)
    op = next(o for o in function_of(types, build).body.ops if o.name == "linear")
    assert anchors.product_kind(op) == kind
    check(worker, (types, build), kind, None, "sm_90")


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100"])
@pytest.mark.parametrize(("rows", "kind"), [(20, "skinny"), (300, "matmul")])
def test_compiles(rows: int, kind: str, arch: str) -> None:
    kernel = kernel_of(function_of(*case(rows)), kind, 1)
    compiled = TritonBackend(arch).compile([kernel])
    (launch,) = compiled.launches[compiled.names[0]]
    ptx = launch.binary.ptx
    assert ("e4m3" in ptx or "f8f6f4" in ptx) == (arch != "sm_80")
    if arch == "sm_90" and kind == "matmul":
        assert "wgmma.mma_async" in ptx and ".f32.e4m3.e4m3" in ptx
