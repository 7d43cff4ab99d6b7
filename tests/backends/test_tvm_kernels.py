"""Generated kernels against the interpreter: index maps, reductions, sizes, phases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.errors import BackendError, ExecutionError
from accel.ir import TensorType, WeightStore, interpret
from tests.backends.kernels import BACKEND, Runner, f32, function_of, kernel_of, run_kernel, sym

B = Any
S, T = sym("s0"), sym("s1")


def typed(dtype: torch.dtype, *shape: Any) -> TensorType:
    return TensorType(tuple(shape), dtype)


def check(
    types: Sequence[TensorType],
    build: Callable[..., Any],
    inputs: Sequence[Tensor],
    tolerance: float = 2e-6,
) -> Runner:
    """Runs a kernel; integers must be equal, floats close to the float64 oracle."""
    function = function_of(types, build)
    runner = Runner([function])
    got = runner(0, inputs)
    same = interpret(function, inputs, WeightStore())
    exact = interpret(function, inputs, WeightStore(), oracle=True)
    for g, s, e in zip(got, same, exact, strict=True):
        assert g.shape == s.shape and g.dtype == s.dtype
        if not g.dtype.is_floating_point:
            assert torch.equal(g, s)
            continue
        finite = e.isfinite()
        assert torch.equal(finite, g.isfinite())
        assert torch.equal(g[~finite].nan_to_num(7.0), s[~finite].nan_to_num(7.0))
        scale = float(e[finite].abs().max()) if bool(finite.any()) else 1.0
        epsilon = torch.finfo(g.dtype).eps if g.dtype.itemsize < 4 else 0.0
        error = (g.double() - e.double())[finite].abs()
        worst = float(error.max()) if error.numel() else 0.0
        assert worst <= (tolerance + epsilon) * max(scale, 1e-30), runner.compiled.sources
    return runner


@dataclass
class Case:
    types: Sequence[TensorType]
    build: Callable[..., Any]
    inputs: Sequence[Tensor]
    tolerance: float = 2e-6


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(high))


def rope(b: B, x: Any, cosine: Any, sine: Any) -> Any:
    half = x.shape[-1] // 2
    low = b.slice(x, axis=3, start=0, stop=half)
    high = b.slice(x, axis=3, start=half, stop=2 * half)
    return b.add(b.mul(x, cosine), b.mul(b.cat(b.neg(high), low, axis=3), sine))


def shared_statistics(b: B, x: Any) -> Any:
    """Full and reduced results of one row, and one without reductions."""
    mean = b.mean(x, axes=(2,), keepdim=True)
    return b.sub(x, mean), mean, b.exp(x)


INDEX_CASES: dict[str, Case] = {
    "broadcast": Case([f32(4, 1, 6), f32(5, 1)], lambda b, x, y: b.add(x, y),
                      [randn(4, 1, 6), randn(5, 1)]),
    "scalar": Case([f32(), f32(3, 4)], lambda b, x, y: b.mul(x, y), [randn(), randn(3, 4)]),
    "permute": Case([f32(3, 4, 5)], lambda b, x: b.exp(b.permute(x, axes=(2, 0, 1))),
                    [randn(3, 4, 5)]),
    "transpose tiles": Case([f32(70, 65), f32(65, 70)],
                            lambda b, x, y: b.add(b.permute(x, axes=(1, 0)), y),
                            [randn(70, 65), randn(65, 70)]),
    "batched transpose": Case([f32(3, 40, 66)], lambda b, x: b.neg(b.permute(x, axes=(0, 2, 1))),
                              [randn(3, 40, 66)]),
    "split heads": Case([f32(2, 7, 24)],
                        lambda b, x: b.permute(b.reshape(x, shape=(2, 7, 3, 8)), axes=(0, 2, 1, 3)),
                        [randn(2, 7, 24)]),
    "merge heads": Case([f32(2, 3, 7, 8)],
                        lambda b, x: b.reshape(b.permute(b.relu(x), axes=(0, 2, 1, 3)),
                                               shape=(2, 7, 24)),
                        [randn(2, 3, 7, 8)]),
    "awkward reshape": Case([f32(6, 35)], lambda b, x: b.neg(b.reshape(x, shape=(14, 15))),
                            [randn(6, 35)]),
    "reshape of permute": Case([f32(6, 10)],
                               lambda b, x: b.reshape(b.permute(x, axes=(1, 0)), shape=(4, 15)),
                               [randn(6, 10)]),
    "slice with step": Case([f32(4, 20)],
                            lambda b, x: b.abs(b.slice(x, axis=1, start=3, stop=18, step=4)),
                            [randn(4, 20)]),
    "flip": Case([f32(4, 5, 6)], lambda b, x: b.flip(x, axes=(0, 2)), [randn(4, 5, 6)]),
    "diagonal": Case([f32(5, 7, 3)],
                     lambda b, x: b.neg(b.diagonal(x, offset=1, axis1=0, axis2=1)),
                     [randn(5, 7, 3)]),
    "unfold": Case([f32(3, 20)], lambda b, x: b.neg(b.unfold(x, axis=1, size=5, step=3)),
                   [randn(3, 20)]),
    "cat": Case([f32(3, 5), f32(3, 0), f32(3, 2)],
                lambda b, x, y, z: b.cat(b.neg(x), y, z, axis=1),
                [randn(3, 5), randn(3, 0), randn(3, 2)]),
    "cat of cat": Case([f32(2, 3), f32(4, 3)],
                       lambda b, x, y: b.cat(b.cat(x, y, axis=0), b.exp(x), axis=0),
                       [randn(2, 3), randn(4, 3)]),
    "pad": Case([f32(4, 5)], lambda b, x: b.pad(x, low=(1, 0), high=(2, 3), value=-1.5),
                [randn(4, 5)]),
    "crop and pad": Case([f32(6, 5)], lambda b, x: b.pad(x, low=(-2, 1), high=(1, -1)),
                         [randn(6, 5)]),
    "slice update": Case([f32(4, 9), f32(4, 3)],
                         lambda b, x, y: b.slice_update(x, y, axis=1, start=2, stop=8, step=2),
                         [randn(4, 9), randn(4, 3)]),
    "iota": Case([f32(3, 5)],
                 lambda b, x: b.add(x, b.iota(shape=(3, 5), axis=1, dtype=torch.float32,
                                              start=2, step=3)),
                 [randn(3, 5)]),
    "tri mask": Case([f32(6, 8)],
                     lambda b, x: b.where(b.tri_mask(rows=6, columns=8, diagonal=2, lower=-3), x,
                                          b.scalar(-9.0, torch.float32)),
                     [randn(6, 8)]),
    "embedding": Case([f32(11, 6), typed(torch.int64, 2, 3)],
                      lambda b, t, i: b.embedding(t, i), [randn(11, 6), integers(0, 11, 2, 3)]),
    "gather": Case([f32(3, 7, 4), typed(torch.int32, 5, 2)],
                   lambda b, x, i: b.exp(b.gather(x, i, axis=1)),
                   [randn(3, 7, 4), integers(-7, 7, 5, 2).int()]),
    "codebook": Case([f32(16), typed(torch.uint8, 9, 33)], lambda b, c, i: b.gather(c, i, axis=0),
                     [randn(16), integers(0, 16, 9, 33).to(torch.uint8)]),
    "take along": Case([f32(4, 9), typed(torch.int64, 4, 5)],
                       lambda b, x, i: b.take_along(x, i, axis=1),
                       [randn(4, 9), integers(0, 9, 4, 5)]),
    "index adjacent": Case([f32(4, 5, 6), typed(torch.int64, 3), typed(torch.int64, 2, 1)],
                           lambda b, x, i, j: b.index(x, i, j, axes=(1, 2)),
                           [randn(4, 5, 6), integers(-5, 5, 3), integers(-6, 6, 2, 1)]),
    "index apart": Case([f32(4, 5, 6), typed(torch.int64, 3), typed(torch.int64, 3)],
                        lambda b, x, i, j: b.index(x, i, j, axes=(0, 2)),
                        [randn(4, 5, 6), integers(-4, 4, 3), integers(-6, 6, 3)]),
    "dynamic slice": Case([f32(9, 4), typed(torch.int64)],
                          lambda b, x, p: b.dynamic_slice(x, p, axis=0, size=3),
                          [randn(9, 4), torch.tensor(8)]),
    "dynamic update": Case([f32(2, 9, 4), f32(2, 3, 4), typed(torch.int64)],
                           lambda b, x, y, p: b.dynamic_update(x, b.neg(y), p, axis=1),
                           [randn(2, 9, 4), randn(2, 3, 4), torch.tensor(5)]),
    "rope": Case([f32(2, 3, 5, 8), f32(5, 8), f32(5, 8)], rope,
                 [randn(2, 3, 5, 8), randn(5, 8), randn(5, 8)]),
    "few rows": Case([f32(2, 5000), f32(5000)], lambda b, x, y: b.add(b.permute(
        b.reshape(x, shape=(2, 50, 100)), axes=(1, 0, 2)), b.reshape(y, shape=(50, 1, 100))),
                     [randn(2, 5000), randn(5000)]),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEX_CASES)
def test_index_maps(name: str) -> None:
    case = INDEX_CASES[name]
    check(case.types, case.build, case.inputs, case.tolerance)


REDUCTION_CASES: dict[str, Case] = {
    "rows": Case([f32(5, 130)], lambda b, x: b.sum(x, axes=(1,)), [randn(5, 130)]),
    "short rows": Case([f32(9, 7)], lambda b, x: b.sum(b.mul(x, x), axes=(1,)), [randn(9, 7)]),
    "columns": Case([f32(37, 100)], lambda b, x: b.sum(x, axes=(0,)), [randn(37, 100)]),
    "middle": Case([f32(3, 20, 70)], lambda b, x: b.mean(x, axes=(1,), keepdim=True),
                   [randn(3, 20, 70)]),
    "outer and inner": Case([f32(4, 5, 6)], lambda b, x: b.sum(x, axes=(0, 2)), [randn(4, 5, 6)]),
    "everything": Case([f32(30, 40)], lambda b, x: b.sum(x, axes=(0, 1)), [randn(30, 40)]),
    "no axes": Case([f32(3, 4)], lambda b, x: b.sum(x, axes=()), [randn(3, 4)]),
    "axis of one": Case([f32(3, 1, 4)], lambda b, x: b.amax(x, axes=(1,)), [randn(3, 1, 4)]),
    "maximum": Case([f32(4, 33)], lambda b, x: b.amax(x, axes=(1,)), [randn(4, 33)]),
    "nan in maximum": Case([f32(3, 40)], lambda b, x: (b.amax(x, axes=(1,)), b.amin(x, axes=(1,))),
                           [torch.where(torch.arange(120).reshape(3, 40) == 77, torch.nan,
                                        randn(3, 40))]),
    "argmax": Case([f32(4, 1000)], lambda b, x: (b.argmax(x, axis=1), b.argmin(x, axis=1)),
                   [randn(4, 1000).round()]),
    "argmax of nan": Case([f32(2, 90)], lambda b, x: b.argmax(x, axis=1),
                          [torch.where(torch.arange(180).reshape(2, 90) % 90 > 70, torch.nan,
                                       randn(2, 90))]),
    "argmax of columns": Case([f32(50, 70)], lambda b, x: b.argmax(x, axis=0),
                              [randn(50, 70).round()]),
    "any and all": Case([typed(torch.bool, 4, 50)],
                        lambda b, x: (b.any(x, axes=(1,)), b.all(x, axes=(1,))),
                        [torch.arange(200).reshape(4, 50) % 51 == 3]),
    "integer sum": Case([typed(torch.int8, 4, 300)], lambda b, x: b.sum(x, axes=(1,)),
                        [integers(-128, 128, 4, 300).to(torch.int8)]),
    "bool sum": Case([typed(torch.bool, 7, 9)], lambda b, x: b.sum(x, axes=(0,)),
                     [torch.arange(63).reshape(7, 9) % 2 == 0]),
    "product": Case([f32(3, 20)], lambda b, x: b.prod(x, axis=1), [randn(3, 20)]),
    "integer maximum": Case([typed(torch.int64, 3, 70)], lambda b, x: b.amax(x, axes=(1,)),
                            [integers(-(2**40), 2**40, 3, 70)]),
    "half sum": Case([typed(torch.float16, 5, 600)], lambda b, x: b.sum(x, axes=(1,)),
                     [randn(5, 600).half()]),
    "softmax": Case([f32(6, 100)], lambda b, x: b.softmax(x, axis=1), [randn(6, 100)]),
    "softmax over the front": Case([f32(40, 90)], lambda b, x: b.softmax(x, axis=0),
                                   [randn(40, 90)]),
    "log softmax": Case([f32(6, 50)], lambda b, x: b.log_softmax(x, axis=1), [randn(6, 50)]),
    "layer norm": Case([f32(3, 5, 96), f32(96), f32(96)],
                       lambda b, x, w, c: b.layer_norm(x, w, c, rank=1, eps=1e-5),
                       [randn(3, 5, 96), randn(96), randn(96)]),
    "layer norm of two axes": Case([f32(3, 8, 20), f32(8, 20)],
                                   lambda b, x, w: b.layer_norm(x, w, rank=2, eps=1e-5),
                                   [randn(3, 8, 20), randn(8, 20)]),
    "bfloat16 rms norm": Case([typed(torch.bfloat16, 4, 64), typed(torch.bfloat16, 64)],
                              lambda b, x, w: b.rms_norm(x, w, eps=1e-5, cast_before_weight=True),
                              [randn(4, 64).bfloat16(), randn(64).bfloat16()], 8e-3),
    "group norm": Case([f32(2, 12, 5, 5), f32(12), f32(12)],
                       lambda b, x, w, c: b.group_norm(x, w, c, groups=3, eps=1e-5),
                       [randn(2, 12, 5, 5), randn(12), randn(12)]),
    "one large group": Case([f32(1, 8, 64, 64)],
                            lambda b, x: b.group_norm(x, groups=1, eps=1e-5),
                            [randn(1, 8, 64, 64)]),
    "variance": Case([f32(4, 90)], lambda b, x: b.var(x, axes=(1,)), [randn(4, 90)]),
    "divide by total": Case([f32(200, 100)], lambda b, x: b.div(x, b.sum(x, axes=(0, 1))),
                            [randn(200, 100).abs()]),
    "shared rows": Case([f32(3, 4, 50)], shared_statistics, [randn(3, 4, 50)]),
    "reduction of reduction": Case(
        [f32(6, 7, 40)], lambda b, x: b.amax(b.sum(x, axes=(2,)), axes=(1,)), [randn(6, 7, 40)]),
    "row total in another row": Case(
        [f32(30, 40)],
        lambda b, x: b.sum(b.mul(x, b.reshape(b.sum(x, axes=(0,)), shape=(1, 40))), axes=(1,)),
        [randn(30, 40)], 2e-5),
    "gathered norm": Case([f32(20, 64), typed(torch.int64, 5)],
                          lambda b, t, i: b.rms_norm(b.embedding(t, i), eps=1e-6),
                          [randn(20, 64), integers(0, 20, 5)]),
    "dequantize": Case([typed(torch.int8, 6, 128), f32(6, 2), typed(torch.int8, 6, 2)],
                       lambda b, q, s, z: b.dequantize(q, s, z, axis=1, group=64),
                       [integers(-128, 128, 6, 128).to(torch.int8), randn(6, 2),
                        integers(-9, 9, 6, 2).to(torch.int8)]),
    "sum over nothing": Case([f32(4, 0)], lambda b, x: b.sum(x, axes=(1,)), [randn(4, 0)]),
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCTION_CASES)
def test_reductions(name: str) -> None:
    case = REDUCTION_CASES[name]
    check(case.types, case.build, case.inputs, case.tolerance)


SYMBOLIC: dict[str, tuple[Sequence[TensorType], Callable[..., Any], Callable[[int, int], Any]]] = {
    "pointwise": ([f32(S, 8, T), f32(T)], lambda b, x, y: b.gelu(b.add(x, y)),
                  lambda s, t: [randn(s, 8, t), randn(t)]),
    "softmax": ([f32(S, T)], lambda b, x: b.softmax(x, axis=1), lambda s, t: [randn(s, t)]),
    "norm": ([f32(S, 48), f32(48)], lambda b, x, w: b.rms_norm(x, w, eps=1e-5),
             lambda s, t: [randn(s, 48), randn(48)]),
    "columns": ([f32(S, T)], lambda b, x: b.sum(x, axes=(0,)), lambda s, t: [randn(s, t)]),
    "merge heads": ([f32(S, 3, T, 8)],
                    lambda b, x: b.exp(b.reshape(b.permute(x, axes=(0, 2, 1, 3)),
                                                 shape=(S, T, 24))),
                    lambda s, t: [randn(s, 3, t, 8)]),
    "flatten": ([f32(S, T, 6), f32(6)],
                lambda b, x, y: b.add(b.reshape(x, shape=(S * T, 6)), y),
                lambda s, t: [randn(s, t, 6), randn(6)]),
    "unflatten": ([f32(S * T, 6), f32(S, T, 6)],
                  lambda b, x, y: b.add(b.reshape(x, shape=(S, T, 6)), y),
                  lambda s, t: [randn(s * t, 6), randn(s, t, 6)]),
    "append": ([f32(2, S, 4), f32(2, T, 4)], lambda b, x, y: b.cat(x, b.neg(y), axis=1),
               lambda s, t: [randn(2, s, 4), randn(2, t, 4)]),
    "causal": ([f32(3, S, T)],
               lambda b, x: b.softmax(b.where(
                   b.tri_mask(rows=S, columns=T, diagonal=T - S), x,
                   b.scalar(float("-inf"), torch.float32)), axis=2),
               lambda s, t: [randn(3, s, max(s, t))]),
    "transpose": ([f32(S, T)], lambda b, x: b.neg(b.permute(x, axes=(1, 0))),
                  lambda s, t: [randn(s, t)]),
    "count": ([f32(S, T)], lambda b, x: b.mean(x, axes=(1,)), lambda s, t: [randn(s, t)]),
    "positions": ([f32(S, T)],
                  lambda b, x: b.add(x, b.iota(shape=(S, T), axis=0, dtype=torch.float32)),
                  lambda s, t: [randn(s, t)]),
}  # fmt: skip


@pytest.mark.parametrize("sizes", [(1, 1), (1, 70), (5, 3), (64, 64), (67, 129)])
@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes(name: str, sizes: tuple[int, int]) -> None:
    types, build, inputs = SYMBOLIC[name]
    check(types, build, inputs(*sizes))


def test_large_kernels_run_on_several_threads_and_agree_with_one() -> None:
    x, y = randn(300, 1000), randn(1000)
    function = function_of(
        [f32(300, 1000), f32(1000)], lambda b, x, y: b.softmax(b.add(x, y), axis=1)
    )
    runner = Runner([function])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        (alone,) = runner(0, [x, y])
        torch.set_num_threads(max(before, 2))
        (shared,) = runner(0, [x, y])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, shared)


@pytest.mark.parametrize(
    ("build", "bad"),
    [
        (lambda b, t, i: b.embedding(t, i), [[0, 7], [0, -1]]),
        (lambda b, t, i: b.gather(t, i, axis=0), [[0, 7], [0, -8]]),
        (lambda b, t, i: b.take_along(t, b.reshape(i, shape=(2, 1)), axis=0), [[0, 7], [-1, 0]]),
    ],
)
def test_an_index_out_of_range_is_an_error(build: Any, bad: list[list[int]]) -> None:
    function = function_of([f32(7, 4), typed(torch.int64, 2)], build)
    runner = Runner([function])
    runner(0, [randn(7, 4), torch.tensor([6, 0])])
    for index in bad:
        with pytest.raises(ExecutionError, match="out of range"):
            runner(0, [randn(7, 4), torch.tensor(index)])


def test_an_update_that_does_not_fit_is_an_error() -> None:
    function = function_of(
        [f32(9, 4), f32(3, 4), typed(torch.int64)],
        lambda b, x, y, p: b.dynamic_update(x, y, p, axis=0),
    )
    with pytest.raises(ExecutionError, match="out of range"):
        run_kernel(function, [randn(9, 4), randn(3, 4), torch.tensor(7)])


def test_equal_regions_are_compiled_once() -> None:
    def build(b: B, x: Any, y: Any) -> Any:
        return b.relu(b.add(x, y))

    one = function_of([f32(4, 8), f32(8)], build)
    two = function_of([f32(4, 8), f32(8)], build)
    other = function_of([f32(4, 9), f32(9)], build)
    two.args[0].name = "another"
    compiled = BACKEND.compile([kernel_of(one), kernel_of(two), kernel_of(other)])
    assert compiled.symbols[0] == compiled.symbols[1] != compiled.symbols[2]
    assert sorted(compiled.sources) == sorted({*compiled.symbols, "shim.c"})


def test_results_that_may_overwrite_an_operand() -> None:
    def pairs(types: Sequence[TensorType], build: Any) -> list[tuple[int, int]]:
        runner = Runner([function_of(types, build)])
        return runner.compiled.inplace[runner.compiled.symbols[0]]

    square = [f32(8, 8), f32(8, 8)]
    assert pairs(square, lambda b, x, y: b.add(b.exp(x), y)) == [(0, 0), (0, 1)]
    assert pairs(square, lambda b, x, y: b.add(b.permute(x, axes=(1, 0)), y)) == [(0, 1)]
    assert pairs(square[:1], lambda b, x: b.softmax(x, axis=1)) == [(0, 0)]
    assert pairs(square[:1], lambda b, x: b.flip(x, axes=(0,))) == []
    assert pairs(square[:1], lambda b, x: b.cast(x, dtype=torch.float64)) == []
    assert pairs(square[:1], lambda b, x: b.sum(x, axes=(1,))) == []
    assert pairs(square[:1], lambda b, x: (b.exp(x), b.sum(x, axes=(0,)))) == []


def test_a_result_never_overwrites_what_a_later_one_reads() -> None:
    """Results of an element are stored one after another (gradients of a residual block)."""

    def build(b: B, x: Any, y: Any, z: Any) -> Any:
        first = b.add(x, y)
        return first, b.mul(first, z), b.mul(x, x)

    runner = Runner([function_of([f32(4, 8)] * 3, build)])
    pairs = runner.compiled.inplace[runner.compiled.symbols[0]]
    assert pairs == [(1, 1), (1, 2), (2, 0)]


def test_any_and_all_of_numbers_ask_whether_they_are_zero() -> None:
    x = torch.tensor([[0.25, -8.5, 0.0], [256.0, 2.0, 1.0], [0.0, -0.0, 0.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.int32):
        given = (x * 4).to(dtype)
        for name in ("any", "all"):
            check([typed(dtype, 3, 3)], lambda b, v, n=name: getattr(b, n)(v, axes=(1,)), [given])
            check([typed(dtype, 3, 3)], lambda b, v, n=name: getattr(b, n)(v, axes=(0,)), [given])


def test_zero_times_infinity_is_no_zero() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 2.0])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):

        def build(b: B, v: Any) -> Any:
            zero = b.scalar(0.0, v.dtype)
            return b.mul(v, zero), b.mul(zero, v), b.div(zero, v)

        check([typed(dtype, 5)], build, [x.to(dtype)])


def test_division_by_a_constant_zero() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 2.0, -1e-40])

    def build(b: B, v: Any) -> Any:
        return b.div(v, b.scalar(0.0, v.dtype)), b.div(v, b.scalar(-0.0, v.dtype))

    for dtype in (torch.float32, torch.float64):
        check([typed(dtype, 6)], build, [x.to(dtype)])


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (2, 0, 70)])
def test_empty_results(shape: tuple[int, ...]) -> None:
    """Loops that never run are still loops: no constant division by their lengths."""

    def transposed(b: B, x: Any) -> Any:
        return b.exp(b.permute(x, axes=(2, 0, 1))), b.cat(x, x, axis=2), b.sum(x, axes=(0,))

    def rows(b: B, x: Any) -> Any:
        return b.softmax(x, axis=2), b.any(x, axes=(1,)), b.sum(b.cat(x, x, axis=0), axes=(0,))

    def stacked(b: B, x: Any) -> Any:
        parts = [b.reshape(x, shape=(1, *shape))] * 2
        return b.cat(*parts, axis=0), x, b.reshape(b.exp(x), shape=(shape[2], shape[0], shape[1]))

    x = torch.randn(shape)
    for build in (transposed, rows, stacked):
        for i in range(3):
            check([f32(*shape)], lambda b, v, n=i, f=build: f(b, v)[n], [x])


def test_refusals_say_why() -> None:
    complex_type = typed(torch.complex64, 4)
    function = function_of([complex_type], lambda b, x: b.exp(x))
    assert "complex64" in str(BACKEND.supports(next(iter(function.ops))))
    function = function_of([f32(4, 6)], lambda b, x: b.cumsum(x, axis=1))
    assert "cumsum" in str(BACKEND.supports(next(iter(function.ops))))
    with pytest.raises(BackendError, match="cumsum"):
        BACKEND.compile([kernel_of(function)])


def test_sources_are_readable_programs() -> None:
    runner = check([f32(4, 8)], lambda b, x: b.relu(x), [randn(4, 8)])
    source = runner.compiled.sources[runner.compiled.symbols[0]]
    assert "@T.prim_func" in source and "T.Select" in source
    assert "accel_use_pool" in runner.compiled.sources["shim.c"]


@pytest.mark.parametrize(("s", "t"), [(2, 12), (3, 17), (5, 9), (3, 12)])
def test_sizes_with_floors_inside_products(s: int, t: int) -> None:
    """Rows by tens: the number of pieces is a floor over a product with a floor in it."""
    even = 2 * ((T - 1) // 2) + 2

    def build(b: B, x: Any, y: Any, z: Any) -> Any:
        del y, z
        return b.permute(b.exp(x), axes=(0, 2, 1))

    types = [f32(S, even, 70), f32(S), f32(T)]
    given = [torch.randn(s, 2 * ((t - 1) // 2) + 2, 70), torch.randn(s), torch.randn(t)]
    check(types, build, given)
