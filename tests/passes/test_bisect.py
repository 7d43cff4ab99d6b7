"""Bisection finds a planted bug: pass, rewrite, small program, and a test file that fails."""

from __future__ import annotations

import runpy

import pytest
import torch

import tests.passes.sample_passes  # noqa: F401 (registers the passes)
from accel.errors import ContractError, OptionError
from accel.ir import print_module
from accel.passes.bisect import bisect, replay
from accel.passes.reduce import extract, reduce_function
from tests.passes.helpers import F32, ops, program, t


def long_program(n=30, bug_at=17):
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(8, 8, generator=generator)

    def make(b, a):
        for i in range(n):
            a = b.neg(b.neg(b.linear(a, b.weight(w))))
            a = b.sinh(a) if i == bug_at else b.tanh(a)
            a = b.add(a, b.scalar(0.5, F32))
        return a, b.exp(a)

    return program(make, t(4, 8))


def test_a_planted_bug_is_found_down_to_its_rewrite(tmp_path):
    module = long_program()
    text = print_module(module)
    finding = bisect(module, "cse,test_double_negation{},test_planted_bug,dce")
    assert print_module(module) == text, "the input is not changed"
    assert finding is not None
    assert (finding.pass_index, finding.pass_text) == (3, "test_planted_bug")
    assert finding.rule == "sinh_to_sin" and "accel.sinh" in finding.op
    assert ops(finding.module) == ["sinh"]
    assert finding.module.main.args[0].type == t(2, 2)
    assert "rule sinh_to_sin" in finding.summary() and "test_planted_bug" in finding.summary()
    # Fuel is the number of the rewrite in the whole pipeline.
    before = finding.fuel - finding.rewrite
    assert before == 29 + 30  # equal scalars merged, double negations removed

    path = tmp_path / "test_found.py"
    path.write_text(finding.test_source)
    found = runpy.run_path(str(path))
    with pytest.raises(ContractError, match="test_planted_bug"):
        found["test_reduced"]()


def test_the_right_rewrite_among_many_of_one_pass():
    def make(b, a):
        for i in range(12):
            a = b.neg(b.neg(a))
            a = b.sinh(a) if i == 5 else b.sin(a)
        return a

    finding = bisect(program(make, t(3)), "test_planted_bug")
    assert finding is not None and finding.rule == "sinh_to_sin"
    assert 1 <= finding.rewrite <= 13 and finding.fuel == finding.rewrite


def test_a_correct_pipeline_has_no_finding():
    assert bisect(long_program(bug_at=-1), "cse,test_double_negation,dce") is None


def test_a_pass_that_breaks_without_a_rewrite():
    finding = bisect(program(lambda b, a: b.neg(b.exp(a)), t(3)), "test_broken_types")
    assert finding is not None and finding.rewrite is None and finding.fuel is None
    assert ops(finding.module) == ["exp"] and "ACCEL021" in finding.error


def test_weights_are_spelled_out_only_where_random_ones_do_not_fail():
    def make(b, a):
        return b.add(a, b.weight(torch.tensor([0.1, 0.2, 0.3])))

    finding = bisect(program(make, t(3)), "test_fold{undeclared=true}")
    assert finding is not None and finding.pass_text == "test_fold{undeclared=true}"
    assert "WEIGHTS" not in finding.test_source and "accel.constant" in finding.test_source


def test_replay_raises_what_the_check_raises():
    module = program(lambda b, a: b.sinh(a), t(3))
    with pytest.raises(ContractError):
        replay(print_module(module), "test_planted_bug")
    replay(print_module(module), "test_double_negation")
    with pytest.raises(OptionError):
        replay(print_module(module), "no_such_pass")


def test_extract_cuts_at_values():
    module = program(lambda b, a: b.exp(b.sin(b.neg(a))), t(3))
    middle = [o for o in module.main.ops if o.name == "sin"]
    small = extract(module, module.main, middle)
    assert ops(small) == ["sin"] and len(small.main.args) == 1 and len(small.main.results) == 1


def test_reduction_keeps_what_the_fault_needs():
    # The fault needs two ops far apart: the neighbourhood of the hint is not enough.
    def make(b, a):
        c = b.sin(a)
        for _ in range(10):
            c = b.neg(c)
        return b.cos(c)

    module = program(make, t(5))
    small = reduce_function(module, "main", lambda m: {"sin", "cos"} <= set(ops(m)), hint=0)
    assert sorted(ops(small)) == ["cos", "sin"]
