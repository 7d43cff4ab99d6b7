"""hoist_slices: rows that nobody reads are not computed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from accel.ir import Builder, Value, interpret, print_module, symbol
from accel.ir.module import Module
from accel.passes.contracts import exact_error
from accel.passes.manager import run_pipeline
from tests.ir.random_program import OTHER_SIZES, random_program
from tests.passes.helpers import BOOL, I64, ProgramBuilder, compute, find, program, t

N = symbol("n")


def hoisted(make: Any, *types: Any) -> Module:
    """The program after the pass; the manager compares it with the one before in float64."""
    module = program(make, *types)
    run_pipeline(module, "hoist_slices,cse,dce", validate=True)
    return module


def part(
    b: Builder, x: Value, axis: int = 1, start: Any = 0, stop: Any = 1, step: int = 1
) -> Value:
    made: Value = b.slice(x, axis=axis, start=start, stop=stop, step=step)
    return made


def weight(b: ProgramBuilder, *shape: int) -> Value:
    return b.weight(torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))))


def misses(make: Any, *types: Any) -> list[str]:
    """What the pass says of a program that it leaves as it is."""
    module = program(make, *types)
    before = print_module(module)
    ledger = run_pipeline(module, "hoist_slices")
    assert print_module(module) == before
    return [f"{miss.rule}: {miss.reason}" for miss in ledger.misses]


def test_a_block_is_computed_of_the_row_that_is_read() -> None:
    def block(b: ProgramBuilder, x: Value) -> Value:
        inner = b.linear(b.layer_norm(x, None, None, rank=1, eps=1e-5), weight(b, 16, 8))
        return part(b, b.add(x, b.linear(b.relu(inner), weight(b, 8, 16))))

    module = hoisted(block, t(2, 6, 8))
    assert compute(module) == ["slice", "layer_norm", "linear", "relu", "linear", "add"]
    wide = [op for op in module.main.ops if op.results and len(op.result.shape) == 3]
    assert all(op.result.shape[1] == 1 for op in wide)


FIRES: dict[str, tuple[Any, list[Any]]] = {
    "broadcast": (lambda b, x, y: part(b, b.mul(x, y)), [t(2, 6, 8), t(6, 1)]),
    "one row for all": (lambda b, x, y: part(b, b.add(x, y)), [t(2, 6, 8), t(1, 8)]),
    "select": (lambda b, c, x: part(b, b.where(c, x, b.neg(x))), [t(6, 1, dtype=BOOL), t(2, 6, 8)]),
    "permute": (lambda b, x: part(b, b.permute(b.relu(x), axes=(2, 0, 1)), axis=2), [t(2, 6, 8)]),
    "split": (lambda b, x: part(b, b.reshape(b.relu(x), shape=(2, 6, 2, 4))), [t(2, 6, 8)]),
    "joined": (lambda b, x: part(b, b.reshape(b.relu(x), shape=(12, 4)), 0, 2, 4), [t(6, 2, 4)]),
    "parted": (lambda b, x: part(b, b.reshape(b.relu(x), shape=(6, 2, 4)), 0, 3, 4), [t(12, 4)]),
    "ones": (lambda b, x: part(b, b.reshape(b.relu(x), shape=(1, 6, 1, 8))), [t(6, 8)]),
    "spread": (lambda b, x: part(b, b.broadcast_to(b.relu(x), shape=(3, 6, 8))), [t(6, 1)]),
    "cat": (lambda b, x, y: part(b, b.cat(b.relu(x), y, axis=2)), [t(2, 6, 8), t(2, 6, 3)]),
    "matmul": (lambda b, x, y: part(b, b.matmul(b.relu(x), y)), [t(2, 6, 6), t(6, 6)]),
    "columns": (lambda b, x, y: part(b, b.matmul(x, b.relu(y)), 2), [t(2, 5, 6), t(2, 6, 6)]),
    "batches": (lambda b, x, y: part(b, b.matmul(b.relu(x), y), 0), [t(4, 5, 6), t(6, 3)]),
    "softmax": (lambda b, x: part(b, b.softmax(b.relu(x), axis=2)), [t(2, 6, 8)]),
    "norm": (lambda b, x, w: part(b, b.rms_norm(b.relu(x), w, eps=1e-5)), [t(2, 8, 8), t(8)]),
    "sum": (lambda b, x: part(b, b.sum(b.relu(x), axes=(2,))), [t(2, 8, 8)]),
    "rope": (lambda b, x, c: part(b, b.rope(b.relu(x), c, c), 2), [t(2, 3, 6, 4), t(6, 4)]),
    "images": (
        lambda b, x, w: part(
            b, b.conv(b.relu(x), w, stride=(1, 1), padding=(1, 1), dilation=(1, 1)), 0
        ),
        [t(4, 3, 5, 5), t(4, 3, 3, 3)],
    ),
    "last of a text": (lambda b, x: part(b, b.relu(b.neg(x)), 1, N - 1, N), [t(2, N, 4)]),
    "first of a text": (lambda b, x: part(b, b.softmax(b.relu(x), axis=2)), [t(2, N, 4)]),
    "a batch of texts": (
        lambda b, x: part(b, b.reshape(b.relu(x), shape=(6, N, 4)), 0, 5, 6),
        [t(6 * N, 4)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRES)
def test_slices_reach_the_arguments(name: str) -> None:
    module = hoisted(FIRES[name][0], *FIRES[name][1])
    read = [op.operands[0] for op in module.main.ops if op.name == "slice"]
    assert read and all(value in module.main.args for value in read)


def test_a_table_is_read_at_the_rows_only() -> None:
    def rows(b: ProgramBuilder, i: Value) -> Value:
        return part(b, b.embedding(weight(b, 5, 4), b.clamp(i, min=0, max=4)))

    assert find(hoisted(rows, t(2, 6, dtype=I64)), "clamp").result.shape == (2, 1)


def attention(
    mask: int = -1, queries: int = 6, start: int = 3, rows: int = 2, **attributes: Any
) -> Any:
    """A few of the queries of an attention; `mask` is the place of its argument."""

    def make(b: Builder, q: Value, k: Value, v: Value, *rest: Value) -> Value:
        operands = [q, k, v, rest[0] if mask >= 0 and rest else None, *rest[mask + 1 :]]
        made = b.attention(*operands, scale=0.5, **attributes)
        return part(b, made, 2, start, start + rows)

    return make


Q, K, KEYS = t(2, 4, 6, 8), t(2, 2, 6, 8), 6  # two query heads share a key head

ATTENTION: dict[str, tuple[Any, list[Any], dict[str, Any]]] = {
    "all keys": (attention(), [], {"causal": False}),
    "causal": (attention(causal=True), [], {"causal": True, "offset": 3}),
    "offset": (attention(causal=True, offset=-1), [], {"causal": True, "offset": 2}),
    "last": (attention(causal=True, start=5, rows=1), [], {"causal": False, "offset": 0}),
    "window": (attention(causal=True, window=3), [], {"window": 3, "offset": 3}),
    "window only": (attention(window=3, start=2), [], {"window": 3, "offset": 2}),
    "wide window": (attention(causal=True, window=5), [], {"causal": True, "window": None}),
    "soft cap": (attention(softcap=2.0), [], {"softcap": 2.0}),
    "mask": (attention(0), [t(2, 1, 6, KEYS, dtype=BOOL)], {}),
    "mask of two axes": (attention(0), [t(6, KEYS)], {}),
    "mask of keys": (attention(0), [t(2, 1, 1, KEYS, dtype=BOOL)], {}),
    "mask without rows": (attention(0), [t(KEYS)], {}),
    "sinks": (attention(causal=True), [t(4)], {"causal": True, "offset": 3}),
    "mask and sinks": (attention(0), [t(2, 1, 6, KEYS), t(4)], {}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_few_queries(name: str) -> None:
    make, more, wanted = ATTENTION[name]
    module = hoisted(make, Q, K, K, *more)
    op = find(module, "attention")
    assert op.operands[0].shape[2] == (1 if name == "last" else 2)
    assert op.operands[1] is module.main.args[1], "keys stay whole"
    assert {n: op.attribute(n) for n in wanted} == wanted


def test_the_last_query_of_a_text_of_any_length_sees_all_keys() -> None:
    def last(b: Builder, q: Value, k: Value) -> Value:
        return part(b, b.attention(q, k, k, scale=0.5, causal=True), 2, N - 1, N)

    op = find(hoisted(last, t(1, 2, N, 4), t(1, 2, N, 4)), "attention")
    assert op.operands[0].shape[2] == 1 and not op.attribute("causal")


def test_several_slices_have_one_hull() -> None:
    def two(b: Builder, x: Value) -> tuple[Value, ...]:
        y = b.relu(x)
        return part(b, y, 1, 1, 2), part(b, y, 1, 3, 4), part(b, y, 1, 1, 5, step=2)

    module = hoisted(two, t(2, 10, 3))
    assert find(module, "relu").result.shape == (2, 4, 3)


def test_a_step_stays_below() -> None:
    module = hoisted(lambda b, x: part(b, b.relu(x), 1, 1, 5, step=3), t(2, 9, 3))
    assert find(module, "relu").result.shape == (2, 4, 3)
    assert compute(module) == ["slice", "relu", "slice"]


def test_slices_of_slices_are_seen_above() -> None:
    def twice(b: Builder, x: Value) -> Value:
        return part(b, b.neg(part(b, b.relu(x), 1, 2, 10, step=3)), 1, 1, 2)

    module = hoisted(twice, t(2, 12, 3))
    assert compute(module) == ["slice", "relu", "neg"]
    assert find(module, "relu").result.shape == (2, 1, 3)


STAYS: dict[str, tuple[Any, list[Any]]] = {
    "more than half": (lambda b, x: part(b, b.relu(x), 1, 0, 4), [t(2, 7, 3)]),
    "two of an unknown number": (lambda b, x: part(b, b.relu(x), 1, 0, 2), [t(2, N, 3)]),
    "a hull of most": (
        lambda b, x: [part(b, y := b.relu(x), 1, 0, 1), part(b, y, 1, 6, 7)], [t(2, 7, 3)],
    ),
    "two axes": (lambda b, x: [part(b, y := b.relu(x)), part(b, y, 2)], [t(2, 7, 3)]),
    "a result": (lambda b, x: [y := b.relu(x), part(b, y)], [t(2, 7, 3)]),
    "another reader": (lambda b, x: [b.neg(y := b.relu(x)), part(b, y)], [t(2, 7, 3)]),
    "random": (
        lambda b: part(b, b.random_uniform(shape=(2, 8, 3), dtype=torch.float32)), [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_it_stays(name: str) -> None:
    assert misses(STAYS[name][0], *STAYS[name][1]) == []


MIXES: dict[str, tuple[Any, list[Any]]] = {
    "cumsum": (lambda b, x: part(b, b.cumsum(x, axis=1)), [t(2, 8, 3)]),
    "softmax": (lambda b, x: part(b, b.softmax(x, axis=1)), [t(2, 8, 3)]),
    "norm": (lambda b, x: part(b, b.layer_norm(x, None, None, rank=2, eps=1e-5)), [t(2, 8, 3)]),
    "flip": (lambda b, x: part(b, b.flip(x, axes=(1,))), [t(2, 8, 3)]),
    "cat": (lambda b, x: part(b, b.cat(x, x, axis=1)), [t(2, 4, 3)]),
    "linear": (lambda b, x: part(b, b.linear(x, weight(b, 8, 3)), 2), [t(2, 8, 3)]),
    "regrouped": (lambda b, x: part(b, b.reshape(x, shape=(2, 8, 3))), [t(2, 6, 4)]),
    "half a group": (lambda b, x: part(b, b.reshape(x, shape=(6, 4)), 0, 1, 2), [t(3, 2, 4)]),
    "images": (
        lambda b, x, w: part(
            b, b.conv(x, w, stride=(1, 1), padding=(1, 1), dilation=(1, 1)), 2
        ),
        [t(1, 3, 8, 5), t(4, 3, 3, 3)],
    ),
    "keys": (
        lambda b, q: part(b, b.attention(q, q, q, scale=1.0), 3), [t(1, 2, 5, 8)],
    ),
    "elements put in order": (
        lambda b, x, m, y: part(b, b.masked_scatter(x, m, y), 0), [t(4), t(4, dtype=BOOL), t(4)],
    ),
    "positions": (lambda b, x: part(b, b.take_along(x, b.cast(x, dtype=I64), axis=1)), [t(2, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_the_rows_is_a_near_miss(name: str) -> None:
    (reason,) = misses(MIXES[name][0], *MIXES[name][1])
    assert reason.startswith("hoist_slices: it mixes the indices of axis")


@pytest.mark.parametrize("seed", range(30))
def test_random_programs_keep_their_meaning(seed: int) -> None:
    """A random program of which one row, or the last, of an axis of a random value is read."""
    made = random_program(seed, symbolic=seed % 2 == 0, length=10)
    rng = random.Random(seed)
    end = made.module.main.body.terminator
    b = Builder(before=end)
    values = [r for op in made.module.main.ops for r in op.results if r.shape]
    read = [v for v in (*end.operands, *rng.sample(values, min(3, len(values)))) if v.shape]
    results = []
    for x in read:
        axis = rng.randrange(len(x.shape))
        start = rng.choice([0, x.shape[axis] - 1])
        results.append(part(b, x, axis, start, start + 1))
    end.set_operands(results)
    original = made.module.clone()
    run_pipeline(made.module, "dce,hoist_slices,cse,dce,hoist_slices", validate=True)
    for sizes in (None, OTHER_SIZES) if seed % 2 == 0 else (None,):
        inputs = made.inputs(seed, sizes)
        before, after = (
            interpret(m.main, inputs, m.weights, oracle=True) for m in (original, made.module)
        )
        assert max(exact_error(x, y) for x, y in zip(before, after, strict=True)) < 1e-9
