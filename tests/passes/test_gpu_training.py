"""Passes that GPU training programs need: recompute_sums, flash_layout, and what fuse delays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accel.backends.triton import TritonBackend
from accel.backends.vendor import FlashAttention
from accel.compiler import gpu
from accel.ir import Module, interpret
from accel.ir.module import Op
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.passes.registry import load_passes
from tests.ir.random_program import random_program
from tests.passes.helpers import F32, program, t

load_passes()


def run(module: Module, *passes: str) -> Module:
    context = Context(generator=TritonBackend(), libraries=(FlashAttention(),))
    PassManager(list(passes), context, validate=True).run(module)
    return module


def kernels(module: Module) -> list[tuple[str, list[str]]]:
    return [
        (str(op.attributes["kind"]), [o.name for o in op.regions[0].ops if o.name != "yield"])
        for op in module.main.ops
        if op.name == "kernel"
    ]


def norm_gradients(b: Any, g: Any, x: Any, mean: Any, rstd: Any) -> list[Any]:
    """A norm's gradients for its input (rows), weight and bias (columns)."""
    hat = b.mul(b.sub(x, mean), rstd)
    product = b.mul(g, hat)
    inner = b.mean(product, axes=(1,), keepdim=True)
    dx = b.mul(b.sub(g, b.mul(hat, inner)), rstd)
    return [dx, b.sum(product, axes=(0,)), b.sum(g, axes=(0,))]


def test_sums_over_rows_compute_what_they_add() -> None:
    shapes = ((64, 32), (64, 32), (64, 1), (64, 1))
    module = program(norm_gradients, *(t(*s) for s in shapes))
    inputs = [torch.randn(s) for s in shapes]
    before = interpret(module.main, inputs, module.weights)
    run(module, "decompose", "cse", "recompute_sums", "dce", "fuse", "dce")
    made = kernels(module)
    assert sorted(kind for kind, _ in made) == ["reduction", "rowwise"]
    (sums,) = (names for kind, names in made if kind == "reduction")
    assert sums.count("sum") == 2, "both sums read the same tensors in one kernel"
    (rows,) = (names for kind, names in made if kind == "rowwise")
    assert rows.count("sum") == 1, "the mean over a row"
    for a, c in zip(interpret(module.main, inputs, module.weights), before, strict=True):
        assert torch.equal(a, c)


def test_what_a_product_reads_is_not_computed_again() -> None:
    """The sum's operand is in memory for the product anyway: reading it costs least."""

    def build(b: Any, g: Any, x: Any, w: Any) -> list[Any]:
        dx = b.mul(g, b.exp(x))
        return [b.matmul(dx, w), b.sum(dx, axes=(0,)), b.sum(dx, axes=(1,))]

    module = run(program(build, t(64, 32), t(64, 32), t(32, 8)), "recompute_sums")
    assert kernels(module) == []


def test_a_sum_that_alone_reads_its_operand_is_left_to_fuse() -> None:
    module = program(lambda b, x: b.sum(b.mul(x, x), axes=(0,)), t(64, 32))
    assert kernels(run(module, "recompute_sums")) == []
    assert kernels(run(module, "fuse")) == [("reduction", ["mul", "sum"])]


def test_many_tensors_are_not_read_twice() -> None:
    def build(b: Any, *xs: Any) -> list[Any]:
        total = xs[0]
        for x in xs[1:]:
            total = b.add(total, x)
        return [total, b.sum(total, axes=(0,))]

    module = run(program(build, *[t(64, 32)] * 5), "recompute_sums")
    assert kernels(module) == []


def attention(b: Any, q: Any, k: Any, v: Any, g: Any) -> list[Any]:
    y, lse = b.flash_attention(q, k, v, scale=0.5, causal=True)
    grads = b.flash_attention_backward(g, q, k, v, y, lse, scale=0.5, causal=True)
    merged = b.reshape(b.permute(y, axes=(0, 2, 1, 3)), shape=(2, 6, 24))
    return [merged, lse, b.exp(grads[0]), *(b.permute(x, axes=(0, 2, 1, 3)) for x in grads[1:])]


def call_of(module: Module, name: str) -> Op:
    return next(
        op
        for op in module.main.ops
        if op.name == "call" and any(o.name == name for o in op.regions[0].ops)
    )


def test_attention_and_its_gradients_are_calls_in_their_own_layout() -> None:
    shape = (2, 3, 6, 8)
    module = program(attention, *[t(*shape)] * 4)
    inputs = [torch.randn(shape) for _ in range(4)]
    before = interpret(module.main, inputs, module.weights)
    run(module, "flash_layout", "select_libraries", "dce")
    forward, backward = (
        call_of(module, "flash_attention"),
        call_of(module, "flash_attention_backward"),
    )
    assert [tuple(r.shape) for r in forward.results] == [(2, 3, 6), (2, 6, 3, 8)]
    assert [tuple(r.shape) for r in backward.results] == [(2, 6, 3, 8)] * 3
    for a, c in zip(interpret(module.main, inputs, module.weights), before, strict=True):
        assert torch.equal(a, c)


def test_gradients_that_nobody_wants_are_no_results() -> None:
    def build(b: Any, q: Any, k: Any, v: Any, y: Any, lse: Any) -> Any:
        return b.flash_attention_backward(y, q, k, v, y, lse, scale=1.0)[1]

    shape = (1, 2, 4, 8)
    module = program(build, *[t(*shape)] * 4, t(1, 2, 4))
    run(module, "flash_layout", "select_libraries", "dce")
    call = call_of(module, "flash_attention_backward")
    options = dict(call.attribute("options"))
    assert options["wanted"] == (False, True, False) and len(call.results) == 1


def test_what_is_in_memory_anyway_waits_for_its_reader() -> None:
    """x_hat needs only arguments, but is computed in the kernel after the product."""

    def build(b: Any, x: Any, mean: Any, y: Any, w: Any) -> Any:
        hat = b.sub(x, mean)
        return b.mul(b.matmul(y, w), hat)

    shapes = ((16, 32), (16, 1), (16, 8), (8, 32))
    module = run(program(build, *(t(*s) for s in shapes)), "fuse")
    assert kernels(module) == [("pointwise", ["sub", "mul"])]


def test_widened_parameters_and_ranges_have_no_kernel() -> None:
    def build(b: Any, x: Any, gain: Any) -> Any:
        line = b.arange(length=64, dtype=torch.float32)
        return b.add(b.mul(b.cast(x, dtype=F32), b.cast(gain, dtype=F32)), line)

    half = torch.float16
    module = run(program(build, t(32, 64, dtype=half), t(64, dtype=half)), "fuse")
    assert len(kernels(module)) == 1


def test_a_widened_position_behind_a_view_has_no_kernel() -> None:
    """The angles of rotary embeddings of one token."""

    def build(b: Any, position: Any, rates: Any) -> list[Any]:
        place = b.cast(b.reshape(position, shape=(1, 1)), dtype=F32)
        angles = b.mul(place, rates)
        return [b.cos(angles), b.sin(angles)]

    module = run(program(build, t(dtype=torch.int64), t(64)), "fuse")
    assert len(kernels(module)) == 1


def test_a_small_widened_value_that_is_a_result_is_computed() -> None:
    def build(b: Any, x: Any, gain: Any) -> list[Any]:
        wide = b.cast(gain, dtype=F32)
        return [b.mul(x, wide), wide]

    module = run(program(build, t(32, 64), t(64, dtype=torch.float16)), "fuse")
    inputs = [torch.randn(32, 64), torch.randn(64).half()]
    got = interpret(module.main, inputs, module.weights)
    assert torch.equal(got[1], inputs[1].float())


@pytest.mark.parametrize("seed", range(30))
def test_random_programs_keep_their_meaning_on_gpus(seed: int) -> None:
    """Every pass of the GPU's lowering, each contract checked."""
    made = random_program(seed, symbolic=seed % 2 == 1)
    module, inputs = made.module, made.inputs()
    wanted = interpret(module.main, inputs, module.weights)
    context = Context(generator=TritonBackend(), libraries=gpu.libraries())
    PassManager(list(gpu.KERNEL_PIPELINE), context, validate=True).run(module)
    for got, want in zip(interpret(module.main, inputs, module.weights), wanted, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def rows_and_sums(b: Any, g: Any, x: Any, mean: Any, rstd: Any) -> list[Any]:
    """As `norm_gradients`, and the sum of what is made, in another shape."""
    dx, dw, db = norm_gradients(b, g, x, mean, rstd)
    return [dx, dw, db, b.sum(b.reshape(dx, shape=(2, 512, 32)), axes=(0, 1))]


def test_sums_join_the_kernel_of_their_rows() -> None:
    shapes = ((1024, 32), (1024, 32), (1024, 1), (1024, 1))
    module = program(rows_and_sums, *(t(*s) for s in shapes))
    inputs = [torch.randn(s) for s in shapes]
    before = interpret(module.main, inputs, module.weights)
    run(module, "decompose", "cse", "recompute_sums", "dce", "fuse", "dce", "join_sums")
    ((kind, names),) = kernels(module)
    assert kind == "summed" and names.count("sum") == 4
    for a, c in zip(interpret(module.main, inputs, module.weights), before, strict=True):
        assert torch.equal(a, c)


def few_rows(b: Any, x: Any) -> list[Any]:
    y = b.mul(x, x)
    return [y, b.sum(y, axes=(0,))]


def all_at_once(b: Any, x: Any) -> list[Any]:
    y = b.mul(x, x)
    return [y, b.sum(y, axes=(0, 1))]


def of_all_rows(b: Any, x: Any) -> list[Any]:
    return [b.sub(x, b.sum(x, axes=(0,), keepdim=True))]


@pytest.mark.parametrize(
    ("build", "rows"), [(few_rows, 64), (all_at_once, 2048), (of_all_rows, 2048)]
)
def test_other_sums_stay(build: Any, rows: int) -> None:
    module = program(build, t(rows, 32))
    run(module, "decompose", "cse", "dce", "fuse", "dce", "join_sums")
    assert "summed" not in [kind for kind, _ in kernels(module)]


def test_a_sum_of_later_values_stays() -> None:
    """Its kernel cannot stand where the rows' kernel is."""

    def build(b: Any, x: Any, w: Any) -> list[Any]:
        y = b.mul(x, x)
        z = b.linear(y, w)
        return [y, b.sum(b.mul(y, z), axes=(0,))]

    module = program(build, t(2048, 32), t(32, 32))
    run(module, "decompose", "cse", "dce", "fuse", "dce", "join_sums")
    assert "summed" not in [kind for kind, _ in kernels(module)]
