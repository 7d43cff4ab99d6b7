"""Attention's gradients, pages and lists of blocks on the device: the interpreters' cases."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from accel.backends.triton.attention_tiles import AttentionTile, OverlappedTile, Tile
from accel.ir import WeightStore, interpret
from tests.backends import test_triton_attention as attention
from tests.backends import test_triton_attention_training as training
from tests.backends import test_triton_paged as paged
from tests.backends.kernels import function_of
from tests.backends.test_tvm_kernels import typed
from tests.gpu.device_kernels import DeviceKernels, Kernel, device_arch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
NAMES = list(training.CASES)
LISTED: list[Tile] = [
    AttentionTile(16, 32, 4, 2, listed=True),
    OverlappedTile(2, 64, 2, listed=True),
]
LENGTH = 300


def training_suite() -> list[Kernel]:
    """Of each case the forward, then the backward, with the tiles of the compiler's own choice."""
    made: list[Kernel] = []
    for case in training.CASES.values():
        made.append(Kernel(case.forward(), "flash_attention"))
        made.append(Kernel(case.backward(), "flash_attention_backward"))
    return made


def other_suite() -> list[Kernel]:
    """Pages, then texts in one row."""
    types = [*[typed(torch.bfloat16, 1, 2, LENGTH, 64)] * 3, typed(torch.int64, LENGTH)]
    texts = function_of(types, lambda b, *x: attention.texts(b, *x, causal=True))
    cases = [c if device_arch() == "sm_90" else replace(c, tile=None) for c in paged.CASES]
    pages = [Kernel(paged.opened(c), "cached_attention", tile=c.tile) for c in cases]
    tiles = LISTED if device_arch() == "sm_90" else LISTED[:1]
    return [*pages, *(Kernel(texts, "attention", tile=tile) for tile in tiles)]


@cache
def kernels(name: str) -> DeviceKernels:
    return DeviceKernels({"training": training_suite, "other": other_suite}[name])


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    """Both ways against float64, and the same bits each time."""
    made, case, number = kernels("training"), training.CASES[name], 2 * NAMES.index(name)
    inputs = case.inputs(7)
    want = interpret(case.forward(), inputs, WeightStore(), oracle=True)
    training.compare(made(number, inputs), want, case.dtype, made.source(number))
    y = want[0].permute(0, 2, 1, 3) if case.turned else want[0]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(case.dtype)
    given = [grad, *inputs[:3], y.to(case.dtype), want[1].float(), *inputs[3:]]
    want = interpret(case.backward(), given, WeightStore(), oracle=True)
    got = made(number + 1, given)
    training.compare(got, want, case.dtype, made.source(number + 1))
    again = made(number + 1, given, calls=3)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("number", range(len(paged.CASES)))
def test_pages(number: int) -> None:
    case = paged.CASES[number]
    last = case.count * case.page - case.tokens
    for position in (0, 15, last // 2, last):
        inputs: list[Tensor] = case.inputs(position)
        (want,) = interpret(function_of(case.types(), case.build), inputs)
        (got,) = kernels("other")(number, inputs)
        torch.testing.assert_close(got, want, rtol=0, atol=paged.BOUND[case.dtype])


@pytest.mark.parametrize("tile", LISTED, ids=str)
def test_texts_in_one_row(tile: Tile) -> None:
    number, made = len(paged.CASES) + LISTED.index(tile), kernels("other")
    if number >= len(made.functions):
        pytest.skip("for Hopper")
    types = [a.type for a in made.functions[number].args]
    inputs = [*attention.inputs_of(types[:3], 0), torch.arange(LENGTH) // 70]
    (want,) = interpret(made.functions[number], inputs, WeightStore(), oracle=True)
    (got,) = made(number, inputs)
    bound = attention.LIMITS[got.dtype] * float(want.abs().max())
    assert float((got.double() - want).abs().max()) <= bound
