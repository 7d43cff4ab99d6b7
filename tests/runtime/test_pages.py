"""Paged generation: pages are taken, shared, remembered and given back; none left is an error."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import accel
from accel.errors import OptionError, PagesError
from accel.runtime.pages import PagedLoop, PagePool
from tests.passes.causal_models import tiny
from tests.runtime.test_state_kinds import varied

pytest.importorskip("transformers")

PAGE = 4


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The same model with a contiguous cache and with pages."""
    model = varied("llama")
    plain = accel.compile_generator(model, capacity=48, batch=0)
    cache = f"page_cache{{page={PAGE}}}"
    return plain, accel.compile_generator(model, capacity=48, batch=0, extend=8, cache=cache)


def pool_of(model: Any) -> PagePool:
    gc.collect()
    loop = model.generator.loop
    assert isinstance(loop, PagedLoop)
    return loop.pool


def test_text_is_that_of_a_contiguous_cache(models):
    plain, fast = models
    ids = torch.randint(3, 120, (2, 13))
    wanted = plain.generate(ids, max_new_tokens=20)
    assert len(set(wanted[0, 13:].tolist())) > 2
    for _ in range(2):  # the second time from remembered pages
        assert torch.equal(fast.generate(ids, max_new_tokens=20), wanted)
    assert pool_of(fast).used == 0
    wanted = plain.generate(ids[:1], max_new_tokens=20)
    looked_up = fast.generate(ids[:1], max_new_tokens=20, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, wanted)


def test_rows_share_a_common_prompt(models):
    plain, fast = models
    common = torch.randint(3, 120, (1, 4 * PAGE)).expand(3, -1)
    ids = torch.cat([common, torch.randint(3, 120, (3, 5))], 1)
    loop = fast.generator.loop
    with torch.no_grad():
        _, state = loop.prefill(ids, loop.empty(3))
    assert state.pages[0][:4] == state.pages[1][:4] == state.pages[2][:4]
    assert len({row[4] for row in state.pages}) == 3
    assert pool_of(fast).used == 4 + 3 * 2
    del state
    assert pool_of(fast).used == 0
    wanted = plain.generate(ids, max_new_tokens=20)
    assert torch.equal(fast.generate(ids, max_new_tokens=20), wanted)


def test_a_fork_goes_its_own_way(models):
    """Whole pages are shared, the last one is copied; writing to one text changes no other."""
    plain, fast = models
    ids, loop = torch.randint(3, 120, (1, 3 * PAGE + 1)), fast.generator.loop
    with torch.no_grad():
        _, state = loop.prefill(ids, loop.empty(1))
        forked = loop.fork(state, [0, 0], ids.shape[1])
        assert forked.pages[0][:3] == state.pages[0][:3]
        assert len({row[3] for row in (*state.pages, *forked.pages)}) == 3
        next_ = torch.tensor([5, 6])
        logits, forked = loop.decode(next_, torch.tensor(ids.shape[1]), forked)
    for row, token in enumerate(next_):
        whole = torch.cat([ids, token.reshape(1, 1)], 1)
        wanted = plain.generator.logits(whole, 1)
        torch.testing.assert_close(logits[row : row + 1], wanted, rtol=1e-4, atol=1e-4)


def test_no_pages_left():
    fast = accel.compile_generator(
        varied("llama"), capacity=48, batch=0, cache=f"page_cache{{page={PAGE},pages=9}}"
    )
    ids = torch.randint(3, 120, (2, 13))
    with pytest.raises(PagesError, match="all 9 pages of 4 tokens") as caught:
        fast.generate(ids, max_new_tokens=24)
    assert "pages=N" in caught.value.advice
    del caught
    # What the failed call held is free again.
    assert pool_of(fast).used == 0
    assert fast.generate(ids[:1], max_new_tokens=20).shape == (1, 33)


def test_pages_that_nobody_holds_are_forgotten_oldest_first():
    pool = PagePool([], PAGE, 2, torch.device("cpu"))
    first, second = pool.take(), pool.take()
    for key, page in ((b"a", first), (b"b", second)):
        pool.remember(key, page)
    pool.release([first, second])
    assert pool.known([b"a"]) == [first] and pool.hold(first) == first
    assert pool.take() == second and pool.known([b"b"]) == []
    with pytest.raises(PagesError):
        pool.take()


@pytest.mark.parametrize("family", ["mistral", "t5"])
def test_other_models(family: str) -> None:
    """A window over whole texts in pages; an encoder's keys beside them."""
    model = varied(family)
    plain = accel.compile_generator(model, capacity=32, batch=0)
    fast = accel.compile_generator(model, capacity=32, batch=0, cache="page_cache{page=8},int8")
    ids = torch.randint(3, 120, (2, 9))
    made = fast.generate(ids, max_new_tokens=12)
    assert made.shape == plain.generate(ids, max_new_tokens=12).shape
    exact = accel.compile_generator(model, capacity=32, batch=0, cache="paged")
    wanted = plain.generate(ids, max_new_tokens=12)
    assert torch.equal(exact.generate(ids, max_new_tokens=12), wanted)


def test_the_artifact_keeps_its_pages(tmp_path):
    model, path = varied("llama"), tmp_path / "m.accel"
    made = accel.package_generator(model, path=path, capacity=32, cache="page_cache{page=8}")
    loaded = accel.load(path, trust=True)
    ids = torch.randint(3, 120, (1, 9))
    wanted = made.generate(ids, max_new_tokens=12)
    assert torch.equal(loaded.generate(ids, max_new_tokens=12), wanted)


def test_capacity_is_whole_pages():
    with pytest.raises(OptionError, match="no multiple of page"):
        accel.compile_generator(tiny("llama"), capacity=20, cache="paged")
