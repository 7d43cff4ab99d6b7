"""The benchmark of GPU kernels' numerics: it counts, goes on past failures, and where it was."""

from __future__ import annotations

import json
import time
from pathlib import Path

from benchmarks.docs_gpu_numerics import numerics_lines
from benchmarks.docs_table import markdown
from benchmarks.gpu_numerics import Run, summary, triton_version
from benchmarks.gpu_numerics_worker import HOPPER, compiled_file, lines

FUZZ = "tests/backends/test_triton_fuzz.py"


def folder(root: Path) -> Path:
    made = root / "state"
    (made / "kernels").mkdir(parents=True)
    (root / "launches").mkdir()
    return made


def test_one_region_from_its_test_to_machine_code(tmp_path: Path) -> None:
    state, triton = folder(tmp_path), triton_version("")
    run = Run(state, time.monotonic() + 300)
    assert run.worker("check", FUZZ, "2", "sm_90")
    (test,) = lines(state / "tests.jsonl")
    assert test["outcome"] == "passed" and test["runs"]
    broken = json.loads(next((tmp_path / "launches").glob("*.json")).read_text())
    broken["source"] = broken["source"].replace("tl.store(", "tl.nothing(")
    name = next((tmp_path / "launches").glob("*.json"))
    name.write_text(json.dumps(broken))
    assert run.worker("compile")
    made = summary(state, ["sm_90"], [triton])
    assert made["tests"] == {"passed": 1} and made["random_regions"]["kernels"] == 2
    counts = made["compiled"][triton]["sm_90"]
    assert counts["compiled"] == 1 and len(counts["failed"]) == 1 and not counts["not_tried"]
    (why,) = counts["failed"].values()
    assert "nothing" in why
    size = compiled_file(state, triton).stat().st_size
    assert run.worker("check", FUZZ, "2", "sm_90") and run.worker("compile")
    assert len(lines(state / "tests.jsonl")) == 1
    assert compiled_file(state, triton).stat().st_size == size


def test_no_time_left_is_said(tmp_path: Path) -> None:
    assert not Run(folder(tmp_path), time.monotonic()).worker("compile")


def test_a_process_that_died_is_a_failure(tmp_path: Path) -> None:
    state = folder(tmp_path)
    (state / "started.jsonl").write_text('{"test": "a"}\n{"test": "b"}\n')
    (state / "tests.jsonl").write_text(
        '{"test": "a", "outcome": "passed", "seconds": 1.0, "error": "", "runs": {"k": 3}}\n'
    )
    Run(state, 0.0)._bury("its process ended with -11", "")
    kernel = {"key": "k", "template": "scan", "random": False, "launches": {"sm_80": HOPPER}}
    (state / "kernels" / "k.json").write_text(json.dumps(kernel))
    made = summary(state, ["sm_80"], [triton_version("")])
    assert made["tests"] == {"failed": 1, "passed": 1}
    assert made["failed"] == {"b": "its process ended with -11"}
    assert made["templates"] == {"scan": {"kernels": 1, "runs": 3}}
    page = "\n".join(numerics_lines(made, markdown))
    assert "1 tests pass, 1 fail" in page and "| scan | 1 | 3 |" in page
    assert "0 compile, 1 for Hopper alone" in page
