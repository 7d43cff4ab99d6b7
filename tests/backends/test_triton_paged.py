"""Attention over pages: the kernel over a cache finds its keys and values through a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.cached import CachedTile, StreamedCachedTile, Tile
from accel.compiler import gpu
from accel.ir import Builder, Function, TensorType, interpret
from accel.ir.types import symbol
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.passes.registry import load_passes
from tests.backends.kernels import function_of, kernel_of
from tests.backends.triton_kernels import IndexFailure, InterpretedKernels
from tests.backends.triton_worker import Worker
from tests.passes.helpers import program

load_passes()
BOUND = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
POOL, TABLE = 40, torch.int32


@dataclass(frozen=True)
class Case:
    """`count` pages of `page` tokens a text, of a pool of 40."""

    batch: int = 2
    heads: int = 4
    groups: int = 2
    tokens: int = 1
    page: int = 16
    count: int = 6
    size: int = 32
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    mask: bool = False
    sinks: bool = False
    each: bool = False
    tile: Tile | None = None

    def types(self) -> list[TensorType]:
        pool = TensorType((POOL, self.groups, self.page, self.size), self.dtype)
        types = [
            TensorType((self.batch, self.heads, self.tokens, self.size), self.dtype), pool, pool,
            TensorType((self.batch, self.count), TABLE),
            TensorType((self.batch,) if self.each else (), torch.int64),
        ]  # fmt: skip
        if self.mask:
            types.append(TensorType((self.batch, 1, 1, self.count * self.page), torch.bool))
        if self.sinks:
            types.append(TensorType((self.heads,), self.dtype))
        return types

    def build(self, b: Builder, q: Any, k: Any, v: Any, table: Any, at: Any, *rest: Any) -> Any:
        out = b.paged_attention(
            q, k, v, table, at, rest[0] if self.mask else None, rest[-1] if self.sinks else None,
            scale=self.size**-0.5, window=self.window, softcap=self.softcap,
        )  # fmt: skip
        merged = (self.batch, self.tokens, self.heads * self.size)
        return b.reshape(b.permute(out, axes=(0, 2, 1, 3)), shape=merged)

    def inputs(self, position: int) -> list[Tensor]:
        """Pages in any order; what no text has reached is NaN."""
        torch.manual_seed(position)
        q, k, v, *_ = self.types()
        made = [torch.randn(list(map(int, t.shape))).to(self.dtype) for t in (q, k, v)]
        pages = torch.randperm(POOL)[: self.batch * self.count].view(self.batch, self.count)
        last = self.count * self.page - self.tokens
        places = torch.tensor([position, last - position, position // 3])[: self.batch]
        places = places if self.each else torch.tensor(position)
        reached = torch.zeros(POOL, self.page, dtype=torch.bool)
        for row, first in enumerate(places.expand(self.batch).tolist()):
            for token in range(first + self.tokens):
                reached[pages[row, token // self.page], token % self.page] = True
        for pool in made[1:]:
            pool.transpose(1, 2)[~reached] = math.nan
        made += [pages.to(TABLE), places]
        if self.mask:
            made.append(torch.rand(self.batch, 1, 1, self.count * self.page) > 0.3)
        if self.sinks:
            made.append(torch.randn(self.heads).to(self.dtype))
        return made


def opened(case: Case) -> Function:
    """The function as the kernel has it: reads of pages become reads through a table."""
    module = program(case.build, *case.types())
    PassManager(["open_pages"], Context()).run(module)
    return module.main


_STREAMED: dict[str, Any] = {"size": 64, "groups": 1, "dtype": torch.float16}
CASES = [
    Case(),
    Case(tile=CachedTile(32, 1), page=8, count=9),
    Case(dtype=torch.bfloat16, size=64, heads=8, groups=1, page=32),
    Case(dtype=torch.float16, tokens=3, window=20),
    Case(mask=True, sinks=True, softcap=3.0),
    Case(each=True, batch=3, groups=4),
    Case(page=5, count=7, size=24),
    Case(tile=StreamedCachedTile(64, 1), count=13, **_STREAMED),
    Case(tile=StreamedCachedTile(64, 2, 2), count=19, softcap=5.0, sinks=True, **_STREAMED),
    Case(tile=StreamedCachedTile(64, 2), page=8, count=20, each=True, heads=9, **_STREAMED),
    Case(tile=StreamedCachedTile(64, 1), page=64, count=4, **_STREAMED),
    Case(tile=StreamedCachedTile(64, 4, 2), page=128, count=3, batch=1, **_STREAMED),
]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_the_interpreter_does(case: Case, worker: Worker) -> None:
    plain = function_of(case.types(), case.build)
    run = InterpretedKernels([opened(case)], worker, ["cached_attention"],
                             TritonBackend(tile=case.tile))  # fmt: skip
    last = case.count * case.page - case.tokens
    for position in sorted({0, 1, 15, 16, last // 2, last}):
        inputs = case.inputs(position)
        (want,), (got,) = interpret(plain, inputs), run(0, inputs)
        torch.testing.assert_close(got, want, rtol=0, atol=BOUND[case.dtype])


def step_of(case: Case, symbolic: bool = False) -> Any:
    """A decoding step: new keys and values, turned and not, to their pages, and attention."""
    pages = symbol("pages") if symbolic else POOL
    q, _, _, table, at = case.types()
    pool = TensorType((pages, case.groups, case.page, case.size), case.dtype)
    new = TensorType((case.batch, case.groups, 1, case.size), case.dtype)

    def build(b: Any, q: Any, new: Any, k: Any, v: Any, table: Any, at: Any) -> Any:
        k = b.update_pages(k, b.neg(new), table, at)
        v = b.update_pages(v, new, table, at)
        return [case.build(b, q, k, v, table, at), k, v]

    return program(build, q, new, pool, pool, table, at)


WRITTEN = [c for c in CASES if c.tokens == 1 and not (c.mask or c.sinks)]


@pytest.mark.parametrize("case", WRITTEN, ids=str)
def test_new_tokens_are_written_to_their_pages(case: Case, worker: Worker) -> None:
    """Nothing else of the pools changes, and none of it is read."""
    module, plain = step_of(case), step_of(case).main
    PassManager(["open_pages"], Context()).run(module)
    backend = TritonBackend(tile=case.tile)
    run = InterpretedKernels([module.main], worker, ["cached_attention"], backend)
    last = case.count * case.page - 1
    for position in sorted({0, case.page - 1, case.page, last // 2, last}):
        q, k, v, table, places = case.inputs(position)
        for row, at in enumerate(places.expand(case.batch).tolist()):
            for pool in (k, v):
                pool[table[row, at // case.page], :, at % case.page] = math.nan
        new = torch.randn(case.batch, case.groups, 1, case.size).to(case.dtype)
        inputs = [q, new, k, v, table, places]
        wanted, got = interpret(plain, inputs), run(0, inputs)
        torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=BOUND[case.dtype])
        for made, right in zip(got[1:], wanted[1:], strict=True):
            torch.testing.assert_close(made, right, rtol=0, atol=0, equal_nan=True)


def test_a_page_that_is_none_is_reported(worker: Worker) -> None:
    run = InterpretedKernels([opened(Case())], worker, ["cached_attention"])
    inputs = Case().inputs(40)
    inputs[3][1, 1] = POOL
    with pytest.raises(IndexFailure):
        run(0, inputs)


def test_a_token_for_a_page_that_is_none_is_reported(worker: Worker) -> None:
    module = step_of(Case())
    PassManager(["open_pages"], Context()).run(module)
    run = InterpretedKernels([module.main], worker, ["cached_attention"])
    q, k, v, table, at = Case().inputs(40)
    table[1, 2] = -1
    with pytest.raises(IndexFailure):
        run(0, [q, torch.randn(2, 2, 1, 32), k, v, table, at])


def test_a_decoding_step_gathers_nothing() -> None:
    """With its pools written in place and read through the table: one kernel, and no copy."""
    module = step_of(Case(dtype=torch.bfloat16, size=64), symbolic=True)
    context = Context(generator=TritonBackend(), libraries=gpu.libraries())
    PassManager(list(gpu.KERNEL_PIPELINE), context).run(module)
    kinds = [str(op.attribute("kind")) for op in module.main.ops if op.name == "kernel"]
    calls = [str(op.attribute("library")) for op in module.main.ops if op.name == "call"]
    assert kinds == ["cached_attention"] and not calls


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles_without_a_gpu(arch: str) -> None:
    case = Case(dtype=torch.bfloat16, size=128, heads=8, groups=2, page=16, count=64)
    step = step_of(case, symbolic=True)
    PassManager(["open_pages"], Context()).run(step)
    kernels = [kernel_of(f, "cached_attention") for f in (opened(case), step.main)]
    made = TritonBackend(arch).compile(kernels)
    for name in made.names:
        (launch,) = made.launches[name]
        assert launch.binary.cubin


def test_tma_brings_pages_on_hopper() -> None:
    """Pages that fill no block are read through the table key by key, as on other devices."""

    def source(arch: str, page: int) -> str:
        case = Case(batch=16, heads=32, groups=8, dtype=torch.bfloat16, size=128, page=page)
        names, made = TritonBackend(arch).generate([kernel_of(opened(case), "cached_attention")])
        (launch,) = made[names[0]].launches
        return launch.source

    assert "keys.index(last).slice(48, 16, dim=0)" in source("sm_90", 16)
    assert "bad = bad |" in source("sm_90", 24) and "bad = bad |" in source("sm_80", 16)
