"""Chunked recurrences, token by token: the same numbers, and only where they are the same."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accel.compiler.language import derive_generator
from accel.frontends.token_loops import (
    _tried_delta_rule,
    _tried_state_space,
    _tried_wide_delta_rule,
    delta_rule,
    state_space,
    token_by_token,
)
from accel.passes.equivalence import check_decode
from benchmarks.language_models import tiny_model

transformers = pytest.importorskip("transformers")

FORMS = [
    ("mamba2", "mamba2_chunk_scan", state_space, _tried_state_space),
    ("qwen3_next", "torch_chunk_gated_delta_rule", delta_rule, _tried_delta_rule),
    ("kimi_linear", "chunk_kimi_delta_attention", delta_rule, _tried_wide_delta_rule),
]


def chunked(family: str, name: str) -> Any:
    path = f"transformers.models.{family}.modeling_{family}"
    module = pytest.importorskip(path)
    if not hasattr(module, name):
        pytest.skip(f"this version of transformers has no {name}")
    return getattr(module, name)


@pytest.mark.parametrize(("family", "name", "loop", "tried"), FORMS)
def test_loops_compute_what_chunks_do(family, name, loop, tried):
    torch.testing.assert_close(tried(loop), tried(chunked(family, name)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "name", "loop", "tried"), FORMS)
def test_states_go_on(family, name, loop, tried):
    """A text in two parts, the second from the first one's state, is the text."""
    del tried
    x, k = torch.randn(1, 9, 4, 6), torch.randn(1, 9, 4, 6)
    step = torch.rand(1, 9, 4)
    if loop is state_space:
        given: tuple[Tensor, ...] = (x, step, -torch.rand(4), k[:, :, :2], k[:, :, 1:3])
        names, sequence = ("initial_states", "return_final_states"), (0, 1, 3, 4)
    else:
        decay = -torch.rand(1, 9, 4, 6) if "kimi" in family else -torch.rand(1, 9, 4)
        given = (x, k / 3, torch.randn(1, 9, 4, 5), decay, step)
        names, sequence = ("initial_state", "output_final_state"), (0, 1, 2, 3, 4)

    def part(start: int, stop: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        own = [t[:, start:stop] if i in sequence else t for i, t in enumerate(given)]
        made: tuple[Tensor, Tensor] = loop(*own, **{names[0]: state, names[1]: True})
        return made

    whole, _ = part(0, 9, None)
    first, state = part(0, 4, None)
    second, _ = part(4, 9, state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-6)


class Uses(nn.Module):
    """A model of a module that has a function of that name."""


@pytest.fixture
def module(monkeypatch):
    made = ModuleType("made_up_model")
    monkeypatch.setitem(sys.modules, "made_up_model", made)
    monkeypatch.setattr(Uses, "__module__", "made_up_model")
    return made


def test_only_while_it_captures(module):
    def chunks(*given: Any, **more: Any) -> Any:
        return state_space(*given, **more)

    module.mamba2_chunk_scan = chunks
    with pytest.raises(KeyError), token_by_token(Uses()):
        assert module.mamba2_chunk_scan is state_space
        raise KeyError
    assert module.mamba2_chunk_scan is chunks


@pytest.mark.parametrize(
    "other",
    [
        lambda *given, **more: state_space(*given, **more) * 1.01,
        lambda x: x,
        lambda *given, **more: state_space(*given, **more)[:, 1:],
    ],
)
def test_other_functions_stay(module, other):
    module.mamba2_chunk_scan = other
    with token_by_token(Uses()):
        assert module.mamba2_chunk_scan is other


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_decoding_carries_their_states(name):
    model = tiny_model(name)
    module = derive_generator(model, 14)
    kinds = {item["kind"] for item in module.metadata["kv_cache"]["state"]}
    assert {"carry", "window"} <= kinds
    assert check_decode(module, prompts=(2,), steps=2) < 1e-9
