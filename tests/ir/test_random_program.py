"""The generator of random programs: valid, repeatable, varied, tame."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from accel.ir import interpret, parse_module, print_module, verify
from tests.ir.random_program import OTHER_SIZES, STEPS, Program, random_program

COUNT = 60


def programs(symbolic: bool) -> list[Program]:
    return [random_program(seed, symbolic=symbolic) for seed in range(COUNT)]


@pytest.mark.parametrize("symbolic", [False, True])
def test_programs_are_valid_and_run(symbolic: bool) -> None:
    for program in programs(symbolic):
        module = program.module
        verify(module)
        for sizes in (program.sizes, OTHER_SIZES) if symbolic else (program.sizes,):
            inputs = program.inputs(sizes=sizes)
            for oracle in (False, True):
                for made in interpret(module.main, inputs, module.weights, oracle=oracle):
                    assert made.numel() <= 8 * 2048, f"seed {program.seed}"
                    finite = made.isfinite().all() and made.double().abs().max() < 1e6
                    assert finite, f"seed {program.seed}: {made}"


def test_the_oracle_is_near_the_program() -> None:
    """Values are tame: rounding is all that differs, but for steps that jump (floor, argmax...)."""
    near = 0
    for program in programs(False):
        module, inputs = program.module, program.inputs()
        pairs = zip(
            interpret(module.main, inputs, module.weights),
            interpret(module.main, inputs, module.weights, oracle=True),
        )
        near += all(torch.allclose(a.double(), b, rtol=0.02, atol=0.02) for a, b in pairs)
    assert near >= 0.8 * COUNT


@pytest.mark.parametrize("symbolic", [False, True])
def test_text_is_read_back(symbolic: bool) -> None:
    for program in programs(symbolic):
        text = print_module(program.module)
        assert print_module(parse_module(text)) == text, f"seed {program.seed}"


def test_a_seed_gives_one_program() -> None:
    for seed in range(5):
        a, b = random_program(seed, symbolic=True), random_program(seed, symbolic=True)
        assert print_module(a.module) == print_module(b.module)
        assert all(torch.equal(x, y) for x, y in zip(a.inputs(), b.inputs()))
    assert print_module(random_program(0).module) != print_module(random_program(1).module)


def test_programs_are_varied() -> None:
    seen: Counter[str] = Counter()
    multi_use = dead = 0
    for program in programs(False) + programs(True):
        for op in program.module.walk():
            seen[op.name] += 1
            multi_use += any(len(r.uses) > 1 for r in op.results)
            dead += any(not r.uses for r in op.results)
    assert len(seen) >= 55, sorted(seen)
    assert multi_use > COUNT and dead > COUNT / 2


def test_kinds_choose_steps() -> None:
    names = {op.name for s in range(9) for op in random_program(s, kinds=["unary"]).module.walk()}
    assert not names & {"softmax", "linear", "matmul", "reshape"}
    for kind in STEPS:
        verify(random_program(3, kinds=[kind], symbolic=True).module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for seed in range(8):
        program = random_program(seed, dtype=dtype)
        verify(program.module)
        interpret(program.module.main, program.inputs(), program.module.weights)
