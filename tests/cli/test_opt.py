"""`accel opt` and `accel bisect` on IR text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.support import ROOT, Run, run_process

PROGRAM = """
"accel.func"() ({
^bb0(%x: tensor<4x8xf32>, %y: tensor<4x8xf32>):
  %0 = "accel.add"(%x, %y) : (tensor<4x8xf32>, tensor<4x8xf32>) -> tensor<4x8xf32>
  %1 = "accel.add"(%y, %x) : (tensor<4x8xf32>, tensor<4x8xf32>) -> tensor<4x8xf32>
  %2 = "accel.mul"(%0, %1) : (tensor<4x8xf32>, tensor<4x8xf32>) -> tensor<4x8xf32>
  %3 = "accel.sqrt"(%2) : (tensor<4x8xf32>) -> tensor<4x8xf32>
  "accel.return"(%3) : (tensor<4x8xf32>) -> ()
}) {sym_name = "main"} : () -> ()
"""
WEIGHTED = """
"accel.func"() ({
^bb0(%x: tensor<4x8xf32>):
  %w = "accel.constant"() {name = "w"} : () -> tensor<16x8xf32>
  %y = "accel.linear"(%x, %w) : (tensor<4x8xf32>, tensor<16x8xf32>) -> tensor<4x16xf32>
  "accel.return"(%y) : (tensor<4x16xf32>) -> ()
}) {sym_name = "main"} : () -> ()
"""
EXAMPLE_PASS = ROOT / "examples" / "write_a_pass.py"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.mlir"
    path.write_text(PROGRAM)
    return path


def test_passes_run_over_text(accel: Run, program: Path) -> None:
    ran = accel("opt", program, "--passes", "cse,dce")
    assert ran.code == 0, ran.err
    assert ran.out.count("accel.add") == 1
    again = program.with_name("again.mlir")
    again.write_text(ran.out)
    assert accel("opt", again).out == ran.out, "printed text reads back to itself"


def test_standard_input_and_a_pipe() -> None:
    ran = run_process("opt", "--passes", "cse", stdin=PROGRAM)
    assert ran.code == 0, ran.err
    assert ran.out.startswith('"builtin.module"') and ran.err == ""


def test_output_file_stats_and_dumps(accel: Run, program: Path, tmp_path: Path) -> None:
    out, dumps = tmp_path / "out.mlir", tmp_path / "dumps"
    ran = accel("opt", program, "-p", "cse,dce", "-o", out, "--stats", "--dump-dir", dumps)
    assert (ran.code, ran.out) == (0, "")
    assert "accel.return" in out.read_text()
    assert "equal_op" in ran.err
    assert [p.name for p in sorted(dumps.iterdir())] == [
        "00_input.mlir",
        "01_cse.mlir",
        "02_dce.mlir",
    ]


@pytest.mark.parametrize("option", ["-o", "--dump-dir"])
def test_a_file_that_cannot_be_written(accel: Run, program: Path, option: str) -> None:
    ran = accel("opt", program, "-p", "cse", option, program / "inside.mlir")
    assert ran.code == 2
    assert "ACCEL001" in ran.err and "inside.mlir" in ran.err


def test_json_holds_text_and_ledger(accel: Run, program: Path) -> None:
    data = accel("opt", program, "-p", "cse", "--json").json
    assert data["ir"].startswith('"builtin.module"')
    assert data["ledger"]["rows"][0]["rewrites"] == {"equal_op": 1}


def test_stop_after_and_print_after(accel: Run, program: Path) -> None:
    ran = accel("opt", program, "-p", "dce,cse", "--stop-after", "dce", "--print-after", "dce")
    assert ran.out.count("accel.add") == 2
    assert "after 01 dce" in ran.err


def test_fuel_limits_rewrites(accel: Run, program: Path) -> None:
    assert accel("opt", program, "-p", "cse", "--fuel", 0).out.count("accel.add") == 2


def test_verify_only(accel: Run, program: Path) -> None:
    assert (accel("opt", program, "--verify-only").code, accel("opt", program).code) == (0, 0)
    wrong = program.with_name("wrong.mlir")
    wrong.write_text(PROGRAM.replace("-> tensor<4x8xf32>\n  %3", "-> tensor<4x9xf32>\n  %3"))
    ran = accel("opt", wrong, "--verify-only")
    assert ran.code == 4 and "ACCEL02" in ran.err


def test_text_with_an_error_has_line_column_and_caret(accel: Run, program: Path) -> None:
    program.write_text(PROGRAM.replace('"accel.sqrt"(%2)', '"accel.sqrt"(%2 %2)'))
    ran = accel("opt", program)
    assert ran.code == 4
    assert f"{program}:7:" in ran.err and "^" in ran.err


def test_an_unknown_pass_is_named_with_near_names(accel: Run, program: Path) -> None:
    ran = accel("opt", program, "-p", "cs")
    assert ran.code == 2 and "cse" in ran.err
    error = accel("opt", program, "-p", "cs", "--json").json["error"]
    assert (error["id"], error["exit_code"]) == ("ACCEL001", 2)


def test_weights_from_a_file_or_made_up(accel: Run, tmp_path: Path) -> None:
    path, weights = tmp_path / "w.mlir", tmp_path / "w.safetensors"
    path.write_text(WEIGHTED)
    save_file({"w": torch.randn(16, 8)}, weights)
    quantize = "quantize{bits=8}"
    for options in (["--weights", weights], ["--random-weights"]):
        ran = accel("opt", path, "-p", quantize, *options)
        assert ran.code == 0, ran.err
        assert "accel.dequantize" in ran.out
    save_file({"w": torch.randn(8, 8)}, weights)
    ran = accel("opt", path, "-p", quantize, "--weights", weights)
    assert ran.code == 3 and "tensor<8x8xf32>" in ran.err


def test_a_pass_of_ones_own(accel: Run, tmp_path: Path) -> None:
    path = tmp_path / "square.mlir"
    path.write_text(PROGRAM.replace('"accel.mul"(%0, %1)', '"accel.mul"(%0, %0)'))
    ran = accel("opt", path, "--load", EXAMPLE_PASS, "-p", "root_of_square,dce", "--validate")
    assert ran.code == 0, ran.err
    assert "accel.abs" in ran.out and "accel.sqrt" not in ran.out


def test_bisect_finds_a_wrong_rewrite(accel: Run, program: Path, tmp_path: Path) -> None:
    test = tmp_path / "test_found.py"
    arguments = ["bisect", program, "-p", "cse,careless_root_of_square,dce"]
    ran = accel(*arguments, "--load", EXAMPLE_PASS, "-o", test)
    assert ran.code == 5, ran.err
    assert "drop_root" in ran.out and "careless_root_of_square" in ran.out
    # The file needs the module that registers the pass.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)],
        cwd=EXAMPLE_PASS.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "careless_root_of_square" in done.stdout, done.stdout


def test_bisect_of_a_correct_pipeline(accel: Run, program: Path) -> None:
    ran = accel("bisect", program, "-p", "cse,dce", "--json")
    assert (ran.code, ran.json) == (0, {"finding": None})
