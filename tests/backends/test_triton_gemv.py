"""Linears of few rows as Triton kernels: through its interpreter, and compiled for three GPUs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.errors import BackendError
from accel.ir import Function, TensorType, WeightStore, interpret
from accel.ir.module import Value
from accel.ir.storage import pack_sub_byte
from accel.ir.types import SUB_BYTE_BITS
from tests.backends.kernels import f32, function_of, kernel_of
from tests.backends.test_tvm_kernels import randn, typed
from tests.backends.triton_kernels import BACKEND, InterpretedKernels
from tests.backends.triton_worker import Worker

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def check(
    worker: Worker,
    function: Function,
    inputs: Sequence[Tensor],
    kind: str,
    weights: int | None = None,
    backend: TritonBackend = BACKEND,
) -> str:
    """Compares a kernel with the float64 oracle; returns its source."""
    runner = InterpretedKernels([function], worker, [kind], backend, weights)
    exact = interpret(function, inputs, WeightStore(), oracle=True)
    stored = [
        pack_sub_byte(t, a.dtype) if a.dtype in SUB_BYTE_BITS else t
        for t, a in zip(inputs, function.args, strict=True)
    ]
    for got, want, result in zip(runner(0, stored), exact, function.results, strict=True):
        assert got.dtype == result.dtype and got.shape == want.shape
        roundings = 4 if got.dtype.itemsize < 4 else 16  # of linear, activation, product, residual
        bound = roundings * torch.finfo(got.dtype).eps * float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= bound, runner.source(0)
    return runner.source(0)


def turned(b: Any, y: Value, cos: Value, sin: Value, heads: int) -> Value:
    """Rotary embedding of the first heads of [B, S, H * D]; cos and sin are [S, D]."""
    rows, length, width = (int(d) for d in y.shape)
    depth = int(cos.shape[1])
    first = b.slice(y, axis=2, start=0, stop=heads * depth)
    split = b.reshape(first, shape=(rows, length, heads, depth))
    around = [b.reshape(v, shape=(1, length, 1, depth)) for v in (cos, sin)]
    flat = b.reshape(b.rope(split, *around), shape=(rows, length, heads * depth))
    return b.cat(flat, b.slice(y, axis=2, start=heads * depth, stop=width), axis=2)


def halves(b: Any, y: Value) -> Value:
    """silu(gate) * up, of one merged linear's result."""
    axis, size = y.type.rank - 1, int(y.shape[-1]) // 2
    gate = b.slice(y, axis=axis, start=0, stop=size)
    return b.mul(b.silu(gate), b.slice(y, axis=axis, start=size, stop=2 * size))


Case = tuple[list[TensorType], Callable[..., Any]]
CASES: dict[str, Case] = {
    "plain": ([f32(1, 96), f32(40, 96)], lambda b, x, w: b.linear(x, w)),
    "a vector": ([f32(96), f32(40, 96)], lambda b, x, w: b.linear(x, w)),
    "square": ([f32(1, 128), f32(128, 128)], lambda b, x, w: b.linear(x, w)),
    "odd sizes": ([f32(3, 77), f32(13, 77)], lambda b, x, w: b.linear(x, w)),
    "one result": ([f32(1, 300), f32(1, 300)], lambda b, x, w: b.linear(x, w)),
    "long sums, bias": (
        [typed(BF16, 1, 3000), typed(BF16, 6, 3000), typed(BF16, 6)],
        lambda b, x, w, c: b.linear(x, w, c),
    ),
    "rows, gelu, residual": (
        [typed(FP16, 2, 2, 64), typed(FP16, 24, 64), typed(FP16, 24), typed(FP16, 2, 2, 24)],
        lambda b, x, w, c, r: b.add(b.gelu(b.linear(x, w, c)), r),
    ),
    "norm": (
        [typed(BF16, 1, 1, 128), typed(BF16, 128), typed(BF16, 128, 128)],
        lambda b, x, g, w: b.linear(b.rms_norm(x, g, eps=1e-5, cast_before_weight=True), w),
    ),
    "norm, long": (
        [f32(2, 1500), f32(1500), f32(20, 1500)],
        lambda b, x, g, w: b.linear(b.rms_norm(x, g, eps=1e-5, offset=1.0), w),
    ),
    "norm, gate times up": (
        [typed(BF16, 1, 1, 64), typed(BF16, 64), typed(BF16, 96, 64)],
        lambda b, x, g, w: halves(b, b.linear(b.rms_norm(x, g, eps=1e-6), w)),
    ),
    "activation before": (
        [typed(BF16, 2, 48), typed(BF16, 33, 48)],
        lambda b, x, w: b.linear(b.silu(x), w),
    ),
    "int8 a channel": (
        [f32(2, 64), typed(torch.int8, 24, 64), f32(24, 1)],
        lambda b, x, q, s: b.linear(x, b.dequantize(q, s, axis=1, group=64)),
    ),
    "int4 in groups": (
        [f32(2, 128), typed(torch.uint4, 24, 128), f32(24, 4), typed(torch.uint8, 24, 4)],
        lambda b, x, q, s, z: b.linear(x, b.dequantize(q, s, z, axis=1, group=32)),
    ),
    "int8 in groups, rows and columns that fit no tile": (
        [typed(BF16, 3, 192), typed(torch.int8, 13, 192), typed(BF16, 13, 6),
         typed(torch.int8, 13, 6), typed(BF16, 13)],
        lambda b, x, q, s, z, c: b.linear(x, b.dequantize(q, s, z, axis=1, group=32), c),
    ),
    "bytes a channel with a zero, long": (
        [typed(FP16, 1, 4160), typed(torch.uint8, 7, 4160), typed(FP16, 7, 1),
         typed(torch.uint8, 7, 1)],
        lambda b, x, q, s, z: b.linear(x, b.dequantize(q, s, z, axis=1, group=4160)),
    ),
    "signed nibbles in long groups": (
        [f32(2, 2048), typed(torch.int4, 5, 2048), f32(5, 2)],
        lambda b, x, q, s: b.linear(x, b.dequantize(q, s, axis=1, group=1024)),
    ),
    "float8 a channel": (
        [typed(BF16, 2, 96), typed(torch.float8_e4m3fn, 9, 96), typed(BF16, 9, 1)],
        lambda b, x, q, s: b.linear(x, b.dequantize(q, s, axis=1)),
    ),
    "a scale for all": (
        [f32(1, 64), typed(torch.int8, 8, 64), f32()],
        lambda b, x, q, s: b.linear(x, b.dequantize(q, s)),
    ),
    "int8, norm, gate times up": (
        [typed(BF16, 2, 64), typed(BF16, 64), typed(torch.int8, 32, 64), typed(BF16, 32, 1)],
        lambda b, x, g, q, s: halves(
            b, b.linear(b.rms_norm(x, g, eps=1e-6), b.dequantize(q, s, axis=1, group=64))
        ),
    ),
    "int4, norm, gate times up": (
        [typed(BF16, 1, 64), typed(BF16, 64), typed(torch.uint4, 32, 64), typed(BF16, 32, 2),
         typed(torch.uint8, 32, 2)],
        lambda b, x, g, q, s, z: halves(
            b, b.linear(b.rms_norm(x, g, eps=1e-6), b.dequantize(q, s, z, axis=1, group=32))
        ),
    ),
}  # fmt: skip


def inputs_for(types: Sequence[TensorType]) -> list[Tensor]:
    """Random tensors; sub-byte ones an element a byte, as the interpreter takes them."""
    made: list[Tensor] = []
    for t in types:
        shape = tuple(int(d) for d in t.shape)
        if t.dtype.is_floating_point:
            made.append(randn(*shape).to(t.dtype))
        elif t.dtype == torch.int4:
            made.append(torch.randint(-8, 8, shape).to(torch.int8))
        elif t.dtype == torch.int8:
            made.append(torch.randint(-128, 128, shape).to(torch.int8))
        else:
            made.append(torch.randint(0, 16, shape).to(torch.uint8))
    return made


@pytest.mark.parametrize("weights", [None, 1])
@pytest.mark.parametrize("name", CASES)
def test_few_rows(worker: Worker, name: str, weights: int | None) -> None:
    types, build = CASES[name]
    torch.manual_seed(0)
    check(worker, function_of(types, build), inputs_for(types), "gemv", weights)


def random_case(seed: int, most_rows: int) -> Case:
    """A linear with a random norm, bias and epilogue; sizes that fit no tile are likely."""
    draw = random.Random(seed)
    dtype = draw.choice((FP16, BF16) if most_rows > 4 else (FP16, BF16, torch.float32))
    rows, depth = draw.randint(2, most_rows), draw.choice((8, 33, 64, 100, 300))
    columns, lead = draw.choice((6, 16, 35, 64)), draw.choice(((), (1,)))
    norm, bias = draw.random() < 0.4, draw.random() < 0.5
    after = draw.sample(("gelu", "silu", "residual", "tanh", "scale"), draw.randint(0, 3))
    gate = not after and columns % 2 == 0
    types = [typed(dtype, *lead, rows, depth), typed(dtype, columns, depth)]
    types += [typed(dtype, depth)] if norm else []
    types += [typed(dtype, columns)] if bias else []
    types += [typed(dtype, *lead, rows, columns)] if "residual" in after else []

    def build(b: Any, x: Value, w: Value, *rest: Value) -> Value:
        left = list(rest)
        if norm:
            g = left.pop(0)
            x = b.rms_norm(x, g, eps=1e-5) if most_rows <= 4 else b.mul(x, g)
        y = b.linear(x, w, left.pop(0) if bias else None)
        for op in after:
            if op == "residual":
                y = b.add(y, left.pop(0))
            elif op == "scale":
                y = b.mul(y, b.scalar(0.5, dtype))
            else:
                y = getattr(b, op)(y)
        return halves(b, y) if gate else y

    return types, build


@pytest.mark.parametrize("seed", range(12))
def test_random_regions(worker: Worker, seed: int) -> None:
    types, build = random_case(seed, 4)
    torch.manual_seed(seed)
    check(worker, function_of(types, build), inputs_for(types), "gemv")


def test_one_launch_reads_each_weight_once(worker: Worker) -> None:
    types, build = CASES["norm, gate times up"]
    source = check(worker, function_of(types, build), inputs_for(types), "gemv")
    assert source.count("@triton.jit") == 1
    assert source.count("evict_first") == 2  # the two halves


def test_rows_share_the_weight(worker: Worker) -> None:
    types, build = CASES["rows, gelu, residual"]
    source = check(worker, function_of(types, build), inputs_for(types), "gemv")
    assert source.count("evict_first") == 1 and source.count("tl.sum(") == 4


def test_refusals_say_why() -> None:
    five = function_of([f32(5, 64), f32(8, 64)], lambda b, x, w: b.linear(x, w))
    (op,) = (o for o in five.ops if o.name == "linear")
    assert "5 rows" in str(BACKEND.supports_anchor(op, "gemv"))
    assert "torch.float32" in str(BACKEND.supports_product(op))
    assert "sideways" in str(BACKEND.supports_anchor(op, "sideways"))
    exp = function_of([f32(5)], lambda b, x: b.exp(x))
    assert "accel.exp is not" in str(BACKEND.supports_anchor(next(iter(exp.ops)), "gemv"))


def test_halves_of_other_sizes_are_refused() -> None:
    function = function_of(
        [f32(1, 64), f32(9, 64)],
        lambda b, x, w: [b.slice(b.linear(x, w), axis=1, start=0, stop=4), b.linear(x, w)],
    )
    with pytest.raises(BackendError, match="columns"):
        BACKEND.generate([kernel_of(function, "gemv")])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["norm, gate times up", "int4 in groups"])
def test_compiles_without_a_gpu(arch: str, name: str) -> None:
    types, build = CASES[name]
    made = TritonBackend(arch).compile([kernel_of(function_of(types, build), "gemv")])
    (launch,) = made.launches[made.names[0]]
    assert launch.binary.cubin and f".target {arch}" in launch.binary.ptx


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e15])
@pytest.mark.parametrize("name", ["int8 a channel", "int4 in groups"])
def test_sums_over_codes_at_any_usual_size(worker: Worker, name: str, size: float) -> None:
    types, build = CASES[name]
    torch.manual_seed(0)
    x, *weights = inputs_for(types)
    source = check(worker, function_of(types, build), [x * size, *weights], "gemv", 1)
    assert "bitcast=True) *" in source  # codes are floats by their bits


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_sums_over_codes_pass_on_what_is_no_number(worker: Worker, bad: float) -> None:
    types = [f32(1, 64), typed(torch.uint8, 8, 64), f32(8, 1)]
    function = function_of(types, lambda b, x, q, s: b.linear(x, b.dequantize(q, s, axis=1)))
    x, codes, scale = torch.ones(1, 64), torch.full((8, 64), 3, dtype=torch.uint8), torch.ones(8, 1)
    x[0, 5] = bad
    (got,) = InterpretedKernels([function], worker, ["gemv"], weights=1)(0, [x, codes, scale])
    assert torch.equal(got.isnan(), torch.full((1, 8), bad != bad))
    assert bad != bad or torch.equal(got, torch.full((1, 8), bad))
