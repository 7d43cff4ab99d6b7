"""Generation with every kind of state: rings, recurrent state, encoder-decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import accel
from accel.errors import InputError, OptionError
from accel.runtime.libraries.cache import Update
from accel.runtime.libraries.loop import Scan
from tests.passes.causal_models import tiny

pytest.importorskip("transformers")

NEW = 24
TIED = ("gemma3", "recurrent_gemma", "t5")


def varied(family: str) -> Any:
    """A model whose texts do not repeat one token."""
    model = tiny(family)
    model(torch.zeros(1, 2, dtype=torch.int64)) if family == "rwkv" else None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                table = "embed" in name or "shared" in name
                parameter.mul_(1 if table and family in TIED else 6)
    return model


def wanted(model: Any, ids: Tensor, **options: Any) -> Tensor:
    made: Tensor = model.generate(
        ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return made


@pytest.mark.parametrize("family", ["mistral", "gemma3", "mamba", "recurrent_gemma", "rwkv"])
def test_greedy_tokens_are_those_of_transformers(family, tmp_path):
    """From the artifact, prompts of any number, in one piece and in several."""
    model = varied(family)
    path = tmp_path / "m.accel"
    accel.package_generator(model, path=path, capacity=48, batch=0, extend=4)
    loaded = accel.load(path, trust=True)
    ids = torch.randint(3, 120, (2, 13))
    # The cached forward that transformers has of RWKV differs from its plain one, the model.
    expected = wanted(model, ids, **({"use_cache": False} if family == "rwkv" else {}))
    assert len(set(expected[0, 13:].tolist())) > 2
    assert torch.equal(loaded.generate(ids, max_new_tokens=NEW), expected)
    pieces = loaded.generate(ids, max_new_tokens=NEW, prefill_chunk_size=4)
    assert torch.equal(pieces, expected)


@pytest.fixture(scope="module", params=["t5", "bart"])
def translator(request):
    model = varied(request.param)
    return model, accel.compile_generator(model, capacity=32, batch=0)


def test_encoder_decoders(translator):
    model, fast = translator
    ids = torch.randint(3, 120, (2, 7))
    expected = wanted(model, ids)
    assert len(set(expected.flatten().tolist())) > 2
    assert torch.equal(fast.generate(ids, max_new_tokens=NEW), expected)
    first = model.config.decoder_start_token_id
    begun = torch.tensor([[first, 5, 6, 7], [first, 8, 9, 10]])
    expected = wanted(model, ids, decoder_input_ids=begun)
    got = fast.generate(ids, decoder_input_ids=begun, max_new_tokens=NEW)
    assert torch.equal(got, expected)


def test_sources_of_unequal_lengths_do_not_see_each_other(translator):
    _, fast = translator
    first, second = torch.randint(3, 120, (1, 9)), torch.randint(3, 120, (1, 5))
    alone = [fast.generate(ids, max_new_tokens=6)[0] for ids in (first, second)]
    lists = fast.generate([first[0].tolist(), second[0].tolist()], max_new_tokens=6)
    padded = torch.cat([first, torch.nn.functional.pad(second, (0, 4))])
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    masked = fast.generate(padded, attention_mask=mask, max_new_tokens=6)
    for i, text in enumerate(alone):
        assert torch.equal(lists[i], text) and torch.equal(masked[i], text)


def test_wrong_sources_are_refused(translator):
    _, fast = translator
    ids = torch.randint(3, 120, (2, 7))
    with pytest.raises(InputError, match="outside of the vocabulary"):
        fast.generate(torch.tensor([[3, 1000]]), max_new_tokens=2)
    with pytest.raises(InputError, match="1 beginnings for 2"):
        fast.generate(ids, decoder_input_ids=torch.tensor([[1]]), max_new_tokens=2)
    with pytest.raises(InputError, match="hides tokens inside"):
        mask = torch.tensor([[1, 0, 1, 1, 1, 1, 1]] * 2)
        fast.generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(InputError, match="is empty"):
        fast.generate(ids, attention_mask=torch.zeros(2, 7, dtype=torch.int64), max_new_tokens=2)


def test_a_causal_model_has_no_source():
    fast = accel.compile_generator(tiny("llama"), capacity=16)
    with pytest.raises(OptionError, match="no encoder"):
        fast.generate(torch.tensor([[3]]), decoder_start_token_id=1, max_new_tokens=2)


@pytest.mark.parametrize(("start", "count"), [(0, 3), (4, 3), (13, 5), (3, 12)])
def test_a_ring_is_written_around_its_end(start: int, count: int):
    from accel.runtime.interfaces import Operand

    operands = [Operand(torch.float32, (2, 5)), Operand(torch.float32, (2, None))]
    call = Update().prepare({"axis": 1, "ring": True}, [*operands, Operand(torch.int64, ())])
    x, source = torch.zeros(2, 5), torch.randn(2, count)
    expected = x.clone()
    for i in range(count):
        expected[:, (start + i) % 5] = source[:, i]
    assert torch.equal(call(x, source, torch.tensor(start)), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"carries": 5},
        {"axes": ["0"]},
        {"body": {"steps": [["os::system", [], {}, 1]], "results": [0, 0]}},
        {"body": {"steps": [["aten::add.Tensor", [], {}, 1]], "results": [0, 99]}},
        {"body": {"steps": [["aten::add_.Tensor", [], {}, 1]], "results": [0, 0]}},
        {"symbols": []},
    ],
)
def test_a_damaged_loop_is_refused(change):
    from accel.errors import ArtifactError
    from accel.runtime.interfaces import Operand

    add = ["aten::add.Tensor", [{"operand": 0}, {"operand": 1}], {}, 1]
    options = {
        "carries": 1,
        "axes": [0],
        "stacks": [0],
        "symbols": {},
        "body": {"steps": [add], "results": [2, 2]},
    }
    operands = [Operand(torch.float32, (1, 2)), Operand(torch.float32, (None, 2))]
    x = torch.randn(4, 2)
    last, stacked = Scan().prepare(options, operands)(torch.zeros(1, 2), x)
    torch.testing.assert_close(stacked, x.cumsum(0))
    torch.testing.assert_close(last, x.sum(0, keepdim=True))
    with pytest.raises(ArtifactError):
        Scan().prepare(options | change, operands)
