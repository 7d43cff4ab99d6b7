"""Speculation changes neither greedy texts nor distributions; what cannot speculate is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import accel
from accel.errors import InputError, OptionError
from accel.runtime.speculation import PromptLookup, Proposal
from benchmarks.speculation_statistics import Pairs, single_tokens, whole_texts
from tests.passes.causal_models import tiny

pytest.importorskip("transformers")
pytest.importorskip("tvm")

CAPACITY, NEW = 48, 30


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[Any, Any]]:
    """A model with @extend, and another that drafts for it."""
    model = tiny("llama")
    yield (
        accel.compile_generator(model, capacity=CAPACITY, batch=0, extend=7),
        accel.compile_generator(tiny("qwen2"), capacity=CAPACITY),
    )


def prompts(rows: int = 1) -> Tensor:
    return torch.randint(3, 128, (rows, 6), generator=torch.Generator().manual_seed(2))


def test_greedy_texts_stay_the_same(models):
    fast, draft = models
    plain = fast.generate(prompts(3), max_new_tokens=NEW)
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True}
    looked = fast.generate(prompts(3), prompt_lookup_num_tokens=5, **options)
    drafted = fast.generate(prompts(3), assistant_model=draft, **options)
    itself = fast.generate(prompts(3), assistant_model=fast, num_assistant_tokens=6, **options)
    for made in (looked, drafted, itself):
        assert torch.equal(made.sequences, plain)
        assert made.statistics["proposed"] >= made.statistics["accepted"]
    assert itself.statistics["accepted"] == itself.statistics["proposed"] > 0


def test_limits_hold(models):
    fast, _ = models
    ids = prompts()
    plain = fast.generate(ids, max_new_tokens=NEW)[0, 6:]
    stop = int(plain[11])
    first = plain.tolist().index(stop)
    lookup = {"prompt_lookup_num_tokens": 6}
    made = fast.generate(ids, max_new_tokens=NEW, eos_token_id=stop, **lookup)
    assert made[0, 6:].tolist() == plain[: first + 1].tolist()
    full = fast.generate(ids, max_new_tokens=CAPACITY - 5, **lookup)
    assert torch.equal(full, fast.generate(ids, max_new_tokens=CAPACITY - 5))
    assert fast.generate(ids, max_new_tokens=1, **lookup).shape == (1, 7)
    assert torch.equal(fast.generate(ids, max_new_tokens=0, **lookup), ids)


def test_penalties_and_log_probabilities(models):
    fast, _ = models
    options = {"max_new_tokens": NEW, "repetition_penalty": 1.3, "logprobs": 3}
    plain = fast.generate(prompts(), **options)
    made = fast.generate(prompts(), prompt_lookup_num_tokens=4, **options)
    assert torch.equal(made.sequences, plain.sequences)
    torch.testing.assert_close(made.logprobs, plain.logprobs, atol=1e-4, rtol=1e-4)
    assert torch.equal(made.top_ids, plain.top_ids)


def test_lookup():
    lookup = PromptLookup(longest=2)
    assert list(lookup.propose([1, 2, 3, 4, 1, 2], 3).tokens) == [3, 4, 1]
    assert list(lookup.propose([1, 2, 3, 4, 1, 2, 9], 3).tokens) == []
    assert list(lookup.propose([1, 2, 3, 4, 1, 2, 9, 2], 2).tokens) == [9, 2]
    loop = PromptLookup(longest=3)
    assert list(loop.propose([7, 5, 6, 5, 6], 5).tokens) == [5, 6, 5, 6, 5]
    assert list(PromptLookup().propose([4], 3).tokens) == []


@pytest.mark.parametrize("way", ["drawn", "certain"])
def test_one_checked_token_has_the_models_distribution(way):
    """Whatever is proposed: 30000 proposals from another distribution, or one token always."""
    assert single_tokens(way)["p"] > 0.01


def test_a_planted_error_is_found():
    """Proposals that are kept without a check have their own distribution."""
    assert single_tokens("planted")["p"] < 1e-9


@pytest.mark.parametrize("way", ["lookup", "draft"])
def test_texts_have_the_models_distribution(way):
    """All texts of three tokens over four, 4000 drawn with each of fixed seeds."""
    row = whole_texts(way)
    assert row["p"] > 0.01 and row["accepted"] > 500


def test_what_cannot_speculate(models):
    fast, draft = models
    for options in (
        {"prompt_lookup_num_tokens": 7},  # extend=7 takes six
        {"num_assistant_tokens": 3},
        {"assistant_model": draft, "prompt_lookup_num_tokens": 3},
    ):
        with pytest.raises(OptionError):
            fast.generate(prompts(), max_new_tokens=4, **options)
    with pytest.raises(OptionError, match="extend=5"):
        draft.generate(prompts(), max_new_tokens=4, prompt_lookup_num_tokens=4)
    other = accel.compile_generator(Pairs(1).eval(), capacity=12)
    with pytest.raises(OptionError, match="knows 4 tokens"):
        fast.generate(prompts(), max_new_tokens=4, assistant_model=other)
    with pytest.raises(InputError):
        fast.generate([[]], max_new_tokens=4, prompt_lookup_num_tokens=4)
    assert Proposal([1]).shares is None


def test_prompts_in_pieces(models):
    fast, draft = models
    ids = torch.randint(3, 128, (2, 23), generator=torch.Generator().manual_seed(1))
    whole = fast.generate(ids, max_new_tokens=NEW - 10)
    for size in (1, 5, 7):
        assert torch.equal(fast.generate(ids, max_new_tokens=20, prefill_chunk_size=size), whole)
    with pytest.raises(OptionError, match="extend=8"):
        fast.generate(ids, max_new_tokens=4, prefill_chunk_size=8)
    with pytest.raises(OptionError):
        draft.generate(ids[:1], max_new_tokens=4, prefill_chunk_size=4)
