"""cluster: fires, near misses, and the same centers as a direct k-means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accel.errors import OptionError
from accel.passes.cluster import Cluster, kmeans
from tests.passes.compression.programs import apply, decoded_weight, linear_program, random


def direct_kmeans(values: Tensor, clusters: int, iterations: int) -> Tensor:
    """Lloyd's algorithm by full distance matrices."""
    flat = values.double().reshape(-1)
    centers = torch.linspace(float(flat.min()), float(flat.max()), clusters, dtype=torch.float64)
    for _ in range(iterations):
        nearest = (flat[:, None] - centers).abs().argmin(1)
        for k in range(clusters):
            if bool((nearest == k).any()):
                centers[k] = flat[nearest == k].mean()
    return centers


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_centers_match_a_direct_kmeans(bits: int) -> None:
    values = random(17, 9, seed=bits)
    wanted = direct_kmeans(values, 2**bits, 30)
    torch.testing.assert_close(kmeans(values, 2**bits, 30), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_each_weight_becomes_the_nearest_center(bits: int) -> None:
    weight = random(8, 16, seed=bits)
    module = linear_program(weight, rows=16)
    outcome = apply(module, Cluster(bits=bits))
    assert outcome.rewrites == ["cluster"]
    book = kmeans(weight, 2**bits, 100).float()
    nearest = (weight.unsqueeze(-1).double() - book.double()).abs().argmin(-1)
    assert torch.equal(decoded_weight(module), book[nearest])
    assert module.weights.stored("fc.weight.index").numel() == 8 * 16 * bits // 8
    assert outcome.notes["bytes_after"] == 8 * 16 * bits // 8 + 4 * 2**bits


@pytest.mark.parametrize("group", [0, 8])
def test_groups_are_scaled_to_one_before_clustering(group: int) -> None:
    weight = random(8, 16) * torch.logspace(-2, 2, 8)[:, None]
    module = linear_program(weight, rows=16)
    outcome = apply(module, Cluster(bits=4, group=group))
    scale = weight.reshape(8, -1, group or 16).abs().amax(-1)
    assert torch.equal(module.weights.tensor("fc.weight.scale"), scale)
    spread = scale.repeat_interleave(group or 16, 1)
    book = module.weights.tensor("fc.weight.codebook")
    nearest = ((weight / spread).unsqueeze(-1) - book).abs().argmin(-1)
    torch.testing.assert_close(decoded_weight(module), book[nearest] * spread)
    plain = apply(linear_program(weight, rows=16), Cluster(bits=4))
    errors = [o.notes["weights"][0]["error"] for o in (outcome, plain)]
    assert errors[0] < errors[1]


def test_importance_weighs_the_centers() -> None:
    values = torch.tensor([0.0, 0.1, 1.0, 1.3])
    centers = kmeans(values, 2, 10, torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(centers, torch.tensor([0.05, 1.2], dtype=torch.float64))


def test_weights_of_few_values_are_met_exactly() -> None:
    levels = torch.linspace(-1, 2, 16)
    picks = torch.randint(0, 16, (8, 16), generator=torch.Generator().manual_seed(0))
    picks[0] = torch.arange(16)
    module = linear_program(levels[picks], rows=16)
    apply(module, Cluster(bits=4))
    torch.testing.assert_close(decoded_weight(module), levels[picks], rtol=1e-6, atol=1e-7)


def test_eight_bit_codebooks() -> None:
    weight = random(40, 40)
    module = linear_program(weight, rows=40)
    outcome = apply(module, Cluster(bits=8))
    assert "tensor<40x40xui8>" in outcome.text
    assert outcome.notes["weights"][0]["error"] < 0.01


def test_a_weight_smaller_than_its_codebook_is_a_near_miss() -> None:
    outcome = apply(linear_program(random(4, 4)), Cluster(bits=4))
    assert outcome.rewrites == [] and "only 16 elements" in outcome.misses[0]


def test_a_group_that_does_not_divide_the_inputs_is_a_near_miss() -> None:
    outcome = apply(linear_program(random(8, 12)), Cluster(bits=2, group=8))
    assert outcome.rewrites == [] and "no multiple of group = 8" in outcome.misses[0]


@pytest.mark.parametrize("options", [{"bits": 5}, {"iterations": -1}, {"group": -1}])
def test_bad_options_are_option_errors(options: dict) -> None:
    with pytest.raises(OptionError):
        Cluster(**options)
