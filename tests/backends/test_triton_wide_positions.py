"""Kernels whose positions need 64 bits, of every template: all compile.

Positions are 64-bit numbers where a tensor has too many elements, or an unknown number. Triton's
interpreter gives variables no types, so only its compiler finds a variable that has two. Here every
tensor counts as too large.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend, kernel
from accel.ir import Function
from tests.backends import (
    special_values,
    test_triton_attention_training,
    test_triton_cached,
    test_triton_paged,
    test_triton_topk,
)
from tests.backends.kernels import function_of, kernel_of

Kernel = tuple[Function, str, Any, int]  # kind, tile, multiprocessors


def kernels() -> dict[str, Kernel]:
    made: dict[str, Kernel] = {
        name: (one.function(), one.kind, one.tile, one.sms)
        for name, one in special_values.cases().items()
    }
    for number in (0, 1, 4, 13, 18, 19, 22, 25, 28, 29, 31):
        case = test_triton_cached.CASES[number]
        made[f"cached {case}"] = (case.function(), "cached_attention", case.tile, 132)
    for one in test_triton_paged.CASES:
        made[f"paged {one}"] = (
            test_triton_paged.opened(one), "cached_attention", one.tile, 132,
        )  # fmt: skip
    training = test_triton_attention_training.Case(
        1, 4, 2, 256, 256, 64, torch.bfloat16, causal=True, window=100, softcap=20.0
    )
    made["training attention"] = (training.forward(), "flash_attention", None, 132)
    made["its gradients"] = (training.backward(), "flash_attention_backward", None, 132)
    for name, (type_, build) in test_triton_topk.CASES.items():
        made[f"topk {name}"] = (function_of([type_], build), "topk", None, 132)
    return made


KERNELS = kernels()


@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_LARGEST_INT32", 0)
    function, kind, tile, sms = KERNELS[name]
    compiled = TritonBackend("sm_90", sms, tile).compile([kernel_of(function, kind)])
    assert all(one.binary.cubin for one in compiled.launches[compiled.names[0]])
