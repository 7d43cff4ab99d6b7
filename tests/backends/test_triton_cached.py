"""Attention over a cache as a generated GPU kernel, through Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend, cached
from accel.backends.triton.cached import CachedTile, StreamedCachedTile, Tile
from accel.errors import BackendError
from accel.ir import Builder, Function, SymbolInfo, TensorType, Value, interpret
from accel.ir.types import Dim, symbol
from tests.backends.kernels import function_of, kernel_of
from tests.backends.triton_kernels import BACKEND, IndexFailure, InterpretedKernels
from tests.backends.triton_worker import Worker

_SMALL = CachedTile(16, 4)
_STREAMED: dict[str, Any] = {"size": 64, "width": 64, "dtype": torch.bfloat16, "capacity": 200}
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """One kernel: sizes, what it masks, and whether it writes the new tokens' keys and values."""

    batch: int = 1
    heads: int = 4
    groups: int = 2
    tokens: int = 1
    capacity: int = 80
    size: int = 32
    width: int = 32
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    mask: str = ""
    update: bool = True
    ring: bool = False
    tile: Tile = _SMALL
    each: bool = False  # a position for each text
    sinks: bool = False

    def function(self) -> Function:
        c = self
        t = c.tokens
        qkv = (c.heads + c.groups) * c.size + c.groups * c.width
        angles = TensorType((c.batch, 1, t, c.size) if c.each else (1, t, c.size), c.dtype)
        types = [
            TensorType((c.batch, t, qkv), c.dtype),
            angles,
            angles,
            TensorType((c.batch, c.groups, c.capacity, c.size), c.dtype),
            TensorType((c.batch, c.groups, c.capacity, c.width), c.dtype),
            TensorType((c.batch,) if c.each else (), torch.int64),
        ]
        if c.mask:
            boolean = c.mask == "bool"
            shape = (c.batch, 1, t, c.capacity) if boolean else (1, c.heads, 1, c.capacity)
            types.append(TensorType(shape, torch.bool if boolean else c.dtype))
        if c.sinks:
            types.append(TensorType((c.heads,), c.dtype))

        def split(b: Builder, x: Value, start: int, heads: int, size: int) -> Value:
            part = b.slice(x, axis=2, start=start, stop=start + heads * size)
            return b.permute(b.reshape(part, shape=(c.batch, t, heads, size)), axes=(0, 2, 1, 3))

        def build(b: Builder, x: Value, cos: Value, sin: Value, keys: Value, values: Value,
                  position: Value, *rest: Value) -> list[Value]:  # fmt: skip
            first = c.heads * c.size
            q = b.rope(split(b, x, 0, c.heads, c.size), cos, sin)
            made: list[Value] = []
            start, many = position, c.ring and c.tokens > 1
            if c.ring and not many:  # a full ring is seen whole
                size = b.scalar(c.capacity, torch.int64)
                start = b.remainder(position, size)
                position = b.minimum(position, b.sub(size, b.scalar(1, torch.int64)))
            if c.update:
                k = b.rope(split(b, x, first, c.groups, c.size), cos, sin)
                v = split(b, x, first + c.groups * c.size, c.groups, c.width)
                keys = b.dynamic_update(keys, k, start, axis=2)
                values = b.dynamic_update(values, v, start, axis=2)
                made = [keys, values]
            out = b.cached_attention(
                q, keys, values, position, rest[0] if c.mask else None,
                rest[-1] if c.sinks else None, scale=c.size**-0.5, window=c.window,
                softcap=c.softcap, ring=many,
            )  # fmt: skip
            merged = (c.batch, t, c.heads * c.width)
            return [*made, b.reshape(b.permute(out, axes=(0, 2, 1, 3)), shape=merged)]

        return function_of(types, build)

    def inputs(self, position: int) -> list[Tensor]:
        """Random inputs; what the caches hold behind the position is NaN."""
        function = self.function()
        made = []
        for a in function.args[:5]:
            made.append(torch.randn([int(d) for d in a.shape]).to(a.dtype))
        places = torch.tensor(position)
        if self.each:
            last = self.capacity - self.tokens
            places = torch.tensor([position, last - position, position // 3])[: self.batch]
        for row, at in enumerate(places.expand(self.batch).tolist()):
            seen = at if self.update else at + self.tokens
            for cache in made[3:5]:
                cache[row, :, max(seen, 0) :] = math.nan
        made.append(places)
        if self.mask == "bool":
            keep = torch.rand(self.batch, 1, self.tokens, self.capacity) > 0.3
            keep[:, :, 0] &= position % 2 == 0  # every other time, a query sees nothing
            made.append(keep)
        elif self.mask:
            made.append(torch.randn(1, self.heads, 1, self.capacity).to(self.dtype))
        if self.sinks:
            made.append(torch.randn(self.heads).to(self.dtype) + 2)
        return made


CASES = [
    Case(),
    Case(update=False),
    Case(tile=CachedTile(32, 1)),
    Case(heads=1, groups=1, capacity=16, tile=CachedTile(16, 1)),
    Case(batch=2, heads=6, groups=2, size=64, width=64, dtype=torch.bfloat16),
    Case(heads=3, groups=3, size=40, width=24, dtype=torch.float16),
    Case(tokens=3, heads=4, groups=1),
    Case(tokens=5, update=False, batch=2, tile=CachedTile(16, 2)),
    Case(window=20),
    Case(window=7, tokens=4, update=False),
    Case(window=1),
    Case(softcap=5.0, dtype=torch.bfloat16),
    Case(mask="bool"),
    Case(mask="bool", batch=3, tokens=2, tile=CachedTile(32, 1)),
    Case(mask="add", heads=8, groups=2, size=128, width=128),
    Case(mask="add", update=False, window=33, dtype=torch.float16),
    Case(heads=2, groups=1, size=256, width=256, dtype=torch.bfloat16),
    Case(heads=40, groups=1, capacity=64),
    Case(ring=True, capacity=50),
    Case(each=True, batch=3),
    Case(each=True, batch=2, tokens=2, update=False, window=20),
    Case(each=True, batch=3, dtype=torch.bfloat16, size=64, width=64, tile=CachedTile(32, 1)),
    Case(sinks=True, heads=8, groups=2, batch=2),
    Case(sinks=True, mask="bool", tokens=3, tile=CachedTile(32, 1), window=30),
    Case(sinks=True, ring=True, capacity=50, dtype=torch.bfloat16),
    Case(tile=StreamedCachedTile(64, 1), **_STREAMED),
    Case(tile=StreamedCachedTile(64, 4, 2), batch=2, heads=6, **_STREAMED | {"capacity": 300}),
    Case(tile=StreamedCachedTile(64, 2), heads=2, update=False, window=70, **_STREAMED),
    Case(tile=StreamedCachedTile(64, 2), heads=9, groups=1, sinks=True, softcap=4.0, **_STREAMED),
    Case(tile=StreamedCachedTile(64, 1, 2), batch=3, each=True, window=100, **_STREAMED),
    Case(tile=StreamedCachedTile(64, 2), sinks=True, heads=2, **_STREAMED | {"width": 128}),
    Case(ring=True, capacity=64, tokens=3, window=20, update=False),
    Case(ring=True, capacity=37, tokens=2, window=36, update=False, dtype=torch.bfloat16),
]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def kernels(case: Case, worker: Worker) -> InterpretedKernels:
    backend = TritonBackend(tile=case.tile)
    return InterpretedKernels([case.function()], worker, ["cached_attention"], backend)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_the_interpreter_does(case: Case, worker: Worker) -> None:
    torch.manual_seed(0)
    last, run = case.capacity - case.tokens, kernels(case, worker)
    positions = {0, 1, 15, 16, last // 2, last - 1, last} & set(range(last + 1))
    if case.ring:
        positions |= {last + 1, last + 2, case.capacity, 5 * case.capacity + 3}
    for position in sorted(positions):
        inputs = case.inputs(position)
        wanted = interpret(case.function(), [x.clone() for x in inputs])
        got = run(0, inputs)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(
                a.float(), b.float(), rtol=0, atol=BOUND[case.dtype], equal_nan=True
            )
        assert torch.isfinite(got[-1]).all()


def test_a_position_outside_of_the_cache_is_reported(worker: Worker) -> None:
    run = kernels(Case(), worker)
    for position in (-1, 80, 1 << 40):
        inputs = Case().inputs(3)
        inputs[5] = torch.tensor(position)
        with pytest.raises(IndexFailure):
            run(0, inputs)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("count", [1, 7, 20, symbol("n")], ids=str)
def test_updates_write_the_new_rows_and_nothing_else(
    count: Dim, ring: bool, worker: Worker
) -> None:
    torch.manual_seed(0)
    state, rows = TensorType((2, 3, 24, 8), torch.float16), (2, count, 3, 8)
    types = [state, TensorType((2, 3, 24, 4), torch.float16), TensorType(rows, torch.float16)]
    types.append(TensorType((), torch.int64))

    def build(b: Builder, keys: Value, values: Value, new: Value, at: Value) -> list[Value]:
        heads = b.permute(new, axes=(0, 2, 1, 3))
        made = [b.dynamic_update(keys, heads, at, axis=2, ring=ring)]
        part = b.slice(heads, axis=3, start=0, stop=4)
        return [*made, b.dynamic_update(values, part, at, axis=2, ring=ring)]

    function = function_of(types, build)
    if not isinstance(count, int):
        function.symbols = {"n": SymbolInfo(1, None)}
    run = InterpretedKernels([function], worker, ["update"])
    for size in (1, 13, 24, *([61] if ring else [])):
        size = count if isinstance(count, int) else size
        for start in (0, 1, 24 - size, *([23, 24, 1000] if ring else [])):
            if not 0 <= start <= (1 << 20 if ring else 24 - size):
                continue
            inputs = [torch.randn(2, 3, 24, n).half() for n in (8, 4)]
            inputs += [torch.randn(2, size, 3, 8).half(), torch.tensor(start)]
            wanted = interpret(function, [x.clone() for x in inputs])
            for got, right in zip(run(0, inputs), wanted, strict=True):
                assert torch.equal(got, right)


@pytest.mark.parametrize("batch", [3, symbol("b")], ids=str)
@pytest.mark.parametrize("ring", [False, True])
def test_updates_at_a_place_for_each_row(batch: Dim, ring: bool, worker: Worker) -> None:
    torch.manual_seed(0)
    types = [
        TensorType((batch, 3, 24, 8), torch.float16),
        TensorType((batch, 2, 24), torch.float16),
    ]
    types += [TensorType((batch, 3, 2, 8), torch.float16), TensorType((batch,), torch.int64)]

    def build(b: Builder, keys: Value, small: Value, new: Value, at: Value) -> list[Value]:
        part = b.reshape(b.slice(b.slice(new, axis=1, start=0, stop=1), axis=3, start=0, stop=2),
                         shape=(batch, 2, 2))  # fmt: skip
        later = b.add(at, b.scalar(1, torch.int64))
        made = [b.dynamic_update(keys, new, at, axis=2, ring=ring)]
        return [*made, b.dynamic_update(small, part, later, axis=2, ring=ring)]

    function = function_of(types, build)
    if not isinstance(batch, int):
        function.symbols = {"b": SymbolInfo(1, None)}
    run = InterpretedKernels([function], worker, ["update"])
    for places in ([0, 21, 7], [5, 5, 5], *([[23, 0, 100]] if ring else [])):
        inputs = [torch.randn(3, 3, 24, 8).half(), torch.randn(3, 2, 24).half()]
        inputs += [torch.randn(3, 3, 2, 8).half(), torch.tensor(places)]
        wanted = interpret(function, [x.clone() for x in inputs])
        for got, right in zip(run(0, inputs), wanted, strict=True):
            assert torch.equal(got, right)
    if not ring:
        with pytest.raises(IndexFailure):
            run(0, [*inputs[:3], torch.tensor([1, 23, 0])])


def test_what_it_does_not_take_is_said() -> None:
    def reason(case: Case) -> str | None:
        op = next(o for o in case.function().ops if o.name == "cached_attention")
        return cached.reason(op)

    assert reason(Case()) is None
    assert "queries of one" in str(reason(Case(tokens=40)))
    assert "size" in str(reason(replace(Case(), size=512, width=512)))
    assert "float64" in str(reason(Case(dtype=torch.float64)))


def test_programs_fill_the_device_at_every_batch_size() -> None:
    for pairs in (2, 8, 32, 256, 2048):
        tile = cached.choose(pairs, 32768, 128, 2, 132)
        assert 60 < pairs * tile.split <= max(132, pairs)
    assert cached.choose(8, 1024, 128, 2, 132).split == 8  # no program without keys
    assert cached.choose(8, 1152, 64, 2, 132) == CachedTile(64, 16)


def test_tuning_tries_tma_for_many_heads() -> None:
    """Few heads, and operands that TMA or tensor cores cannot take, have no such tile."""

    def offered(case: Case) -> bool:
        tiles = cached.candidates(kernel_of(case.function(), "cached_attention"), 132)
        return StreamedCachedTile(64, 1, 3) in tiles

    large = Case(batch=32, heads=32, groups=8, capacity=1152, size=128, width=128,
                 dtype=torch.bfloat16)  # fmt: skip
    assert offered(large) and cached.choose(256, 1152, 128, 2, 132) == CachedTile(64, 1, 4, 4)
    for other in (
        replace(large, batch=1),
        replace(large, dtype=torch.float32),
        replace(large, mask="bool"),
        replace(large, size=40),
        replace(large, tokens=2),
    ):
        assert not offered(other)


def test_few_heads_leave_shared_memory_to_the_next_kernel() -> None:
    def chosen(batch: int, capability: int = 90) -> object:
        case = Case(batch=batch, heads=32, groups=8, capacity=1152, size=128, width=128,
                    dtype=torch.bfloat16)  # fmt: skip
        kernel = kernel_of(case.function(), "cached_attention")
        return cached.choose_tile(kernel, 132, capability)

    assert chosen(1) is None and chosen(32, 80) is None
    assert chosen(32) == StreamedCachedTile(64, 1, 3)


def test_a_ring_of_one_slot_is_refused() -> None:
    backend = TritonBackend(tile=StreamedCachedTile(64, 1, 1))
    with pytest.raises(BackendError, match="does not fit"):
        backend.generate([kernel_of(Case(**_STREAMED).function(), "cached_attention")])


def test_caches_that_another_kernel_has_written_are_read_after_the_wait() -> None:
    function = CASES[0].function()
    kernel = kernel_of(function, "cached_attention")
    made = [BACKEND.generate([kernel])[1]]
    b = Builder(Function("other", [v.type for v in kernel.operands]).body)
    args = list(b.region.args)
    args[3] = b.neg(args[3])
    kernel.set_operand(3, args[3])
    made.append(BACKEND.generate([kernel])[1])
    sources = [next(iter(m.values())).launches[0].source for m in made]
    first = [s.index("gdc_wait()") < s.index("tl.load(y0") for s in sources]
    assert first == [False, True] and all(s.count("gdc_wait()") == 1 for s in sources)


def test_code_compiles() -> None:
    for case in (CASES[4], CASES[14]):
        compiled = BACKEND.compile([kernel_of(case.function(), "cached_attention")])
        (launches,) = compiled.launches.values()
        assert launches[0].binary.shared <= 227 << 10
