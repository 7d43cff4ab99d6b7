"""Prompts of unequal length over pages: one batch, each row's text is the one it gives alone.

Rows that end give their pages back and leave the batch; planted mistakes in that are seen.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import accel
from accel.errors import PagesError
from accel.runtime.pages import PagedLoop, PagedState
from tests.passes.causal_models import tiny
from tests.runtime.test_unequal import DRAWS, LONGEST, NEW, PROMPTS, SEEDS, call, same

pytest.importorskip("transformers")

PAGE = 4


def model_of(family: str) -> Any:
    model = tiny(family)
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.3)  # texts that vary
    return model


def paged(model: Any, batch: int, cache: str = "", pages: int = 0, extend: int = 0) -> Any:
    kinds = [*([cache] if cache else []), f"page_cache{{page={PAGE},pages={pages}}}"]
    return accel.compile_generator(
        model, capacity=32, batch=batch, extend=extend, cache=",".join(kinds)
    )


@pytest.fixture(scope="module", params=["llama", "mistral", "gpt2"])
def compiled(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """One text at a time over a contiguous cache; any number over pages, and three."""
    model = model_of(request.param)
    return accel.compile_generator(model, capacity=32), paged(model, 0), paged(model, 3)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    """One text at a time over a contiguous cache, and any number over few pages."""
    model = model_of("llama")
    return accel.compile_generator(model, capacity=32), paged(model, 0, pages=19, extend=8)


def pool_of(model: Any) -> Any:
    gc.collect()
    assert isinstance(model.generator.loop, PagedLoop)
    return model.generator.loop.pool


def steps_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step has from here on."""
    steps: list[int] = []
    decode = PagedLoop.decode

    def counted(loop: PagedLoop, tokens: Tensor, position: Tensor, state: PagedState) -> Any:
        steps.append(len(state.running))
        return decode(loop, tokens, position, state)

    monkeypatch.setattr(PagedLoop, "decode", counted)
    return steps


def test_greedy(compiled: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one, *others = compiled
    alone = [call(one, [p]) for p in PROMPTS]
    assert len({tuple(a.sequences[0, -NEW:].tolist()) for a in alone}) == len(PROMPTS)
    steps = steps_of(monkeypatch)
    for model, batches in zip(others, ([4], [3, 1]), strict=True):
        assert model.generator.loop.each
        steps.clear()
        same(call(model, PROMPTS), alone)
        assert steps == [n for n in batches for _ in range(NEW - 1)]  # they do run together
        assert pool_of(model).used == 0


def test_text_is_that_of_transformers(compiled: tuple[Any, Any, Any]) -> None:
    """Padded on the left with a mask, as transformers takes such prompts."""
    transformers = pytest.importorskip("transformers")
    model = model_of("llama")
    assert isinstance(model, transformers.PreTrainedModel)
    ids = torch.full((len(PROMPTS), LONGEST), 99)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    wanted = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    fast = paged(model, 0)
    made = fast.generate(ids, attention_mask=mask, max_new_tokens=NEW)
    assert torch.equal(made, wanted)


@pytest.mark.parametrize("cache", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("batch", [0, 3])
def test_codes_in_pages(cache: str, batch: int) -> None:
    """What a lossy cache says of a text does not depend on pages."""
    model = model_of("llama")
    plain = accel.compile_generator(model, capacity=32, batch=batch, cache=cache)
    wanted, made = (call(m, PROMPTS).sequences for m in (plain, paged(model, batch, cache)))
    assert torch.equal(made, wanted)


def test_stops_draws_and_log_probabilities_are_a_rows_own(
    compiled: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, *others = compiled
    plain = [call(one, [p], seed=s, **DRAWS) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    stops = [int(plain[0].sequences[0, -NEW + 4]), int(plain[3].sequences[0, -NEW + 1])]
    options = {**DRAWS, "eos_token_id": stops, "min_new_tokens": 3, "pad_token_id": 0}
    both = zip(PROMPTS, SEEDS, strict=True)
    alone = [call(one, [p], seed=s, logprobs=2, **options) for p, s in both]
    lengths = [a.lengths[0] for a in alone]
    assert len(set(lengths)) > 1
    steps = steps_of(monkeypatch)
    for model in others:
        steps.clear()
        same(call(model, PROMPTS, seed=SEEDS, logprobs=2, **options), alone)
        assert sum(steps) == sum(n - 1 for n in lengths)  # a row that has ended costs nothing


def test_pages_of_rows_that_end_are_free_for_the_others(llama: tuple[Any, Any]) -> None:
    """All texts to their end take more pages than there are."""
    one, fast = llama
    prompts = [*PROMPTS, PROMPTS[2][::-1]]
    alone = [call(one, [p], pad_token_id=0) for p in prompts]
    with pytest.raises(PagesError, match="all 19 pages"):
        call(fast, prompts)
    assert pool_of(fast).used == 0
    stop = int(alone[2].sequences[0, LONGEST + 1])
    alone = [call(one, [p], eos_token_id=stop, pad_token_id=0) for p in prompts]
    assert min(a.lengths[0] for a in alone) < NEW == max(a.lengths[0] for a in alone)
    made = call(fast, prompts, eos_token_id=stop, pad_token_id=0)
    assert made.lengths == [a.lengths[0] for a in alone]
    for row, (prompt, a) in enumerate(zip(prompts, alone, strict=True)):
        count = a.lengths[0]
        text = a.sequences[0, len(prompt) : len(prompt) + count]
        assert torch.equal(made.sequences[row, LONGEST : LONGEST + count], text)
    assert pool_of(fast).used == 0


def test_rows_of_unequal_length_share_what_they_begin_with(llama: tuple[Any, Any]) -> None:
    one, fast = llama
    common = [7, 3, 9, 1, 5, 2, 8, 6]
    prompts = [[*common, *p] for p in PROMPTS]
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
    loop = fast.generator.loop
    with torch.no_grad():
        _, state = loop.begin(ids, [len(p) for p in prompts])
    assert all(held[:2] == state.pages[0][:2] for held in state.pages)
    held = sum(-(-len(p) // PAGE) - 2 for p in prompts) + 2
    assert pool_of(fast).used == held < sum(-(-len(p) // PAGE) for p in prompts)
    state.end([1])  # what the others read stays
    assert pool_of(fast).used == held - (-(-len(prompts[1]) // PAGE) - 2)
    del state
    assert pool_of(fast).used == 0
    made = fast.generate(prompts, max_new_tokens=3)
    for row, prompt in enumerate(prompts):
        wanted = one.generate([prompt], max_new_tokens=3)[0]
        assert torch.equal(made[row, width - len(prompt) :], wanted)


def test_a_fixed_number_of_rows_takes_pages_for_its_texts_alone() -> None:
    model = model_of("llama")
    three, one = paged(model, 3, pages=4), accel.compile_generator(model, capacity=32)
    made = three.generate(PROMPTS[:1], max_new_tokens=8)  # 15 tokens: 4 pages
    assert torch.equal(made, one.generate(PROMPTS[:1], max_new_tokens=8))


# -- planted mistakes ----------------------------------------------------------------------------


def moved_on_by_one(loop: Any, state: PagedState, position: Tensor) -> Tensor:
    """The last row's position is one too far."""
    return position + (torch.arange(len(position)) == len(position) - 1)


def tables_swapped(loop: Any, state: PagedState, position: Tensor) -> Tensor:
    """The first two rows read each other's pages."""
    state[0][:2] = state[0][:2].flip(0).clone()
    return position


def given_back_too_early(loop: Any, state: PagedState, position: Tensor) -> Tensor:
    """A page that a text still reads is free, and the next text to need one gets it."""
    if 5 * PAGE not in loop.freed:
        loop.freed.append(5 * PAGE)
        loop.pool._free.append(state.pages[2][0])
    return position


@pytest.mark.parametrize("plant", [moved_on_by_one, tables_swapped, given_back_too_early])
def test_planted_mistakes_are_seen(
    llama: tuple[Any, Any],
    plant: Callable[[Any, PagedState, Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `same` holds of rows beside each other does not hold with any of these."""
    model = model_of("llama")
    one, fast = llama[0], paged(model, 0)
    alone = [call(one, [p]) for p in PROMPTS]
    same(call(fast, PROMPTS), alone)
    decode = PagedLoop.decode

    def wrong(loop: Any, tokens: Tensor, position: Tensor, state: PagedState) -> Any:
        return decode(loop, tokens, plant(loop, state, position), state)

    fast.generator.loop.freed = []
    monkeypatch.setattr(PagedLoop, "decode", wrong)
    with pytest.raises(AssertionError):
        same(call(fast, PROMPTS), alone)


def test_ending_the_wrong_row_is_seen(
    llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, fast = llama[0], paged(model_of("llama"), 0)
    stop = int(call(one, PROMPTS[:1]).sequences[0, -NEW + 2])
    options: dict[str, Any] = {"eos_token_id": stop, "pad_token_id": 0}
    alone = [call(one, [p], **options) for p in PROMPTS]
    assert len({a.lengths[0] for a in alone}) > 1
    same(call(fast, PROMPTS, **options), alone)
    ended = PagedLoop.ended

    def wrong(loop: PagedLoop, state: PagedState, running: Sequence[bool]) -> None:
        ended(loop, state, [*running[1:], running[0]])

    monkeypatch.setattr(PagedLoop, "ended", wrong)
    with pytest.raises(AssertionError):
        same(call(fast, PROMPTS, **options), alone)
