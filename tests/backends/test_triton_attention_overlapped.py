"""Attention in Gluon: through the interpreter with its barriers and copies, compiled for Hopper."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.attention_tiles import OverlappedTile
from accel.errors import BackendError
from accel.ir import Function, TensorType, WeightStore, interpret
from tests.backends.kernels import function_of, kernel_of, sym
from tests.backends.test_triton_attention import LIMITS, alibi, fused, heads, inputs_of, merged
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

BF16, FP16, BOOL = torch.bfloat16, torch.float16, torch.bool
TILE = OverlappedTile(2, 64, 2, True)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def backend(tile: OverlappedTile = TILE) -> TritonBackend:
    """Few programs, so that each has several parts of the work."""
    return TritonBackend("sm_90", sms=3, tile=tile)


def check(
    worker: Worker, function: Function, inputs: Sequence[Tensor], tile: OverlappedTile = TILE
) -> str:
    runner = InterpretedKernels([function], worker, ["attention"], backend(tile))
    (want,) = interpret(function, inputs, WeightStore(), oracle=True)
    (got,) = runner(0, inputs)
    bound = LIMITS[got.dtype] * float(want.abs().max())
    assert float((got.double() - want).abs().max()) <= bound, runner.source(0)
    return runner.source(0)


def plain(
    b: Any, q: Any, k: Any, v: Any, mask: Any = None, sinks: Any = None, **attributes: Any
) -> Any:
    """[B, S, H * D], heads of 64."""
    split = [heads(b, x, 64) for x in (q, k, v)]
    if mask is not None:
        mask = b.reshape(mask, shape=(mask.shape[0], 1, 1, mask.shape[1]))
    return merged(b, b.attention(*split, mask, sinks, scale=0.125, **attributes))


def three(batch: int, queries: int, keys: int, count: int, groups: int) -> list[TensorType]:
    return [typed(FP16, batch, queries, 64 * count), *[typed(FP16, batch, keys, 64 * groups)] * 2]


def turned(b: Any, x: Any, cos: Any, sin: Any, cache: Any) -> Any:
    """Two heads and the values of [B, S, 4 * 128]; keys in a cache."""
    length = x.shape[1]
    q, v = (heads(b, b.slice(x, axis=2, start=i, stop=j), 128) for i, j in ((0, 256), (384, 512)))
    keys = b.slice(cache, axis=2, start=0, stop=length)
    return merged(b, b.attention(b.rope(q, cos, sin), keys, v, scale=0.1, causal=True))


S = sym("s0")
CASES: dict[str, tuple[list[TensorType], Callable[..., Any], int]] = {
    "one part": (three(1, 128, 64, 1, 1), plain, 0),
    "fused, causal": (
        [typed(BF16, 2, 256, 3 * 2 * 64)], lambda b, x: fused(b, x, size=64, causal=True), 0,
    ),
    "fused, groups, tails": (
        [typed(BF16, 1, 200, 6 * 64)], lambda b, x: fused(b, x, size=64, groups=2, causal=True), 0,
    ),
    "tails of queries": (three(2, 150, 192, 2, 1), plain, 0),
    "an offset": (
        three(1, 130, 200, 2, 2), lambda b, *x: plain(b, *x, causal=True, offset=70), 0,
    ),
    "an offset that blocks do not end at, and few keys": (
        three(1, 130, 100, 1, 1), lambda b, *x: plain(b, *x, causal=True, offset=7), 0,
    ),
    "a window": (
        three(1, 400, 400, 2, 1), lambda b, *x: plain(b, *x, causal=True, window=100), 0,
    ),
    "a window of one": (
        three(1, 200, 200, 1, 1), lambda b, *x: plain(b, *x, causal=True, window=1), 0,
    ),
    "a cap": (three(1, 128, 128, 1, 1), lambda b, *x: plain(b, *x, softcap=3.0), 0),
    "keys that are none": (
        [*three(2, 130, 192, 2, 2), typed(BOOL, 2, 192)],
        lambda b, *x: plain(b, *x, causal=True, offset=62), 0,
    ),
    "heads first, a bias of distances": ([typed(FP16, 1, 4, 128, 64)] * 3, alibi, 0),
    "sinks": (
        [*three(1, 200, 200, 2, 1), typed(FP16, 2)],
        lambda b, *x: plain(b, *x[:3], sinks=x[3], causal=True, window=100), 0,
    ),
    "sinks, keys that are none": (
        [*three(2, 130, 192, 2, 2), typed(BOOL, 2, 192), typed(FP16, 2)],
        lambda b, *x: plain(b, *x[:4], sinks=x[4]), 0,
    ),
    "wider values": (
        [typed(BF16, 2, 2, 128, 64), typed(BF16, 2, 2, 128, 64), typed(BF16, 2, 2, 128, 128)],
        lambda b, *x: b.attention(*x, scale=0.2, causal=True), 0,
    ),
    "a last block that ends with the keys": (three(2, 150, 197, 2, 1), plain, 0),
    "the same, causal, a window": (
        three(2, 197, 197, 2, 1), lambda b, *x: plain(b, *x, causal=True, window=90), 0,
    ),
    "the same, keys that are none": (
        [*three(2, 130, 197, 2, 2), typed(BOOL, 2, 197)],
        lambda b, *x: plain(b, *x, causal=True, offset=67), 0,
    ),
    "turned queries": (
        [typed(BF16, 1, S, 4 * 128), *[typed(BF16, 1, S, 128)] * 2, typed(BF16, 1, 1, 210, 128)],
        lambda b, *x: turned(b, *x), 201,
    ),
    "symbolic": (
        [typed(BF16, 1, S, 6 * 64)], lambda b, x: fused(b, x, size=64, groups=1, causal=True), 140,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(worker: Worker, name: str) -> None:
    types, build, size = CASES[name]
    source = check(worker, function_of(types, build), inputs_of(types, size))
    assert "warp_specialize" in source


@pytest.mark.parametrize(
    "tile",
    [
        OverlappedTile(2, 128, 2),
        OverlappedTile(3, 64, 4, across=True),
        OverlappedTile(3, 128, 3, True, turns=True),
        OverlappedTile(4, 64, 4, True),
        OverlappedTile(2, 64, 2, True, True, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["fused, causal", "a window"])
def test_other_tiles(worker: Worker, name: str, tile: OverlappedTile) -> None:
    types, build, size = CASES[name]
    if name == "fused, causal":
        types = [typed(BF16, 2, 384, 3 * 2 * 64)]
    check(worker, function_of(types, build), inputs_of(types, size), tile)


def packed(b: Any, q: Any, k: Any, v: Any, number: Any, **attributes: Any) -> Any:
    """Heads of 64 in [B, S, H * D], texts by their number [B or 1, H or 1, S]."""
    split = [heads(b, x, 64) for x in (q, k, v)]
    lead, length = tuple(number.shape[:2]), number.shape[2]
    mask = b.eq(b.reshape(number, shape=(*lead, length, 1)),
                b.reshape(number, shape=(*lead, 1, length)))  # fmt: skip
    return merged(b, b.attention(*split, mask, scale=0.125, **attributes))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_blocks_that_a_mask_hides_are_left_out(
    worker: Worker, lead: tuple[int, int], causal: bool
) -> None:
    """What lies in hidden blocks changes nothing, be it no number; nor what lies in no block."""
    length = 420
    types = [*three(2, length, length, 4, 2), typed(torch.int64, *lead, length)]
    function = function_of(types, lambda b, *x: packed(b, *x, causal=causal))
    inputs = inputs_of(types, 0, seed=3)
    borders = torch.arange(lead[0] * lead[1]).view(*lead, 1) * 10 + 200
    inputs[3] = (torch.arange(length) >= borders).long() + (torch.arange(length) >= 350)
    tile = OverlappedTile(2, 64, 2, listed=True)
    source = check(worker, function, inputs, tile)
    assert "seen = tl.load(" in source
    runner = InterpretedKernels([function], worker, ["attention"], backend(tile))
    (want,) = runner(0, inputs)
    for x in inputs[1:3]:
        x[:, :64] = float("nan")  # of the first text, a whole block
    (got,) = runner(0, inputs)
    assert torch.equal(got[:, 384:], want[:, 384:])  # the last tile of queries
    assert bool(got[:, :64].isnan().any())


def test_queries_that_see_nothing(worker: Worker) -> None:
    types = [*three(1, 130, 192, 1, 1), typed(torch.int64, 1, 1, 130), typed(torch.int64, 192)]

    def build(b: Any, q: Any, k: Any, v: Any, mine: Any, theirs: Any) -> Any:
        mask = b.eq(b.reshape(mine, shape=(1, 1, 130, 1)), b.reshape(theirs, shape=(1, 1, 1, 192)))
        return plain_mask(b, q, k, v, mask)

    def plain_mask(b: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        return merged(b, b.attention(*(heads(b, x, 64) for x in (q, k, v)), mask, scale=0.125))

    inputs = inputs_of(types, 0, seed=4)
    inputs[3], inputs[4] = torch.arange(130)[None, None] // 128, torch.zeros(192, dtype=torch.int64)
    check(worker, function_of(types, build), inputs, OverlappedTile(2, 64, 2, listed=True))


def random_case(seed: int) -> tuple[list[TensorType], Callable[..., Any], OverlappedTile]:
    """Attention that TMA can bring, in random shapes and tiles."""
    r = random.Random(seed)
    groups, share, columns = r.choice((1, 2)), r.choice((1, 2, 3)), r.choice((64, 128))
    batch = r.choice((1, 2))
    keys = r.randrange(2 if batch == 1 else columns, 500)
    queries = r.randrange(2, keys + 2)
    attributes: dict[str, Any] = {"scale": r.choice((0.1, 0.2))}
    if r.random() < 0.7:
        attributes |= {"causal": True, "offset": r.choice((0, max(keys - queries, 0)))}
        if r.random() < 0.5 and queries + attributes["offset"] <= keys:
            attributes["window"] = r.choice((1, 70, 128, 300))
    if r.random() < 0.3:
        attributes["softcap"] = r.choice((2.0, 30.0))
    depth, dtype = r.choice((64, 64, 128)), r.choice((BF16, FP16))
    types = [typed(dtype, batch, queries, groups * share * depth)]
    types += [typed(dtype, batch, keys, groups * depth)] * 2
    if r.random() < 0.4:
        types.append(typed(BOOL, batch, 1, 1, keys))
    tile = OverlappedTile(3 if depth == 64 and r.random() < 0.4 else 2, columns,
                          2 if depth > 64 else r.choice((2, 3)), r.random() < 0.5,
                          r.random() < 0.5, r.random() < 0.3)  # fmt: skip

    def build(b: Any, *x: Any) -> Any:
        split = [heads(b, y, depth) for y in x[:3]]
        return merged(b, b.attention(*split, *x[3:], **attributes))

    return types, build, tile


@pytest.mark.parametrize("seed", range(24))
def test_random_attentions(worker: Worker, seed: int) -> None:
    types, build, tile = random_case(seed)
    check(worker, function_of(types, build), inputs_of(types, 0, seed), tile)


def test_what_is_refused() -> None:
    def why(types: list[TensorType], build: Callable[..., Any]) -> str:
        with pytest.raises(BackendError) as caught:
            backend().generate([kernel_of(function_of(types, build), "attention")])
        return str(caught.value)

    overrun = three(2, 128, 40, 1, 1)  # less than a block
    assert "next batch" in why(overrun, plain)
    assert "size 40" in why(
        [typed(FP16, 1, 1, 128, 40)] * 3, lambda b, *x: b.attention(*x, scale=1.0)
    )
    assert "first key" in why(
        three(1, 128, 128, 1, 1), lambda b, *x: plain(b, *x, causal=True, offset=-3)
    )
    turned = [typed(FP16, 1, 2, 128, 64), typed(FP16, 1, 2, 64, 128), typed(FP16, 1, 2, 128, 64)]
    assert "no matrices" in why(
        turned, lambda b, q, k, v: b.attention(q, b.permute(k, axes=(0, 1, 3, 2)), v, scale=1.0)
    )


def test_the_model_takes_it_on_hopper_where_it_fits() -> None:
    def sources(arch: str, length: int) -> bool:
        types = [typed(BF16, 2, length, 3 * 2 * 64)]
        function = function_of(types, lambda b, x: fused(b, x, size=64, causal=True))
        made = TritonBackend(arch).generate([kernel_of(function, "attention")])[1]
        return "warp_specialize" in next(iter(made.values())).launches[0].source

    assert sources("sm_90", 4096)  # parts of all heads by length, programs stay
    assert not sources("sm_90", 2048)  # short texts, heads of 64: the loop was measured faster
    assert not sources("sm_80", 4096)  # no wgmma
    assert sources("sm_90", 4000)  # the last block of keys ends with them
    assert not sources("sm_90", 128)


@pytest.mark.parametrize("name", ["fused, groups, tails", "a window", "keys that are none"])
def test_compiles_for_hopper(name: str) -> None:
    types, build, _ = CASES[name]
    kernel = kernel_of(function_of(types, build), "attention")
    made = backend().compile([kernel])
    (launch,) = made.launches[made.names[0]]
    assert launch.binary.shared <= 227 << 10 and len(launch.binary.maps) == 3
