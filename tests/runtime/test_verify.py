"""`verify_artifact` says what is wrong; generation; the process that only loads."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from accel.errors import InputError, VerificationFailedError
from accel.runtime.artifact import Contents, GoldenCase, write_artifact
from accel.runtime.generation import generate
from accel.runtime.golden import compare, tolerance
from accel.runtime.interfaces import Library
from accel.runtime.libraries import get
from accel.runtime.loader import load
from accel.runtime.manifest import TargetSpec, check_machine, this_machine
from accel.runtime.plan import Step
from accel.runtime.verify import verify_artifact
from accel.runtime.weights import StoredWeight
from accel.tree import flatten
from tests.runtime.models import example_inputs, small_contents
from tests.runtime.support import Plan, Registry

ROOT = Path(__file__).parents[2]


def test_a_good_artifact(tmp_path: Path) -> None:
    write_artifact(tmp_path / "m.accel", small_contents(kernels=True))
    found = verify_artifact(tmp_path / "m.accel")
    assert found.ok, found.checks
    assert [c.name for c in found.checks] == [
        "file", "contents", "machine", "libraries", "versions", "signature", "load",
        "golden main", "golden main",
    ]  # fmt: skip
    assert [d.error for d in found.deviations] == [0.0, 0.0]
    found.raise_if_failed()


def test_wrong_numbers(tmp_path: Path) -> None:
    """Which output, and how far."""
    contents = small_contents()
    case = contents.golden[0]
    outputs = [case.outputs[0] * 1.01, case.outputs[1]]
    contents.golden = [dataclasses.replace(case, outputs=outputs)]
    write_artifact(tmp_path / "m.accel", contents)
    found = verify_artifact(tmp_path / "m.accel")
    assert not found.ok
    failed = [c for c in found.checks if c.result == "failed"]
    assert len(failed) == 1
    assert failed[0].detail == "output 0: relative error 0.0099, allowed 0.00035"
    with pytest.raises(VerificationFailedError, match="golden main: output 0"):
        found.raise_if_failed()


def test_another_cpu(tmp_path: Path) -> None:
    contents = small_contents(kernels=True)
    for target, says in (
        (TargetSpec("x", this_machine().machine, ["amx-magic"]), "needs amx-magic"),
        (TargetSpec("x", "riscv64", []), "is for riscv64; this machine is"),
    ):
        contents.target = target
        write_artifact(tmp_path / "m.accel", contents)
        found = verify_artifact(tmp_path / "m.accel")
        details = {c.name: c.detail for c in found.checks if c.result == "failed"}
        assert says in details["machine"]
        assert says in details["load"]


def test_a_missing_library(tmp_path: Path) -> None:
    write_artifact(tmp_path / "m.accel", small_contents())
    entry: Library = get("sdpa")
    found = verify_artifact(tmp_path / "m.accel", find_library=Registry(entry))
    assert "no library entry 'torch.linear'" in next(
        c.detail for c in found.checks if c.name == "libraries"
    )
    assert not found.ok


def test_machine_of_this_process_fits_itself() -> None:
    check_machine(this_machine())


class TestCompare:
    @pytest.mark.parametrize(
        ("result", "wanted", "ok"),
        [
            (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0001]), True),
            (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.01]), False),
            (torch.tensor([1e-9, 2.0]), torch.tensor([0.0, 2.0]), True),
            (torch.zeros(2), torch.zeros(2), True),
            (torch.tensor([torch.inf, 1.0]), torch.tensor([torch.inf, 1.0]), True),
            (torch.tensor([-torch.inf, 1.0]), torch.tensor([torch.inf, 1.0]), False),
            (torch.tensor([torch.nan, 1.0]), torch.tensor([torch.nan, 1.0]), True),
            (torch.tensor([torch.nan, 1.0]), torch.tensor([0.0, 1.0]), False),
            (torch.tensor([torch.nan]), torch.tensor([torch.nan]), True),
            (torch.tensor([3, 4]), torch.tensor([3, 4]), True),
            (torch.tensor([3, 4]), torch.tensor([3, 5]), False),
            (torch.zeros(2), torch.zeros(3), False),
            (torch.zeros(2), torch.zeros(2, dtype=torch.float64), False),
            (torch.zeros(0), torch.zeros(0), True),
            (torch.tensor([1 + 1j]), torch.tensor([1 + 1j]), True),
            (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0625]).bfloat16(), True),
            (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.125]).bfloat16(), False),
        ],
    )
    def test_deviation(self, result: Tensor, wanted: Tensor, ok: bool) -> None:
        case = GoldenCase("f", [], [wanted], [tolerance(wanted.dtype)])
        (deviation,) = compare("f", [result], case)
        assert deviation.ok == ok

    def test_number_of_outputs(self) -> None:
        (deviation,) = compare("f", [], GoldenCase("f", [], [torch.zeros(1)], [0.0]))
        assert not deviation.ok


class TestGeneration:
    """A model that counts: the next token is the last one plus one, modulo seven."""

    @staticmethod
    def _model(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((ids + 1) % 7, 7).float()

    def test_greedy(self) -> None:
        seen: list[int] = []
        ids = generate(self._model, torch.tensor([[3, 4]]), 4, on_token=seen.append)
        assert ids.tolist() == [[3, 4, 5, 6, 0, 1]]
        assert seen == [5, 6, 0, 1]

    @pytest.mark.parametrize("eos", [6, [6, 100]])
    def test_end_of_text(self, eos: int | list[int]) -> None:
        assert generate(self._model, torch.tensor([[4]]), 9, eos).tolist() == [[4, 5, 6]]

    def test_model_outputs(self) -> None:
        ids = generate(lambda x: SimpleNamespace(logits=self._model(x)), torch.tensor([[1]]), 1)
        assert ids.tolist() == [[1, 2]]

    @pytest.mark.parametrize("prompt", [torch.tensor([1]), torch.zeros(1, 3), torch.ones(2, 3)])
    def test_bad_prompts(self, prompt: Tensor) -> None:
        with pytest.raises(InputError, match="a prompt is int64"):
            generate(self._model, prompt, 1)


def test_a_process_that_only_loads(tmp_path: Path) -> None:
    """Loads and runs in a new process, which imports nothing of the compiler."""
    path = tmp_path / "m.accel"
    write_artifact(path, small_contents(kernels=True))
    code = f"""
import sys, torch
before = set(sys.modules)
import accel
assert not any(m.startswith("accel.runtime") for m in sys.modules)
model = accel.load({str(path)!r})
r = model(torch.linspace(-1, 1, 16).reshape(2, 8), ids=torch.tensor([2, 0]))
print(r["rows"][1], list(r["y"].shape), model.explain().count(chr(10)))
new = set(sys.modules) - before
parts = {{m.split(".")[1] for m in new if m.startswith("accel.")}}
print(sorted(parts & {{"ir", "passes", "frontends", "backends", "compiler", "cli"}}))
print(sorted({{m.split(".")[0] for m in new}} & {{"tvm", "transformers", "sympy", "rich"}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["done [2, 6] 2", "[]", "[]"], done.stderr


def test_loading_twice_gives_independent_models(tmp_path: Path) -> None:
    write_artifact(tmp_path / "m.accel", small_contents(kernels=True))
    a, b = load(tmp_path / "m.accel"), load(tmp_path / "m.accel")
    x, ids = torch.randn(3, 8), torch.tensor([1, 1])
    first = a(x, ids)["y"]
    assert torch.equal(first, b(x, ids)["y"])
    assert first.data_ptr() != b(x, ids)["y"].data_ptr()


def test_packed_weights_are_not_held_twice(tmp_path: Path) -> None:
    """Peak memory of loading and running is the weights once, not the file and the packed copy."""
    size = 1024
    p = Plan()
    x = p.input(1, size)
    for i in range(24):  # 4 MB each
        w = p.value("weight", [size, size], name=f"w{i}")
        y = p.value("owned", [1, size])
        options = {"unary": "none", "binary": "none"}
        p.steps.append(Step("library", "onednn.linear", [x, w, -1], [y], options))
        x = y
    weight = torch.eye(size)
    weights = {
        f"w{i}": StoredWeight(torch.float32, (size, size), lambda: weight) for i in range(24)
    }
    path = tmp_path / "m.accel"
    write_artifact(path, Contents({"main": p.done(x)}, weights, TargetSpec("cpu")))
    code = f"""
import re, torch, accel
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024
torch.ops.mkldnn._reorder_linear_weight(torch.eye(8))
before = peak()
(y,) = accel.load({str(path)!r})(torch.arange({size}.0)[None])
assert torch.equal(y[0], torch.arange({size}.0))
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert 96 < float(done.stdout) < 96 + 60, done.stdout + done.stderr


def test_outputs_of_transformers(tmp_path: Path) -> None:
    """With the library loaded its own class comes back."""
    outputs = pytest.importorskip("transformers.modeling_outputs")
    contents = small_contents()
    plan = contents.functions["main"]
    x = torch.zeros(1)
    wanted = outputs.CausalLMOutputWithPast(logits=x, hidden_states=(x,))
    plan.metadata = {**plan.metadata, "outputs": flatten(wanted)[1]}
    write_artifact(tmp_path / "m.accel", contents)
    inputs = example_inputs()
    result = load(tmp_path / "m.accel")(inputs["x"], ids=inputs["ids"])
    assert type(result) is outputs.CausalLMOutputWithPast
    assert result.logits.shape == (2, 6)
    assert result.hidden_states[0].shape == (2, 5)
