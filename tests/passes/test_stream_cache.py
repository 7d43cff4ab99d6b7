"""stream_cache: sinks and a window; the paper's own cache, planted mistakes, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import accel
from accel.errors import CaptureError, ContractError, OptionError
from accel.ir import Builder, Module, verify
from accel.ir.module import Op
from accel.passes.cache_kinds import cache_passes
from accel.passes.equivalence import TOLERANCE, check_decode
from accel.passes.manager import run_pipeline
from tests.passes.causal_models import captured, tiny
from tests.runtime.test_state_kinds import varied

pytest.importorskip("transformers")

SINKS, WINDOW, CAPACITY = 2, 5, 20


def streaming(family: str, options: str = "", validate: bool = False) -> Module:
    module = captured(tiny(family))
    options = options or f"sinks={SINKS},window={WINDOW}"
    insert = f"insert_kv_cache{{capacity={CAPACITY}}}"
    run_pipeline(module, f"stream_cache{{{options}}},{insert}", validate=validate)
    verify(module)
    return module


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_decode_equivalence(family: str) -> None:
    """@prefill is made of two queries, @decode of turned keys, @main is the paper's own cache."""
    module = streaming(family)
    assert check_decode(module, prompts=(1, 4, 11), batches=(1, 2), steps=4) <= TOLERANCE


@pytest.mark.parametrize("options", ["sinks=0,window=6", "sinks=3,window=1"])
def test_extreme_sizes(options: str) -> None:
    module = streaming("llama", options)
    assert check_decode(module, prompts=(1, 9), batches=(2,), steps=3) <= TOLERANCE


def test_the_cache_has_one_size():
    module = streaming("llama", validate=True)
    decode = module.functions["decode"]
    assert [a.shape[2] for a in decode.args[2:]] == [SINKS + WINDOW] * 4
    assert all(i["sinks"] == SINKS for i in module.metadata["kv_cache"]["state"])


def test_texts_may_be_longer_than_the_model_has_positions():
    """Places are within the cache: 64 positions, and a text of 100 tokens."""
    model = varied("llama")
    cache = f"stream_cache{{sinks={SINKS},window=20}}"
    fast = accel.compile_generator(model, capacity=100, cache=cache)
    ids = torch.randint(3, 120, (1, 10))
    made = fast.generate(ids, max_new_tokens=90)
    assert made.shape == (1, 100)
    plain = accel.compile_generator(model, capacity=64)
    # As long as nothing has left the cache the text is the model's own.
    wanted = plain.generate(ids, max_new_tokens=12)
    assert len(set(wanted[0, 10:].tolist())) > 2
    assert torch.equal(made[:, :22], wanted)


def test_compiled_text_is_that_of_the_program():
    """@prefill and @decode of the compiled program agree where tokens have left the cache."""
    cache = f"stream_cache{{sinks={SINKS},window={WINDOW}}}"
    fast = accel.compile_generator(varied("llama"), capacity=24, cache=cache)
    ids = torch.randint(0, 128, (1, 20))
    one, steps = (fast.generator.logits(ids, count) for count in (1, 16))
    torch.testing.assert_close(one[-1], steps[-1], rtol=1e-3, atol=1e-3)


# -- planted mistakes ----------------------------------------------------------------------------


def _ops(module: Module, name: str) -> list[Op]:
    return [op for op in module.functions["decode"].ops if op.name == name]


def evict_a_sink(module: Module) -> None:
    """A ring over all slots."""
    op = _ops(module, "dynamic_update")[0]
    b, position = Builder(before=op), module.functions["decode"].args[1]
    op.set_operand(2, b.remainder(position, b.scalar(SINKS + WINDOW, torch.int64)))


def write_one_slot_late(module: Module) -> None:
    op = _ops(module, "dynamic_update")[1]
    b = Builder(before=op)
    slots = b.scalar(SINKS + WINDOW, torch.int64)
    later = b.remainder(b.add(op.operands[2], b.scalar(1, torch.int64)), slots)
    op.set_operand(2, later)


def turn_by_the_slot(module: Module) -> None:
    """Keys turned by where they lie, not by their order."""
    op = next(o for o in _ops(module, "gather") if o.operands[1].shape == (SINKS + WINDOW,))
    b = Builder(before=op)
    op.set_operand(1, b.iota(shape=(SINKS + WINDOW,), axis=0, dtype=torch.int64))


def see_one_slot_too_few(module: Module) -> None:
    op = _ops(module, "cached_attention")[0]
    b = Builder(before=op)
    op.set_operand(3, b.sub(op.operands[3], b.scalar(1, torch.int64)))


@pytest.mark.parametrize(
    "plant", [evict_a_sink, write_one_slot_late, turn_by_the_slot, see_one_slot_too_few]
)
def test_planted_mistakes_are_caught(plant: Callable[[Module], None]) -> None:
    module = streaming("llama")
    plant(module)
    verify(module)
    with pytest.raises(ContractError, match="decode equivalence"):
        check_decode(module, prompts=(4, 9), batches=(2,), steps=3)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bloom", "gpt2", "gpt_neox"])
def test_positions_elsewhere_are_refused_with_their_place(family: str) -> None:
    with pytest.raises(CaptureError, match="stream_cache") as caught:
        streaming(family)
    assert "modeling_" in caught.value.where or "sdpa" in caught.value.where


def test_wrong_options():
    for options in ("sinks=-1", "window=0", "bound=0.0"):
        with pytest.raises(OptionError):
            streaming("llama", options)
    with pytest.raises(OptionError, match="no less than the capacity"):
        streaming("llama", "sinks=4,window=16")


def test_several_tokens_at_once_are_refused():
    module = captured(tiny("llama"))
    pipeline = "stream_cache{sinks=2,window=5},insert_kv_cache{capacity=20,extend=3}"
    with pytest.raises(OptionError, match="one token at a time"):
        run_pipeline(module, pipeline)


@pytest.mark.parametrize("text", ["sinks,paged", "int8,sinks"])
def test_kinds_that_contradict_each_other(text: str) -> None:
    with pytest.raises(OptionError, match="contradicts itself"):
        cache_passes(text)
