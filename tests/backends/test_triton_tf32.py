"""float32 products on tensor cores: only where PyTorch's setting, or an option, allows tf32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend
from accel.compiler.gpu import generator
from accel.compiler.options import Options
from accel.compiler.targets import get_target
from accel.errors import OptionError
from accel.ir import Module, TensorType
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.passes.registry import load_passes
from tests.backends.kernels import function_of, kernel_of
from tests.backends.test_tvm_kernels import typed
from tests.passes.helpers import program, t

load_passes()
F32 = torch.float32
TYPES = [typed(F32, 300, 96), typed(F32, 80, 96)]


@pytest.fixture
def setting() -> Iterator[Any]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def activated(b: Any, x: Any, w: Any) -> Any:
    return b.gelu(b.linear(x, w))


def kinds(backend: TritonBackend, make: Any, *types: TensorType) -> tuple[list[str], list[str]]:
    """The kinds of kernels that products become, and the reasons why not."""
    misses: list[str] = []
    module: Module = program(make, *types)
    context = Context(generator=backend, on_miss=lambda rule, op, why: misses.append(why))
    passes = ["select_products", "select_experts", "select_batched", "dce"]
    PassManager(passes, context).run(module)
    return [str(o.attribute("kind")) for o in module.main.ops if o.name == "kernel"], misses


def linear(b: Any, x: Any) -> Any:
    return b.gelu(b.linear(x, b.weight(torch.randn(96, 64))))


def batch(b: Any, x: Any, y: Any) -> Any:
    return b.relu(b.matmul(x, y))


PAIR = (t(2, 48, 32), t(2, 32, 48))


def test_exact_backends_leave_float32_to_the_library() -> None:
    made, misses = kinds(TritonBackend(), linear, t(300, 64))
    assert not made and misses == ["a product of torch.float32"]
    assert kinds(TritonBackend(), batch, *PAIR) == ([], ["float32 in full precision"])


def test_tf32_has_kernels() -> None:
    backend = TritonBackend(tf32=True)
    assert kinds(backend, linear, t(300, 64))[0] == ["matmul"]
    assert kinds(backend, batch, *PAIR)[0] == ["batched"]
    assert backend.version() != TritonBackend().version()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("tf32", [False, True])
def test_instructions(arch: str, tf32: bool) -> None:
    kernel = kernel_of(function_of(TYPES, activated), "matmul", 1)
    compiled = TritonBackend(arch, tf32=tf32).compile([kernel])
    (launch,) = compiled.launches[compiled.names[0]]
    assert ("tf32" in launch.binary.ptx) == tf32


@pytest.mark.parametrize("rows", [8, 64, 500])
def test_tiles_fill_hoppers_instruction(rows: int) -> None:
    types = [typed(torch.float32, rows, 256), typed(torch.float32, 512, 256)]
    kernel = kernel_of(function_of(types, lambda b, x, w: b.gelu(b.linear(x, w))), "matmul", 1)
    compiled = TritonBackend(tf32=True).compile([kernel])
    (launch,) = compiled.launches[compiled.names[0]]
    assert launch.code.constants["ROWS"] >= 64 and "wgmma" in launch.binary.ptx


def test_the_choice_is_torchs_unless_an_option_says_else(setting: Any) -> None:
    target = get_target("h200")
    setting("highest")
    assert not generator(target, Options()).tf32 and generator(target, Options(float32="tf32")).tf32
    setting("high")
    assert (
        generator(target, Options()).tf32 and not generator(target, Options(float32="exact")).tf32
    )
    with pytest.raises(OptionError, match="float32"):
        Options.of({"float32": "half"})
