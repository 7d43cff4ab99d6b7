"""select_libraries, decompose and fuse: what becomes one kernel or call, and what must not."""

from __future__ import annotations

import pytest
import torch

from accel.backends.tvm import TvmBackend
from accel.backends.vendor import OneDnnConv, OneDnnLinear, ScaledDotProduct, TorchLinear
from accel.compiler.pipeline import KERNEL_PIPELINE
from accel.ir import Module, interpret
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.passes.registry import load_passes
from tests.ir.random_program import random_program
from tests.passes.helpers import F32, I64, ops, program, t

load_passes()


def context() -> Context:
    libraries = (OneDnnLinear(), OneDnnConv(), ScaledDotProduct(), TorchLinear())
    return Context(generator=TvmBackend(), libraries=libraries)


def lower(module: Module) -> Module:
    PassManager(list(KERNEL_PIPELINE), context(), validate=True).run(module)
    return module


def kernels(module: Module) -> list[str]:
    return [str(op.attributes["kind"]) for op in module.main.ops if op.name == "kernel"]


def calls(module: Module) -> list[tuple[str, list[str]]]:
    return [
        (str(op.attributes["library"]), [o.name for o in op.regions[0].ops if o.name != "yield"])
        for op in module.main.ops
        if op.name == "call"
    ]


def weight(b, *shape):
    return b.weight(torch.randn(shape))


def two_linears(b, x, r, first, second, bias):
    return b.add(r, b.linear(b.gelu(b.linear(x, first, bias)), second))


def test_a_call_takes_activation_and_residual() -> None:
    module = lower(program(two_linears, t(3, 4), t(3, 4), t(8, 4), t(4, 8), t(8)))
    assert calls(module) == [
        ("onednn.linear", ["linear", "gelu"]),
        ("onednn.linear", ["linear", "add"]),
    ]
    assert kernels(module) == []


def test_stored_weights_make_products_that_take_both() -> None:
    def make(b, x, r):
        return two_linears(b, x, r, weight(b, 8, 4), weight(b, 4, 8), weight(b, 8))

    module = lower(program(make, t(3, 4), t(3, 4)))
    assert calls(module) == []
    assert kernels(module) == ["matmul", "matmul"]


def broadcast_add(b, x, w):
    return b.add(b.linear(x, w), weight(b, 8))


def second_user(b, x, w):
    y = b.linear(x, w)
    return b.gelu(y), y


def add_to_itself(b, x, w):
    y = b.linear(x, w)
    return b.add(y, y)


@pytest.mark.parametrize("make", [broadcast_add, second_user, add_to_itself])
def test_a_call_leaves_what_only_looks_like_an_epilogue(make) -> None:
    module = lower(program(make, t(3, 4), t(8, 4)))
    assert calls(module) == [("onednn.linear", ["linear"])]
    assert kernels(module) == ["pointwise"]


def test_weights_given_at_run_time() -> None:
    module = lower(program(lambda b, x, w: b.linear(x, w), t(3, 4), t(8, 4)))
    assert [name for name, _ in calls(module)] == ["onednn.linear"]
    build = lambda b, x, w: b.linear(x, b.permute(w, axes=(1, 0)))  # noqa: E731
    module = lower(program(build, t(3, 4), t(4, 8)))
    assert [name for name, _ in calls(module)] == ["torch.linear"]


def test_attention_takes_the_head_merge() -> None:
    def make(b, q, k, v):
        a = b.attention(q, k, v, scale=0.5, causal=True)
        return b.reshape(b.permute(a, axes=(0, 2, 1, 3)), shape=(2, 5, 12))

    types = [t(2, 3, 5, 4), t(2, 1, 5, 4), t(2, 1, 5, 4)]
    module = lower(program(make, *types))
    assert calls(module) == [("sdpa", ["attention", "permute", "reshape"])]

    def other_axes(b, q, k, v):
        return b.permute(b.attention(q, k, v, scale=0.5), axes=(2, 0, 1, 3))

    module = lower(program(other_axes, *types))
    assert calls(module) == [("sdpa", ["attention"])]


def test_attention_with_soft_cap_is_decomposed() -> None:
    def make(b, q, k, v):
        return b.attention(q, k, v, scale=0.5, softcap=30.0)

    module = lower(program(make, t(1, 2, 5, 4), t(1, 2, 5, 4), t(1, 2, 5, 4)))
    assert calls(module) == []
    assert "rowwise" in kernels(module)


def test_norm_and_its_neighbours_are_one_kernel() -> None:
    def make(b, x, r):
        y = b.add(x, r)
        return b.layer_norm(y, weight(b, 8), weight(b, 8), rank=1, eps=1e-5), y

    module = lower(program(make, t(2, 5, 8), t(2, 5, 8)))
    assert kernels(module) == ["rowwise"]


def test_rope_is_one_kernel() -> None:
    def make(b, x, cos, sin):
        q = b.permute(b.reshape(x, shape=(1, 6, 2, 8)), axes=(0, 2, 1, 3))
        low, high = (b.slice(q, axis=3, start=s, stop=s + 4) for s in (0, 4))
        return b.add(b.mul(q, cos), b.mul(b.cat(b.neg(high), low, axis=3), sin))

    module = lower(program(make, t(1, 6, 16), t(6, 8), t(6, 8)))
    assert kernels(module) == ["pointwise"]
    assert [n for n in ops(module) if n == "cat"] == []


def test_different_axes_are_different_kernels() -> None:
    def make(b, x):
        return b.softmax(b.softmax(x, axis=1), axis=0)

    module = lower(program(make, t(6, 8)))
    assert kernels(module).count("rowwise") == 1
    assert "reduction" in kernels(module)


def test_a_shift_of_rows_is_no_part_of_a_row_kernel() -> None:
    def make(b, x):
        y = b.softmax(x, axis=1)
        shifted = b.pad(y, low=(1, 0), high=(-1, 0))
        return b.add(y, shifted)

    module = lower(program(make, t(6, 8)))
    assert kernels(module) == ["rowwise", "pointwise"]


def test_fusion_makes_no_cycle() -> None:
    # a -> linear -> c and a -> c: a and c have one shape, and a call lies between.
    def make(b, x, w):
        a = b.exp(x)
        return b.mul(b.exp(b.linear(a, w)), b.add(a, b.scalar(1.0, F32)))

    module = lower(program(make, t(3, 4), t(4, 4)))
    assert kernels(module).count("pointwise") >= 2


def test_views_without_computation_stay_views() -> None:
    def make(b, x):
        return b.permute(b.reshape(x, shape=(2, 3, 4)), axes=(1, 0, 2))

    assert ops(lower(program(make, t(6, 4)))) == ["reshape", "permute"]


def test_embedding_and_integers_are_fused() -> None:
    def make(b, ids):
        shifted = b.add(ids, b.scalar(1, I64))
        return b.mul(b.embedding(weight(b, 9, 4), shifted), b.scalar(2.0, F32))

    module = lower(program(make, t(2, 3, dtype=I64)))
    assert "embedding" not in ops(module)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("symbolic", [False, True])
def test_random_programs_keep_their_meaning(seed, symbolic) -> None:
    """`lower` checks the contract of every pass in float64; this checks the whole in float32."""
    made = random_program(seed, symbolic=symbolic)
    module, inputs = made.module, made.inputs()
    wanted = interpret(module.main, inputs, module.weights)
    lower(module)
    for got, want in zip(interpret(module.main, inputs, module.weights), wanted, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
