"""Kernels that only training uses, on the device, against the interpreter in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from accel.ir import WeightStore, interpret
from tests.backends import test_triton_embedding_gradient as embedding
from tests.backends import test_triton_summed as summed
from tests.backends.kernels import function_of
from tests.backends.test_tvm_kernels import typed
from tests.gpu.device_kernels import DeviceKernels, Kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BF16, I64 = torch.bfloat16, torch.int64
ROWS = 20011
INTERPRETED = "a long key"  # the case whose tile is for an interpreter: one program of many rows


def of_a_vocabulary(b: Any, grad: Any, ids: Any, head: Any) -> Any:
    return b.add(head, b.embedding_backward(grad, ids, rows=ROWS, padding_index=5))


def gradient_kernels() -> list[Kernel]:
    large = [typed(BF16, 8, 1024, 96), typed(I64, 8, 1024), typed(BF16, ROWS, 96)]
    return [
        *(Kernel(function_of(t, b), embedding.KIND, tile=tile if name != INTERPRETED else None)
          for name, (t, b, tile) in embedding.CASES.items()),
        Kernel(function_of(large, of_a_vocabulary), embedding.KIND),
    ]  # fmt: skip


def test_gradients_of_embedding_tables() -> None:
    torch.manual_seed(0)
    kernels = DeviceKernels(gradient_kernels)
    for number, function in enumerate(kernels.functions):
        rows = int(function.results[0].shape[0])
        for _ in range(2):
            inputs = embedding.fresh([a.type for a in function.args], rows)
            agrees(kernels(number, inputs), inputs, function)


@pytest.mark.parametrize("kind", ["one id", "few ids", "padding"])
def test_texts_of_few_ids(kind: str) -> None:
    torch.manual_seed(1)
    kernels = DeviceKernels(gradient_kernels)
    number = len(kernels.functions) - 1
    function = kernels.functions[number]
    inputs = embedding.fresh([a.type for a in function.args], ROWS)
    few = (ROWS * torch.rand(8, 1024) ** 9).long()
    inputs[1] = {"one id": torch.full_like(few, 7), "few ids": few, "padding": few % 7}[kind]
    got = kernels(number, inputs)
    agrees(got, inputs, function)
    for _ in range(5):
        assert torch.equal(kernels(number, inputs)[0], got[0]), "sums have one order"


def sum_kernels() -> list[Kernel]:
    cases = [(build, types, tile) for _, build, types, tile in summed.CASES]
    cases.append((summed.norm_gradient, summed.norm_types((8, 1024), 768), None))
    return [Kernel(function_of(t, b), "summed", tile=tile) for b, t, tile in cases]


def test_rows_and_sums() -> None:
    torch.manual_seed(2)
    kernels = DeviceKernels(sum_kernels)
    for number, function in enumerate(kernels.functions):
        inputs = summed.fresh([a.type for a in function.args])
        agrees(kernels(number, inputs), inputs, function)


def agrees(got: list[Tensor], inputs: list[Tensor], function: Any) -> None:
    wanted = interpret(function, inputs, WeightStore(), oracle=True)
    for one, exact in zip(got, wanted, strict=True):
        error = (one.double() - exact.double()).abs().max() / exact.double().abs().max()
        assert float(error) < {BF16: 1.2e-2, torch.float16: 2e-3}.get(one.dtype, 5e-5)
