"""Compression passes under the pass manager: contracts, bounds, ledger, pipeline text."""

from __future__ import annotations

import pytest
import torch

from accel.errors import ContractError
from accel.ir import Module
from accel.passes.base import Context
from accel.passes.manager import run_pipeline
from accel.passes.pipeline import format_pipeline, parse_pipeline
from accel.passes.quantize import Quantize
from tests.passes.compression.programs import Program, linear_program, random

LOSSY = (
    "quantize",
    "quantize{bits=4,group=16,symmetric=false}",
    "quantize{bits=3,group=16,symmetric=false}",
    "quantize{bits=2,group=16,symmetric=false}",
    "quantize{format=fp8}",
    "quantize{format=nf4,group=16}",
    "sparsify",
    "cluster",
    "cluster{bits=8}",
    "cluster{group=16}",
    "low_rank{energy=0.7,gain=0}",
)


def network(layers: int = 4, width: int = 64) -> Module:
    """Linears with a nonlinearity and a residual sum, as in a transformer's feed-forward part."""
    p = Program()
    x = p.input(6, width)
    for i in range(layers):
        weight = random(width, width, seed=i) / width**0.5
        x = p.b.add(x, p.b.linear(p.b.silu(x), p.weight(f"layers.{i}.weight", weight)))
    return p.done(x)


@pytest.mark.parametrize("pipeline", LOSSY)
def test_the_default_bound_holds_and_the_ledger_says_by_how_much(pipeline: str) -> None:
    ledger = run_pipeline(network(), pipeline, validate=True)
    (row,) = ledger.rows
    assert sum(row.rewrites.values()) == 4 and row.metric == "relative_error"
    assert 0 < row.error <= parse_pipeline(pipeline)[0].promise().bound
    assert row.notes["bytes_before"] == 4 * 64 * 64 * 4
    saved = row.notes["bytes_before"] - row.notes["bytes_after"]
    assert row.saved.weight_bytes == saved > 0
    assert len(row.notes["weights"]) == 4


def test_a_bound_that_is_missed_fails_or_undoes_the_pass() -> None:
    with pytest.raises(ContractError, match="quantize"):
        run_pipeline(network(), "quantize{bits=2,bound=0.01}", validate=True)
    module = network()
    ledger = run_pipeline(module, "quantize{bits=2,bound=0.01}", validate=True, on_violation="undo")
    assert ledger.rows[0].undone
    assert module.weights.names() == [f"layers.{i}.weight" for i in range(4)]


def test_calibration_inputs_are_what_is_measured() -> None:
    context = Context(calibration=[(random(6, 64, seed=5),)])
    row = run_pipeline(network(), "quantize", context).rows[0]
    assert row.measured_on == "calibration inputs" and 0 < row.error < 0.05


def test_pipeline_text_makes_the_pass() -> None:
    text = 'quantize{skip="lm_head|embed",bits=4,group=64,symmetric=false}'
    (made,) = parse_pipeline(text)
    assert made == Quantize(bits=4, group=64, symmetric=False, skip="lm_head|embed")
    assert format_pipeline([made]) == text


def test_reparameterization_keeps_the_exact_contract() -> None:
    p = Program()
    x = p.input(1, 4, 6, 6)
    attributes = {"stride": (1, 1), "dilation": (1, 1)}
    a = p.b.conv(x, p.weight("a", random(4, 4, 3, 3)), padding=(1, 1), **attributes)
    c = p.b.conv(x, p.weight("c", random(4, 4, 1, 1)), padding=(0, 0), **attributes)
    norm = [p.weight(f"n{i}", random(4, seed=i).abs() + 0.5) for i in range(4)]
    module = p.done(p.b.add(p.b.batch_norm(a, *norm, eps=1e-5), p.b.add(c, x)))
    row = run_pipeline(module, "reparameterize", validate=True).rows[0]
    assert row.rewrites == {"reparameterize": 1} and row.error < 1e-9


def test_passes_compose_under_their_contracts() -> None:
    pipeline = "sparsify{only=layers.0},quantize{group=32},cluster{only=layers.3}"
    ledger = run_pipeline(network(), pipeline, validate=True)
    assert [sum(row.rewrites.values()) for row in ledger.rows] == [1, 4, 0]


@pytest.mark.parametrize("pipeline", LOSSY)
def test_exact_passes_afterwards_leave_encoded_weights_encoded(pipeline: str) -> None:
    module = network()
    ledger = run_pipeline(module, f"{pipeline},canonicalize,cse,fold,dce")
    assert ledger.rows[-1].after.weight_bytes <= ledger.rows[0].after.weight_bytes
    assert ledger.rows[0].after.weight_bytes < 4 * 64 * 64 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoded_programs_keep_their_types(dtype: torch.dtype) -> None:
    for pipeline in LOSSY:
        module = linear_program(random(32, 64, dtype=dtype), rows=2)
        run_pipeline(module, pipeline)
        assert module.main.results[0].dtype == dtype
