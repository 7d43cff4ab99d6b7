"""Sampling equals the processors of transformers on the same logits; log probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from accel.errors import OptionError
from accel.runtime.generation_options import GenerationOptions
from accel.runtime.sampling import Recording, Sampling

transformers = pytest.importorskip("transformers")

VOCABULARY = 61


def processors(sampling: Sampling) -> list:
    made = []
    if sampling.repetition_penalty is not None:
        made.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature is not None:
        made.append(transformers.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        made.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        made.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        made.append(transformers.MinPLogitsWarper(sampling.min_p))
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": VOCABULARY + 5},
        {"top_p": 0.01},
        {"top_p": 0.7},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
)
@pytest.mark.parametrize("ties", [False, True])
def test_scores_are_those_of_the_processors(options, ties):
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(do_sample=True, **options)
    for _ in range(20):
        logits = torch.randn(3, VOCABULARY, generator=generator) * 4
        if ties:
            logits = logits.round()
        ids = torch.randint(0, VOCABULARY, (3, 9), generator=generator)
        wanted = logits
        for process in processors(sampling):
            wanted = process(ids, wanted.clone())
        assert torch.equal(sampling.scores(logits, ids), wanted)


def test_draws_follow_the_distribution():
    """40000 draws against the probabilities, by chi-square."""
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(do_sample=True, temperature=0.7, top_k=6, seed=3)
    generator = sampling.chance(torch.device("cpu"))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    count = 40000
    drawn = sampling.choose(logits.expand(count, -1), ids.expand(count, -1), generator)
    expected = sampling.scores(logits, ids).softmax(-1)[0] * count
    found = drawn.bincount(minlength=8).double()
    kept = expected > 0
    assert found[~kept].sum() == 0
    statistic = float(((found - expected)[kept] ** 2 / expected[kept]).sum())
    assert statistic < 20.5  # 5 degrees of freedom: p = 0.001


def test_recorded_log_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(2, VOCABULARY, generator=generator), torch.zeros(2, 3).long()
    recording = Recording(top=4, temperature=0.5, do_sample=True, seed=1)
    tokens = recording.choose(logits, ids, recording.chance(torch.device("cpu")))
    (choice,) = recording.choices
    logs = logits.log_softmax(-1)
    assert torch.equal(choice.logprobs, logs[torch.arange(2), tokens])
    assert torch.equal(choice.top_ids[:, 0], logs.argmax(-1))
    assert torch.equal(choice.top_logprobs, logs.sort(descending=True).values[:, :4])


def test_least_length_and_processors():
    logits, ids = torch.zeros(1, 5), torch.zeros(1, 4, dtype=torch.int64)
    logits[0, 2] = 9.0
    early = Recording(least=3, stops=(2,), prompts=(3,))
    assert int(early.choose(logits, ids, None)) != 2
    late = Recording(least=1, stops=(2,), prompts=(3,))
    assert int(late.choose(logits, ids, None)) == 2

    def forbid(text: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert text is ids
        return scores.index_fill(1, torch.tensor([2]), -math.inf)

    assert int(Recording(processors=(forbid,)).choose(logits, ids, None)) != 2


@pytest.mark.parametrize(
    "given",
    [
        {"max_new_tokens": 4, "max_length": 9},
        {"max_new_tokens": 4, "min_new_tokens": 5},
        {"min_new_tokens": -1},
        {"logprobs": 1.5},
        {"prompt_lookup_num_tokens": 0},
        {"prompt_lookup_num_tokens": 4, "num_assistant_tokens": 4},
        {"max_matching_ngram_size": 2},
        {"prefill_chunk_size": 0},
        {"max_new_token": 5},
        {"num_beams": 2},
    ],
)
def test_options_that_do_not_fit(given):
    with pytest.raises(OptionError):
        GenerationOptions.of(given)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.0, "do_sample": True},
        {"temperature": math.inf, "do_sample": True},
        {"temperature": True, "do_sample": True},
        {"top_k": -1, "do_sample": True},
        {"top_p": 1.5, "do_sample": True},
        {"min_p": -0.1, "do_sample": True},
        {"repetition_penalty": 0},
        {"temperature": 0.5},
        {"top_k": 5},
        {"min_p": 0.1},
        {"seed": 1},
    ],
)
def test_sampling_that_does_not_fit(given):
    with pytest.raises(OptionError):
        GenerationOptions.of(given).sampling()


def test_generation_configs():
    config = transformers.GenerationConfig(
        max_length=50, temperature=0.6, top_p=0.9, eos_token_id=[2, 5], pad_token_id=0
    )
    greedy = GenerationOptions.of({"max_new_tokens": 7}, config)
    assert greedy.sampling() == Sampling() and greedy.new_tokens(3) == 7
    assert greedy.stops() == [2, 5] and greedy.pad_token_id == 0
    drawn = GenerationOptions.of({"do_sample": True, "top_p": 0.5}, config)
    assert drawn.sampling() == Sampling(True, temperature=0.6, top_k=50, top_p=0.5)
    assert drawn.new_tokens(3) == 47
    off = transformers.GenerationConfig(do_sample=True, top_k=0, max_new_tokens=3)
    assert GenerationOptions.of({}, off).sampling() == Sampling(True)
    assert GenerationOptions.of({"max_length": 9}, off).new_tokens(4) == 5
    with pytest.raises(OptionError, match="num_beams"):
        GenerationOptions.of({}, transformers.GenerationConfig(num_beams=4))
    with pytest.raises(OptionError, match="how long"):
        GenerationOptions.of({}, transformers.GenerationConfig()).new_tokens(2)
