"""Attention that turns its queries, and updates that turn their rows: through the interpreters."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.attention_tiles import AttentionTile, OverlappedTile, Tile
from accel.ir import Function, TensorType, WeightStore, interpret
from tests.backends.kernels import function_of, kernel_of, sym
from tests.backends.test_triton_attention import LIMITS, heads, merged
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = OverlappedTile(2, 64, 2, True, True, True)
LOOP = AttentionTile(64, 64, 4)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def angles(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Cosines and sines that differ from element to element."""
    turned = 6.28 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return [turned.cos().to(dtype), turned.sin().to(dtype)]


def fused(count: int, groups: int, depth: int, **attributes: Any) -> Callable[..., Any]:
    """Heads of a fused projection, or keys in a cache of some capacity; queries are turned."""

    def build(b: Any, x: Any, cos: Any, sin: Any, cache: Any = None) -> Any:
        ends = [count * depth, (count + groups) * depth, (count + 2 * groups) * depth]
        parts = [b.slice(x, axis=2, start=i, stop=j) for i, j in zip([0, *ends], ends)]
        q, k, v = (heads(b, part, depth) for part in parts)
        if cache is not None:
            k = b.slice(cache, axis=2, start=0, stop=x.shape[1])
        q = b.rope(q, cos, sin, style="half")
        return merged(b, b.attention(q, k, v, scale=depth**-0.5, **attributes))

    return build


def check(worker: Worker, function: Function, inputs: list[Tensor], tile: Tile, sms: int) -> str:
    backend = TritonBackend("sm_90", sms=sms, tile=tile)
    runner = InterpretedKernels([function], worker, ["attention"], backend)
    (want,) = interpret(function, inputs, WeightStore(), oracle=True)
    (got,) = runner(0, inputs)
    source = runner.source(0)
    assert ("rotate(query" in source) == isinstance(tile, OverlappedTile)
    bound = LIMITS[got.dtype] * float(want.abs().max())
    assert float((got.double() - want).abs().max()) <= bound, source
    return source


S = sym("s0")
# dtype, batch, length, its size, heads, groups, depth, the shape of cosines, attributes
CASES: dict[str, tuple[Any, ...]] = {
    "one part": (BF16, 1, 128, 128, 1, 1, 128, (128, 128), {}),
    "groups, causal": (BF16, 1, 200, 200, 4, 2, 128, (1, 200, 128), {"causal": True}),
    "symbolic": (FP16, 1, S, 201, 3, 1, 128, (1, S, 128), {"causal": True}),
    "rows of their own": (FP16, 2, 192, 192, 2, 1, 128, (2, 1, 192, 128), {"causal": True}),
    "heads of their own": (BF16, 1, 130, 130, 2, 2, 128, (2, 130, 128), {}),
    "a window": (BF16, 1, 300, 300, 2, 1, 128, (300, 128), {"causal": True, "window": 70}),
    "wide heads": (BF16, 1, 140, 140, 2, 1, 256, (140, 256), {"causal": True}),
}


@pytest.mark.parametrize("tile", [SMALL, OverlappedTile(2, 64, 2), LOOP], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_queries_are_turned(worker: Worker, name: str, tile: Tile) -> None:
    dtype, batch, length, size, count, groups, depth, shape, attributes = CASES[name]
    types = [
        typed(dtype, batch, length, (count + 2 * groups) * depth), *[typed(dtype, *shape)] * 2
    ]  # fmt: skip
    function = function_of(types, fused(count, groups, depth, **attributes))
    x = torch.randn((batch, size, (count + 2 * groups) * depth)).to(dtype)
    known = tuple(size if d is S else d for d in shape)
    check(worker, function, [x, *angles(known, dtype)], tile, 3)


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes_and_keys_in_a_cache(worker: Worker, seed: int) -> None:
    """What lies in the cache behind the text is no number, and changes nothing."""
    r = random.Random(seed)
    groups, share, size = r.choice((1, 2)), r.choice((1, 2, 3)), r.randrange(65, 330)
    dtype, symbolic = r.choice((BF16, FP16)), r.random() < 0.6
    count, room, length = groups * share, r.choice((0, 1, 70)), S if symbolic else size
    width = (count + 2 * groups) * 128
    types: list[TensorType] = [
        typed(dtype, 1, length, width), *[typed(dtype, 1, length, 128)] * 2,
        typed(dtype, 1, groups, size + room, 128),
    ]  # fmt: skip
    function = function_of(types, fused(count, groups, 128, causal=True))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((1, size, width), generator=generator).to(dtype)
    cache = torch.randn((1, groups, size + room, 128), generator=generator).to(dtype)
    cache[:, :, size:] = torch.nan
    tile = r.choice((SMALL, OverlappedTile(2, 128, 2), OverlappedTile(3, 64, 3, True), LOOP))
    inputs = [x, *angles((1, size, 128), dtype, seed), cache]
    check(worker, function, inputs, tile, r.choice((1, 3, 8)))


@pytest.mark.parametrize("length", [1, 37, 128])
def test_rows_are_turned_where_they_are_written(worker: Worker, length: int) -> None:
    types = [
        typed(BF16, 1, S, 6 * 64),
        *[typed(BF16, 1, S, 64)] * 2,
        *[typed(BF16, 1, 2, 150, 64)] * 2,
    ]

    def build(b: Any, x: Any, cos: Any, sin: Any, keys: Any, values: Any) -> list[Any]:
        k, v = (heads(b, b.slice(x, axis=2, start=i, stop=i + 128), 64) for i in (128, 256))
        at = b.scalar(0, torch.int64)
        k = b.rope(k, cos, sin, style="half")
        return [b.dynamic_update(keys, k, at, axis=2), b.dynamic_update(values, v, at, axis=2)]

    function = function_of(types, build)
    runner = InterpretedKernels([function], worker, ["update"], TritonBackend("sm_90"))
    x = torch.randn(1, length, 384).to(BF16)
    caches = [torch.randn(1, 2, 150, 64).to(BF16) for _ in range(2)]
    inputs = [x, *angles((1, length, 64), BF16), *caches]
    for got, want in zip(
        runner(0, inputs), interpret(function, inputs, WeightStore()), strict=True
    ):
        assert torch.equal(got, want)
    assert len(runner.made[runner.names[0]].launches) == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles(arch: str) -> None:
    types = [
        typed(BF16, 1, S, 48 * 128),
        *[typed(BF16, 1, S, 128)] * 2,
        typed(BF16, 1, 8, 2176, 128),
    ]
    kernel = kernel_of(function_of(types, fused(32, 8, 128, causal=True)), "attention")
    backend = TritonBackend(arch)
    compiled = backend.compile([kernel])
    (launch,) = compiled.launches[compiled.names[0]]
    assert ("rotate(query" in launch.code.source) == (arch == "sm_90")
