"""Which architectures compile: the zoo of tiny random models, accel beside Inductor.

    python -m benchmarks.coverage                       # all: about an hour on two cores
    python -m benchmarks.coverage --only llama --only t5
    python -m benchmarks.coverage --no-inductor --no-gradients
    python -m benchmarks.coverage --missing             # goes on where a run ended

For each model of `tests/zoo.py`, through `torch.compile`:

    accel, inductor   graphs, graph breaks, error against eager, seconds of the first call
    fallbacks         every ATen op that has no definition in the IR and that torch runs itself
    dynamic           (models over tokens) three batch and sequence sizes, and programs compiled; if
                      more than one, also the graphs that Dynamo makes with a backend of no work
    gradients         error of the gradients against eager's, where eager has them

Errors are the largest difference over the largest element, the worst of all outputs; for gradients,
over the largest element of any gradient. Compile caches of both are off. A row is stored as soon
as it is measured, and what is not measured again stays as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters

from accel import tree
from accel.compiler.api import compile_function
from accel.frontends.dynamo import make_backend
from accel.ir.module import Module
from benchmarks.measure import THREADS, load_results, machine, store_results
from tests import zoo

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
LEAST = 1e-6  # errors are relative to the largest element, or to this
LANGUAGE = (zoo.tokens, zoo.masked_tokens, zoo.source_and_target)
SIZES = ((2, 12), (3, 17), (5, 9))
Outcome = dict[str, Any]


class Accel:
    """The accel backend; notes the ATen ops without a definition in what it compiles."""

    def __init__(self) -> None:
        self.fallbacks: dict[str, int] = {}
        self.programs = 0
        self.backend = make_backend(self._compile)

    def _compile(
        self, module: Module, options: Mapping[str, Any], device: torch.device
    ) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        self.programs += 1
        for name, count in module.metadata["fallbacks"].items():
            self.fallbacks[name] = self.fallbacks.get(name, 0) + count
        return compile_function(module, options)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="coverage of architectures")
    parser.add_argument("--only", action="append", help="a model of the zoo; may be repeated")
    parser.add_argument("--no-inductor", action="store_true")
    parser.add_argument("--no-gradients", action="store_true")
    parser.add_argument("--missing", action="store_true", help="only what is not stored yet")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore")
    for row in zoo.ZOO:
        if options.only and row.name not in options.only:
            continue
        known = stored_models().get(row.name, {})
        skipped = [key for key in known if options.missing]
        skipped += ["inductor"] * options.no_inductor + ["gradients"] * options.no_gradients
        measured = measure(row, skipped)
        if not measured:
            continue
        store(row, measured)
        print(row.name, measured, flush=True)
    show(stored_models())


def stored_models() -> dict[str, Outcome]:
    """What is stored by now, by this process or another that measures other questions."""
    models: dict[str, Outcome] = load_results("coverage").get("models", {})
    return models


def store(row: zoo.Row, measured: Outcome) -> None:
    models = stored_models()
    models[row.name] = {**models.get(row.name, {}), "family": row.family, **measured}
    models = {r.name: models[r.name] for r in zoo.ZOO if r.name in models}
    store_results("coverage", {"machine": machine(), "summary": summary(models), "models": models})


def measure(row: zoo.Row, skipped: Sequence[str]) -> Outcome:
    """The figures of one architecture, by question, without the skipped questions."""
    result: Outcome = {}
    if "accel" not in skipped:
        compiler = Accel()
        result["accel"] = forward(row, compiler.backend, {"cache": False})
        result["fallbacks"] = dict(sorted(compiler.fallbacks.items()))
    if "dynamic" not in skipped and row.inputs in LANGUAGE:
        result["dynamic"] = dynamic(row)
    if "gradients" not in skipped:
        result["gradients"] = backward(row)
    if "inductor" not in skipped:
        result["inductor"] = forward(row, "inductor", {"fx_graph_cache": False})
    return result


@contextlib.contextmanager
def attempt(outcome: Outcome) -> Iterator[None]:
    """Starts Dynamo afresh; an exception becomes the outcome's "error_message"."""
    torch._dynamo.reset()
    counters.clear()
    try:
        yield
    except Exception as error:  # a coverage table says what fails, whatever it is
        outcome["ok"] = False
        lines = [line for line in str(error).splitlines() if "Error: " in line] or [str(error)]
        outcome["error_message"] = f"{type(error).__name__}: {lines[0].splitlines()[0][:200]}"


def forward(row: zoo.Row, backend: Any, options: Mapping[str, Any]) -> Outcome:
    """One model in inference through `torch.compile`."""
    outcome: Outcome = {}
    model, inputs = row.build(), row.make_inputs()
    with attempt(outcome), torch.no_grad():
        wanted = model(**inputs)
        if not any(bool((t.abs() > LEAST).any()) for t in tree.flatten(wanted)[0]):
            raise ValueError("the model's outputs vanish, so nothing is compared")
        fast = torch.compile(model, backend=backend, options=dict(options))
        start = time.perf_counter()
        got = fast(**inputs)
        outcome["seconds"] = round(time.perf_counter() - start, 2)
        outcome["graphs"] = counters["stats"]["unique_graphs"]
        outcome["graph_breaks"] = sum(counters["graph_break"].values())
        outcome["error"] = worst_error(got, wanted)
        fresh = row.make_inputs(seed=7)
        outcome["error"] = max(outcome["error"], worst_error(fast(**fresh), model(**fresh)))
        outcome["ok"] = outcome["error"] <= TOLERANCE and outcome["graph_breaks"] == 0
    return outcome


def dynamic(row: zoo.Row) -> Outcome:
    """Several batch and sequence sizes with `dynamic=True`."""
    outcome: Outcome = {}
    compiler = Accel()
    model = row.build()
    with attempt(outcome), torch.no_grad():
        fast = torch.compile(model, backend=compiler.backend, dynamic=True)
        errors = []
        for batch, length in SIZES:
            inputs = row.make_inputs(batch, length)
            errors.append(worst_error(fast(**inputs), model(**inputs)))
        outcome["error"] = max(errors)
        outcome["programs"] = compiler.programs
        outcome["ok"] = outcome["error"] <= TOLERANCE and compiler.programs == 1
    if outcome.get("programs", 1) > 1:
        outcome["dynamo_graphs"] = dynamo_graphs(row)
    return outcome


def dynamo_graphs(row: zoo.Row) -> int:
    """How many graphs Dynamo itself makes: one a length, where Python loops over the tokens."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    model = row.build()
    with torch.no_grad():
        fast = torch.compile(model, backend=count, dynamic=True)
        for batch, length in SIZES:
            fast(**row.make_inputs(batch, length))
    return graphs


def backward(row: zoo.Row) -> Outcome:
    """Gradients of all parameters, of the mean square of all outputs."""
    outcome: Outcome = {}
    compiler = Accel()
    model, inputs = row.build(), row.make_inputs()
    try:
        wanted = gradients_of(model, model, inputs)
    except RuntimeError as error:
        return {"eager_fails": str(error).splitlines()[0][:200]}
    with attempt(outcome):
        got = gradients_of(torch.compile(model, backend=compiler.backend), model, inputs)
        scale = max((float(g.abs().max()) for g in wanted), default=0.0) or 1.0
        differences = [float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)]
        outcome["error"] = max(differences, default=0.0) / scale
        outcome["parameters"] = len(wanted)
        outcome["fallbacks"] = dict(sorted(compiler.fallbacks.items()))
        outcome["ok"] = outcome["error"] <= GRADIENT_TOLERANCE
    return outcome


def gradients_of(function: Any, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    outputs, _ = tree.flatten(function(**inputs))
    loss = sum((t.float().pow(2).mean() for t in outputs if t.requires_grad), torch.tensor(0.0))
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def worst_error(got: Any, wanted: Any) -> float:
    """The largest relative error of any output; infinity where structures or shapes differ."""
    ours, our_structure = tree.flatten(got)
    theirs, their_structure = tree.flatten(wanted)
    if our_structure != their_structure or any(
        a.shape != b.shape or a.dtype != b.dtype for a, b in zip(ours, theirs)
    ):
        return float("inf")
    return max((relative_error(a, b) for a, b in zip(ours, theirs)), default=0.0)


def relative_error(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    x, y = a.double(), b.double()
    same = (x == y) | (x.isnan() & y.isnan())  # infinities of masks among them
    if bool(same.all()):
        return 0.0
    finite = y[torch.isfinite(y)]
    largest = float(finite.abs().max()) if finite.numel() else 1.0
    return float((x - y)[~same].abs().max()) / max(largest, 1e-6)


def summary(models: Mapping[str, Outcome]) -> Outcome:
    """How many of how many, by question."""

    def rate(key: str) -> str | None:
        known = [m[key] for m in models.values() if "ok" in m.get(key, ())]
        return f"{sum(bool(k.get('ok')) for k in known)} of {len(known)}" if known else None

    return {key: rate(key) for key in ("accel", "inductor", "dynamic", "gradients")}


def show(models: Mapping[str, Outcome]) -> None:
    """The table on the terminal."""
    table = Table("model", "accel", "s", "Inductor", "s", "dynamic", "gradients", "run by torch")

    def mark(outcome: Outcome | None) -> str:
        if outcome is None or "eager_fails" in outcome:
            return "" if outcome is None else "eager fails"
        if outcome.get("ok"):
            return f"{outcome['error']:.0e}"
        return outcome.get("error_message") or f"wrong: {outcome.get('error')}"

    for name, m in models.items():
        table.add_row(
            name,
            mark(m["accel"]),
            str(m["accel"].get("seconds", "")),
            mark(m.get("inductor")),
            str(m.get("inductor", {}).get("seconds", "")),
            mark(m.get("dynamic")),
            mark(m.get("gradients")),
            ", ".join(m["fallbacks"]),
        )
    Console().print(table)
    print(summary(models))


if __name__ == "__main__":
    main()
