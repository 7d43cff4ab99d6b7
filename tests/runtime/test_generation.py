"""Generation: equal to transformers, sampling, limits, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import accel
from accel.errors import InputError, OptionError
from accel.runtime.sampling import Sampling
from tests.passes.causal_models import FAMILIES, tiny

pytest.importorskip("transformers")
pytest.importorskip("tvm")

CAPACITY = 40
NEW = 24


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    model = tiny("llama")
    return model, accel.compile_generator(model, capacity=CAPACITY, batch=0)


def expected(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW, **options}
    model.generation_config.eos_token_id = options["eos_token_id"]
    mask = options.pop("attention_mask", torch.ones_like(ids))
    made: torch.Tensor = model.generate(ids, attention_mask=mask, **options)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family):
    """Past the sliding windows; prompts of one token and of several."""
    model = tiny(family)
    fast = accel.compile_generator(model, capacity=CAPACITY)
    for length in (1, 9):
        ids = torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(length))
        wanted = expected(model, ids, do_sample=False)
        assert torch.equal(fast.generate(ids, max_new_tokens=NEW), wanted)


def test_batches_and_unequal_prompts(llama):
    model, fast = llama
    ids = torch.randint(3, 128, (3, 6))
    assert torch.equal(fast.generate(ids, max_new_tokens=NEW), expected(model, ids))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    got = fast.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0)
    assert torch.equal(got[1, 6:], expected(model, ids[1:2, 4:])[0, 2:])
    lists = [row[m.bool()].tolist() for row, m in zip(ids, mask)]
    assert torch.equal(fast.generate(lists, max_new_tokens=NEW, pad_token_id=0), got)


def test_it_stops_and_pads(llama):
    model, fast = llama
    ids = torch.randint(3, 128, (3, 5))
    free = expected(model, ids)
    stop = int(free[0, 8])
    wanted = expected(model, ids, eos_token_id=stop)
    got = fast.generate(ids, max_new_tokens=NEW, eos_token_id=[stop], pad_token_id=0)
    assert torch.equal(got, wanted)
    assert fast.generate(ids[:1], max_length=9).shape == (1, 9)
    assert torch.equal(fast.generate(ids, max_new_tokens=0), ids)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 20},
        {"top_k": 128, "top_p": 0.8},
        {"top_k": 128, "min_p": 0.3, "temperature": 1.3},
        {"top_k": 5, "repetition_penalty": 1.4},
    ],
)
def test_draws_are_those_of_transformers(llama, options):
    model, fast = llama
    ids = torch.randint(3, 128, (2, 5))
    torch.manual_seed(11)
    wanted = expected(model, ids, do_sample=True, **options)
    got = fast.generate(ids, max_new_tokens=NEW, do_sample=True, seed=11, **options)
    assert torch.equal(got, wanted)
    other = fast.generate(ids, max_new_tokens=NEW, do_sample=True, seed=12, **options)
    assert not torch.equal(got, other)


def test_greedy_with_a_repetition_penalty(llama):
    model, fast = llama
    ids = torch.randint(3, 128, (1, 5))
    wanted = expected(model, ids, do_sample=False, repetition_penalty=1.5)
    assert torch.equal(fast.generate(ids, max_new_tokens=NEW, repetition_penalty=1.5), wanted)


def test_a_streamer_sees_every_token(llama):
    _, fast = llama
    seen: list[torch.Tensor] = []

    class Streamer:
        ended = False

        def put(self, value: torch.Tensor) -> None:
            seen.append(value.reshape(-1))

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    ids = torch.tensor([[5, 6, 7]])
    made = fast.generate(ids, max_new_tokens=4, streamer=streamer)
    assert torch.equal(torch.cat(seen), made[0]) and streamer.ended


@pytest.mark.parametrize(
    ("ids", "options", "error"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, InputError),
        ([[5], []], {}, InputError),
        ([], {}, InputError),
        (torch.zeros(1, CAPACITY + 1, dtype=torch.int64), {}, InputError),
        (torch.zeros(1, CAPACITY, dtype=torch.int64), {"max_new_tokens": 2}, InputError),
        (torch.tensor([[128]]), {}, InputError),
        (torch.tensor([[-1]]), {}, InputError),
        (torch.tensor([[1.0]]), {}, InputError),
        (torch.tensor([1]), {}, InputError),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.tensor([[1, 0]])}, InputError),
        (torch.tensor([[1]]), {"max_length": 5}, OptionError),
        (torch.tensor([[1]]), {"max_new_tokens": -1}, OptionError),
        (torch.tensor([[1]]), {"temperature": 0.5}, OptionError),
        (torch.tensor([[1]]), {"do_sample": True, "top_p": 1.5}, OptionError),
        (torch.tensor([[1]]), {"do_sample": True, "top_k": -1}, OptionError),
        (torch.tensor([[1]]), {"assistant_model": torch.nn.Linear(2, 2)}, OptionError),
        ([1, 2], {}, InputError),
        (None, {}, InputError),
        ("text", {}, InputError),
        (torch.tensor([[1]]), {"eos_token_id": -3}, OptionError),
    ],
)
def test_bad_input(llama, ids, options, error):
    with pytest.raises(error):
        llama[1].generate(ids, **{"max_new_tokens": 1, **options})


def test_options_that_ask_for_nothing(llama):
    ids = torch.tensor([[5, 6, 7]])
    wanted = llama[1].generate(ids, max_new_tokens=4)
    neutral = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    assert torch.equal(llama[1].generate(ids, max_new_tokens=4, **neutral), wanted)
    drawn = llama[1].generate(ids, max_new_tokens=4, do_sample=True, seed=3)
    same = llama[1].generate(ids, max_new_tokens=4, do_sample=True, seed=3, top_k=0)
    assert torch.equal(drawn, same)


def test_the_last_position_of_the_cache_is_usable(llama):
    model, fast = llama
    ids = torch.randint(3, 128, (1, CAPACITY - 2))
    wanted = expected(model, ids, max_new_tokens=3)
    assert torch.equal(fast.generate(ids, max_new_tokens=3), wanted)


def test_caches_are_written_in_place_and_weights_are_shared(llama):
    """@decode returns the caches that it was given; both functions read the same weights."""
    _, fast = llama
    prefill, decode = (fast.entry_points[n].function for n in ("prefill", "decode"))
    caches = fast.generator.loop.empty(2)
    ids = torch.randint(3, 128, (2, 4))
    with torch.no_grad():
        _, *first = prefill([ids, *caches])
        _, *second = decode([ids[:, :1], torch.tensor([4, 4]), *first])
    for a, b, c in zip(caches, first, second):
        assert a.data_ptr() == b.data_ptr() == c.data_ptr()
        assert not bool((c[:, :, 4] == 0).all()) and bool((c[:, :, 5:] == 0).all())
    large = [
        {v.name for v in f.plan.values if v.kind == "weight" and len(v.shape) > 1}
        for f in (prefill, decode)
    ]
    assert large[0] == large[1]


def test_compile_generates_too(llama):
    model, _ = llama
    ids = torch.randint(3, 128, (1, 5))
    compiled = accel.compile(model)
    assert torch.equal(compiled.generate(ids, max_new_tokens=NEW), expected(model, ids))


def test_an_artifact_generates_with_the_weights_once(llama, tmp_path):
    model, _ = llama
    accel.package_generator(model, path=tmp_path / "m.accel", capacity=CAPACITY)
    loaded = accel.load(tmp_path / "m.accel")
    ids = torch.randint(3, 128, (1, 5))
    assert torch.equal(loaded.generate(ids, max_new_tokens=NEW), expected(model, ids))
    parameters = sum(p.numel() for p in model.parameters())
    assert loaded.report()["weight_bytes"] < 4.3 * parameters


def test_a_model_without_a_cache_says_so(tmp_path):
    linear = torch.nn.Linear(4, 4).eval()
    accel.package(linear, (torch.zeros(1, 4),), path=tmp_path / "m.accel")
    with pytest.raises(OptionError, match="no key/value cache"):
        accel.load(tmp_path / "m.accel").generate(torch.tensor([[1]]), max_new_tokens=1)


def test_top_p_keeps_the_fewest_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = Sampling(do_sample=True, top_p=0.7).scores(logits, torch.zeros(1, 0, dtype=torch.int64))
    assert torch.isfinite(kept).tolist() == [[True, True, False, False]]


class Letters:
    """A token is a letter."""

    def decode(self, ids: Any) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def test_stop_strings(llama):
    _, fast = llama
    ids = torch.randint(3, 128, (3, 5), generator=torch.Generator().manual_seed(8))
    free = fast.generate(ids, max_new_tokens=NEW)[:, 5:]
    words = [Letters().decode(row.tolist()) for row in free]
    stop = words[1][9:12]
    options = {"stop_strings": [stop, "?"], "tokenizer": Letters(), "pad_token_id": 1}
    made = fast.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True, **options)
    for i, text in enumerate(words):
        at = text.find(stop)
        length = NEW if at < 0 else at + 3
        assert made.lengths[i] == length
        row = made.sequences[i, 5:].tolist()
        assert row[:length] == free[i, :length].tolist() and set(row[length:]) <= {1}
    with pytest.raises(OptionError, match="tokenizer"):
        fast.generate(ids, max_new_tokens=4, stop_strings="x")


def test_log_probabilities_are_the_models(llama):
    model, fast = llama
    ids = [[5, 6, 7, 8], [9, 10]]
    made = fast.generate(ids, max_new_tokens=6, logprobs=2)
    for i, prompt in enumerate(ids):
        text = made.sequences[i : i + 1, 4 - len(prompt) :]
        with torch.no_grad():
            logs = model(text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = logs.gather(1, text[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(made.logprobs[i], own, atol=1e-4, rtol=1e-4)
        assert torch.equal(made.top_ids[i, :, 0], logs.argmax(-1))


def test_configs_and_processors(llama):
    from transformers import GenerationConfig

    model, fast = llama
    ids = torch.randint(3, 128, (2, 5))
    config = GenerationConfig(
        do_sample=True, temperature=0.8, top_p=0.9, max_new_tokens=NEW, pad_token_id=0
    )
    torch.manual_seed(4)
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert torch.equal(fast.generate(ids, generation_config=config, seed=4), wanted)
    calls = []

    def only_seven(text: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(text.shape)
        return scores.index_fill(1, torch.tensor([7]), 1e9)

    made = fast.generate(ids, max_new_tokens=3, logits_processor=[only_seven])
    assert set(made[:, 5:].flatten().tolist()) == {7}
    assert calls == [(2, 5), (2, 6), (2, 7)]
    least = fast.generate(ids, max_new_tokens=6, eos_token_id=int(made[0, 5]), min_new_tokens=2)
    assert least.shape[1] >= 7


def test_the_models_own_config_holds():
    model = tiny("llama")
    fast = accel.compile(model)
    ids = torch.tensor([[5, 6, 7]])
    free = fast.generate(ids, max_new_tokens=12, capacity=CAPACITY)
    model.generation_config.eos_token_id = int(free[0, 6])
    made = fast.generate(ids, max_new_tokens=12, capacity=CAPACITY)
    assert made.tolist() == free[:, :7].tolist()
    looked = fast.generate(ids, max_new_tokens=12, capacity=CAPACITY, prompt_lookup_num_tokens=3)
    assert torch.equal(made, looked)
    drafted = fast.generate(ids, max_new_tokens=12, capacity=CAPACITY, assistant_model=model)
    assert torch.equal(made, drafted)
