"""Generated attention over a cache against the interpreter; nothing behind the position is read."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.tvm import cached
from accel.errors import ExecutionError
from accel.ir import Function, TensorType, WeightStore, interpret
from tests.backends.kernels import Runner, f32, function_of

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
}


def function(name: str) -> Function:
    types, attributes = CASES[name]
    return function_of(list(types), lambda b, *x: b.cached_attention(*x, scale=0.3, **attributes))


@cache
def runner() -> Runner:
    return Runner([function(n) for n in CASES], ["cached_attention"] * len(CASES))


def inputs_of(name: str, position: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(position)
    types, _ = CASES[name]
    made = [torch.randn([int(d) for d in t.shape], generator=generator) for t in types]
    made[3] = torch.tensor(position)
    seen = position + made[0].shape[2]
    for held in made[1:3]:
        held[:, :, seen:] = float("nan")
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


def _step(capacity: int, rows: int = 1, batch: int = 1) -> Function:
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
    angles = f32(1, 1, rows, 32)
    types = [f32(batch, rows, 256), angles, angles, cache, cache, I64]
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


def test_a_position_outside_of_the_cache_is_an_error() -> None:
    function = _step(16)
    inputs = [torch.randn([int(d) for d in a.shape]) for a in function.args[:5]]
    with pytest.raises(ExecutionError):
        Runner([function], ["cached_attention"])(0, [*inputs, torch.tensor(16)])
