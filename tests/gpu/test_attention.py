"""Attention on the device: the cases that the interpreters run, random ones, and larger ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from accel.backends.triton.attention_tiles import Tile
from accel.ir import TensorType, WeightStore, interpret
from accel.runtime.interfaces import Operand
from accel.runtime.libraries.torch_native import ScaledDotProduct, cudnn_is_faster
from tests.backends import test_triton_attention as loop
from tests.backends import test_triton_attention_overlapped as overlapped
from tests.backends.kernels import function_of
from tests.backends.test_tvm_kernels import typed
from tests.gpu.device_kernels import DeviceKernels, Kernel, device_arch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BF16, FP16, BOOL = torch.bfloat16, torch.float16, torch.bool
RANDOM = 60


# The region's types and ops, the size of its heads, and a tile or None.
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
    return case.types(), case.build, 0, tile


def jobs(arch: str) -> dict[tuple[str, str], Job]:
    made: dict[tuple[str, str], Job] = {("large", n): job for n, job in large().items()}
    for name, case in loop.CASES.items():
        made["loop", name] = (case.types(), case.build, case.size, None)
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


def keys_of(kind: str) -> list[tuple[str, str]]:
    return [key for key in jobs("sm_90") if key[0] == kind]


def kernels_of(kind: str) -> list[Kernel]:
    """All kernels of a kind: the first of a job's key."""
    sms = 5 if kind.endswith("overlapped") else 132  # few, so that each has several parts
    made = []
    for key in keys_of(kind):
        types, build, _, tile = jobs("sm_90")[key]
        made.append(Kernel(function_of(types, build), "attention", sms=sms, tile=tile))
    return made


@cache
def compiled(kind: str) -> DeviceKernels:
    return DeviceKernels(partial(kernels_of, kind))


def kernel_at(key: tuple[str, str]) -> tuple[DeviceKernels, int]:
    if key not in jobs(device_arch()):
        pytest.skip("for Hopper")
    return compiled(key[0]), keys_of(key[0]).index(key)


@pytest.mark.parametrize("key", list(jobs("sm_90")), ids=" ".join)
def test_against_the_oracle(key: tuple[str, str]) -> None:
    kernels, number = kernel_at(key)
    types, _, size, _ = jobs("sm_90")[key]
    inputs = loop.inputs_of(types, size, 1)
    (want,) = interpret(kernels.functions[number], inputs, WeightStore(), oracle=True)
    (got,) = kernels(number, inputs)
    bound = loop.LIMITS[got.dtype] * max(float(want.abs().max()), 1e-3)
    assert float((got.double() - want).abs().max()) <= bound, kernels.source(number)


@pytest.mark.parametrize("key", [("large", "long, several"), ("overlapped", "fused, causal")])
def test_a_batch_does_not_see_the_others(key: tuple[str, str]) -> None:
    kernels, number = kernel_at(key)
    types, _, size, _ = jobs("sm_90")[key]
    inputs = loop.inputs_of(types, size, 2)
    inputs[0][1:] = float("nan")
    (got,) = kernels(number, inputs)
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
