"""`accel bench`: an artifact by itself, or a model beside eager PyTorch and Inductor.

Outputs are checked against eager PyTorch in float64 before anything is timed; the systems take
turns in one process.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import accel
from accel import tree
from accel.cli.calls import Entry, InputFile, Inputs, Seed, Sizes, Trust, prepare_call
from accel.cli.capture import Example, load_example
from accel.cli.output import Json, emit, format_seconds, progress, table
from accel.cli.timing import interleaved_medians, relative_error
from accel.errors import ExecutionError, OptionError
from accel.names import near

app = typer.Typer()

# A system may be this much further from float64 than eager is in the model's own dtypes.
_ERROR_FACTOR, _ERROR_FLOOR = 10, 1e-6
_SYSTEMS = ("eager", "inductor", "accel")


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="An .accel file, or a model (see accel compile).")],
    inputs: Inputs = None,
    file: InputFile = None,
    sizes: Sizes = None,
    entry: Entry = "",
    against: Annotated[
        str, typer.Option("--against", help="Comma separated peers of a model: eager, inductor.")
    ] = "eager",
    passes: Annotated[str, typer.Option("--passes", "-p", help="Techniques to apply.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's default.")] = 0,
    rounds: Annotated[int, typer.Option(help="Turns of each system.")] = 7,
    seconds: Annotated[float, typer.Option(help="Of each turn.")] = 0.5,
    seed: Seed = 0,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Time an artifact, or a model beside eager PyTorch and its peers."""
    if threads:
        torch.set_num_threads(threads)
    if what.endswith(".accel"):
        model = accel.load(Path(what), trust=trust)
        call = prepare_call(model, entry, inputs or [], file, sizes or [], seed)
        systems: dict[str, dict[str, Any]] = {"accel": {}}
        calls: dict[str, Callable[[], Any]] = {"accel": call.run}
        wanted_sizes = call.sizes
    else:
        example = load_example(what, inputs or [], seed)
        names = [*(_peers(against)), "accel"]
        with progress("compiling", as_json):
            calls, systems = compile_all(example, names, {"passes": passes})
        if not passes:
            check(example, calls, systems)
        wanted_sizes = {}
    with progress("timing", as_json), torch.no_grad():
        medians = interleaved_medians(calls, rounds=rounds, seconds=seconds)
    for name, median in medians.items():
        systems[name]["seconds"] = median
    data = {"what": what, "threads": torch.get_num_threads(), "systems": systems}
    if wanted_sizes:
        data["sizes"] = wanted_sizes
    emit(data, as_json, _table(systems))


def _peers(against: str) -> list[str]:
    peers = [p.strip() for p in against.split(",") if p.strip()]
    for peer in peers:
        if peer not in _SYSTEMS[:-1]:
            raise OptionError(f"no peer named '{peer}'", advice=near(peer, _SYSTEMS[:-1]))
    return peers


def _table(systems: dict[str, dict[str, Any]]) -> Any:
    rows = []
    own = systems["accel"]["seconds"]
    for name, s in systems.items():
        ratio = "" if name == "accel" else f"{s['seconds'] / own:.2f}x"
        compiled = format_seconds(s["compile_seconds"]) if "compile_seconds" in s else ""
        error = f"{s['error']:.1e}" if "error" in s else ""
        rows.append((name, format_seconds(s["seconds"]), ratio, compiled, error))
    columns = ("system", ">median", ">accel is", ">compile", ">error")
    return table("", columns, rows)


def compile_all(
    example: Example, names: list[str], options: dict[str, Any]
) -> tuple[dict[str, Callable[[], list[Tensor]]], dict[str, dict[str, Any]]]:
    """A call of each system, and the seconds that compiling took, its first call included."""
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    systems: dict[str, dict[str, Any]] = {}
    for name in names:
        start = time.perf_counter()
        call = _call(_compiled(name, example, options), example)
        with torch.no_grad():
            call()
        systems[name] = {}
        if name != "eager":
            systems[name]["compile_seconds"] = time.perf_counter() - start
        calls[name] = call
    return calls, systems


def _compiled(name: str, example: Example, options: dict[str, Any]) -> Callable[..., Any]:
    if name == "eager":
        return example.model
    if name == "inductor":
        compiled: Callable[..., Any] = torch.compile(example.model)
        return compiled
    made: Callable[..., Any] = accel.compile(
        example.model, inputs=example.args, kwargs=example.kwargs, options=options
    )
    return made


def _call(function: Callable[..., Any], example: Example) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        leaves, _ = tree.flatten(function(*example.args, **example.kwargs))
        return leaves

    return call


def check(
    example: Example,
    calls: dict[str, Callable[[], list[Tensor]]],
    systems: dict[str, dict[str, Any]],
) -> None:
    """Errors against eager PyTorch in float64. Raises ExecutionError for a wrong result."""
    with torch.no_grad():
        wanted = _call(copy.deepcopy(example.model).double(), _widened(example))()
        own = relative_error(_call(example.model, example)(), wanted)
        allowed = max(_ERROR_FLOOR, _ERROR_FACTOR * own)
        for name, call in calls.items():
            error = systems[name]["error"] = relative_error(call(), wanted)
            if not error <= allowed:
                raise ExecutionError(
                    f"{name} is wrong: relative error {error:.3g}, allowed {allowed:.3g}",
                    advice="accel bisect finds the rewrite" if name == "accel" else "",
                )


def _widened(example: Example) -> Example:
    def wide(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating else value

    args = tuple(wide(a) for a in example.args)
    kwargs = {k: wide(v) for k, v in example.kwargs.items()}
    model: nn.Module = example.model
    return Example(example.name, model, args, kwargs, None)
