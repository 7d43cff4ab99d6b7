"""The benchmarks' own logic: errors, tables, and one real row from compiling to figures."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel.cli.timing import interleaved_medians, relative_error
from benchmarks import docs_coverage, docs_gpu, docs_gpu_decode, docs_table, gpu, op_db
from benchmarks.compile_time import build
from benchmarks.cpu import measure_row, summary
from benchmarks.measure import merged
from benchmarks.models import CASES, EfficientNetLite0
from benchmarks.systems import ERROR_FLOOR, reference


def test_errors_are_relative_to_the_largest_value() -> None:
    wanted = [torch.tensor([1.0, -4.0])]
    assert relative_error([torch.tensor([1.0, -4.2])], wanted) == pytest.approx(0.05)
    assert relative_error(wanted, wanted) == 0
    assert relative_error([torch.ones(3)], wanted) == math.inf
    assert relative_error([torch.tensor([1.0, math.nan])], wanted) == math.inf
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert relative_error([torch.zeros(0)], [torch.zeros(0)]) == 0


def test_systems_take_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    medians = interleaved_medians(calls, rounds=2, seconds=0)
    assert set(medians) == {"a", "b"}
    assert "".join(order) == ("a" * 4 + "b" * 4) * 2


def test_the_allowed_error_is_measured() -> None:
    model = nn.Linear(4, 4).eval()
    wanted, allowed = reference(model, (torch.randn(2, 4),))
    assert wanted[0].dtype == torch.float64 and allowed >= ERROR_FLOOR
    assert model.weight.dtype == torch.float32


def test_efficientnet_has_its_weights() -> None:
    model = EfficientNetLite0.pretrained().eval()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    with torch.no_grad():
        scores = model(torch.zeros(1, 3, 224, 224))
    assert scores.shape == (1, 1000) and scores.std() > 0.01


def test_a_row_from_compiling_to_figures() -> None:
    row = measure_row(CASES["efficientnet-lite0"], ["eager", "accel"], rounds=1, seconds=0)
    assert row["systems"]["accel"]["error"] <= row["allowed_error"] < 1e-4
    assert row["systems"]["accel"]["compile_seconds"] > 0
    assert "accel:" in summary(row)
    data = {"machine": {"processor": "p", "threads": 2, "python": "3", "packages": {}}}
    page = docs_table.cpu_section({**data, "rows": {"efficientnet-lite0": row}})
    assert "EfficientNet-Lite0 B1" in page and "/ eager" in page


def test_the_ladder_of_depths_differs_only_in_depth() -> None:
    (short, (x,)), (long, _) = build(2), build(4)
    with torch.no_grad():
        assert short(x).shape == long(x).shape == x.shape
    layers = [sum(1 for _ in m.parameters()) for m in (short, long)]
    assert (layers[1] - 2) == 2 * (layers[0] - 2)


def test_tables_of_coverage() -> None:
    good = {"ok": True, "error": 1e-7, "seconds": 2.0, "graph_breaks": 0}
    models = {
        "one": {"family": "decoder", "accel": good, "fallbacks": {"aten::x": 2}, "inductor": good,
                "dynamic": {**good, "programs": 3, "ok": False, "dynamo_graphs": 3},
                "gradients": {**good, "fallbacks": {"aten::y": 1}}},
        "two": {"family": "vision", "accel": {"ok": False, "error_message": "SomeError: x"},
                "fallbacks": {}, "gradients": {"eager_fails": "no"}},
    }  # fmt: skip
    text = "\n".join(docs_coverage.coverage_lines(models))
    assert "| **all** | 2 | 1 of 2 | 1 of 1 | 0 of 1 | 1 of 1 |" in text
    assert "`x` (training: `y`)" in text and "3 (Dynamo: 3)" in text
    assert "fails: SomeError" in text and "eager has none" in text
    rows = {"a": {"counts": {"right": 2}}, "b": {"counts": {"refused": 1}, "refused": ["no <way>"]}}
    stored = {"float32": {"samples": 1, "rows": rows, "total": op_db.total(rows)}}
    text = "\n".join(docs_coverage.op_db_lines(stored))
    assert "| float32 | 2 | 3 | 2 | 0 | 1 | 0 | 0 | 0 |" in text and "no &lt;way>" in text


def test_the_op_sweep_tells_wrong_from_right() -> None:
    def impure(x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)

    x = torch.ones(3)
    assert op_db.judge(impure, ((x,), {}), unwritten=False) == ("right", "")
    assert op_db.judge(torch.nonzero, ((x,), {}), unwritten=False)[0] == "refused"
    assert op_db.judge(torch.linalg.svdvals, ((x[None],), {}), False)[0] == "right, torch"
    assert op_db.difference(x, x + 1e-3, random=False) and not op_db.difference(x, x + 1, True)
    assert not op_db.as_precise(x + 0.1, x, 0, lambda t: t, ((x,), {}))


def gpu_rows(workload: str, **milliseconds: float) -> list[dict[str, Any]]:
    return [asdict(gpu.Row(workload, s.replace("_", "-"), ms, 2 * ms, 1e-3)) for s, ms in
            milliseconds.items()]  # fmt: skip


def test_rows_of_a_later_run_take_their_places(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    facts = {"gpu": "G", "packages": {"torch": "2"}}
    order = ["bert_b1", "vit_b1"]
    old = merged(path, facts, gpu_rows("bert_b1", eager=4, accel=2), order)
    old += merged(path, facts, gpu_rows("vit_b1", eager=4, accel=3), order)
    path.write_text(json.dumps({"machine": facts, "rows": old[::-1]}))
    fresh = gpu_rows("vit_b1", eager=6, inductor_reduce_overhead=5, accel=2)
    made = merged(path, facts, fresh, order)
    assert [r["workload"] for r in made] == ["bert_b1"] * 2 + ["vit_b1"] * 3
    assert gpu.ratios(made) == {"bert_b1": (2.0, 1.0), "vit_b1": (2.5, 2.5)}
    assert merged(path, {**facts, "gpu": "H"}, fresh, order) == fresh
    page = "\n".join(docs_gpu.gpu_lines({"machine": facts, "rows": made}))
    assert "| bert_b1 | 4.000 |  | 2.000 | 2.00 |" in page
    assert "| geometric mean |  |  |  | 2.24 |" in page


def test_the_loop_of_a_text_is_what_prompt_and_steps_do_not_take() -> None:
    steps = (docs_gpu_decode.NEW - 1) * 2.0
    row = {"milliseconds": 10 + 1.25 * steps, "step_milliseconds": 2.0, "prompt_milliseconds": 10.0}
    line = docs_gpu_decode.text_line(row)
    assert "(500 a second)" in line and "25.0 % of the steps" in line
    assert line.startswith(f"{1e3 * docs_gpu_decode.NEW / row['milliseconds']:.0f} tokens a second")


def test_gradients_are_compared_as_one_vector() -> None:
    model = nn.Linear(2, 1, bias=False)
    call = lambda x: model(x).sum()  # noqa: E731
    loss, vector = gpu.gradients(call, model, {"x": torch.tensor([[3.0, 4.0]])})
    assert vector.tolist() == [3.0, 4.0] and loss.dim() == 0 and model.weight.grad is None
    work = gpu.Workload(model, {}, trains=True)
    assert gpu.errors(work, [vector * 1.1], [vector]) == pytest.approx(0.1)
