"""Generation on the device: tokens of `transformers`, choices, stops, streams, caches in place."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import accel
from accel.errors import ExecutionError
from accel.ir import interpret
from tests.backends.test_triton_cached import BOUND, CASES, Case
from tests.gpu.device_kernels import DeviceKernels, Kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
NEW = 40


def target() -> str:
    return "h200" if "H200" in torch.cuda.get_device_name() else "h100"


def cached_kernels() -> list[Kernel]:
    return [Kernel(c.function(), "cached_attention", tile=c.tile) for c in CASES]


@pytest.fixture(scope="module")
def cached() -> DeviceKernels:
    return DeviceKernels(cached_kernels)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_over_a_cache(cached: DeviceKernels, case: Case) -> None:
    torch.manual_seed(0)
    number, last = CASES.index(case), case.capacity - case.tokens
    for position in {0, min(17, last), last}:
        inputs = case.inputs(position)
        got = cached(number, inputs, calls=3)  # the parts' counters are ready again after each
        wanted = interpret(cached.functions[number], inputs)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(
                a.float(), b.float(), rtol=0, atol=2 * BOUND[case.dtype], equal_nan=True
            )


def test_a_position_outside_of_the_cache(cached: DeviceKernels) -> None:
    with pytest.raises(ExecutionError, match="out of range"):
        cached(0, CASES[0].inputs(CASES[0].capacity))


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    config = transformers.LlamaConfig(**{**sizes, **options}, pad_token_id=0, eos_token_id=None)
    return transformers.LlamaForCausalLM(config).to("cuda", dtype).eval()


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    model = llama()
    return model, accel.compile_generator(model, capacity=128, batch=0, target=target())


def expected(model: Any, ids: Tensor, **options: Any) -> Tensor:
    made: Tensor = model.generate(
        ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options
    )
    return made


@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_tokens_are_those_of_transformers(small: tuple[Any, Any], rows: int) -> None:
    model, fast = small
    for length in (1, 5, 23):
        ids = torch.randint(1, 1000, (rows, length), device="cuda")
        wanted = expected(model, ids)
        for _ in range(3):  # step by step, recorded, replayed
            assert torch.equal(fast.generate(ids, max_new_tokens=NEW), wanted)


PROMPTS = (7, 1, 23, 12)  # tokens


def unequal(small: tuple[Any, Any], **options: Any) -> None:
    """Rows of unequal length give together what each gives alone."""
    _, fast = small
    assert fast.generator.loop.each
    prompts = [torch.randint(1, 1000, (n,)).tolist() for n in PROMPTS]
    seeds = options.pop("seed", None)
    own = [{} if seeds is None else {"seed": seed} for seed in seeds or PROMPTS]
    alone = [
        fast.generate([p], **options, **o, return_dict_in_generate=True)
        for p, o in zip(prompts, own, strict=True)
    ]
    whole = {} if seeds is None else {"seed": seeds}
    for _ in range(3):  # step by step, recorded, replayed
        made = fast.generate(prompts, **options, **whole, return_dict_in_generate=True)
        assert made.lengths == [a.lengths[0] for a in alone]
        for row, a in enumerate(alone):
            count, start = a.lengths[0], PROMPTS[row]
            assert torch.equal(
                made.sequences[row, max(PROMPTS) : max(PROMPTS) + count],
                a.sequences[0, start : start + count],
            )


def test_texts_of_unequal_length_run_together(small: tuple[Any, Any]) -> None:
    model, fast = small
    unequal(small, max_new_tokens=NEW)
    ids = torch.randint(1, 1000, (3, 9), device="cuda")
    mask = torch.ones_like(ids)
    ids[1, :6], mask[1, :6] = 0, 0
    made = fast.generate(ids, attention_mask=mask, max_new_tokens=NEW)
    assert torch.equal(made[1, 6:], expected(model, ids[1:2, 6:])[0])
    assert torch.equal(made[::2], expected(model, ids[::2]))


def test_unequal_texts_end_and_are_drawn_row_by_row(small: tuple[Any, Any]) -> None:
    model, _ = small
    stops = expected(model, torch.randint(1, 1000, (1, 9), device="cuda"))[0, 9:].tolist()
    unequal(small, max_new_tokens=NEW, eos_token_id=stops[::7])
    draws = {"do_sample": True, "temperature": 0.9, "top_k": 40, "min_p": 0.01}
    unequal(small, max_new_tokens=NEW, seed=[3, 1, 4, 15], **draws)
    unequal(small, max_new_tokens=12, repetition_penalty=1.3)


@pytest.mark.parametrize("rows", [0, 4])
def test_unequal_texts_over_pages(small: tuple[Any, Any], rows: int) -> None:
    """Rows end, prompts begin alike; the last pages are given back."""
    model, plain = small
    cache = "page_cache{page=16}"
    fast = accel.compile_generator(model, capacity=128, batch=rows, target=target(), cache=cache)
    common = torch.randint(1, 1000, (20,)).tolist()
    prompts = [torch.randint(1, 1000, (n,)).tolist() for n in PROMPTS]
    for texts in (prompts, [[*common, *p] for p in prompts]):
        wanted = plain.generate(texts, max_new_tokens=NEW)
        stop = int(wanted[0, -NEW // 2])
        ended = plain.generate(texts, max_new_tokens=NEW, eos_token_id=stop, pad_token_id=0)
        for _ in range(3):  # step by step, recorded, replayed
            assert torch.equal(fast.generate(texts, max_new_tokens=NEW), wanted)
        made = fast.generate(texts, max_new_tokens=NEW, eos_token_id=stop, pad_token_id=0)
        assert torch.equal(made, ended)
        gc.collect()
        assert fast.generator.loop.pool.used == 0


@pytest.fixture(scope="module")
def speculative() -> tuple[Any, Any, Any]:
    """A model, its generator with @extend, and a smaller model's."""
    model = llama()
    draft = llama(num_hidden_layers=1)
    # The draft is right now and then: it has the large model's embedding and head.
    draft.model.embed_tokens, draft.lm_head = model.model.embed_tokens, model.lm_head
    fast = accel.compile_generator(model, capacity=128, extend=6, target=target())
    return model, fast, accel.compile_generator(draft, capacity=128, target=target())


@pytest.mark.parametrize("kind", ["lookup", "draft", "itself"])
def test_speculation_gives_the_same_tokens(speculative: tuple[Any, Any, Any], kind: str) -> None:
    model, fast, draft = speculative
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 3}
    if kind != "lookup":
        assistant = fast if kind == "itself" else draft
        options = {"assistant_model": assistant, "num_assistant_tokens": 4}
    for length in (1, 9, 24):
        ids = torch.randint(1, 1000, (1, length), device="cuda")
        ids = ids.repeat(1, 2)  # something to look up
        wanted = expected(model, ids)
        for _ in range(3):
            made = fast.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True, **options)
            assert torch.equal(made.sequences, wanted)
        facts = made.statistics
        assert kind == "lookup" or facts["proposed"] > 0
        if kind == "itself":
            assert facts["accepted"] == facts["proposed"]


def test_speculation_draws_follow_their_seed(speculative: tuple[Any, Any, Any]) -> None:
    _, fast, draft = speculative
    ids = torch.randint(1, 1000, (1, 9), device="cuda")
    draws = {"do_sample": True, "temperature": 0.8, "top_k": 50, "max_new_tokens": NEW}

    def draw(seed: int) -> Tensor:
        made: Tensor = fast.generate(ids, assistant_model=draft, seed=seed, **draws)
        return made

    assert torch.equal(draw(5), draw(5)) and not torch.equal(draw(5), draw(6))


def test_prompts_in_pieces(speculative: tuple[Any, Any, Any]) -> None:
    model, fast, _ = speculative
    ids = torch.randint(1, 1000, (1, 23), device="cuda")
    made = fast.generate(ids, max_new_tokens=NEW, prefill_chunk_size=6)
    assert torch.equal(made, expected(model, ids))


def test_logits_of_every_step(small: tuple[Any, Any]) -> None:
    """Against whole forwards; the caches are where they were."""
    model, fast = small
    loop, ids = fast.generator.loop, torch.randint(1, 1000, (2, 30), device="cuda")
    state = loop.empty(2)
    places = [part.data_ptr() for part in state]
    with torch.no_grad():
        logits, state = loop.prefill(ids[:, :10], state)
        for i in range(10, 30):
            wanted = model(ids[:, :i]).logits[:, -1]
            torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-5)
            logits, state = loop.decode(ids[:, i], torch.tensor(i, device="cuda"), state)
            assert [part.data_ptr() for part in state] == places


def test_a_text_ends_where_the_loop_on_the_host_ends_it(small: tuple[Any, Any]) -> None:
    model, fast = small
    ids = torch.randint(1, 1000, (3, 9), device="cuda")
    tokens = expected(model, ids)[:, 9:]
    for place in (0, 3, 17, NEW - 1):
        stops = tokens[:, place].tolist()
        made = fast.generate(ids, max_new_tokens=NEW, eos_token_id=stops, pad_token_id=0)[:, 9:]
        for row, own in zip(tokens.tolist(), made.tolist(), strict=True):
            end = next(i for i, t in enumerate(row) if t in stops) + 1
            assert own[:end] == row[:end] and not any(own[end:])


def test_a_stream_gets_every_token_once(small: tuple[Any, Any]) -> None:
    model, fast = small
    ids = torch.randint(1, 1000, (1, 9), device="cuda")
    wanted = expected(model, ids)
    for stop in (None, int(wanted[0, 9 + 12])):
        got: list[int] = []

        class Stream:
            def put(self, value: Tensor, got: list[int] = got) -> None:
                got += value.reshape(-1).tolist()

            def end(self, got: list[int] = got) -> None:
                got.append(-1)

        made = fast.generate(ids, max_new_tokens=NEW, streamer=Stream(), eos_token_id=stop)
        assert got == [*made[0].tolist(), -1]
        assert torch.equal(made, wanted[:, : made.shape[1]])


def test_draws_follow_their_seed(small: tuple[Any, Any]) -> None:
    _, fast = small
    ids = torch.randint(1, 1000, (2, 9), device="cuda")

    def draw(seed: int) -> Tensor:
        options = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
        made: Tensor = fast.generate(ids, max_new_tokens=NEW, seed=seed, **options)
        return made

    first = [draw(7) for _ in range(4)]
    assert all(torch.equal(first[0], other) for other in first[1:])
    assert not torch.equal(first[0], draw(8))


def test_a_window_shorter_than_the_text() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).to("cuda", torch.float32).eval()
    fast = accel.compile_generator(model, capacity=96, target=target())
    ids = torch.randint(1, 1000, (1, 25), device="cuda")
    got, wanted = fast.generate(ids, max_new_tokens=NEW)[0], expected(model, ids)[0]
    differ = (got != wanted).nonzero()
    if len(differ):  # only where two tokens are as likely as each other
        place = int(differ[0])
        with torch.no_grad():
            logits = model(wanted[None, :place]).logits[0, -1].double()
        assert place > 30 and float(logits[wanted[place]] - logits[got[place]]) < 1e-5


def test_bfloat16_is_as_near_to_float32_as_eager() -> None:
    model = llama(torch.bfloat16)
    fast = accel.compile_generator(model, capacity=64, target=target())
    ids = torch.randint(1, 1000, (1, 33), device="cuda")
    loop = fast.generator.loop
    with torch.no_grad():
        _, state = loop.prefill(ids[:, :-1], loop.empty(1))
        got, _ = loop.decode(ids[:, -1], torch.tensor(32, device="cuda"), state)
        eager = model(ids).logits[:, -1].float()
        exact = model.float()(ids).logits[:, -1]
    assert (got.float() - exact).abs().max() <= 2 * (eager - exact).abs().max()
