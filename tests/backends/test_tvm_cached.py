"""Generated attention over a cache against the interpreter; nothing behind the position is read."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.tvm import cached
from accel.compiler.language import compile_generator
from accel.errors import ExecutionError
from accel.ir import Function, TensorType, WeightStore, interpret
from tests.backends.kernels import Runner, f32, function_of
from tests.passes.causal_models import tiny

I64 = TensorType((), torch.int64)

# q, k, v, capacity in k and v; a mask of rank 4 or none; attributes.
CASES: dict[str, tuple[tuple[TensorType, ...], dict[str, Any]]] = {
    "one query": ((f32(1, 9, 1, 64), f32(1, 3, 150, 64), f32(1, 3, 150, 64), I64), {}),
    "batch": ((f32(3, 4, 1, 32), f32(3, 4, 64, 32), f32(3, 4, 64, 16), I64), {}),
    "window": ((f32(2, 4, 1, 16), f32(2, 2, 100, 16), f32(2, 2, 100, 16), I64), {"window": 7}),
    "softcap": ((f32(1, 4, 1, 16), f32(1, 1, 70, 16), f32(1, 1, 70, 16), I64), {"softcap": 2.0}),
    "queries": ((f32(1, 2, 5, 48), f32(1, 2, 90, 48), f32(1, 2, 90, 48), I64), {"window": 70}),
    "additive mask": (
        (f32(1, 2, 1, 16), f32(1, 2, 66, 16), f32(1, 2, 66, 16), I64, f32(1, 2, 1, 66)),
        {},
    ),
    "sinks": (
        (f32(2, 4, 2, 32), f32(2, 2, 90, 32), f32(2, 2, 90, 32), I64, f32(4)),
        {"window": 40},
    ),
    "a position a text": (
        (f32(3, 4, 1, 32), f32(3, 2, 150, 32), f32(3, 2, 150, 32), TensorType((3,), torch.int64)),
        {"window": 70},
    ),
}


def _attend(b: Any, *x: Any, **attributes: Any) -> Any:
    """A fifth operand of rank 1 is the sinks."""
    operands = [*x[:4], None, x[4]] if len(x) > 4 and x[4].type.rank == 1 else x
    return b.cached_attention(*operands, scale=0.3, **attributes)


def function(name: str) -> Function:
    types, attributes = CASES[name]
    return function_of(list(types), lambda b, *x: _attend(b, *x, **attributes))


@cache
def runner() -> Runner:
    return Runner([function(n) for n in CASES], ["cached_attention"] * len(CASES))


def inputs_of(name: str, position: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(position)
    types, _ = CASES[name]
    made = [torch.randn([int(d) for d in t.shape], generator=generator) for t in types]
    made[3] = torch.tensor(position)
    if types[3].rank:  # unequal texts
        last = int(types[1].shape[2]) - 1
        made[3] = torch.tensor([position, (position * 7) % last, last - position])
    for row, at in enumerate(made[3].expand(made[0].shape[0])):
        for held in made[1:3]:
            held[row, :, int(at) + made[0].shape[2] :] = float("nan")
    return made


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("place", [0, 1, 62, 63, 64, -1])
def test_against_the_interpreter(name: str, place: int) -> None:
    types, _ = CASES[name]
    last = int(types[1].shape[2]) - int(types[0].shape[2])
    position = last if place < 0 else min(place, last)
    inputs = inputs_of(name, position)
    (got,) = runner()(list(CASES).index(name), inputs)
    (wanted,) = interpret(function(name), inputs, WeightStore(), oracle=True)
    assert not bool(got.isnan().any())
    assert float((got - wanted).abs().max()) <= 5e-6


def test_merged_heads() -> None:
    def make(b: Any, *x: Any) -> Any:
        y = b.cached_attention(*x, scale=0.3)
        return b.reshape(b.permute(y, axes=(0, 2, 1, 3)), shape=(1, 1, 9 * 64))

    types = list(CASES["one query"][0])
    inputs = inputs_of("one query", 80)
    (got,) = Runner([function_of(types, make)], ["cached_attention"])(0, inputs)
    (wanted,) = interpret(function_of(types, make), inputs, WeightStore(), oracle=True)
    assert float((got - wanted).abs().max()) <= 5e-6


@pytest.mark.parametrize(
    ("types", "reason"),
    [
        ((f32(1, 2, 1, 20), f32(1, 2, 64, 20), f32(1, 2, 64, 20)), "size 20"),
        (
            tuple(TensorType((1, 2, 1, 16), torch.bfloat16) for _ in range(3)),
            "bfloat16",
        ),
    ],
)
def test_what_is_refused(types: tuple[TensorType, ...], reason: str) -> None:
    made = function_of([*types, I64], lambda b, *x: b.cached_attention(*x, scale=0.3))
    op = next(op for op in made.ops if op.name == "cached_attention")
    assert reason in str(cached.reason(op))


def _step(capacity: int, rows: int = 1, batch: int = 1, each: bool = False) -> Function:
    """What a layer does with new rows: rotary embedding, both writes, attention, merged heads."""

    def make(b: Any, qkv: Any, cos: Any, sin: Any, keys: Any, values: Any, at: Any) -> Any:
        split = b.permute(b.reshape(qkv, shape=(batch, rows, 8, 32)), axes=(0, 2, 1, 3))
        q, k, v = (b.slice(split, axis=1, start=i, stop=j) for i, j in ((0, 4), (4, 6), (6, 8)))
        keys = b.dynamic_update(keys, b.rope(k, cos, sin), at, axis=2)
        values = b.dynamic_update(values, v, at, axis=2)
        y = b.cached_attention(b.rope(q, cos, sin), keys, values, at, scale=0.3)
        merged = b.reshape(b.permute(y, axes=(0, 2, 1, 3)), shape=(batch, rows, 128))
        return keys, values, merged

    cache = f32(batch, 2, capacity, 32)
    angles = f32(batch if each else 1, 1, rows, 32)
    at = TensorType((batch,), torch.int64) if each else I64
    types = [f32(batch, rows, 256), angles, angles, cache, cache, at]
    return function_of(types, make)


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (1, 3), (5, 2)])
@pytest.mark.parametrize("place", [0, 7, 63, 64, -1])
def test_writes_and_attention_are_one_kernel(rows: int, batch: int, place: int) -> None:
    capacity = 90
    function = _step(capacity, rows, batch)
    position = capacity - rows if place < 0 else place
    generator = torch.Generator().manual_seed(place + 1)
    inputs = [
        torch.randn([int(d) for d in a.shape], generator=generator) for a in function.args[:5]
    ]
    for held in inputs[3:5]:
        held[:, :, position:] = float("nan")
    inputs.append(torch.tensor(position))
    runner = Runner([function], ["cached_attention"])
    assert sorted(i for _, i in runner.compiled.updates[runner.compiled.symbols[0]]) == [3, 4]
    got = runner(0, inputs)
    wanted = interpret(function, inputs, WeightStore(), oracle=True)
    seen = position + rows
    for made, right in zip(got[:2], wanted[:2]):
        assert float((made[:, :, :seen] - right[:, :, :seen]).abs().max()) <= 5e-6
        assert bool(made[:, :, seen:].isnan().all())  # nothing else is written
    assert float((got[2] - wanted[2]).abs().max()) <= 5e-6


@pytest.mark.parametrize("rows", [1, 2])
def test_texts_of_unequal_length_in_one_kernel(rows: int) -> None:
    function = _step(90, rows, 3, each=True)
    positions = torch.tensor([70, 0, 88 - rows])
    generator = torch.Generator().manual_seed(rows)
    inputs = [
        torch.randn([int(d) for d in a.shape], generator=generator) for a in function.args[:5]
    ]
    for held in inputs[3:5]:
        for row, at in enumerate(positions):
            held[row, :, int(at) :] = float("nan")
    inputs.append(positions)
    got = Runner([function], ["cached_attention"])(0, inputs)
    wanted = interpret(function, inputs, WeightStore(), oracle=True)
    for made, right in zip(got, wanted):
        torch.testing.assert_close(made, right.float(), rtol=0, atol=5e-6, equal_nan=True)
    assert bool(got[2].isfinite().all())


@pytest.mark.parametrize("each", [False, True])
def test_a_position_outside_of_the_cache_is_an_error(each: bool) -> None:
    function = _step(16, batch=2, each=each)
    inputs = [torch.randn([int(d) for d in a.shape]) for a in function.args[:5]]
    position = torch.tensor([3, 16]) if each else torch.tensor(16)
    with pytest.raises(ExecutionError):
        Runner([function], ["cached_attention"])(0, [*inputs, position])


ENCODED = ["int8", "fp8", "int4"]


@pytest.mark.parametrize(
    "cache",
    [*ENCODED, "stream_cache{sinks=2,window=20}", "paged", *(f"{c},paged" for c in ENCODED)],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_keys_are_computed_inside_of_the_kernel(cache: str, batch: int) -> None:
    """Codes are decoded, keys turned, pages read a block at a time; the cache is written there."""
    fast = compile_generator(tiny("llama"), capacity=64, batch=batch, cache=cache)
    assert fast.generator.loop.each == (batch > 1)  # texts of unequal length
    steps = fast.entry_points["decode"].function.plan.steps
    assert not [step.name for step in steps if step.kind in ("library", "aten")]
    attention = [s for s in steps if "cached_attention" in s.name]
    plan = fast.entry_points["decode"].function.plan
    state = len(plan.metadata["kv_cache"]["state"])
    assert sum(len(s.outputs) - 1 for s in attention) == state  # all that a token leaves
    ids = torch.randint(0, 128, (1, 40))
    one, several = (fast.generator.logits(ids, count) for count in (1, 30))
    torch.testing.assert_close(one[-1], several[-1], rtol=1e-4, atol=1e-4)


def test_a_view_of_what_lies_in_memory_is_refused() -> None:
    """Such as values cut from one product with the keys: the kernel does not compute that."""

    def make(b: Any, q: Any, k: Any, x: Any, weight: Any, at: Any) -> Any:
        made = b.slice(b.linear(x, weight), axis=2, start=16, stop=32)
        return b.cached_attention(q, k, b.reshape(made, shape=(1, 1, 70, 16)), at, scale=0.3)

    types = [f32(1, 2, 1, 16), f32(1, 1, 70, 16), f32(1, 70, 8), f32(32, 8), I64]
    op = next(op for op in function_of(types, make).ops if op.name == "cached_attention")
    assert "view" in str(cached.reason(op))


def _paged(page: int, rows: int, batch: int, pages: int) -> tuple[Function, Function]:
    """The step over pages as the compiler writes it, and as the interpreter reads it."""

    def make(b: Any, qkv: Any, cos: Any, sin: Any, keys: Any, values: Any, table: Any, at: Any,
             gather: bool) -> Any:  # fmt: skip
        split = b.permute(b.reshape(qkv, shape=(batch, rows, 8, 32)), axes=(0, 2, 1, 3))
        q, k, v = (b.slice(split, axis=1, start=i, stop=j) for i, j in ((0, 4), (4, 6), (6, 8)))
        keys = b.update_pages(keys, b.rope(k, cos, sin), table, at)
        values = b.update_pages(values, v, table, at)
        q = b.rope(q, cos, sin)
        if gather:
            whole = [
                b.reshape(
                    b.permute(b.gather(x, table, axis=0), axes=(0, 2, 1, 3, 4)),
                    shape=(batch, 2, pages * page, 32),
                )
                for x in (keys, values)
            ]
            y = b.cached_attention(q, *whole, at, scale=0.3)
        else:
            y = b.paged_attention(q, keys, values, table, at, scale=0.3)
        merged = b.reshape(b.permute(y, axes=(0, 2, 1, 3)), shape=(batch, rows, 128))
        return keys, values, merged

    pool = f32(batch * pages + 3, 2, page, 32)
    angles = f32(batch, 1, rows, 32)  # each row's own, as its position is
    table = TensorType((batch, pages), torch.int32)
    at = TensorType((batch,), torch.int64) if batch > 1 else I64
    types = [f32(batch, rows, 256), angles, angles, pool, pool, table, at]
    return tuple(  # type: ignore[return-value]
        function_of(types, lambda b, *x, how=how: make(b, *x, gather=how)) for how in (True, False)
    )


@pytest.mark.parametrize(
    ("page", "rows", "batch", "pages"),
    [(16, 1, 1, 9), (32, 1, 3, 5), (4, 1, 1, 20), (16, 5, 2, 6), (48, 2, 1, 3), (16, 1, 1, 70)],
)
def test_pages_are_written_and_read_where_they_lie(
    page: int, rows: int, batch: int, pages: int
) -> None:
    function, plain = _paged(page, rows, batch, pages)
    runner = Runner([function], ["cached_attention"])
    assert sorted(i for _, i in runner.compiled.updates[runner.compiled.symbols[0]]) == [3, 4]
    capacity = pages * page
    for place in (0, page - 1, page, 63, capacity // 2, capacity - rows):
        generator = torch.Generator().manual_seed(place)
        inputs = [
            torch.randn([int(d) for d in a.shape], generator=generator) for a in function.args[:5]
        ]
        order = torch.randperm(batch * pages + 3, generator=generator)[: batch * pages]
        inputs.append(order.reshape(batch, pages).to(torch.int32))
        places = [min(place, capacity - rows), 0, capacity - rows][:batch]
        inputs.append(torch.tensor(places if batch > 1 else places[0]))
        for pool in inputs[3:5]:  # what no text has reached is not read
            held = torch.full_like(pool, float("nan"))
            for row, first in zip(inputs[5], places):
                for slot in range(first):
                    held[row[slot // page], :, slot % page] = pool[
                        row[slot // page], :, slot % page
                    ]
            pool.copy_(held)
        got = runner(0, inputs)
        wanted = interpret(plain, inputs, WeightStore(), oracle=True)
        for made, right in zip(got, wanted):
            torch.testing.assert_close(made, right.float(), rtol=0, atol=1e-5, equal_nan=True)
        assert bool(got[2].isfinite().all())


LONG: dict[str, tuple[tuple[TensorType, ...], dict[str, Any]]] = {
    "groups of three": ((f32(1, 9, 1, 64), f32(1, 3, 1500, 64), f32(1, 3, 1500, 64), I64), {}),
    "one head": ((f32(1, 1, 1, 16), f32(1, 1, 4000, 16), f32(1, 1, 4000, 48), I64), {}),
    "a group of ten": ((f32(1, 10, 1, 32), f32(1, 1, 1100, 32), f32(1, 1, 1100, 32), I64), {}),
    "window": ((f32(2, 2, 1, 32), f32(2, 1, 2000, 32), f32(2, 1, 2000, 32), I64), {"window": 600}),
    "sinks": (
        (f32(1, 2, 1, 16), f32(1, 2, 1024, 16), f32(1, 2, 1024, 16), I64, f32(2)),
        {"softcap": 3.0},
    ),
    "queries": ((f32(1, 2, 3, 16), f32(1, 2, 800, 16), f32(1, 2, 800, 16), I64), {}),
}


@pytest.mark.parametrize("name", LONG)
def test_tasks_that_share_the_keys_of_a_query(name: str) -> None:
    types, attributes = LONG[name]
    made = function_of(list(types), lambda b, *x: _attend(b, *x, **attributes))
    runner = Runner([made], ["cached_attention"])
    assert "_p1" in runner.compiled.sources[runner.compiled.symbols[0]]  # what adds the parts up
    last = int(types[1].shape[2]) - int(types[0].shape[2])
    for place in (0, 63, 64, 500, last):
        generator = torch.Generator().manual_seed(place)
        inputs = [torch.randn([int(d) for d in t.shape], generator=generator) for t in types]
        inputs[3] = torch.tensor(place)
        for held in inputs[1:3]:
            held[:, :, place + int(types[0].shape[2]) :] = float("nan")
        (got,) = runner(0, inputs)
        (wanted,) = interpret(made, inputs, WeightStore(), oracle=True)
        assert not bool(got.isnan().any())
        assert float((got - wanted).abs().max()) <= 5e-6
