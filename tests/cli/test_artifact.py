"""compile, inspect, explain, verify, run and bench on one small artifact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from accel.cli import main
from accel.cli.inspect import signature
from accel.cli.models import load_model
from accel.runtime.artifact import Artifact
from tests.cli.support import Run, run_process

MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 64), nn.Linear(64, 8), nn.LayerNorm(64)

    def forward(self, x, scale=None):
        y = self.down(self.norm(nn.functional.gelu(self.up(x))))
        return y if scale is None else y * scale

def build():
    torch.manual_seed(0)
    return Model()

def with_inputs():
    return build(), (torch.ones(4, 16),)

class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, its artifact, and a cache (and signing key) of its own."""
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "model.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_CACHE_DIR", str(folder / "cache"))
        with pytest.raises(SystemExit) as stopped:
            arguments = ["compile", f"{folder}/model.py:build", "-i", "x:f32[batch?4,16]"]
            main([*arguments, "-o", f"{folder}/m.accel"])
        assert stopped.value.code == 0
        yield folder


@pytest.fixture
def at_home(home: Path, accel: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`accel` with the cache of `home`."""
    monkeypatch.setenv("ACCEL_CACHE_DIR", str(home / "cache"))
    return accel


def test_a_model_and_its_inputs_are_cast(at_home: Run, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.accel"
    made = at_home(
        "compile", f"{home}/model.py:with_inputs", "--dtype", "bfloat16", "-o", path, "--json"
    )
    assert made.code == 0, made.err
    with Artifact(path) as artifact:
        (plan,) = artifact.manifest.functions.values()
        assert {plan.values[v].dtype for v in (*plan.inputs, *plan.outputs)} == {"bfloat16"}
        assert {w.dtype for w in artifact.manifest.weights.values()} == {"bfloat16"}
    wrong = at_home("compile", f"{home}/model.py:with_inputs", "--dtype", "int8", "-o", path)
    assert wrong.code == 2 and "no floating dtype" in wrong.err


def eager(home: Path, x: torch.Tensor) -> torch.Tensor:
    model = load_model(f"{home}/model.py:build").model
    with torch.no_grad():
        result: torch.Tensor = model(x)
    return result


def test_compile_says_what_it_made(home: Path, at_home: Run, tmp_path: Path) -> None:
    out = tmp_path / "fixed.accel"
    ran = at_home("compile", f"{home}/model.py:with_inputs", "-o", out, "--json")
    assert ran.code == 0, ran.err
    data = ran.json
    assert data["functions"]["main"]["symbols"] == {}
    assert data["functions"]["main"]["inputs"][0]["shape"] == [4, 16]
    assert data["bytes"] == out.stat().st_size
    names = [row["name"] for row in data["ledger"]["rows"]]
    assert "canonicalize" in names and "fuse" in names


def test_compile_with_a_lossy_technique(home: Path, at_home: Run, tmp_path: Path) -> None:
    out, dumps = tmp_path / "q.accel", tmp_path / "dumps"
    ran = at_home(
        "compile", f"{home}/model.py:with_inputs", "-p", "quantize{bits=8}",
        "-o", out, "--dump-dir", dumps, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    (row,) = [r for r in ran.json["ledger"]["rows"] if r["name"] == "quantize"]
    assert row["contract"].startswith("relative_error")
    assert row["after"]["weight_bytes"] < row["before"]["weight_bytes"] / 2
    assert any(p.name.endswith("_quantize.mlir") for p in dumps.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{}/model.py:build"], 2, "example inputs"),
        (["{}/model.py:with_inputs", "-p", "quantise"], 2, "quantize"),
        (["{}/model.py:with_inputs", "--target", "h1000"], 2, "h1000"),
        (["{}/model.py:Branching", "-i", "x:f32[4]"], 3, "model.py:"),
        (["{}/model.py:build", "-i", "y:f32[4,?16]"], 2, "no argument 'y'"),
    ],
)
def test_a_failed_compile_names_the_cause_and_leaves_no_file(
    home: Path, at_home: Run, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    out = tmp_path / "bad.accel"
    ran = at_home("compile", *(a.format(home) for a in arguments), "-o", out)
    assert ran.code == code, ran.err
    assert said in ran.err
    assert list(tmp_path.glob("*")) == [] or not out.exists()


def test_inspect(home: Path, at_home: Run) -> None:
    path = home / "m.accel"
    data = at_home("inspect", path, "--json").json
    main = data["functions"]["main"]
    assert main["symbols"]["batch"][0] >= 1 and data["trusted"] is True
    assert main["inputs"][0] == {"name": "x", "dtype": "float32", "shape": ["batch", 16]}
    arena = main["arena"]
    assert arena["bytes"] >= arena["least_bytes"] and set(arena["sizes"]) == {"batch"}
    ran = at_home("inspect", path, "--plan", "--kernels")
    assert ran.code == 0, ran.err
    assert "float32[batch, 16]" in ran.out and "accel_matmul_" in ran.out
    for stage in data["stages"]:
        text = at_home("inspect", path, "--ir", stage).out
        assert "accel.return" in text
    assert at_home("inspect", path, "--ir", "nothing").code == 7
    kernels = at_home("inspect", path, "--kernels", "--json").json["kernels"]
    source = at_home("inspect", path, "--source", kernels[0]["name"])
    assert source.code == 0 and kernels[0]["name"] in source.out


def test_ir_of_an_artifact_goes_through_opt(home: Path, at_home: Run, tmp_path: Path) -> None:
    text = at_home("inspect", home / "m.accel", "--ir", "captured").out
    path = tmp_path / "captured.mlir"
    path.write_text(text)
    ran = at_home("opt", path, "--random-weights", "-p", "canonicalize,cse,dce", "--validate")
    assert ran.code == 0, ran.err
    assert "accel.layer_norm" in ran.out


def test_explain(home: Path, at_home: Run) -> None:
    ran = at_home("explain", home / "m.accel", "--rules", "--misses")
    assert ran.code == 0 and "canonicalize" in ran.out and "exact" in ran.out
    data = at_home("explain", home / "m.accel", "--json").json
    assert {"rows", "misses"} <= set(data)


def test_verify(home: Path, at_home: Run, tmp_path: Path) -> None:
    ran = at_home("verify", home / "m.accel", "--json")
    assert ran.code == 0, ran.out
    assert ran.json["ok"] and ran.json["deviations"]
    data = bytearray((home / "m.accel").read_bytes())
    data[len(data) // 2] ^= 1
    damaged = tmp_path / "damaged.accel"
    damaged.write_bytes(data)
    ran = at_home("verify", damaged)
    assert ran.code == 9 and "failed" in ran.out


def test_untrusted_host_code_is_refused_by_verify_and_can_be_trusted(
    home: Path, accel: Run
) -> None:
    """`accel` here has another cache folder, so another key."""
    data = accel("inspect", home / "m.accel", "--json").json
    assert data["trusted"] is False
    assert accel("keys", "trust", data["signer"]).code == 0
    assert accel("inspect", home / "m.accel", "--json").json["trusted"] is True
    assert data["signer"] in accel("keys", "show", "--json").json["trusted"]
    assert accel("keys", "trust", "nonsense").code == 8


def test_run_on_files_and_on_random_inputs(home: Path, at_home: Run, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "y.safetensors"
    ran = at_home("run", home / "m.accel", "-i", f"x={tmp_path}/x.npy", "-o", out)
    assert ran.code == 0, ran.err
    wanted = eager(home, torch.from_numpy(x))
    torch.testing.assert_close(load_file(out)["output0"], wanted, rtol=1e-4, atol=1e-5)
    again = at_home("run", home / "m.accel", "--inputs", out)
    assert again.code == 2 and "output0" in again.err
    data = at_home("run", home / "m.accel", "--size", "batch=3", "--seed", 7, "--json").json
    assert data["outputs"]["output0"]["shape"] == [3, 8] and data["sizes"] == {"batch": 3}
    same = at_home("run", home / "m.accel", "--size", "batch=3", "--seed", 7, "--json").json
    assert same["outputs"] == data["outputs"]
    np.save(tmp_path / "x.npy", x.astype(np.float64))
    assert at_home("run", home / "m.accel", "-i", f"x={tmp_path}/x.npy").code == 3
    assert at_home("run", home / "m.accel", "-i", "z=ones").code == 2


def test_run_into_a_folder_that_is_not_there(home: Path, at_home: Run, tmp_path: Path) -> None:
    ran = at_home("run", home / "m.accel", "-o", tmp_path / "none" / "out.safetensors", "--json")
    assert ran.code == 2 and "none" in ran.json["error"]["what"]


def test_run_of_a_file_that_is_no_artifact(accel: Run, tmp_path: Path) -> None:
    path = tmp_path / "text.accel"
    path.write_text("not an artifact")
    for verb in ("run", "inspect", "explain", "bench"):
        ran = accel(verb, path)
        assert ran.code == 7 and "text.accel" in ran.err, verb
    assert accel("run", tmp_path / "none.accel").code == 7


def test_bench_of_an_artifact_and_of_a_model(home: Path, at_home: Run) -> None:
    quick = ["--rounds", 1, "--seconds", 0.01, "--json"]
    data = at_home("bench", home / "m.accel", *quick).json
    assert data["systems"]["accel"]["seconds"] > 0
    data = at_home("bench", f"{home}/model.py:with_inputs", *quick).json
    assert set(data["systems"]) == {"eager", "accel"} and data["best_peer"] == "eager"
    assert data["systems"]["accel"]["error"] < 1e-5
    data = at_home("bench", home / "m.accel", "--kernels", *quick).json
    line = data["roofline"]
    assert line["matched"] and line["timed_by"] == "wall clock"
    assert line["floor_seconds"] == pytest.approx(sum(r["floor"] for r in line["rows"]))
    assert all(r["seconds"] > 0 and r["bytes"] > 0 for r in line["rows"])
    assert "floor" in at_home("bench", home / "m.accel", "--kernels", *quick[:-1]).out
    ran = at_home("bench", f"{home}/model.py:with_inputs", "--against", "tensorflow", *quick)
    assert ran.code == 2


def test_bisect_of_a_model(home: Path, at_home: Run) -> None:
    ran = at_home("bisect", f"{home}/model.py:with_inputs", "-p", "canonicalize,cse", "--json")
    assert (ran.code, ran.json) == (0, {"finding": None})


def test_doctor(at_home: Run) -> None:
    ran = at_home("doctor", "--json")
    data = ran.json
    states = {c["name"]: c["state"] for c in data["checks"]}
    assert ran.code == 0 and data["usable"]
    assert states["compile and run"] == "ok" and states["C compiler"] == "ok"
    assert data["packages"]["torch"] == torch.__version__
    assert "compile and run" in at_home("doctor").out


def test_doctor_without_a_c_compiler(at_home: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_CC", "no-such-compiler")
    ran = run_process("doctor", "--json")
    assert ran.code == 6
    (check,) = [c for c in json.loads(ran.out)["checks"] if c["name"] == "C compiler"]
    assert check["state"] == "missing" and "ACCEL_CC" in check["advice"]


def test_values_of_one_type_in_a_row_are_one(accel: Run) -> None:
    cache = {"dtype": "float16", "shape": ["b", 4, ["*", 2, "n"]]}
    values = [{"name": "ids", "dtype": "int64", "shape": [1, 8]}]
    values += [{"name": f"cache{i}", **cache} for i in range(60)]
    assert signature(values) == (
        "ids: int64\\[1, 8], cache0 ... cache59: 60 x float16\\[b, 4, (2 * n)]"
    )
    assert signature(values[:3]).count("cache") == 2
