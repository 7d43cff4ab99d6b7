"""Overlapped products on the device: the cases that the interpreter runs, and larger ones."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.overlapped import OverlappedTile
from accel.compiler.gpu import kernel_binary
from accel.ir import Function, WeightStore, interpret
from accel.ir.interpret import bind_symbols
from accel.ir.storage import pack_sub_byte
from accel.ir.types import SUB_BYTE_BITS
from accel.runtime.cuda import CudaLibrary
from accel.runtime.cuda_code import pack
from tests.backends import test_triton_matmul, test_triton_overlapped
from tests.backends.kernels import function_of, kernel_of, poisoned, sym
from tests.backends.test_triton_gemv import Case, halves, inputs_for
from tests.backends.test_tvm_kernels import typed
from tests.gpu.device_kernels import device_arch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BF16, FP16 = torch.bfloat16, torch.float16
LARGE: dict[str, Case] = {
    "many tiles": (
        [typed(FP16, 1000, 200), typed(FP16, 520, 200), typed(FP16, 520), typed(FP16, 1000, 520)],
        lambda b, x, w, c, r: b.add(b.gelu(b.linear(x, w, c)), r),
    ),
    "long sums": ([typed(BF16, 300, 4096), typed(BF16, 264, 4096)], lambda b, x, w: b.linear(x, w)),
    "wide halves": (
        [typed(BF16, 700, 512), typed(BF16, 1056, 512)],
        lambda b, x, w: halves(b, b.linear(x, w)),
    ),
}  # fmt: skip
SYMBOLIC: Case = (
    [typed(BF16, sym("s"), 128), typed(BF16, 264, 128)],
    lambda b, x, w: b.silu(b.linear(x, w)),
)
# Few programs, so that each has many tiles; the usual tile, and a wide one.
BACKENDS = {
    "overlapped": lambda arch: TritonBackend(arch, sms=3, tile=OverlappedTile()),
    "wide": lambda arch: TritonBackend(arch, sms=1, tile=OverlappedTile(64, 256, 64, 3)),
    "chosen": lambda arch: TritonBackend(arch),
}
CASES = {**test_triton_overlapped.CASES, **LARGE, "symbolic": SYMBOLIC}
DECODED = {n: test_triton_matmul.CASES[n] for n in ("int8 a channel", "activation before")}


@dataclass
class Compiled:
    function: Function
    name: str
    reads: list[int]
    sizes: tuple[str, ...]
    code: bytes
    source: str


def compile_case(job: tuple[str, str, str]) -> Compiled:
    kind, name, arch = job
    types, build = {**CASES, **DECODED}[name]
    function = function_of(types, build)
    compiled = BACKENDS[kind](arch).compile([kernel_of(function, "matmul")])
    (launch,) = compiled.launches[compiled.names[0]]
    code = pack(arch, {launch.name: kernel_binary(launch)})
    reads = [slot.number for slot in launch.reads]
    source = launch.code.source
    return Compiled(function, launch.name, reads, launch.code.sizes, code, source)


def all_jobs(arch: str) -> list[tuple[str, str, str]]:
    jobs = [("chosen", name, arch) for name in (*CASES, *DECODED)]
    if arch == "sm_90":
        jobs += [(kind, name, arch) for kind in ("overlapped", "wide") for name in CASES]
    return jobs


@cache
def compiled_cases() -> dict[tuple[str, str], Compiled]:
    jobs = all_jobs(device_arch())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=context) as pool:
        made = list(pool.map(compile_case, jobs, chunksize=2))
    return {job[:2]: one for job, one in zip(jobs, made, strict=True)}


def run(one: Compiled, inputs: list[Tensor]) -> list[Tensor]:
    device = torch.device("cuda", torch.cuda.current_device())
    function = one.function
    stored = [
        pack_sub_byte(t, a.dtype) if a.dtype in SUB_BYTE_BITS else t
        for t, a in zip(inputs, function.args, strict=True)
    ]
    symbols = bind_symbols(function, [tuple(t.shape) for t in inputs])
    memory = [t.to(device) for t in stored]
    shapes = [t.shape for t in interpret(function, inputs, WeightStore())]
    results = [poisoned(list(s), r.dtype).to(device) for s, r in zip(shapes, function.results)]
    words = [memory[i].data_ptr() for i in one.reads] + [r.data_ptr() for r in results]
    words += [symbols[s] for s in one.sizes]
    library = CudaLibrary(one.code, device)
    library.function(one.name)(ctypes.addressof((ctypes.c_int64 * len(words))(*words)))
    torch.cuda.synchronize()
    library.raise_failure()
    return [r.cpu() for r in results]


def compare(one: Compiled, inputs: list[Tensor]) -> None:
    exact = interpret(one.function, inputs, WeightStore(), oracle=True)
    for got, want in zip(run(one, inputs), exact, strict=True):
        bound = 4 * torch.finfo(got.dtype).eps * float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= bound, one.source


def need(kind: str, name: str) -> Compiled:
    found = compiled_cases().get((kind, name))
    if found is None:
        pytest.skip("for Hopper")
    return found


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("name", [n for n in CASES if n != "symbolic"])
def test_products(kind: str, name: str) -> None:
    torch.manual_seed(1)
    compare(need(kind, name), inputs_for(CASES[name][0]))


@pytest.mark.parametrize("name", DECODED)
def test_computed_operands(name: str) -> None:
    torch.manual_seed(2)
    compare(need("chosen", name), inputs_for(DECODED[name][0]))


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("rows", [1, 64, 1111])
def test_symbolic_rows(kind: str, rows: int) -> None:
    torch.manual_seed(3)
    inputs: list[Any] = [torch.randn(rows, 128).bfloat16(), torch.randn(264, 128).bfloat16()]
    compare(need(kind, "symbolic"), inputs)
