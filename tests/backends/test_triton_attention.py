"""Generated attention for GPUs: through Triton's interpreter, and compiled for three GPUs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.attention_tiles import AttentionTile, choose_loop
from accel.errors import BackendError
from accel.ir import Function, TensorType, WeightStore, interpret
from tests.backends.kernels import f32, function_of, kernel_of, sym
from tests.backends.test_tvm_attention import BOOL, CASES, Case
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import BACKEND, InterpretedKernels
from tests.backends.triton_worker import Worker

BF16, FP16 = torch.bfloat16, torch.float16
# Largest error over the largest value: weights are at most 1 and sum to 1; those of 16-bit floats
# are rounded before they meet the values, and so is the result.
LIMITS = {torch.float32: 3e-6, BF16: 1.2e-2, FP16: 1.5e-3}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def inputs_of(types: Sequence[TensorType], size: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for t in types:
        shape = [size if not isinstance(d, int) else d for d in t.shape]
        if t.dtype == BOOL:
            made.append(torch.rand(shape, generator=generator) < 0.7)
        else:
            made.append(torch.randn(shape, generator=generator).to(t.dtype))
    return made


def check(
    worker: Worker, function: Function, inputs: Sequence[Tensor], tile: AttentionTile | None = None
) -> str:
    """Compares a kernel with the float64 oracle; returns its source."""
    backend = BACKEND if tile is None else TritonBackend(tile=tile)
    runner = InterpretedKernels([function], worker, ["attention"], backend)
    (want,) = interpret(function, inputs, WeightStore(), oracle=True)
    (got,) = runner(0, inputs)
    (result,) = function.results
    assert got.dtype == result.dtype and got.shape == want.shape
    bound = LIMITS[got.dtype] * max(float(want.abs().max()), 1e-3)
    assert float((got.double() - want).abs().max()) <= bound, runner.source(0)
    return runner.source(0)


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(worker: Worker, name: str) -> None:
    case = CASES[name]
    check(worker, case.function(), inputs_of(case.types(), case.size))


def heads(b: Any, x: Any, size: int) -> Any:
    """[B, S, H * D] -> [B, H, S, D]."""
    batch, length, width = x.shape
    return b.permute(b.reshape(x, shape=(batch, length, width // size, size)), axes=(0, 2, 1, 3))


def merged(b: Any, y: Any) -> Any:
    batch, count, length, size = y.shape
    return b.reshape(b.permute(y, axes=(0, 2, 1, 3)), shape=(batch, length, count * size))


def fused(b: Any, x: Any, *, size: int, groups: int = 0, **attributes: Any) -> Any:
    """Attention on the slices of one projection [B, S, (H + 2 G) * D]."""
    width = x.shape[2] // size
    groups = groups or width // 3
    bounds = (0, width - 2 * groups, width - groups, width)
    parts = [
        heads(b, b.slice(x, axis=2, start=low * size, stop=high * size), size)
        for low, high in pairwise(bounds)
    ]
    return merged(b, b.attention(*parts, scale=size**-0.5, **attributes))


def alibi(b: Any, q: Any, k: Any, v: Any) -> Any:
    """A bias of distances that is computed in the kernel."""
    heads_, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    f = torch.float32
    slope = b.exp2(b.mul(b.iota(shape=(1, heads_, 1, 1), axis=1, dtype=f), b.scalar(-1.0, f)))
    key = b.iota(shape=(1, 1, 1, keys), axis=3, dtype=f)
    query = b.iota(shape=(1, 1, queries, 1), axis=2, dtype=f)
    bias = b.cast(b.mul(slope, b.sub(key, query)), dtype=q.dtype)
    return b.attention(q, k, v, bias, scale=0.25, causal=True)


def blocked(b: Any, q: Any, k: Any, v: Any, table: Any) -> Any:
    """A block-sparse mask: a table of blocks of 16 x 16."""
    rows, columns = q.shape[2] // 16, k.shape[2] // 16
    five = b.broadcast_to(
        b.reshape(table, shape=(1, 1, rows, 1, columns, 1)), shape=(1, 1, rows, 16, columns, 16)
    )
    return b.attention(q, k, v, b.reshape(five, shape=(1, 1, q.shape[2], k.shape[2])), scale=0.2)


S = sym("s0")
Regions = dict[str, tuple[list[TensorType], Callable[..., Any], int]]
REGIONS: Regions = {
    "a fused projection": ([typed(BF16, 2, 70, 3 * 4 * 32)], lambda b, x: fused(b, x, size=32), 0),
    "a fused projection, groups, causal": (
        [typed(FP16, 1, 130, 8 * 64)],
        lambda b, x: fused(b, x, size=64, groups=2, causal=True), 0,
    ),
    "symbolic, merged": (
        [typed(BF16, 2, S, 6 * 64)], lambda b, x: fused(b, x, size=64, groups=1, causal=True), 75,
    ),
    "symbolic, one token": (
        [typed(BF16, 2, S, 6 * 64)], lambda b, x: fused(b, x, size=64, groups=1, causal=True), 1,
    ),
    "alibi": ([typed(FP16, 1, 4, 80, 32)] * 3, alibi, 0),
    "a table of blocks": (
        [*[typed(BF16, 1, 2, 64, 32)] * 3, typed(BOOL, 4, 4)], blocked, 0,
    ),
    "keys given transposed": (
        [f32(2, 2, 40, 16), f32(2, 16, 2, 50), f32(2, 2, 50, 16)],
        lambda b, q, k, v: b.attention(q, b.permute(k, axes=(0, 2, 3, 1)), v, scale=0.3), 0,
    ),
    "odd head": ([typed(FP16, 1, 2, 40, 72)] * 3, lambda b, *x: b.attention(*x, scale=0.1), 0),
    "tiny head": ([typed(FP16, 1, 2, 40, 5)] * 3, lambda b, *x: b.attention(*x, scale=0.1), 0),
    "one query, one key": ([f32(2, 3, 1, 8)] * 3, lambda b, *x: b.attention(*x, scale=1.0), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", REGIONS)
def test_views_and_masks_around_it(worker: Worker, name: str) -> None:
    types, build, size = REGIONS[name]
    check(worker, function_of(types, build), inputs_of(types, size))


def texts(b: Any, q: Any, k: Any, v: Any, number: Any, **attributes: Any) -> Any:
    """Texts packed into one row: a query sees keys of its own text."""
    length = q.shape[2]
    rows, columns = (b.reshape(number, shape=(length, 1)), b.reshape(number, shape=(1, length)))
    return b.attention(q, k, v, b.eq(rows, columns), scale=0.2, **attributes)


@pytest.mark.parametrize(
    "attributes", [{}, {"causal": True}, {"causal": True, "window": 20}], ids=str
)
@pytest.mark.parametrize("length", [128, 150])
def test_hidden_blocks_are_left_out(
    worker: Worker, length: int, attributes: dict[str, Any]
) -> None:
    """The values of blocks that nobody sees are never read: they are NaN for one program's rows."""
    types = [*[typed(BF16, 1, 2, length, 32)] * 3, typed(torch.int64, length)]
    function = function_of(types, lambda b, *x: texts(b, *x, **attributes))
    inputs = inputs_of(types[:3], 0)
    number = torch.arange(length) // 40
    number[-30:] = 0  # a text in two pieces
    source = check(worker, function, [*inputs, number], AttentionTile(16, 32, 4, 2, listed=True))
    assert "listed" in source
    poisoned = [x.clone() for x in inputs]
    for x in poisoned[1:]:
        x[:, :, 64:96] = float("nan")  # of texts 1 and 2, a whole block
    tile = AttentionTile(16, 32, 4, 2, listed=True)
    runner = InterpretedKernels([function], worker, ["attention"], TritonBackend(tile=tile))
    (got,) = runner(0, [*poisoned, number])
    clean = (number[:16] == 0).nonzero().flatten()
    assert got[:, :, clean].isfinite().all() and not got[:, :, 70].isfinite().all()


def test_masks_that_compare_texts_are_taken_for_sparse() -> None:
    def chosen(length: int, build: Callable[..., Any], *more: TensorType) -> bool:
        types = [*[typed(BF16, 1, 2, length, 64)] * 3, *more]
        op = next(o for o in function_of(types, build).ops if o.name == "attention")
        return choose_loop(op).listed

    assert chosen(2048, texts, typed(torch.int64, 2048))
    assert not chosen(256, texts, typed(torch.int64, 256)), "too few blocks"
    padded = lambda b, q, k, v, keys: b.attention(  # noqa: E731
        q, k, v, b.reshape(keys, shape=(1, 1, 1, 2048)), scale=1.0
    )
    assert not chosen(2048, padded, typed(BOOL, 2048))


def random_case(seed: int) -> tuple[Case, AttentionTile]:
    r = random.Random(seed)
    groups, share, size = r.choice((1, 2)), r.choice((1, 2, 3)), r.choice((8, 16, 40, 64, 96))
    queries, keys = r.choice((1, 7, 33, 64, 90)), r.choice((1, 17, 64, 100, 128))
    attributes: dict[str, Any] = {"scale": r.choice((0.1, 0.3))}
    if r.random() < 0.6:
        attributes |= {"causal": True, "offset": r.choice((0, keys - queries, 5, -20))}
    if r.random() < 0.4:
        attributes["window"] = r.choice((1, 16, 50, 200))
    if r.random() < 0.3:
        attributes["softcap"] = r.choice((1.5, 30.0))
    mask: tuple[int, ...] | None = None
    if r.random() < 0.5:
        full = (2, groups * share, queries, keys)
        mask = tuple(d if r.random() < 0.6 else 1 for d in full)
    dtype = r.choice((torch.float32, BF16, FP16))
    kind = BOOL if r.random() < 0.6 else torch.float32
    tile = AttentionTile(r.choice((16, 32, 64)), r.choice((16, 32, 64)), 4, r.choice((1, 2, 3)),
                         seed % 2 == 0)  # fmt: skip
    q, k = (2, groups * share, queries, size), (2, groups, keys, size)
    v = (2, groups, keys, r.choice((size, 24)))
    return Case(q, k, v, mask, kind, dtype, attributes=attributes), tile


@pytest.mark.parametrize("seed", range(60))
def test_random_attentions(worker: Worker, seed: int) -> None:
    case, tile = random_case(seed)
    check(worker, case.function(), inputs_of(case.types(), 0, seed), tile)


def test_nan_and_infinity_reach_the_result(worker: Worker) -> None:
    function = function_of([f32(1, 1, 20, 16)] * 3, lambda b, *x: b.attention(*x, scale=1.0))
    inputs = inputs_of([f32(1, 1, 20, 16)] * 3, 0)
    inputs[0][0, 0, 3] = float("nan")
    inputs[2][0, 0, 5, 2] = float("inf")
    (want,) = interpret(function, inputs, WeightStore())
    (got,) = InterpretedKernels([function], worker, ["attention"])(0, inputs)
    torch.testing.assert_close(got, want, equal_nan=True)


def test_refusals_say_why() -> None:
    def why(*types: TensorType) -> str:
        function = function_of(types, lambda b, *x: b.attention(*x, scale=1.0))
        return str(BACKEND.supports_anchor(next(iter(function.ops)), "attention"))

    assert "float64" in why(*[typed(torch.float64, 1, 1, 8, 16)] * 3)
    assert "size 512" in why(*[f32(1, 1, 8, 512)] * 3)
    assert "without keys" in why(f32(1, 1, 8, 16), f32(1, 1, 0, 16), f32(1, 1, 0, 16))
    types = [f32(1, 1, 8, 16)] * 3
    function = function_of(types, lambda b, *x: b.exp(b.attention(*x, scale=1.0)))
    with pytest.raises(BackendError, match="not a view"):
        BACKEND.generate([kernel_of(function, "attention")])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["a fused projection, groups, causal", "alibi"])
def test_compiles_without_a_gpu(arch: str, name: str) -> None:
    types, build, _ = REGIONS[name]
    made = TritonBackend(arch).compile([kernel_of(function_of(types, build), "attention")])
    (launch,) = made.launches[made.names[0]]
    assert launch.binary.cubin and launch.binary.shared <= 160 << 10


@pytest.mark.parametrize(
    ("arch", "shape", "attributes", "dtype", "reason"),
    [
        ("sm_90", (2, 16, 8192, 128), {"causal": True}, BF16, None),  # overlapped
        ("sm_80", (2, 16, 8192, 128), {"causal": True}, BF16, "cuDNN saves"),
        ("sm_80", (2, 16, 8192, 128), {"causal": True, "softcap": 9.0}, BF16, None),
        ("sm_90", (1, 8, S, 128), {"causal": True}, BF16, None),
        ("sm_90", (8, 12, 1024, 64), {"causal": True}, BF16, None),  # many small programs
        ("sm_90", (8, 12, 2048, 64), {"causal": True}, BF16, None),
        ("sm_90", (8, 12, 1024, 64), {}, BF16, None),
        ("sm_90", (8, 12, 1000, 64), {}, BF16, None),  # the last block ends with the keys
        ("sm_90", (8, 12, 200, 64), {}, BF16, None),
        ("sm_90", (8, 12, 1024, 64), {"causal": True, "window": 99}, BF16, None),
        ("sm_90", (S, 8, 512, 80), {"causal": True}, BF16, "unknown number"),
        ("sm_90", (8, 16, 1024, 80), {"causal": True}, BF16, "cuDNN saves"),
        ("sm_90", (8, 16, 1024, 80), {"causal": True, "window": 64}, BF16, None),
        ("sm_90", (32, 12, 128, 64), {}, FP16, None),
        ("sm_90", (64, 12, 197, 64), {}, FP16, None),
        ("sm_90", (32, 12, 128, 64), {}, torch.float32, "float32"),
    ],
)
def test_the_library_keeps_what_it_is_faster_at(
    arch: str, shape: Any, attributes: dict[str, Any], dtype: torch.dtype, reason: str | None
) -> None:
    function = function_of(
        [TensorType(shape, dtype)] * 3, lambda b, *x: b.attention(*x, scale=1.0, **attributes)
    )
    op = next(iter(function.ops))
    found = TritonBackend(arch).supports_anchor(op, "attention")
    assert found is None if reason is None else reason in str(found)
    assert TritonBackend(arch, measures=True).supports_anchor(op, "attention") is None
