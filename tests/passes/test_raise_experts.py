"""Mixtures of experts: every way to route rows becomes expert_linear, and near misses do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from accel.ir import Module, symbol
from accel.passes.base import Context
from accel.passes.manager import run_pipeline
from tests.passes.helpers import F32, I32, I64, compute, find, program, t

TOKENS, CHOICES, EXPERTS, WIDTH, INNER = 5, 2, 4, 8, 6
SIZES = (t(TOKENS, WIDTH), t(TOKENS, EXPERTS))
PIPELINE = "raise_experts,canonicalize,cse,dce"


def raised(
    make: Callable[..., Any], *types: Any, pipeline: str = PIPELINE
) -> tuple[Module, list[tuple[str, str]]]:
    module = program(make, *types)
    misses: list[tuple[str, str]] = []
    context = Context(on_miss=lambda rule, op, reason: misses.append((rule, reason)))
    run_pipeline(module, pipeline, context, validate=True)
    return module, misses


def weights(b: Any) -> tuple[Any, Any]:
    up = b.weight(torch.randn(EXPERTS, 2 * INNER, WIDTH), "up")
    return up, b.weight(torch.randn(EXPERTS, WIDTH, INNER), "down")


def chosen(b: Any, scores: Any) -> tuple[Any, Any]:
    values, numbers = b.topk(scores, k=CHOICES, axis=1, largest=True)
    rows = values.shape[0] * CHOICES
    return b.reshape(values, shape=(rows,)), b.reshape(numbers, shape=(rows,))


def gated(b: Any, y: Any) -> Any:
    first = b.slice(y, axis=1, start=0, stop=INNER)
    return b.mul(b.silu(first), b.slice(y, axis=1, start=INNER, stop=2 * INNER))


def ends_of(b: Any, numbers: Any, bins: int = EXPERTS, counts: torch.dtype = F32) -> Any:
    """As on a CPU, where floats are counted, or (`counts` I32) on a GPU."""
    if counts == I32:
        numbers = b.cast_to(numbers, I32)
    column = b.reshape(numbers, shape=(numbers.shape[0], 1))
    equal = b.eq(column, b.iota(shape=(bins,), axis=0, dtype=numbers.dtype))
    total = b.cast_to(b.sum(b.cast_to(equal, counts), axes=(0,)), counts)
    return b.cumsum(total, axis=0)


def experts_of(b: Any, ends: Any, rows: Any) -> Any:
    place = b.iota(shape=(rows, 1), axis=0, dtype=I64)
    passed = b.cast_to(b.le(b.cast_to(ends, I64), place), I64)
    return b.minimum(b.sum(passed, axes=(1,)), b.scalar(EXPERTS - 1, I64))


def in_groups(
    b: Any, x: Any, scores: Any, *, inverse: str = "index_put", reader: str = "",
    bins: int = EXPERTS, below: bool = True, counts: torch.dtype = F32, values: bool = True,
) -> Any:  # fmt: skip
    """As transformers' grouped_mm: sorted, counted, multiplied, put back."""
    up, down = weights(b)
    factors, numbers = chosen(b, scores)
    if not below:
        numbers = b.add(numbers, b.scalar(0, I64))
    rows = numbers.shape[0]
    ordered, order = b.sort(numbers, axis=0, descending=False)
    ordered = ordered if values else b.gather(numbers, order, axis=0)
    states = b.gather(x, b.floor_div(order, b.scalar(CHOICES, I64)), axis=0)
    experts = experts_of(b, ends_of(b, ordered, bins, counts), rows)
    hidden = gated(b, b.expert_linear(states, up, experts))
    y = b.expert_linear(hidden, down, experts)
    scale = b.reshape(b.gather(factors, order, axis=0), shape=(rows, 1))
    y = b.mul(y, scale)
    counting = b.iota(shape=(rows,), axis=0, dtype=I64)
    if inverse == "index_put":
        back = b.index_put(b.full_of((rows,), 0, I64), counting, order, axes=(0,))
    else:
        back = b.sort(order, axis=0, descending=False)[1]
    z = b.gather(y, back, axis=0)
    z = b.sum(b.reshape(z, shape=(x.shape[0], CHOICES, WIDTH)), axes=(1,))
    return (z, b.sum(hidden, axes=(1,))) if reader == "hidden" else z


def by_copies(b: Any, x: Any, scores: Any, *, transposed: bool = False, bias: bool = False) -> Any:
    """As transformers' batched_mm: a copy of the weight for each row."""
    up, _ = weights(b)
    _, numbers = chosen(b, scores)
    rows = numbers.shape[0]
    apart = b.reshape(x, shape=(x.shape[0], 1, WIDTH))
    states = b.broadcast_to(apart, shape=(x.shape[0], CHOICES, WIDTH))
    if transposed:
        copies = b.gather(b.permute(up, axes=(0, 2, 1)), numbers, axis=0)
        y = b.matmul(b.reshape(states, shape=(rows, 1, WIDTH)), copies)
    else:
        copies = b.gather(up, numbers, axis=0)
        y = b.matmul(copies, b.reshape(states, shape=(rows, WIDTH, 1)))
    y = b.reshape(y, shape=(rows, 2 * INNER))
    if bias:
        table = b.weight(torch.randn(EXPERTS, 2 * INNER), "c")
        y = b.add(y, b.gather(table, numbers, axis=0))
    return y


def names(module: Module) -> set[str]:
    return set(compute(module))


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("inverse", ["index_put", "sort"])
@pytest.mark.parametrize("counts", [F32, I32])
def test_groups_lose_their_order(inverse: str, counts: torch.dtype, values: bool) -> None:
    def make(b: Any, x: Any, s: Any) -> Any:
        return in_groups(b, x, s, inverse=inverse, counts=counts, values=values)

    module, misses = raised(make, *SIZES)
    assert not misses and compute(module).count("expert_linear") == 2
    assert not names(module) & {"sort", "gather", "cumsum", "index_put"}


def test_groups_of_an_unknown_number_of_tokens() -> None:
    n = symbol("n")
    module, misses = raised(in_groups, t(n, WIDTH), t(n, EXPERTS))
    assert not misses and compute(module).count("expert_linear") == 2
    assert not names(module) & {"sort", "gather"}


@pytest.mark.parametrize("transposed", [False, True])
def test_copies_of_weights(transposed: bool) -> None:
    module, _ = raised(lambda b, x, s: by_copies(b, x, s, transposed=transposed, bias=True), *SIZES)
    assert names(module) & {"matmul", "gather", "add"} == set()
    assert len(find(module, "expert_linear").operands) == 4


def test_a_second_reader_of_sorted_products_keeps_their_order() -> None:
    module, misses = raised(lambda b, x, s: in_groups(b, x, s, reader="hidden"), *SIZES)
    assert ("expert_order", "something else reads the products in sorted order") in misses
    assert "sort" in names(module) and compute(module).count("expert_linear") == 2


def test_numbers_of_unknown_size_stay_as_they_are() -> None:
    module, misses = raised(lambda b, x, s: in_groups(b, x, s, below=False), *SIZES)
    assert ("expert_numbers", "numbers that may not name an expert") in misses
    assert "cumsum" in names(module)


def test_counts_of_other_bins_are_no_groups() -> None:
    module, misses = raised(lambda b, x, s: in_groups(b, x, s, bins=3), *SIZES)
    assert "cumsum" in names(module) and misses


def test_copies_for_more_than_one_row_stay_a_product() -> None:
    def make(b: Any, x: Any, scores: Any) -> Any:
        up, _ = weights(b)
        _, numbers = chosen(b, scores)
        rows = b.broadcast_to(b.reshape(x, shape=(1, TOKENS, WIDTH)), shape=(10, TOKENS, WIDTH))
        return b.matmul(rows, b.permute(b.gather(up, numbers, axis=0), axes=(0, 2, 1)))

    module, _ = raised(make, *SIZES)
    assert "expert_linear" not in names(module)
