"""Small artifacts to read, damage and run: one without and one with native code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel import tree
from accel.runtime.artifact import Contents, GoldenCase, write_artifact
from accel.runtime.executor import CompiledFunction
from accel.runtime.golden import record
from accel.runtime.libraries import get
from accel.runtime.manifest import TargetSpec, this_machine
from accel.runtime.plan import Step
from accel.runtime.prepare import TensorWeights
from accel.runtime.weights import StoredWeight
from tests.runtime.support import Plan, host_code, operand, shared_object

VERSIONS = {"accel": "0.1.0", "torch": torch.__version__}
LEDGER = {
    "rows": [
        {"index": 0, "name": "fold", "contract": "exact", "changed": True, "rewrites": {"a": 2},
         "ops_before": 9, "ops_after": 7, "seconds": 0.25},
        {"index": 1, "name": "dce", "contract": "exact", "changed": False},
    ],
    "misses": [],
}  # fmt: skip


def stored(weights: dict[str, Tensor]) -> dict[str, StoredWeight]:
    return {n: StoredWeight(t.dtype, tuple(t.shape), lambda t=t: t) for n, t in weights.items()}


def example_inputs(rows: int = 2) -> dict[str, Tensor]:
    return {"x": torch.linspace(-1, 1, rows * 8).reshape(rows, 8), "ids": torch.tensor([2, 0])}


def small_plan(kernels: bool) -> Plan:
    """y = linear(x, w) (times two by a kernel), and two rows of a table."""
    generator = torch.Generator().manual_seed(0)
    p = Plan("main", n=(1, 64))
    x, ids = p.input("n", 8, name="x"), p.input(2, dtype="int64", name="ids")
    w = p.weight("layer.weight", torch.randn(6, 8, generator=generator))
    table = p.weight("table", torch.randn(3, 5, generator=generator))
    y = p.value("owned", ["n", 6])
    p.steps.append(_linear_step(x, w, y))
    y = p.kernel("twice", y) if kernels else y
    rows = p.aten("aten::embedding", [table, ids], [2, 5], operand(0), operand(1),
                  meaning=lambda t, i: t[i])  # fmt: skip
    p.outputs = [y, rows]
    return p


def _linear_step(x: int, w: int, y: int) -> Step:
    return Step("library", "torch.linear", [x, w, -1], [y], {})


def convention(p: Plan) -> dict[str, Any]:
    """main(x, ids=..., scale=None) -> {"y": ..., "rows": (..., "done")}."""
    x, ids = torch.zeros(1), torch.zeros(1)
    _, inputs = tree.flatten(((x,), {"ids": ids}))
    _, outputs = tree.flatten({"y": x, "rows": (ids, "done")})
    return {
        "arguments": [{"name": "x", "kind": "input"}, {"name": "ids", "kind": "input"}],
        "results": [{"kind": "output"}, {"kind": "output"}],
        "inputs": inputs,
        "outputs": outputs,
        "parameters": [
            {"name": "x", "kind": "both"},
            {"name": "ids", "kind": "both"},
            {"name": "scale", "kind": "keyword", "default": {"value": None}},
        ],
    }


def small_contents(kernels: bool = False) -> Contents:
    p = small_plan(kernels)
    plan = p.done(*p.outputs)
    plan.metadata = convention(p)
    target = TargetSpec("cpu", this_machine().machine, ["sse2"] if kernels else [])
    return Contents(
        {"main": plan},
        stored(p.weights),
        target,
        VERSIONS,
        ir={"captured": "module {}\n", "kernels": "module { func @main }\n"},
        kernels={"host.so": shared_object(), "twice.c": b"// source"} if kernels else {},
        host_code="host.so" if kernels else "",
        golden=[golden_case(p)],
        ledger=LEDGER,
        report={"name": "small"},
    )


def golden_case(p: Plan) -> GoldenCase:
    run = CompiledFunction(
        p.done(*p.outputs), TensorWeights(p.weights), libraries=get, host=host_code()
    )
    return record("main", run, list(example_inputs().values()))


def write_small(path: Path, kernels: bool = False) -> Contents:
    contents = small_contents(kernels)
    write_artifact(path, contents)
    return contents


def expected(kernels: bool, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    weights = small_plan(kernels).weights
    y = x @ weights["layer.weight"].t()
    return (2 * y if kernels else y), weights["table"][ids]
