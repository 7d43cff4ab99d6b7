"""The pass manager: verification, "changed", contracts, ledger, dumps, fuel, pipeline text."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import pytest
import torch

from accel.errors import ContractError, OptionError, RewriteError, VerifyError
from accel.ir import parse_module, print_module
from accel.passes.base import Context
from accel.passes.ledger import Ledger
from accel.passes.manager import PassManager, run_pipeline
from accel.passes.pipeline import format_pipeline, parse_pipeline
from tests.passes.helpers import I64, ops, program, t
from tests.passes.sample_passes import DoubleNegation


def negations(n=4):
    def make(b, a):
        for _ in range(n):
            a = b.neg(a)
        return b.exp(a)

    return program(make, t(2, 3))


def weighted(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 3, generator=generator).to(dtype)
    return program(lambda b, a: b.linear(a, b.weight(w)), t(2, 3))


def test_ledger_counts_rewrites_and_changes():
    module = negations()
    ledger = run_pipeline(module, "test_double_negation,test_double_negation,dce", validate=True)
    first, second, third = ledger.rows
    assert first.changed and first.rewrites == {"neg_neg": 2}
    assert not second.changed and second.rewrites == {}
    assert not third.changed
    assert (first.ops_before, first.ops_after) == (6, 2)
    assert first.saved.flops == 4 * 6 and first.saved.bytes == 4 * 2 * 24
    assert first.error == 0.0 and first.seconds > 0 and first.verify_seconds > 0


def test_the_ledger_predicts_time_by_the_roofline():
    from accel.ir.cost import module_cost

    @dataclass
    class Machine:
        flops: dict[str, float]
        bandwidth: float

    module = weighted()  # linear: 2 * 2 * 4 * 3 flops, (6 + 12 + 8) floats
    fast = module_cost(module, rates=Machine({"float32": 1e9}, 1e12))
    assert fast.flops == 48 and fast.seconds == pytest.approx(48e-9)
    slow = module_cost(module, rates=Machine({"float32": 1e15}, 1e9))
    assert slow.bytes == 26 * 4 and slow.seconds == pytest.approx(104e-9)
    context = Context(target=Machine({"float32": 1e15}, 1e9))
    row = PassManager("test_double_negation", context).run(negations()).rows[0]
    assert row.before.seconds == pytest.approx(5 * 48e-9)
    assert row.after.seconds == pytest.approx(48e-9) and row.saved.seconds > 0


def test_costs_of_contractions_views_and_regions():
    from accel.ir.cost import module_cost

    q = t(1, 4, 6, 8)
    attention = program(lambda b, q, k, v: b.attention(q, k, v, scale=1.0), q, q, q)
    assert module_cost(attention).flops == 2 * 4 * 6 * 6 * 16
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    conv = program(lambda b, x, w: b.conv(x, w, **geometry), t(1, 4, 6, 6), t(8, 4, 3, 3))
    assert module_cost(conv).flops == 2 * (8 * 4 * 4) * (4 * 3 * 3)
    views = program(lambda b, x: b.reshape(b.permute(x, axes=(1, 0)), shape=(6,)), t(2, 3))
    assert module_cost(views).flops == module_cost(views).bytes == 0
    lookup = program(lambda b, w, i: b.embedding(w, i), t(1000, 4), t(3, dtype=I64))
    assert module_cost(lookup).bytes == 2 * 48 + 24  # three rows read and written, three indices
    weights = module_cost(weighted())
    assert weights.weight_bytes == 4 * 3 * 4


def test_a_broken_program_is_caught_and_the_pass_named():
    with pytest.raises(VerifyError) as error:
        run_pipeline(negations(), "test_double_negation,test_broken_types")
    assert any("test_broken_types" in note for note in error.value.__notes__)


def test_exact_contract_names_pass_function_result_and_error():
    module = program(lambda b, a: [b.exp(a), b.sinh(a)], t(5))
    with pytest.raises(ContractError) as error:
        run_pipeline(module, "test_planted_bug", validate=True)
    text = str(error.value)
    assert "test_planted_bug" in text and "result 1 of @main" in text and "1e-09" in text
    run_pipeline(program(lambda b, a: b.sinh(a), t(5)), "test_planted_bug")  # unchecked


def test_stored_constants_may_be_rounded_once_and_no_more():
    ledger = run_pipeline(weighted(), "test_fold", validate=True)
    assert ledger.rows[0].error is not None and ledger.rows[0].error < 1e-9
    with pytest.raises(ContractError, match="more than one rounding"):
        run_pipeline(weighted(), "test_fold{sloppy=true}", validate=True)
    with pytest.raises(ContractError, match="result 0"):
        run_pipeline(weighted(), "test_fold{undeclared=true}", validate=True)


def test_approximate_contract_measures_raises_or_undoes():
    ledger = run_pipeline(weighted(), "test_scale_weights{factor=1.001}", validate=True)
    row = ledger.rows[0]
    assert row.metric == "relative_error" and row.error == pytest.approx(0.001, rel=1e-3)
    assert row.measured_on == "random inputs" and row.notes == {"factor": 1.001}
    with pytest.raises(ContractError, match="promises relative_error"):
        run_pipeline(weighted(), "test_scale_weights{factor=2}", validate=True)
    module = weighted()
    before = print_module(module)
    ledger = run_pipeline(
        module, "test_scale_weights{factor=2},dce", validate=True, on_violation="undo"
    )
    assert print_module(module) == before and ledger.rows[0].undone
    assert len(module.weights) == 1


def test_calibration_inputs_are_used_even_without_validate():
    context = Context(calibration=[(torch.zeros(2, 3),), (torch.ones(2, 3),)])
    ledger = run_pipeline(weighted(), "test_scale_weights{factor=1.005}", context)
    assert ledger.rows[0].measured_on == "calibration inputs"
    assert ledger.rows[0].error == pytest.approx(0.005, rel=1e-2)


def test_index_inputs_stay_in_range():
    table = torch.randn(3, 4)

    def make(b, ids):
        return b.exp(b.embedding(b.weight(table), b.reshape(ids, shape=(6,))))

    run_pipeline(program(make, t(2, 3, dtype=I64)), "test_double_negation,dce", validate=True)


def test_fuel_reaches_across_passes():
    module = negations(6)
    fired = []
    context = Context(fuel=2, on_rewrite=lambda p, rule, op: fired.append((p, rule)))
    ledger = PassManager("test_double_negation,dce", context).run(module)
    assert fired == [("test_double_negation", "neg_neg")] * 2
    assert ledger.rows[0].rewrites == {"neg_neg": 2} and context.fuel == 0
    assert ops(module).count("neg") == 2


def test_dumps_print_after_and_stop_after(tmp_path):
    stream = io.StringIO()
    manager = PassManager(
        "test_double_negation,cse,dce",
        dump_dir=tmp_path,
        print_after=["cse"],
        stop_after="cse",
        stream=stream,
    )
    ledger = manager.run(negations())
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "00_input.mlir",
        "01_test_double_negation.mlir",
        "02_cse.mlir",
    ]
    assert len(ledger.rows) == 2
    assert stream.getvalue().startswith("// after 02 cse")
    parse_module((tmp_path / "02_cse.mlir").read_text())
    with pytest.raises(OptionError, match="no pass 'dec' in this pipeline"):
        PassManager("cse,dce", stop_after="dec")


def test_the_ledger_survives_json_and_renders():
    from rich.console import Console

    ledger = run_pipeline(negations(), "test_double_negation,dce", validate=True)
    ledger.add_miss("cse", "rule", "exp", "model.py:3", "has 2 uses")
    ledger.add_miss("cse", "rule", "exp", "model.py:9", "has 2 uses")
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again == ledger and again.misses[0].count == 2
    console = Console(record=True, width=140, file=io.StringIO())
    for part in (ledger.table(), ledger.rules_table(), ledger.misses_table(), ledger.waterfall()):
        console.print(part)
    text = console.export_text()
    assert "test_double_negation" in text and "neg_neg" in text and "has 2 uses" in text
    with pytest.raises(Exception, match="malformed"):
        Ledger.from_json({"rows": [{}], "misses": []})


def test_pipeline_text_round_trips_with_types():
    text = 'test_scale_weights{factor=0.5,only="a,b",mode=none,axes=[1,2]},dce'
    scale, dce = parse_pipeline(text)
    assert (scale.factor, scale.only, scale.mode, scale.axes) == (0.5, "a,b", "none", (1, 2))
    assert dce.weights is True
    assert format_pipeline([scale, dce]) == text
    assert parse_pipeline(["cse", dce])[1] is dce
    assert parse_pipeline("cse\n  dce{weights=false}".replace("\n", ",\n"))[1].weights is False
    assert parse_pipeline("test_scale_weights{only=none}")[0].only is None
    assert parse_pipeline("") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cs", "did you mean cse"),
        ("test_scale_weights{facter=1}", "did you mean factor"),
        ("dce{depth=1}", "no option 'depth'"),
        ("test_scale_weights{factor=big}", "factor = big does not fit"),
        ("test_scale_weights{mode=some}", "does not fit"),
        ("dce{weights=2}", "does not fit"),
        ("dce{weights", "its end"),
        ("dce cse", "belongs"),
        ("dce,{", "no pass named"),
    ],
)
def test_pipeline_errors(text, message):
    with pytest.raises(OptionError) as error:
        parse_pipeline(text)
    assert message in str(error.value)


def test_errors_inside_a_pass_name_it():
    class Loop(type(parse_pipeline("dce")[0])):
        name = "test_loop"

        def run(self, module, context):
            raise RewriteError("rules cycle")

    with pytest.raises(RewriteError) as error:
        PassManager([Loop()]).run(negations())
    assert error.value.where == "pass 01 'test_loop'"


def test_every_rewrite_is_seen_by_the_ledger_and_no_pass_reports_itself():
    module = program(lambda b, a: [b.exp(a), b.exp(a)], t(3))
    ledger = run_pipeline(module, "cse")
    assert ledger.rows[0].rewrites == {"equal_op": 1} and ledger.rows[0].changed


def test_a_pass_does_not_run_again_on_a_program_that_it_left_alone():
    calls = []

    class Watched(DoubleNegation):
        def run(self, module, context):
            calls.append(sum(1 for _ in module.walk()))
            super().run(module, context)

    ledger = PassManager([Watched(), Watched(), Watched()]).run(negations())
    assert calls == [6, 2]  # it changed the program, had nothing to do, and was not asked again
    assert [bool(row.notes.get("skipped")) for row in ledger.rows] == [False, False, True]
    assert [row.ops_after for row in ledger.rows] == [2, 2, 2]
    calls.clear()
    PassManager([Watched(), Watched(), Watched()], validate=True).run(negations())
    assert len(calls) == 3


def test_a_manager_goes_on_where_another_one_stopped():
    module = negations()
    first = PassManager("test_double_negation,dce")
    first.run(module)
    ledger = PassManager("dce").run(module, after=first)
    assert ledger.rows[0].notes and ledger.rows[0].ops_before == 2
    broken = next(op for op in module.walk() if op.name == "exp")
    broken.result.type = t(2, 4)
    with pytest.raises(VerifyError):
        PassManager("dce").run(module, after=first)
