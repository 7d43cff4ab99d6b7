"""quantize_cache: rounding errors, what is kept, refusals, generation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import accel
from accel.errors import ContractError, OptionError
from accel.ir import Module, verify
from accel.passes.base import Context
from accel.passes.equivalence import TOLERANCE, check_decode
from accel.passes.manager import run_pipeline
from tests.passes.causal_models import captured, tiny

pytest.importorskip("transformers")

# Bytes that one token's keys of a layer take: two heads of 16 elements, and their scales.
BYTES = {"int8": 2 * (16 + 2), "fp8": 2 * (16 + 2), "int4": 2 * (8 + 2 + 2)}


def rounded(family: str, options: str, capacity: int = 12) -> Module:
    module = captured(tiny(family))
    context = Context(calibration=[[torch.randint(0, 128, (2, 20))]])
    run_pipeline(module, f"quantize_cache{{{options}}}", context, validate=True)
    run_pipeline(module, f"insert_kv_cache{{capacity={capacity}}}")
    verify(module)
    return module


def key_bytes(module: Module) -> int:
    decode = module.functions["decode"]
    kept = [a for a in decode.args if a.name.startswith("keys.")]
    return sum(a.type.with_shape(a.shape[1:]).nbytes() // a.shape[2] for a in kept) // 2


@pytest.mark.parametrize("form", BYTES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_caches_keep_codes_and_scales(form: str, family: str) -> None:
    """Decoding from the codes gives what the rounded forward gives, to the last position."""
    module = rounded(family, f"format={form}")
    assert key_bytes(module) == BYTES[form]
    assert check_decode(module, prompts=(1, 4), batches=(2,), steps=2) <= TOLERANCE


def test_more_scales_are_closer():
    errors = []
    for group in (0, 4):
        module = captured(tiny("llama"))
        options = f"quantize_cache{{format=int8,group={group}}}"
        errors.append(run_pipeline(module, options, validate=True).rows[0].error)
    assert 0 < errors[1] < errors[0] < 0.01


def test_rotation_changes_no_score():
    """With 8 bits what is left is rounding, and the rotated keys are what the cache keeps."""
    module = rounded("llama", "format=int8")
    assert sum(op.name == "matmul" for op in module.functions["decode"].ops) == 4
    assert check_decode(module, prompts=(4,), batches=(2,), steps=2) <= TOLERANCE


class Shifted(nn.Module):
    """Attention whose keys have a large vector in common."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(16, 64)
        self.shift = nn.Buffer(20 * torch.randn(2, 1, 32, generator=generator))
        self.head = nn.Linear(64, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids).unflatten(-1, (2, 32)).transpose(1, 2)
        made = nn.functional.scaled_dot_product_attention(x, x + self.shift, x, is_causal=True)
        return self.head(made.transpose(1, 2).flatten(2))


def test_what_keys_have_in_common_changes_no_score():
    """Their mean is taken off before they are rounded."""
    model, errors = Shifted(), []
    for center in (0, 64):
        module = captured(model)
        options = f"quantize_cache{{format=int4,group=32,bound=2.0,center={center}}}"
        errors.append(run_pipeline(module, options, validate=True).rows[0].error)
        run_pipeline(module, "insert_kv_cache{capacity=12}")
        assert check_decode(module, prompts=(4,), batches=(2,), steps=2) <= TOLERANCE
    assert 0 < errors[1] < errors[0] / 2


def test_capped_scores_are_not_shifted():
    module = captured(tiny("gemma2"))
    ledger = run_pipeline(module, "quantize_cache{format=int4}")
    assert any("cap of scores" in miss.reason for miss in ledger.misses)


def test_the_promise_is_checked():
    module = captured(tiny("llama"))
    with pytest.raises(ContractError, match="quantize_cache"):
        run_pipeline(module, "quantize_cache{format=int4,bound=0.001}", validate=True)


def test_keys_of_an_odd_size_are_a_near_miss():
    module = captured(tiny("llama"))
    ledger = run_pipeline(module, "quantize_cache{group=5}")
    assert not ledger.rows[0].rewrites  # not rotated either
    assert "no multiple of group = 5" in ledger.misses[0].reason


@pytest.mark.parametrize("options", ["group=-1", "format=int5", "bound=-1.0"])
def test_wrong_options(options):
    with pytest.raises(OptionError):
        run_pipeline(captured(tiny("llama")), f"quantize_cache{{{options}}}")


@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
def test_compiled_text_is_that_of_the_rounded_forward(form):
    """@prefill and @decode of the compiled program agree token by token."""
    fast = accel.compile_generator(tiny("llama"), capacity=24, cache=form)
    ids = torch.randint(0, 128, (1, 20))
    one, steps = (fast.generator.logits(ids, count) for count in (1, 8))
    torch.testing.assert_close(one[-1], steps[-1], rtol=1e-3, atol=1e-3)


def test_the_same_keys_are_rounded_once():
    module = captured(tiny("llama"))
    row = run_pipeline(module, "quantize_cache").rows[0]
    assert row.notes["rounded"] == 4
