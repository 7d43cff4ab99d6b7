"""Random programs through random pipelines of exact passes keep their meaning; passes settle."""

from __future__ import annotations

import random

import pytest
import torch

from accel.ir import interpret, parse_module, print_module, verify
from accel.passes.contracts import exact_error
from accel.passes.manager import run_pipeline
from accel.passes.pipelines import EXACT_PIPELINE
from tests.ir.random_program import OTHER_SIZES, random_program
from tests.passes.helpers import F32, program, t

EXACT = sorted(set(EXACT_PIPELINE))
SEEDS = range(40)


def random_pipeline(seed: int) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice(EXACT) for _ in range(rng.randint(2, 7))]


def worst_error(before, after) -> float:
    return max((exact_error(a, b) for a, b in zip(before, after, strict=True)), default=0.0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("symbolic", [False, True])
def test_random_pipelines_keep_the_meaning(seed, symbolic) -> None:
    made = random_program(seed, symbolic=symbolic, length=20)
    inputs = made.inputs(seed)
    original = made.module.clone()
    run_pipeline(made.module, random_pipeline(seed), validate=True)
    after = interpret(made.module.main, inputs, made.module.weights, oracle=True)
    before = interpret(original.main, inputs, original.weights, oracle=True)
    # Constants may have been stored, in the program's own dtypes.
    assert worst_error(before, after) < 1e-5
    if symbolic:
        other = made.inputs(seed, OTHER_SIZES)
        assert (
            worst_error(
                interpret(original.main, other, original.weights, oracle=True),
                interpret(made.module.main, other, made.module.weights, oracle=True),
            )
            < 1e-5
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_every_exact_pass_settles(seed) -> None:
    made = random_program(seed + 1000, symbolic=seed % 2 == 0, length=16)
    run_pipeline(made.module, list(EXACT_PIPELINE))
    for name in EXACT:
        once = made.module.clone()
        run_pipeline(once, [name])
        again = run_pipeline(once, [name]).rows[0]
        assert not again.changed and not again.rewrites, name


@pytest.mark.parametrize("seed", range(0, 40, 4))
def test_the_text_of_the_result_reads_back(seed) -> None:
    made = random_program(seed, symbolic=True)
    run_pipeline(made.module, list(EXACT_PIPELINE))
    text = print_module(made.module)
    again = parse_module(text)
    assert print_module(again) == text
    again.weights = made.module.weights
    verify(again)


# Steps that a rule undoes, or nearly: each takes a value of shape [2, 3, 4] to one.
def _scale(b, x, rng):
    return b.mul(x, b.scalar(rng.choice([1.0, -1.0, 0.5, 3.0]), F32))


def _shift(b, x, rng):
    return b.add(b.scalar(rng.choice([0.0, 1.5]), F32), x)


def _there_and_back(b, x, rng):
    axes = list(range(3))
    rng.shuffle(axes)
    moved = b.permute(x, axes=tuple(axes))
    back = tuple(axes.index(i) for i in range(3))
    return b.permute(b.reshape(b.reshape(moved, shape=(24,)), shape=moved.shape), axes=back)


def _split_and_join(b, x, rng):
    axis = rng.randrange(3)
    size = x.shape[axis]
    cut = rng.randint(1, size - 1)
    parts = [
        b.slice(x, axis=axis - 3, start=0, stop=cut),
        b.slice(x, axis=axis, start=cut, stop=size),
    ]
    if rng.random() < 0.3:
        parts[0] = b.neg(parts[0])
    return b.cat(*parts, axis=axis)


def _broadcast(b, x, rng):
    row = b.slice(x, axis=0, start=0, stop=1)
    wide = b.broadcast_to(b.broadcast_to(row, shape=(2, 3, 4)), shape=(2, 3, 4))
    return b.add(x, b.permute(b.permute(wide, axes=(0, 2, 1)), axes=(0, 2, 1)))


def _power(b, x, rng):
    return b.pow(b.tanh(x), b.scalar(rng.choice([1.0, 2.0, 3.0]), F32))


def _mask(b, x, rng):
    axes = rng.sample(range(3), 2)
    i, j = (
        b.iota(shape=(2, 3, 4), axis=axis, dtype=torch.int64, start=rng.randint(-2, 2))
        for axis in axes
    )
    compare = getattr(b, rng.choice(["le", "lt", "ge", "gt"]))(i, j)
    if rng.random() < 0.5:
        compare = b.logical_not(compare)
    return b.where(compare, x, b.scalar(rng.choice([0.0, 1.0]), F32))


def _norm(b, x, rng):
    mean = b.mean(b.pow(x, b.scalar(2.0, F32)), axes=(rng.choice([2, -1, 1]),), keepdim=True)
    return b.div(x, b.sqrt(b.add(mean, b.scalar(0.1, F32))))


def _gate(b, x, rng):
    other = x if rng.random() < 0.6 else b.neg(x)
    return b.mul(x, b.div(b.scalar(1.0, F32), b.add(b.exp(b.neg(other)), b.scalar(1.0, F32))))


def _casts(b, x, rng):
    wide = b.cast(x, dtype=rng.choice([torch.float64, torch.float32]))
    return b.cast(wide, dtype=F32)


def _pick(b, x, rng):
    index = b.arange(length=3, dtype=torch.int64, start=rng.choice([0, 0, -3]))
    return b.gather(x, index, axis=1)


def _attend(b, x, rng):
    axes = (0, 2, 1) if rng.random() < 0.7 else (0, 1, 2)
    keys = b.permute(x if axes == (0, 2, 1) else b.reshape(x, shape=(2, 4, 3)), axes=axes)
    scores = b.mul(b.matmul(x, keys), b.scalar(0.5, F32))
    if rng.random() < 0.5:
        scores = b.where(b.tri_mask(rows=3, columns=3), scores, b.scalar(float("-inf"), F32))
    return b.matmul(b.softmax(scores, axis=rng.choice([2, -1, 2, 1])), x)


STEPS = [
    _scale, _shift, _there_and_back, _split_and_join, _broadcast, _power, _mask, _norm, _gate,
    _casts, _pick, _attend,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_programs_full_of_what_rules_look_for(seed) -> None:
    rng = random.Random(seed)

    def make(b, x):
        values = [x]
        for _ in range(rng.randint(3, 10)):
            step = rng.choice(STEPS)
            # Mostly the last value; sometimes an older one, which then has a second user.
            source = values[-1] if rng.random() < 0.8 else rng.choice(values)
            values.append(step(b, source, rng))
        return values[-1], values[len(values) // 2]

    module = program(make, t(2, 3, 4))
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(2, 3, 4, generator=generator)]
    before = interpret(module.main, x, module.weights, oracle=True)
    run_pipeline(module, list(EXACT_PIPELINE), validate=True)
    after = interpret(module.main, x, module.weights, oracle=True)
    assert worst_error(before, after) < 1e-5  # constants may have been stored
