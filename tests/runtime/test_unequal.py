"""Prompts of unequal length in one batch: each row's text is the one that it gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import accel
from accel.errors import OptionError
from accel.runtime.decoding import TokenLoop
from accel.runtime.generator import Generated
from tests.passes.causal_models import tiny

pytest.importorskip("transformers")

PROMPTS = [[1, 5, 9, 3, 7, 2, 8], [4, 4], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12], [6, 1, 2]]
LONGEST, NEW = 12, 10
DRAWS = {"do_sample": True, "top_p": 0.95, "temperature": 1.3, "repetition_penalty": 1.2}
SEEDS = [3, 1, 4, 15]


def models(family: str, cache: str = "") -> tuple[Any, Any, Any]:
    """Compiled for one text at a time, for any number of texts, and for three."""
    model = tiny(family)
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.3)  # texts that vary
    one, many, three = (
        accel.compile_generator(model, capacity=32, batch=n, cache=cache) for n in (1, 0, 3)
    )
    return one, many, three


@pytest.fixture(scope="module", params=["llama", "mistral", "gpt2"])
def compiled(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    return models(request.param)


def call(model: Any, prompts: Any, **options: Any) -> Generated:
    made: Generated = model.generate(
        prompts, max_new_tokens=NEW, return_dict_in_generate=True, **options
    )
    return made


def same(many: Generated, alone: list[Generated]) -> None:
    assert many.lengths == [a.lengths[0] for a in alone]
    for row, (prompt, a) in enumerate(zip(PROMPTS, alone)):
        count = a.lengths[0]
        text = a.sequences[0, len(prompt) : len(prompt) + count]
        assert torch.equal(many.sequences[row, LONGEST : LONGEST + count], text)
        assert not many.sequences[row, LONGEST + count :].any()  # padding
        if a.logprobs is not None and many.logprobs is not None:
            got, wanted = many.logprobs[row, :count], a.logprobs[0, :count]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_greedy(compiled: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one, *others = compiled
    alone = [call(one, [p]) for p in PROMPTS]
    assert len({tuple(a.sequences[0, -NEW:].tolist()) for a in alone}) == len(PROMPTS)
    steps = 0
    decode = TokenLoop.decode

    def counted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        return decode(*args)

    monkeypatch.setattr(TokenLoop, "decode", counted)
    for model, batches in zip(others, (1, 2)):
        assert model.generator.loop.each
        steps = 0
        same(call(model, PROMPTS), alone)
        assert steps == batches * (NEW - 1)  # they do run together


@pytest.mark.parametrize(
    "cache", ["stream_cache{sinks=2,window=6}", "evict_cache{heavy=4,recent=4}"]
)
def test_caches_that_keep_fewer_tokens(cache: str) -> None:
    """Sinks and a window that prompts have passed or not; tokens that each row evicts itself."""
    one, *others = models("llama", cache)
    alone = [call(one, [p]) for p in PROMPTS]
    for model in others:
        assert model.generator.loop.each
        same(call(model, PROMPTS), alone)


def test_attention_masks_as_transformers_takes_them(compiled: tuple[Any, Any, Any]) -> None:
    one, many, _ = compiled
    ids = torch.full((len(PROMPTS), LONGEST), 99)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    made = call(many, ids, attention_mask=mask)
    same(made, [call(one, [p]) for p in PROMPTS])
    assert torch.equal(made.sequences[:, :LONGEST], ids)


def test_stops_draws_and_log_probabilities_are_a_rows_own(compiled: tuple[Any, Any, Any]) -> None:
    one, *others = compiled
    plain = [call(one, [p], seed=s, **DRAWS) for p, s in zip(PROMPTS, SEEDS)]
    stops = [int(plain[0].sequences[0, -NEW + 4]), int(plain[3].sequences[0, -NEW + 1])]
    options = {**DRAWS, "eos_token_id": stops, "min_new_tokens": 3, "pad_token_id": 0}
    alone = [call(one, [p], seed=s, logprobs=2, **options) for p, s in zip(PROMPTS, SEEDS)]
    assert len({a.lengths[0] for a in alone}) > 1
    for model in others:
        same(call(model, PROMPTS, seed=SEEDS, logprobs=2, **options), alone)


def test_callers_processors_see_each_text_alone(compiled: tuple[Any, Any, Any]) -> None:
    one, many, _ = compiled
    seen: list[list[int]] = []

    def last_but_one(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids[0].tolist())
        return scores.index_fill(1, ids[0, -1:], -torch.inf)

    alone = [call(one, [p], logits_processor=[last_but_one]) for p in PROMPTS]
    texts = sorted(seen)
    seen.clear()
    same(call(many, PROMPTS, logits_processor=[last_but_one]), alone)
    assert sorted(seen) == texts


def test_a_seed_for_each_prompt(compiled: tuple[Any, Any, Any]) -> None:
    _, many, _ = compiled
    with pytest.raises(OptionError, match="2 seeds for 4 prompts"):
        call(many, PROMPTS, do_sample=True, seed=[1, 2])
    with pytest.raises(OptionError, match=r"seed is 1\.5"):
        call(many, PROMPTS, do_sample=True, seed=1.5)
