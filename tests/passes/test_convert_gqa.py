"""convert_gqa and heal: pooled heads, groups by likeness, what a short training recovers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from accel.errors import OptionError
from accel.frontends.export import capture
from accel.ir import Module, interpret, verify
from accel.passes.base import Context
from accel.passes.convert_gqa import cluster
from accel.passes.equivalence import TOLERANCE, check_decode
from accel.passes.heal import heal
from accel.passes.manager import run_pipeline
from accel.passes.pipelines import CLEAN_PIPELINE
from tests.passes.causal_models import captured, tiny

pytest.importorskip("transformers")

IDS = torch.arange(48).reshape(2, 24) % 16


class Heads(nn.Module):
    """Attention of four heads, of which 0 and 2 read the same keys and values, and 1 and 3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, 32)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 16)
        with torch.no_grad():
            for layer in (self.k, self.v):
                layer.weight[16:] = layer.weight[:16]
                layer.bias[16:] = layer.bias[:16]

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(y.transpose(1, 2).flatten(2))


def converted(model: nn.Module, options: str) -> tuple[Module, float]:
    module = capture(model.eval(), (IDS,))
    run_pipeline(module, list(CLEAN_PIPELINE))
    context = Context(calibration=[[IDS]])
    row = run_pipeline(module, f"convert_gqa{{{options}}}", context).rows[0]
    verify(module)
    return module, float(row.error or 0.0)


@pytest.mark.parametrize("method", ["cluster", "best"])
def test_equal_heads_that_are_apart_merge_without_an_error(method):
    module, error = converted(Heads(), f"heads=2,method={method}")
    attention = next(op for op in module.main.ops if op.name == "attention")
    assert attention.operands[1].shape[1] == 2
    assert error < 1e-6


def test_neighbours_do_not():
    _, error = converted(Heads(), "heads=2,method=mean")
    assert error > 0.01


def test_groups_of_heads_that_are_alike():
    keys = torch.randn(1, 6, 5, 4)
    keys[:, [3, 5]] = keys[:, [0, 1]] + 0.01
    keys[:, 4] = keys[:, 2] * 2
    assert cluster(keys, keys, 2) == [[0, 3], [1, 5], [2, 4]]
    assert cluster(keys, keys, 1) == [[i] for i in range(6)]
    assert cluster(keys, keys, 6) == [list(range(6))]


@pytest.mark.parametrize("family", ["gpt2", "falcon", "opt", "qwen3"])
def test_models_of_several_forms(family):
    """Merged, biased and rotated projections; the cache keeps the heads that are left."""
    module = captured(tiny(family))
    row = run_pipeline(module, "convert_gqa{heads=1}").rows[0]
    if family == "falcon":  # it has one head already
        assert not row.rewrites
        return
    assert row.rewrites == {"convert_gqa": 2}
    verify(module)
    run_pipeline(module, "insert_kv_cache{capacity=12}")
    decode = module.functions["decode"]
    kept = [a for a in decode.args if a.name.startswith(("keys.", "values."))]
    assert len(kept) == 4 and all(a.shape[1] == 1 for a in kept)
    assert check_decode(module, prompts=(4,), batches=(2,), steps=2) <= TOLERANCE


def test_what_cannot_be_merged_is_a_near_miss():
    module = captured(tiny("llama"))
    ledger = run_pipeline(module, "convert_gqa{heads=2}")
    assert "2 key/value heads" in ledger.misses[0].reason


@pytest.mark.parametrize("options", ["heads=0", "method=median", "bound=0.0"])
def test_wrong_options(options):
    with pytest.raises(OptionError):
        run_pipeline(captured(tiny("gpt2")), f"convert_gqa{{{options}}}")


def test_measuring_needs_calibration():
    with pytest.raises(OptionError, match="no calibration"):
        run_pipeline(captured(tiny("gpt2")), "convert_gqa{method=best}")


def test_healing_recovers_most_of_the_error():
    teacher = capture(Heads().eval(), (IDS,))
    run_pipeline(teacher, list(CLEAN_PIPELINE))
    student, before = converted(Heads(), "heads=1")
    generator = torch.Generator().manual_seed(0)
    batches = ([torch.randint(0, 16, (2, 24), generator=generator)] for _ in range(60))
    losses = heal(student, teacher, batches, learning_rate=3e-3)
    wanted, got = (interpret(m.main, [IDS], m.weights)[0] for m in (teacher, student))
    assert float((got - wanted).norm() / wanted.norm()) < before / 2
    assert losses[-1] < losses[0] / 4
    assert not any(student.weights.tensor(n).requires_grad for n in student.weights.names())


def test_nothing_to_heal():
    module = capture(nn.ReLU(), (torch.randn(2),))
    with pytest.raises(OptionError, match="there are none"):
        heal(module, module, [])
