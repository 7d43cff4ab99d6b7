"""sparsify: fires, near misses, and the same weights as a direct search."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accel.errors import OptionError
from accel.passes.sparsify import Sparsify
from tests.passes.compression.programs import (
    Program,
    apply,
    decoded_weight,
    linear_program,
    random,
    run,
)


def best_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Tries every choice of n places in each group of m."""
    out = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], m):
            group = weight[row, start : start + m]
            best = max(combinations(range(m), n), key=lambda c: float(group[list(c)].abs().sum()))
            out[row, [start + i for i in best]] = group[list(best)]
    return out


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8), (3, 5)])
def test_the_largest_are_kept(n: int, m: int) -> None:
    weight = random(5, 3 * m, seed=n + m)
    module = linear_program(weight, rows=3 * m)
    outcome = apply(module, Sparsify(n=n, m=m))
    assert outcome.rewrites == ["sparsify"]
    assert torch.equal(decoded_weight(module), best_mask(weight, n, m))


def test_places_ascend_and_take_two_bits() -> None:
    module = linear_program(random(8, 64))
    outcome = apply(module, Sparsify())
    index = module.weights.tensor("fc.weight.index").reshape(8, 16, 2)
    assert bool((index[..., 0] < index[..., 1]).all())
    assert module.weights.stored("fc.weight.index").numel() == 8 * 32 * 2 // 8
    assert outcome.notes["bytes_after"] == 8 * 32 * 4 + 8 * 32 * 2 // 8
    assert "tensor<8x32xui2>" in outcome.text


def test_sparse_weights_are_met_exactly() -> None:
    weight = best_mask(random(4, 16), 2, 4)
    module = linear_program(weight, rows=16)
    assert apply(module, Sparsify()).notes["weights"][0]["error"] == 0
    assert torch.equal(decoded_weight(module), weight)


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    module = linear_program(torch.tensor([[1.0, -1.0, 1.0, -1.0]]), rows=4)
    apply(module, Sparsify())
    assert decoded_weight(module).tolist() == [[1.0, -1.0, 0.0, 0.0]]


def test_convolutions_are_sparse_along_channels_and_taps() -> None:
    weight, image = random(6, 4, 3, 3), random(1, 4, 5, 5, seed=1)
    p = Program()
    x = p.input(1, 4, 5, 5)
    w = p.weight("w", weight)
    module = p.done(p.b.conv(x, w, stride=(1, 1), padding=(0, 0), dilation=(1, 1)))
    apply(module, Sparsify())
    wanted = best_mask(weight.reshape(6, 36), 2, 4).reshape(weight.shape)
    torch.testing.assert_close(run(module, image), F.conv2d(image, wanted))


def test_inputs_that_are_no_multiple_of_m_are_a_near_miss() -> None:
    outcome = apply(linear_program(random(4, 10)), Sparsify())
    assert outcome.rewrites == [] and "10 inputs are no multiple of m = 4" in outcome.misses[0]


def test_a_sparse_weight_is_not_sparsified_again() -> None:
    module = linear_program(random(4, 16))
    apply(module, Sparsify())
    outcome = apply(module, Sparsify())
    assert outcome.rewrites == [] and "sparse already" in outcome.misses[0]


@pytest.mark.parametrize("options", [{"n": 4, "m": 4}, {"n": 0}, {"n": 2, "m": 32}])
def test_bad_patterns_are_option_errors(options: dict) -> None:
    with pytest.raises(OptionError):
        Sparsify(**options)
