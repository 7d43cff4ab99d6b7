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


@pytest.mark.parametrize("options", [{"bits": 5}, {"iterations": -1}])
def test_bad_options_are_option_errors(options: dict) -> None:
    with pytest.raises(OptionError):
        Cluster(**options)
