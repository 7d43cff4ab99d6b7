"""insert_kv_cache: decode equivalence over model families, planted mistakes, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from accel.compiler.capture_text import capture_text
from accel.errors import CaptureError, ContractError, OptionError
from accel.ir import Builder, Module, interpret, verify
from accel.ir.module import Op
from accel.passes.equivalence import TOLERANCE, check_decode
from accel.passes.insert_kv_cache import InsertKvCache
from accel.passes.manager import run_pipeline
from accel.passes.pipelines import CLEAN_PIPELINE
from tests.passes.causal_models import (
    FAMILIES,
    LARGEST,
    RECURRENT,
    TRANSLATORS,
    captured,
    tiny,
)

pytest.importorskip("transformers")

CAPACITY = 12  # more than the sliding windows


def inserted(
    family: str, attention: str = "sdpa", capacity: int = CAPACITY, options: str = ""
) -> Module:
    module = captured(tiny(family, attention))
    run_pipeline(module, f"insert_kv_cache{{capacity={capacity}{options}}}")
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_equivalence(family):
    """Several prompts and batches, to the last position; caches start as NaN."""
    module = inserted(family)
    assert check_decode(module, prompts=(1, 4), batches=(1, 2), steps=2) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_eager_attention_gives_the_same(family):
    module = inserted(family, "eager")
    assert check_decode(module, prompts=(4,), batches=(2,), steps=2) <= TOLERANCE


def test_the_manager_checks_the_contract():
    module = captured(tiny("llama"))
    ledger = run_pipeline(module, f"insert_kv_cache{{capacity={CAPACITY}}}", validate=True)
    row = ledger.rows[0]
    assert row.changed and 0 < row.error <= TOLERANCE and row.notes["caches"] == 4


def test_a_static_batch():
    module = captured(tiny("llama"), symbolic_batch=False)
    run_pipeline(module, f"insert_kv_cache{{capacity={CAPACITY},batch=1}}")
    assert module.functions["decode"].args[0].type.is_static
    assert check_decode(module, steps=2) <= TOLERANCE


def test_caches_are_donated_and_as_small_as_the_key_heads():
    module = inserted("llama")
    decode = module.functions["decode"]
    assert decode.donates == {1: 2, 2: 3, 3: 4, 4: 5}
    assert [a.shape[1:] for a in decode.args[2:]] == [(2, CAPACITY, 16)] * 4


def test_prefill_computes_the_head_for_one_token():
    module = inserted("llama")
    *_, head = [op for op in module.functions["prefill"].ops if op.name == "linear"]
    assert head.result.shape[1:] == (1, 128)


def _ops(module: Module, name: str) -> list[Op]:
    return [op for op in module.functions["decode"].ops if op.name == name]


def _position_plus_one(op: Op, index: int) -> None:
    b = Builder(before=op)
    position = op.operands[index]
    op.set_operand(index, b.add(position, b.scalar(1, position.dtype)))


def write_one_too_late(module: Module) -> None:
    _position_plus_one(_ops(module, "dynamic_update")[0], 2)


def see_one_too_few(module: Module) -> None:
    op = _ops(module, "cached_attention")[0]
    b = Builder(before=op)
    op.set_operand(3, b.sub(op.operands[3], b.scalar(1, torch.int64)))


def turn_by_the_wrong_angle(module: Module) -> None:
    """The rotary tables of one position later."""
    cast = next(op for op in _ops(module, "cast") if op.result.dtype == torch.float32)
    b = Builder(before=cast)
    source = cast.operands[0]
    cast.set_operand(0, b.add(source, b.scalar(1, source.dtype)))


def widen_the_window(module: Module) -> None:
    op = _ops(module, "cached_attention")[0]
    op.attributes["window"] = op.attributes["window"] + 1


def turn_the_ring_too_late(module: Module) -> None:
    """Slots are counted modulo one more than there are, as far as there are any."""
    op = _ops(module, "remainder")[0]
    b = Builder(before=op)
    slots = op.operands[1]
    more = b.remainder(op.operands[0], b.add(slots, b.scalar(1, torch.int64)))
    op.set_operand(0, b.minimum(more, b.sub(slots, b.scalar(1, torch.int64))))


def see_one_slot_too_few(module: Module) -> None:
    op = _ops(module, "minimum")[0]
    b = Builder(before=op)
    op.set_operand(1, b.sub(op.operands[1], b.scalar(1, torch.int64)))


def see_the_ring_one_too_late(module: Module) -> None:
    """With room for several tokens: the slots' positions are one off."""
    op = _ops(module, "cached_attention")[0]
    b = Builder(before=op)
    op.set_operand(3, b.add(op.operands[3], b.scalar(1, torch.int64)))


RING = ",extend=3"
WHOLE_TEXT = ",rings=false"


@pytest.mark.parametrize(
    ("family", "plant", "options"),
    [
        ("llama", write_one_too_late, ""),
        ("llama", see_one_too_few, ""),
        ("llama", turn_by_the_wrong_angle, ""),
        ("mistral", widen_the_window, WHOLE_TEXT),
        ("mistral", write_one_too_late, ""),
        ("mistral", turn_the_ring_too_late, ""),
        ("mistral", see_one_slot_too_few, ""),
        ("mistral", see_the_ring_one_too_late, RING),
        ("mistral", widen_the_window, RING),
    ],
)
def test_planted_mistakes_are_caught(
    family: str, plant: Callable[[Module], None], options: str
) -> None:
    module = inserted(family, capacity=20, options=options)
    plant(module)
    verify(module)
    with pytest.raises(ContractError, match="decode equivalence"):
        check_decode(module, prompts=(4,), batches=(2,), steps=2)


def test_sinks_are_there_for_every_token():
    """gpt-oss: each head's sink is an operand of attention, over rings and whole caches."""
    module = inserted("gpt_oss", "eager")
    for name, kind in (("prefill", "attention"), ("decode", "cached_attention")):
        found = [o for o in module.functions[name].ops if o.name.endswith("attention")]
        assert len(found) == 2 and all(o.arguments()[-1] is not None for o in found), kind


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma3", "gpt2", "bloom", "mixtral", "gpt_oss"]
)
def test_several_tokens_at_once(family):
    """@extend, after prompts of which the last few leave the ring."""
    module = inserted(family, capacity=24, options=RING)
    assert check_decode(module, prompts=(1, 4), batches=(2,), steps=3) <= TOLERANCE


@pytest.mark.parametrize(
    ("options", "slots"), [("", {8, 20}), (RING, {16, 20}), (WHOLE_TEXT, {20})]
)
def test_local_layers_keep_no_more_than_their_window(options: str, slots: set[int]) -> None:
    module = inserted("gemma3", capacity=20, options=options)
    assert {a.shape[2] for a in module.functions["decode"].args[2:]} == slots


class Mixing(nn.Module):
    """Attention, and one more way in which tokens meet."""

    def __init__(self, mix: Callable[[Tensor], Tensor], causal: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 32)
        self.head = nn.Linear(32, 16)
        self.mix, self.causal = mix, causal

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=self.causal)
        return self.head(self.mix(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("mix", "name"),
    [
        (lambda x: x - x.mean(1, keepdim=True), "accel.mean"),
        (lambda x: x.flip(1), "accel.flip"),
        (lambda x: x / x.shape[1], "length of the text"),
        (lambda x: x.sort(1).values, "accel.sort"),
    ],
)
def test_ops_that_mix_tokens_are_refused_with_their_place(mix, name):
    module = captured(Mixing(mix))
    with pytest.raises(CaptureError, match=name) as caught:
        run_pipeline(module, "insert_kv_cache{capacity=8}")
    assert "test_insert_kv_cache.py" in caught.value.where


def test_attention_to_later_tokens_is_refused():
    module = captured(Mixing(lambda x: x, causal=False))
    with pytest.raises(CaptureError, match="not known to be causal"):
        run_pipeline(module, "insert_kv_cache{capacity=8}")


def test_a_model_without_attention_is_refused():
    module = captured(nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16)))
    with pytest.raises(CaptureError, match="nothing to cache"):
        run_pipeline(module, "insert_kv_cache{capacity=8}")


def test_token_wise_ops_of_any_kind_pass():
    module = captured(Mixing(lambda x: x.sort(-1).values.cumsum(-1) - x.mean(-1, keepdim=True)))
    run_pipeline(module, "insert_kv_cache{capacity=8}")
    assert check_decode(module, steps=2) <= TOLERANCE


class Causal(nn.Module):
    """A depthwise convolution that sees the tokens before."""

    def __init__(self, delay: int = 0, taps: int = 3, dilation: int = 2) -> None:
        super().__init__()
        self.before = (taps - 1) * dilation + delay
        self.conv = nn.Conv1d(32, 32, taps, groups=32, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x.transpose(1, 2), (self.before, 0))
        return self.conv(padded)[..., : x.shape[1]].transpose(1, 2)


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "convolution": Causal(),
    "convolution_later": Causal(delay=2),
    "shift": lambda x: x + nn.functional.pad(x, (0, 0, 1, -1)),
    "shift_by_cat": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) - x,
    "running_sum": lambda x: x.cumsum(1),
    "running_product": lambda x: x.tanh().cumprod(1),
    "running_maximum": lambda x: x.cummax(1).values,
    "running_minimum": lambda x: x.cummin(1)[0],
    "running_log_sum": lambda x: x.logcumsumexp(1),
    "two_of_them": nn.Sequential(Causal(), nn.GELU(), Causal(delay=1)),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_kept_besides_keys_and_values(kind):
    torch.manual_seed(0)
    module = captured(Mixing(KEPT[kind]))
    run_pipeline(module, "insert_kv_cache{capacity=12,extend=3}")
    assert check_decode(module, prompts=(1, 2, 5), batches=(2,), steps=3) <= TOLERANCE


def test_a_convolution_that_looks_ahead_is_refused():
    conv = nn.Conv1d(32, 32, 3, padding=1)
    module = captured(Mixing(lambda x: conv(x.transpose(1, 2)).transpose(1, 2)))
    with pytest.raises(CaptureError, match=r"accel\.conv|accel\.slice"):
        run_pipeline(module, "insert_kv_cache{capacity=8}")


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_models(family):
    module = recurrent(family)
    kinds = {item["kind"] for item in module.metadata["kv_cache"]["state"]}
    assert "carry" in kinds and "window" in kinds
    assert check_decode(module, prompts=(1, 4), batches=(2,), steps=2) <= TOLERANCE


def recurrent(family: str) -> Module:
    model = tiny(family)
    model(torch.zeros(1, 2, dtype=torch.int64))  # RWKV scales its weights the first time
    module = capture_text(model, LARGEST, batch=0)
    run_pipeline(module, [*CLEAN_PIPELINE, f"insert_kv_cache{{capacity={CAPACITY},extend=3}}"])
    return module


@pytest.mark.parametrize("family", TRANSLATORS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_encoder_decoders(family, attention):
    module = capture_text(tiny(family, attention), LARGEST, batch=0)
    run_pipeline(module, [*CLEAN_PIPELINE, f"insert_kv_cache{{capacity={CAPACITY},extend=3}}"])
    assert module.metadata["kv_cache"]["fixed"] == 4  # keys and values of two cross-attentions
    names = [op.name for op in module.functions["decode"].ops]
    assert names.count("attention") == 2 and names.count("cached_attention") == 2
    assert check_decode(module, prompts=(1, 3), batches=(2,), steps=2) <= TOLERANCE


def test_a_wrong_relative_position_is_caught():
    """The bias of T5 is a function of distances from the run-time position."""
    module = capture_text(tiny("t5"), LARGEST, batch=0)
    run_pipeline(module, [*CLEAN_PIPELINE, f"insert_kv_cache{{capacity={CAPACITY}}}"])
    decode = module.functions["decode"]
    position = next(a for a in decode.args if a.name == "position")
    user = next(u for u in position.users if u.name not in ("dynamic_update", "cached_attention"))
    b = Builder(before=user)
    moved = b.add(position, b.scalar(1, torch.int64))
    user.set_operand(user.operands.index(position), moved)
    with pytest.raises(ContractError, match="decode equivalence"):
        check_decode(module, prompts=(4,), batches=(2,), steps=2)


def keep_one_token_less(module: Module) -> None:
    """The window of a convolution moves on by one place too many."""
    slices = [op for op in _ops(module, "slice") if op.result.uses]
    op = next(o for o in slices if any(u.name == "return" for u in o.result.users))
    start, stop = op.attributes["start"], op.attributes["stop"]
    op.attributes |= {"start": start - 1, "stop": stop - 1}


def forget_the_last_token(module: Module) -> None:
    """The carry is handed on as it was."""
    decode = module.functions["decode"]
    index = next(i for i, a in enumerate(decode.args) if a.name == "carry.0")
    place = next(r for r, a in decode.donates.items() if a == index)
    decode.body.terminator.set_operand(place, decode.args[index])


@pytest.mark.parametrize("plant", [keep_one_token_less, forget_the_last_token])
def test_planted_mistakes_in_recurrent_state_are_caught(plant):
    module = recurrent("mamba")
    plant(module)
    verify(module)
    with pytest.raises(ContractError, match="decode equivalence"):
        check_decode(module, prompts=(4,), batches=(2,), steps=2)


@pytest.mark.parametrize("capacity", [1, 65])
def test_capacities_that_do_not_fit(capacity):
    module = captured(tiny("gpt2"))
    with pytest.raises(OptionError, match="cache of"):
        run_pipeline(module, f"insert_kv_cache{{capacity={capacity}}}")
    assert list(module.functions) == ["main"]


def test_positions_are_those_of_the_text():
    """A table of learned positions is read at the run-time position."""
    module = inserted("gpt2")
    ids = torch.arange(1, 7).reshape(1, 6)
    caches = [torch.zeros(1, 4, CAPACITY, 16) for _ in range(4)]
    got, *caches = interpret(module.functions["prefill"], [ids[:, :5], *caches], module.weights)
    place = torch.tensor(5)
    got = interpret(module.functions["decode"], [ids[:, 5:], place, *caches], module.weights)[0]
    with torch.no_grad():
        wanted = tiny("gpt2")(ids).logits[:, -1:]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_pass_says_what_it_is():
    assert InsertKvCache.contract.kind == "exact"
