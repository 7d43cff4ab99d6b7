"""Traits say what is true: passes trust them, and a wrong one is a wrong program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accel.ir import Trait, definition, interpret
from accel.ir.types import COMPLEX
from tests.ir.samples import REGISTRY, Sample, op_samples, sampled_definitions

OPS = sampled_definitions()


def with_trait(trait: Trait) -> list[str]:
    return [name for name in OPS if definition(name).has(trait)]


def plain_samples(name: str) -> list[Sample]:
    """Of one dtype: float32 where the op takes it."""
    dtypes = REGISTRY[name].dtypes
    dtype = torch.float32 if torch.float32 in dtypes else sorted(dtypes, key=str)[0]
    return op_samples(name, dtype)


def run(sample: Sample, inputs: list[Tensor]) -> list[Tensor]:
    return interpret(sample.function(), inputs)


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))


@pytest.mark.parametrize("name", with_trait(Trait.COMMUTATIVE))
def test_commutative_ops_commute(name: str) -> None:
    # Complex products may be fused multiply-adds, which round differently by order.
    for dtype in sorted(REGISTRY[name].dtypes - COMPLEX, key=str):
        for sample in op_samples(name, dtype):
            x, y = sample.tensors()
            swapped = Sample(name, sample.operands[::-1], sample.attributes)
            assert all(map(equal, run(sample, [x, y]), run(swapped, [y, x]))), str(sample)


@pytest.mark.parametrize("name", with_trait(Trait.PURE))
def test_pure_ops_repeat_themselves_and_write_nothing(name: str) -> None:
    for sample in plain_samples(name):
        inputs = sample.tensors()
        first, again = run(sample, inputs), run(sample, inputs)
        assert all(map(equal, first, again)), str(sample)
        assert all(map(equal, inputs, sample.tensors())), str(sample)


@pytest.mark.parametrize("name", with_trait(Trait.ELEMENTWISE))
def test_elementwise_ops_work_on_elements(name: str) -> None:
    """Element i of the result comes from element i of the broadcast operands, and nothing else."""
    dtypes = REGISTRY[name].dtypes
    dtype = torch.float64 if torch.float64 in dtypes else torch.int64
    for sample in op_samples(name, dtype):
        (whole,) = run(sample, sample.tensors())
        spread = torch.broadcast_tensors(*sample.tensors())
        if whole.shape != spread[0].shape or not whole.dim() or not whole.numel():
            assert whole.shape == spread[0].shape, str(sample)
            continue
        flat = [x.reshape(-1) for x in spread]
        order = torch.arange(whole.numel() - 1, -1, -1)
        call = definition(name).evaluate
        assert call is not None
        attributes = definition(name).complete_attributes(sample.attributes)
        made = call(*(x[order] for x in flat), **attributes)
        torch.testing.assert_close(made, whole.reshape(-1)[order], equal_nan=True)


@pytest.mark.parametrize("name", with_trait(Trait.VIEW))
def test_views_move_elements_of_their_first_operand(name: str) -> None:
    for sample in plain_samples(name):
        x = torch.arange(sample.tensors()[0].numel(), dtype=torch.float32)
        first = x.reshape(sample.tensors()[0].shape)
        (made,) = run(sample, [first])
        assert torch.isin(made, first).all(), str(sample)
        # An index map: other elements at the same places.
        (doubled,) = run(sample, [first * 2 + 1])
        assert torch.equal(doubled, made * 2 + 1), str(sample)


@pytest.mark.parametrize("name", with_trait(Trait.RANDOM))
def test_random_ops_draw(name: str) -> None:
    (sample, *_) = op_samples(name, torch.int64 if name == "random_permutation" else torch.float32)
    inputs = sample.tensors()
    torch.manual_seed(0)
    first = run(sample, inputs)
    draws = [run(sample, inputs) for _ in range(8)]
    assert any(not torch.equal(d, f) for draw in draws for d, f in zip(draw, first))
    torch.manual_seed(0)
    assert all(map(torch.equal, run(sample, inputs), first))
