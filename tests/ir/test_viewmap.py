"""Chains of reshapes and permutes in normal form compute the same, in no more steps."""

from __future__ import annotations

import random

import pytest
import torch

from accel.ir.types import symbol
from accel.ir.viewmap import ViewMap, divide


def apply(x, steps):
    for kind, argument in steps:
        x = x.reshape(argument) if kind == "reshape" else x.permute(argument)
    return x


def random_chain(rng, shape, length):
    steps = []
    for _ in range(length):
        if rng.random() < 0.5:
            axes = list(range(len(shape)))
            rng.shuffle(axes)
            steps.append(("permute", tuple(axes)))
            shape = tuple(shape[a] for a in axes)
        else:
            total, new = 1, []
            for d in shape:
                total *= d
            while total > 1 and len(new) < 5:
                d = rng.choice([f for f in range(1, total + 1) if total % f == 0])
                new.append(d)
                total //= d
            new.append(total)
            shape = tuple(new)
            steps.append(("reshape", shape))
    return steps


@pytest.mark.parametrize("seed", range(300))
def test_random_chains(seed):
    rng = random.Random(seed)
    shape = tuple(rng.choice([1, 2, 3, 4, 6]) for _ in range(rng.randint(1, 4)))
    chain = random_chain(rng, shape, rng.randint(1, 6))
    view = ViewMap(shape)
    done = []
    for kind, argument in chain:
        if not getattr(view, kind)(argument):
            break
        done.append((kind, argument))
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    steps = view.steps()
    assert torch.equal(apply(x, done), apply(x, steps)), (shape, done, steps)
    assert len(steps) <= 3
    if len(done) <= 2:
        assert len(steps) <= len(done)


@pytest.mark.parametrize(
    ("source", "chain", "steps"),
    [
        ((2, 3, 4), [("permute", (0, 2, 1)), ("permute", (0, 2, 1))], []),
        ((2, 1, 3), [("permute", (1, 0, 2))], [("reshape", (1, 2, 3))]),
        ((6, 4), [("reshape", (4, 6)), ("reshape", (6, 4))], []),
        ((2, 1, 3, 4), [("permute", (0, 1, 3, 2))], [("permute", (0, 1, 3, 2))]),
        (
            (2, 6, 4),
            [("reshape", (2, 6, 2, 2)), ("permute", (0, 2, 1, 3)), ("permute", (0, 2, 1, 3)),
             ("reshape", (2, 6, 4))],
            [],
        ),
        (
            (2, 3, 4),
            [("permute", (0, 2, 1)), ("reshape", (2, 2, 2, 3)), ("permute", (0, 3, 1, 2))],
            [("reshape", (2, 3, 2, 2))],
        ),
        ((2, 3, 4), [("reshape", (6, 4)), ("permute", (1, 0))], None),
    ],
)  # fmt: skip
def test_known_chains(source, chain, steps):
    view = ViewMap(source)
    for kind, argument in chain:
        assert getattr(view, kind)(argument)
    if steps is None:
        assert len(view.steps()) == 2
    else:
        assert view.steps() == steps


def test_symbolic_sizes():
    s = symbol("s")
    view = ViewMap((2, s, 8))
    assert view.reshape((2, s, 2, 4))
    assert view.permute((0, 2, 1, 3))
    assert view.reshape((4, s, 4))
    assert view.reshape((2, 2, s, 4))
    assert view.permute((0, 2, 1, 3))
    assert view.reshape((2 * s, 8))
    assert view.steps() == [("reshape", (2 * s, 8))]


def test_sizes_that_do_not_factor_are_refused():
    view = ViewMap((2, 3))
    view.permute((1, 0))
    before = view.steps()
    assert not view.reshape((2, 3))  # [3, 2] read as [2, 3] splits an atom of 3
    assert view.steps() == before
    s = symbol("s")
    assert divide(s, 2) is None and divide(4 * s, 2) == 2 * s and divide(6, 4) is None
    assert divide(2 * s + 2, 2) == s + 1
