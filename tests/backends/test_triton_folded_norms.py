"""Products around a norm that has no kernel: partial sums in an epilogue, rows scaled in the next.

Interpreted against the IR interpreter, and compiled for Hopper.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.cooperative import CooperativeTile
from accel.backends.triton.matmul import Tile, candidates
from accel.backends.triton.overlapped import OverlappedTile
from accel.backends.triton.paired import PairedTile
from accel.backends.triton.product_plan import SUM_COLUMNS, MatmulTile
from accel.errors import BackendError
from accel.ir import Builder, Function, TensorType, WeightStore, interpret
from accel.ir.module import Value
from tests.backends.kernels import function_of, kernel_of, sym
from tests.backends.test_triton_gemv import check, halves, inputs_for
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
# As small as compile with pieces of as many columns as a sum has.
TILES: dict[str, Tile] = {
    "loop": MatmulTile(32, 128, 32, 4),
    "loop, two sums": MatmulTile(16, 256, 32, 4),
    "turns": OverlappedTile(64, 128, 32, 3),
    "shared": CooperativeTile(128, 256, 32, 3),
    "shared by three": CooperativeTile(192, 128, 32, 3, groups=3),
    "paired": PairedTile(128, 256, 16, 3, 4),
}
BACKENDS = {name: TritonBackend("sm_90", sms=2, tile=tile) for name, tile in TILES.items()}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def summed(b: Any, value: Value) -> Value:
    *lead, columns = value.shape
    cut = b.reshape(value, shape=(*lead, int(columns) // SUM_COLUMNS, SUM_COLUMNS))
    total: Value = b.sum(cut, axes=(len(lead) + 1,))
    return total


def producer(types: list[TensorType], moments: int) -> Function:
    """x = residual + linear with the sums of x^2, and of x where `moments` is 2."""

    def build(b: Builder, a: Value, w: Value, r: Value, *bias: Value) -> list[Value]:
        x = b.add(b.linear(a, w, *bias), r)
        wide = b.cast(x, dtype=F32)
        sums = [summed(b, b.mul(wide, wide)), summed(b, wide)]
        return [x, *sums[:moments]]

    return function_of(types, build)


PRODUCERS = {
    "one sum": ([typed(BF16, 150, 72), typed(BF16, 256, 72), typed(BF16, 150, 256)], 1),
    "two sums": (
        [typed(FP16, 3, 67, 40), typed(FP16, 384, 40), typed(FP16, 3, 67, 384), typed(FP16, 384)],
        2,
    ),
    "one part": ([typed(FP16, 64, 16), typed(FP16, 128, 16), typed(FP16, 64, 128)], 2),
}


def check_sums(worker: Worker, backend: TritonBackend, function: Function, rows: int = 0) -> str:
    """Of whole numbers small enough that no type rounds them: results are equal."""
    torch.manual_seed(0)
    inputs = [
        torch.randint(-1, 2, [d if isinstance(d, int) else rows for d in a.shape]).to(a.dtype)
        for a in function.args
    ]
    runner = InterpretedKernels([function], worker, ["matmul"], backend)
    exact = interpret(function, inputs, WeightStore(), oracle=True)
    for got, want, result in zip(runner(0, inputs), exact, function.results, strict=True):
        assert got.dtype == result.dtype and torch.equal(got.double(), want)
    return runner.source(0)


@pytest.mark.parametrize("tile", BACKENDS)
@pytest.mark.parametrize("name", PRODUCERS)
def test_partial_sums(worker: Worker, name: str, tile: str) -> None:
    types, moments = PRODUCERS[name]
    source = check_sums(worker, BACKENDS[tile], producer(types, moments))
    assert ("warp_specialize" in source) == ("loop" not in tile)
    assert source.count("tl.sum(") >= moments


@pytest.mark.parametrize("rows", [2, 65, 300])
@pytest.mark.parametrize("tile", ["loop", "paired"])
def test_partial_sums_of_symbolic_rows(worker: Worker, tile: str, rows: int) -> None:
    s = sym("s")
    types = [typed(BF16, s, 32), typed(BF16, 384, 32), typed(BF16, s, 384)]
    check_sums(worker, BACKENDS[tile], producer(types, 1), rows)


def scaled(b: Any, x: Value, w: Value, r: Value) -> Value:
    """r[m] * linear(x, w), rounded once."""
    y: Value = b.linear(b.cast(x, dtype=F32), b.cast(w, dtype=F32))
    return b.mul(y, r)


def rounded(b: Any, value: Value, like: Value) -> Value:
    made: Value = b.cast(value, dtype=like.dtype)
    return made


CONSUMERS: dict[str, tuple[list[TensorType], Any]] = {
    "rms": (
        [typed(BF16, 150, 72), typed(BF16, 256, 72), typed(F32, 150, 1)],
        lambda b, x, w, r: rounded(b, scaled(b, x, w, r), x),
    ),
    "rms, gate times up": (
        [typed(BF16, 2, 70, 64), typed(BF16, 512, 64), typed(F32, 2, 70, 1)],
        lambda b, x, w, r: halves(b, rounded(b, scaled(b, x, w, r), x)),
    ),
    "mean, bias, gelu": (
        [typed(FP16, 3, 67, 40), typed(FP16, 384, 40), typed(F32, 3, 67, 1), typed(F32, 3, 67, 1),
         typed(F32, 384), typed(F32, 384)],
        lambda b, x, w, r, m, s, c: b.gelu(
            rounded(b, b.add(b.sub(scaled(b, x, w, r), b.mul(m, s)), c), x)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("tile", BACKENDS)
@pytest.mark.parametrize("name", CONSUMERS)
def test_scaled_rows(worker: Worker, name: str, tile: str) -> None:
    types, build = CONSUMERS[name]
    torch.manual_seed(0)
    source = check(
        worker, function_of(types, build), inputs_for(types), "matmul", backend=BACKENDS[tile]
    )
    assert ("warp_specialize" in source) == ("loop" not in tile)
    assert 'input_precision="ieee"' not in source


def statistics(b: Any, *parts: Value) -> list[Value]:
    """Mean, if there are two, and 1 / sqrt(mean square - mean^2 + eps) from partial sums."""
    square, *first = (b.sum(p, axes=(p.type.rank - 1,), keepdim=True) for p in parts[::-1])
    share = b.full(value=1 / 384, shape=(), dtype=F32)
    variance, mean = b.mul(square, share), [b.mul(v, share) for v in first]
    for m in mean:
        variance = b.sub(variance, b.mul(m, m))
        variance = b.maximum(variance, b.full(value=0.0, shape=(), dtype=F32))
    eps = b.full(value=1e-5, shape=(), dtype=F32)
    return [*mean, b.rsqrt(b.add(variance, eps))]


def layer_normed(b: Any, x: Value, w: Value, s: Value, p: Value, colsum: Value) -> Value:
    mean, r = statistics(b, s, p)
    t: Value = b.linear(b.cast(x, dtype=F32), b.cast(w, dtype=F32))
    return b.gelu(rounded(b, b.mul(b.sub(t, b.mul(mean, colsum)), r), x))


INSIDE: dict[str, tuple[list[TensorType], Any]] = {
    "rms, sums of parts": (
        [typed(BF16, 150, 72), typed(BF16, 256, 72), typed(F32, 150, 32)],
        lambda b, x, w, p: rounded(b, scaled(b, x, w, *statistics(b, p)), x),
    ),
    "gate times up, sums of parts": (
        [typed(BF16, 2, 70, 64), typed(BF16, 512, 64), typed(F32, 2, 70, 7)],
        lambda b, x, w, p: halves(b, rounded(b, scaled(b, x, w, *statistics(b, p)), x)),
    ),
    "mean, gelu, sums of parts": (
        [typed(FP16, 3, 67, 40), typed(FP16, 384, 40), typed(F32, 3, 67, 6), typed(F32, 3, 67, 6),
         typed(F32, 384)],
        layer_normed,
    ),
}  # fmt: skip


def spread(inputs: list[Tensor], name: str) -> list[Tensor]:
    """Inputs of a case whose partial sums are those of rows that are no constants."""
    if name in INSIDE:
        made = list(inputs)
        square = 3 if len(made) == 5 else 2  # after the sums, if there are any
        made[square] = torch.rand(made[square].shape) * 8 + 40
        return made
    return inputs


@pytest.mark.parametrize("tile", BACKENDS)
@pytest.mark.parametrize("name", INSIDE)
def test_sums_of_parts(worker: Worker, name: str, tile: str) -> None:
    types, build = INSIDE[name]
    torch.manual_seed(0)
    inputs = spread(inputs_for(types), name)
    source = check(worker, function_of(types, build), inputs, "matmul", backend=BACKENDS[tile])
    assert source.count("tl.sum(") == (2 if len(types) == 5 else 1)


@pytest.mark.parametrize("parts", [65, 4])
def test_other_sums_are_refused(parts: int) -> None:
    types = [
        typed(BF16, 64, 64),
        typed(BF16, 256, 64),
        typed(F32 if parts > 64 else BF16, 64, parts),
    ]

    def build(b: Builder, x: Value, w: Value, p: Value) -> Value:
        return b.mul(b.linear(x, w), b.cast(b.sum(p, axes=(1,), keepdim=True), dtype=BF16))

    with pytest.raises(BackendError, match="sum in a matmul kernel"):
        BACKENDS["loop"].generate([kernel_of(function_of(types, build), "matmul")])


def test_products_are_not_rounded_before_they_are_scaled(worker: Worker) -> None:
    """Sums beyond fp16's range, which r brings back."""
    types = [typed(FP16, 64, 64), typed(FP16, 128, 64), typed(F32, 64, 1)]
    function = function_of(types, lambda b, x, w, r: rounded(b, scaled(b, x, w, r), x))
    torch.manual_seed(0)
    x, w = torch.randn(64, 64).half() * 200, torch.randn(128, 64).half() * 200
    inputs: list[Tensor] = [x, w, torch.full((64, 1), 1e-4)]
    assert bool(((x.double() @ w.double().T).abs() > 65504).any())
    for backend in (BACKENDS["loop"], BACKENDS["shared"]):
        check(worker, function, inputs, "matmul", backend=backend)


@pytest.mark.parametrize("kind", [torch.float64, F32])
def test_other_results_are_refused(kind: torch.dtype) -> None:
    types = [typed(BF16, 64, 64), typed(BF16, 256, 64)]

    def build(b: Builder, x: Value, w: Value) -> list[Value]:
        y = b.linear(x, w)
        cut = b.reshape(b.cast(y, dtype=kind), shape=(64, 2, 128) if kind != F32 else (64, 4, 64))
        return [y, b.sum(cut, axes=(2,))]

    with pytest.raises(BackendError, match="float32 sum over every 128 columns"):
        BACKENDS["loop"].generate([kernel_of(function_of(types, build), "matmul")])


def test_narrow_tiles_are_refused() -> None:
    types = [typed(BF16, 64, 64), typed(BF16, 256, 64), typed(BF16, 64, 256)]
    kernel = kernel_of(producer(types, 1), "matmul")
    for tile in (MatmulTile(32, 64, 32, 4), OverlappedTile(64, 64, 32, 3)):
        with pytest.raises(BackendError, match="in tiles of 64"):
            TritonBackend("sm_90", tile=tile).generate([kernel])
    for one in candidates(kernel, 132):
        TritonBackend("sm_90", tile=one).generate([kernel])
    TritonBackend("sm_80").generate([kernel])  # where the model of costs chooses a wide one


@pytest.mark.parametrize("name", ["one sum", "rms, sums of parts"])
def test_kernels_of_few_rows_refuse_sums(name: str) -> None:
    types, extra = {**PRODUCERS, **INSIDE}[name]
    rows = [typed(t.dtype, *(8 if d == 150 else d for d in t.shape)) for t in types]
    function = producer(rows, extra) if name in PRODUCERS else function_of(rows, extra)
    with pytest.raises(BackendError, match="skinny kernel with sums"):
        TritonBackend("sm_90").generate([kernel_of(function, "skinny")])


def asked(backend: TritonBackend, rows: Any, width: int, depth: int, columns: int) -> str | None:
    """What a backend says of a norm between linear + residual and one linear, as a model has it."""
    types = [typed(BF16, rows, depth), typed(BF16, width, depth), typed(BF16, rows, width)]
    function = Function("main", [*types, typed(BF16, columns, width)])
    b = Builder(function.body)
    a, w, residual, after = function.args
    y = b.linear(a, w)
    x = b.add(residual, y)
    norm = b.rms_norm(x, None, eps=1e-5)
    z = b.linear(norm, after)
    ops = [v.op for v in (y, x, norm, z)]
    return backend.folds_norm(ops[2], ops[:2], [ops[3:]])


def test_which_norms_are_folded() -> None:
    hopper, s = TritonBackend("sm_90"), sym("s")
    assert asked(hopper, 2048, 4096, 14336, 6144) is None
    assert asked(hopper, s, 4096, 4096, 28672) is None
    reasons = {
        "no products in Gluon": (TritonBackend("sm_80"), 2048, 4096, 4096, 6144),
        "which are no sums of 128": (hopper, 2048, 4160, 4096, 6144),
        "do not fill": (hopper, 128, 4096, 4096, 6144),
        "no 16-bit matrices": (hopper, 2048, 4096, 4100, 6144),
        "the norm takes": (hopper, 12608, 768, 3072, 2304),
    }
    for text, case in reasons.items():
        reason = asked(*case)
        assert reason is not None and text in reason


WHOLE = [OverlappedTile(), CooperativeTile(), CooperativeTile(192, 128, groups=3), PairedTile()]


@pytest.mark.parametrize("tile", WHOLE)
@pytest.mark.parametrize("name", [*PRODUCERS, *CONSUMERS, *INSIDE])
def test_compiles_for_hopper(name: str, tile: OverlappedTile) -> None:
    if name in PRODUCERS:
        function = producer(*PRODUCERS[name])
    else:
        function = function_of(*{**CONSUMERS, **INSIDE}[name])
    backend = TritonBackend("sm_90", tile=tile)
    made = backend.compile([kernel_of(function, "matmul")])
    (launch,) = made.launches[made.names[0]]
    assert "wgmma" in launch.binary.ptx and launch.binary.shared <= 227 << 10
