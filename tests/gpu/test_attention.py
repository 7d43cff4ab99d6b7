"""Attention on the device: the cases that the interpreters run, random ones, and larger ones."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.attention_tiles import Tile
from accel.compiler.gpu import kernel_binary
from accel.ir import Function, TensorType, WeightStore, interpret
from accel.ir.interpret import bind_symbols
from accel.ir.types import substitute
from accel.runtime.cuda import CudaLibrary
from accel.runtime.cuda_code import pack
from accel.runtime.interfaces import Operand
from accel.runtime.libraries.torch_native import ScaledDotProduct, cudnn_is_faster
from tests.backends import test_triton_attention as loop
from tests.backends import test_triton_attention_overlapped as overlapped
from tests.backends.kernels import function_of, kernel_of, poisoned
from tests.backends.test_tvm_kernels import typed
from tests.gpu.device_kernels import device_arch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BF16, FP16, BOOL = torch.bfloat16, torch.float16, torch.bool
RANDOM = 60


@dataclass
class Compiled:
    """One kernel: `reads` are the inputs that it takes, `sizes` the symbols after the tensors."""

    function: Function
    name: str
    reads: list[int]
    sizes: tuple[str, ...]
    code: bytes
    source: str


def run(one: Compiled, inputs: list[Tensor]) -> Tensor:
    """The result, on the CPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    symbols = bind_symbols(one.function, [tuple(t.shape) for t in inputs])
    (result,) = one.function.results
    memory = [t.to(device) for t in inputs]
    out = poisoned([int(substitute(d, symbols)) for d in result.shape], result.dtype).to(device)
    words = [memory[i].data_ptr() for i in one.reads] + [out.data_ptr()]
    words += [symbols[s] for s in one.sizes]
    library = CudaLibrary(one.code, device)
    library.function(one.name)(ctypes.addressof((ctypes.c_int64 * len(words))(*words)))
    torch.cuda.synchronize()
    library.raise_failure()
    return out.cpu()


Job = tuple[list[TensorType], Callable[..., Any], int, Tile | None]


def large() -> dict[str, Job]:
    def llama(b: Any, x: Any) -> Any:
        return loop.fused(b, x, size=128, groups=2, causal=True)

    def window(b: Any, x: Any) -> Any:
        return loop.fused(b, x, size=64, causal=True, window=300, softcap=20.0)

    return {
        "long, groups": ([typed(BF16, 1, 2000, 8 * 128)], llama, 0, None),
        "long, several": ([typed(BF16, 3, 1024, 8 * 128)], llama, 0, None),
        "long, window, cap": ([typed(FP16, 2, 1280, 6 * 64)], window, 0, None),
        "wide heads": (
            [typed(BF16, 1, 3, 640, 256)] * 3,
            lambda b, *x: b.attention(*x, scale=0.06, causal=True), 0, None,
        ),
    }  # fmt: skip


def random_loop(seed: int) -> Job:
    case, tile = loop.random_case(seed)
    depth = {"scale": case.q[3] ** -0.5, **case.attributes}
    return case.types(), lambda b, *x: b.attention(*x, **depth), 0, tile


def jobs(arch: str) -> dict[tuple[str, str], Job]:
    made: dict[tuple[str, str], Job] = {("large", n): job for n, job in large().items()}
    for name, case in loop.CASES.items():
        made["loop", name] = (case.types(), _attention(case), case.size, None)
    for name, (types, build, size) in loop.REGIONS.items():
        made["loop", name] = (types, build, size, None)
    made |= {("random", str(seed)): random_loop(seed) for seed in range(RANDOM)}
    if arch == "sm_90":
        for name, (types, build, size) in overlapped.CASES.items():
            made["overlapped", name] = (types, build, size, overlapped.TILE)
        for seed in range(RANDOM):
            types, build, tile = overlapped.random_case(seed)
            made["random overlapped", str(seed)] = (types, build, 0, tile)
    return made


def _attention(case: loop.Case) -> Callable[..., Any]:
    attributes = {"scale": case.q[3] ** -0.5, **case.attributes}
    return lambda b, *x: b.attention(*x, **attributes)


def compile_jobs(arch: str, keys: list[tuple[str, str]]) -> list[Compiled]:
    found, made = jobs(arch), []
    for key in keys:
        types, build, _, tile = found[key]
        sms = 5 if key[0].endswith("overlapped") else 132  # few, so that each has several parts
        function = function_of(types, build)
        backend = TritonBackend(arch, sms=sms, tile=tile)
        compiled = backend.compile([kernel_of(function, "attention")])
        (launch,) = compiled.launches[compiled.names[0]]
        code = pack(arch, {launch.name: kernel_binary(launch)})
        reads = [slot.number for slot in launch.reads]
        made.append(Compiled(function, launch.name, reads, launch.code.sizes, code,
                             launch.code.source))  # fmt: skip
    return made


@cache
def compiled(arch: str, kind: str) -> dict[tuple[str, str], Compiled]:
    """All kernels of a kind: the first of a job's key."""
    keys = [key for key in jobs(arch) if key[0] == kind]
    workers = min(16, os.cpu_count() or 1)
    parts = [keys[start::workers] for start in range(workers)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        made = pool.map(compile_jobs, [arch] * workers, parts)
        return {
            k: one for part, ones in zip(parts, made, strict=True) for k, one in zip(part, ones)
        }


@pytest.mark.parametrize("key", list(jobs("sm_90")), ids=" ".join)
def test_against_the_oracle(key: tuple[str, str]) -> None:
    arch = device_arch()
    if key not in jobs(arch):
        pytest.skip("for Hopper")
    types, _, size, _ = jobs(arch)[key]
    one = compiled(arch, key[0])[key]
    inputs = loop.inputs_of(types, size, 1)
    (want,) = interpret(one.function, inputs, WeightStore(), oracle=True)
    got = run(one, inputs)
    bound = loop.LIMITS[got.dtype] * max(float(want.abs().max()), 1e-3)
    assert float((got.double() - want).abs().max()) <= bound, one.source


@pytest.mark.parametrize("key", [("large", "long, several"), ("overlapped", "fused, causal")])
def test_a_batch_does_not_see_the_others(key: tuple[str, str]) -> None:
    arch = device_arch()
    if key not in jobs(arch):
        pytest.skip("for Hopper")
    types, _, size, _ = jobs(arch)[key]
    inputs = loop.inputs_of(types, size, 2)
    inputs[0][1:] = float("nan")
    got = run(compiled(arch, key[0])[key], inputs)
    assert bool(got[0].isfinite().all()) and bool(got[1].isnan().all())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", ["none", "permute", "merge"])
def test_the_library_call_is_cudnn_where_that_is_faster(causal: bool, heads: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 200, 4, 80, device="cuda").half().transpose(1, 2) for _ in range(3))
    options = {"scale": 0.1, "causal": causal, "offset": 0, "window": None, "heads": heads}
    call = ScaledDotProduct().prepare(options, [Operand(FP16, (2, 4, 200, 80))] * 3 + [None])
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal,
                                          scale=0.1)  # fmt: skip
    if heads != "none":
        want = want.transpose(1, 2)
    want = want.flatten(2) if heads == "merge" else want
    torch.testing.assert_close(call(q, k, v).double(), want, atol=2e-3, rtol=2e-2)
    major, _ = torch.cuda.get_device_capability()
    assert cudnn_is_faster(q, k, v, causal) == (major in (9, 10))
