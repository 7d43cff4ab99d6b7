"""low_rank: fires where it pays, near misses, and the optimal error of its rank."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accel.compiler.targets import Target
from accel.errors import OptionError
from accel.ir import Module, SymbolInfo, TensorType, symbol
from accel.passes.base import Context
from accel.passes.low_rank import CostModel, LowRank, cost_model, rank_by_energy
from accel.passes.quantize import Quantize
from tests.passes.compression.programs import Program, apply, linear_program, random, run


def decaying(outputs: int, inputs: int, decay: float = 0.7, seed: int = 0) -> Tensor:
    """A random matrix with singular values decay^i."""
    u = torch.linalg.qr(random(outputs, outputs, seed=seed).double()).Q
    v = torch.linalg.qr(random(inputs, inputs, seed=seed + 1).double()).Q
    rank = min(outputs, inputs)
    return ((u[:, :rank] * decay ** torch.arange(rank)) @ v[:rank]).float()


def bytes_only(**options: float) -> LowRank:
    """Small test matrices never pay in estimated time: let bytes alone decide."""
    return LowRank(gain=0, **options)


@pytest.mark.parametrize("seed", range(3))
def test_factors_have_the_best_error_of_their_rank(seed: int) -> None:
    outputs, inputs = 24 + 8 * seed, 40 - 4 * seed
    weight = decaying(outputs, inputs, seed=seed)
    x = random(5, inputs, seed=9)
    module = linear_program(weight, rows=5)
    outcome = apply(module, bytes_only(energy=0.99, multiple=1))
    assert outcome.rewrites == ["low_rank"]
    u, s, vt = torch.linalg.svd(weight.double())
    rank = next(r for r in range(1, 99) if s[:r].square().sum() >= 0.99 * s.square().sum())
    row = outcome.notes["weights"][0]
    assert row["rank"] == rank
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert row["error"] == pytest.approx(float((best - weight).norm() / weight.norm()), rel=1e-3)
    torch.testing.assert_close(run(module, x), F.linear(x, best.float()), rtol=1e-4, atol=1e-5)
    assert outcome.notes["bytes_after"] == 4 * rank * (inputs + outputs)


def test_the_bias_goes_to_the_second_linear_and_the_weight_is_dropped() -> None:
    p = Program()
    x = p.input(3, 32)
    weight, bias = decaying(24, 32), random(24)
    module = p.done(p.b.linear(x, p.weight("w", weight), p.weight("bias", bias)))
    outcome = apply(module, bytes_only())
    linears = [op for op in module.main.ops if op.name == "linear"]
    assert [len(op.operands) for op in linears] == [2, 3]
    assert sorted(module.weights.names()) == ["bias", "w.u", "w.v"]
    assert "w.v" in outcome.text
    x_value = random(3, 32, seed=4)
    difference = run(module, x_value) - F.linear(x_value, weight, bias)
    assert difference.norm() < 0.3 * F.linear(x_value, weight).norm()


@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_weights_are_factored_too(transposed: bool) -> None:
    weight = decaying(32, 24)
    p = Program()
    x = p.input(2, 3, 32)
    w = p.weight("w", weight.T.contiguous() if transposed else weight)
    module = p.done(p.b.matmul(x, p.b.permute(w, axes=(1, 0)) if transposed else w))
    outcome = apply(module, bytes_only(energy=1 - 1e-12))
    assert outcome.rewrites == [] and "stores no fewer bytes" in outcome.misses[0]
    outcome = apply(module, bytes_only(energy=0.999, multiple=1))
    assert "matmul" not in outcome.ops() and "permute" not in outcome.ops()
    value = random(2, 3, 32, seed=3)
    wanted = value @ weight
    assert (run(module, value) - wanted).norm() < 0.1 * wanted.norm()


def test_two_readers_share_the_factors() -> None:
    p = Program()
    x, w = p.input(3, 32), p.weight("w", decaying(32, 32))
    module = p.done(p.b.linear(p.b.linear(x, w), w))
    outcome = apply(module, bytes_only())
    assert outcome.rewrites == ["low_rank"]
    assert outcome.ops().count("linear") == 4
    assert module.weights.names() == ["w.v", "w.u"]


def test_ranks_are_found_by_energy_and_rounded_up() -> None:
    s = torch.tensor([4.0, 2.0, 1.0, 1.0])
    assert rank_by_energy(s, 16 / 22, 1) == 1
    assert rank_by_energy(s, 16.1 / 22, 1) == 2
    assert rank_by_energy(s, 21.5 / 22, 1) == 4
    assert rank_by_energy(s, 0.5, 3) == 3
    assert rank_by_energy(s, 1.0, 8) == 4
    assert rank_by_energy(torch.zeros(4), 0.9, 1) == 1


def test_a_flat_spectrum_is_a_near_miss() -> None:
    weight = torch.linalg.qr(random(32, 32)).Q
    outcome = apply(linear_program(weight), bytes_only())
    assert outcome.rewrites == [] and "stores no fewer bytes" in outcome.misses[0]


def test_two_calls_that_cost_more_than_one_are_a_near_miss() -> None:
    outcome = apply(linear_program(decaying(32, 32)), LowRank())
    assert outcome.rewrites == [] and "is estimated" in outcome.misses[0]
    big = apply(linear_program(decaying(1024, 1024, 0.9)), LowRank())
    assert big.rewrites == ["low_rank"]


def symbolic_linear(weight: Tensor, low: int, high: int | None) -> Module:
    p = Program()
    s = symbol("s0")
    p.function.symbols["s0"] = SymbolInfo(low, high)
    x = p.function.body.add_arg(TensorType((1, s, weight.shape[1]), torch.float32), "x")
    return p.done(p.b.linear(x, p.weight("w", weight)))


def test_it_must_pay_at_every_size_of_the_program() -> None:
    # Half the bytes and flops: at many rows the extra traffic of the thin result eats the gain.
    weight = decaying(1024, 1024, 0.9)
    assert apply(symbolic_linear(weight, 1, None), LowRank(gain=3.0)).rewrites == ["low_rank"]
    small = apply(symbolic_linear(decaying(96, 96, 0.8), 1, 4096), LowRank())
    assert small.rewrites == [] and "at 1 rows" in small.misses[0]


def test_a_table_that_is_looked_up_is_a_near_miss() -> None:
    p = Program()
    tokens, table = p.input(3, dtype=torch.int64), p.weight("table", decaying(32, 32))
    outcome = apply(p.done(p.b.linear(p.b.embedding(table, tokens), table)), bytes_only())
    assert outcome.rewrites == [] and "accel.embedding reads it too" in outcome.misses[0]


def test_convolutions_are_a_near_miss() -> None:
    p = Program()
    x, w = p.input(1, 8, 4, 4), p.weight("w", decaying(8, 8).reshape(8, 8, 1, 1))
    conv = p.b.conv(x, w, stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    outcome = apply(p.done(conv), bytes_only())
    assert outcome.rewrites == [] and "accel.conv" in outcome.misses[0]


def test_factors_are_weights_that_quantize_takes() -> None:
    module = linear_program(decaying(64, 64))
    outcome = apply(module, bytes_only(), Quantize())
    assert outcome.ops().count("dequantize") == 2
    assert sorted(module.weights.names()) == [
        "fc.weight.u.q", "fc.weight.u.scale", "fc.weight.v.q", "fc.weight.v.scale",
    ]  # fmt: skip


def test_the_cost_model_takes_the_targets_rates() -> None:
    target = Target("t", "cpu", flops={"float32": 8e12, "bfloat16": 16e12}, bandwidth=1e12)
    context = Context(target=target)
    assert cost_model(context, torch.bfloat16).flops == 16e12
    assert cost_model(context, torch.float64).flops == 8e12
    assert cost_model(context, torch.float32).bandwidth == 1e12
    assert cost_model(Context(), torch.float32) == CostModel()


@pytest.mark.parametrize("options", [{"energy": 0.0}, {"energy": 1.5}, {"multiple": 0}])
def test_bad_options_are_option_errors(options: dict) -> None:
    with pytest.raises(OptionError):
        LowRank(**options)
