"""A language model compiled for a GPU: which launches a step has, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from accel.compiler.choice import add_choices
from accel.compiler.language import derive_generator
from accel.runtime.decoding import Limits, TokenLoop
from accel.runtime.sampling import Sampling
from tests.backends.triton_worker import Worker
from tests.compiler.gpu_programs import InterpretedHost, functions_of

CAPACITY = 24


def model_of(name: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def generate(name: str, options: dict[str, Any], rows: int) -> dict[str, Any]:
    """Runs in a process whose Triton interprets."""
    from tests.backends.triton_worker import _prepare

    _prepare()
    model = model_of(name, **options)
    module = derive_generator(model, CAPACITY, rows)
    add_choices(module, CAPACITY)
    host = InterpretedHost()
    made = functions_of(module, host)
    plans = {k: [(s.kind, s.name) for s in f.plan.steps] for k, f in made.items()}
    loop = TokenLoop(made["prefill"].plan, made["prefill"], made["decode"], torch.device("cpu"))
    ids = torch.randint(1, 61, (rows, 5))
    wanted = model.generate(ids, max_new_tokens=15, min_new_tokens=15, do_sample=False)[:, 5:]
    got = loop.text(ids, Limits(15, frozenset(), 0), Sampling(), None)
    with torch.no_grad():
        logits = model(ids).logits[:, -1:]
    desk = [torch.zeros(rows, 1, dtype=torch.int64), _place(4, rows)]
    desk.append(torch.zeros(rows, CAPACITY + 2, dtype=torch.int64))
    stop = int(logits[0].argmax())
    until = [torch.ones(rows, 1, dtype=torch.bool), torch.tensor(7), torch.full((1, 16), stop)]
    chosen = made["advance_until"]([logits, *desk, *until])
    state = [x.clone() for x in chosen]
    again = made["advance_until"]([logits, *state, *until[1:]])
    host.close()
    return {"plans": plans, "wanted": wanted, "got": got, "chosen": chosen, "again": again,
            "best": logits[:, -1].argmax(-1), "stop": stop}  # fmt: skip


def _place(position: int, rows: int) -> torch.Tensor:
    """Several rows have a position each."""
    return torch.tensor(position) if rows == 1 else torch.full((rows,), position)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("Llama", {}, 1),
        ("Llama", {}, 2),
        ("Mistral", {"sliding_window": 6}, 1),
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, 1),
        ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3}, 1),
    ],
)
def test_tokens_and_launches(worker: Worker, name: str, options: dict[str, Any], rows: int) -> None:
    made = worker.pool.submit(generate, name, options, rows).result()
    assert torch.equal(made["got"], made["wanted"])
    decode = [step for step in made["plans"]["decode"] if step[0] != "view"]
    assert {kind for kind, _ in decode} == {"kernel"}
    if rows == 1 and not name.startswith(("Mixtral", "Olmoe")):
        assert len(decode) <= 5 * 2 + 6  # a layer is five launches
    assert len(made["plans"]["advance_until"]) <= 6
    token, position, history, running = made["chosen"]
    assert torch.equal(position, made["again"][1] - 1)
    best, ended = made["best"], made["best"] == made["stop"]
    assert torch.equal(token[:, 0], best)
    assert torch.equal(history[:, 5], best) and torch.equal(running[:, 0], ~ended)
    assert torch.equal(made["again"][0][:, 0], torch.where(ended, 7, best))
