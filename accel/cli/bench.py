"""`accel bench`: an artifact by itself, or a model beside eager PyTorch and Inductor.

Outputs are checked against eager PyTorch in float64 before anything is timed; the systems take
turns in one process. On a GPU (or with --kernels) each kernel is timed as well, beside its floor.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import accel
from accel import tree
from accel.cli.calls import (
    Call,
    Dtype,
    Entry,
    InputFile,
    Inputs,
    Seed,
    Sizes,
    Trust,
    Tune,
    prepare_call,
)
from accel.cli.capture import Example, load_example
from accel.cli.figures import heaviest, measured, rows_table, total
from accel.cli.inputs import parse_dtype
from accel.cli.output import Json, emit, facts, format_seconds, progress, table
from accel.cli.timing import device_medians, interleaved_medians, relative_error
from accel.compiler.targets import get_target
from accel.errors import ExecutionError, OptionError
from accel.names import near
from accel.runtime.cuda import require_device
from accel.runtime.device import device_of
from accel.runtime.model import CompiledModel

app = typer.Typer()

# A system may be this much further from float64 than eager is in the model's own dtypes.
_ERROR_FACTOR, _ERROR_FLOOR = 10, 1e-6
_MODES = {  # torch.compile's, by how a user names the peer
    "inductor": None,
    "inductor-graphs": "reduce-overhead",
    "inductor-max": "max-autotune",
}
_SYSTEMS = ("eager", *_MODES, "accel")
_MOST_ROWS = 24


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="An .accel file, or a model (see accel compile).")],
    inputs: Inputs = None,
    file: InputFile = None,
    sizes: Sizes = None,
    entry: Entry = "",
    against: Annotated[
        str,
        typer.Option(
            "--against",
            help="Comma separated peers of a model: eager, inductor, inductor-graphs, "
            "inductor-max; or best, for all of them.",
        ),
    ] = "eager",
    target: Annotated[str, typer.Option("--target", help="Of a model; see accel targets.")] = "cpu",
    dtype: Dtype = "",
    tune: Tune = "off",
    kernels: Annotated[
        bool | None,
        typer.Option("--kernels/--no-kernels", help="Each kernel beside its floor (GPU: default)."),
    ] = None,
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
    else:
        example = load_example(what, inputs or [], seed, parse_dtype(dtype))
        on_gpu = get_target(target).kind == "cuda"
        if on_gpu:
            require_device(device_of("cuda"))
            example = _moved(example, device_of("cuda"))
        names = [*(_peers(against)), "accel"]
        with progress("compiling", as_json):
            made = _accel(example, target, {"passes": passes, "tune": tune})
            calls, systems = compile_all(example, names, made)
        if not passes:
            check(example, calls, systems)
        model = made()._latest()[1]
        call = _own_call(model, example)
    device = call.entry.function.device
    medians_of = device_medians if device.type == "cuda" else interleaved_medians
    with progress("timing", as_json), torch.no_grad():
        medians = medians_of(calls, rounds=rounds, seconds=seconds)
    for name, median in medians.items():
        systems[name]["seconds"] = median
    data = {"what": what, "threads": torch.get_num_threads(), "systems": systems}
    parts = [_table(systems)]
    best = min((n for n in systems if n != "accel"), key=lambda n: medians[n], default="")
    if best:
        data["best_peer"] = best
        ratio = medians[best] / medians["accel"]
        parts.append(facts([("best peer", f"{best}; accel is {ratio:.2f}x")]))
    if call.sizes:
        data["sizes"] = call.sizes
    if device.type == "cuda":
        data["device"] = torch.cuda.get_device_name(device)
        data["graphs"] = call.entry.function.graphs()
    if kernels or (kernels is None and device.type == "cuda"):
        with progress("timing each kernel", as_json), torch.no_grad():
            line = measured(model, call.entry, call.inputs, call.sizes)
        data["roofline"] = line.to_json()
        parts.append(rows_table("kernels", heaviest(line, _MOST_ROWS), line))
        parts.append(facts(total(line, systems["accel"]["seconds"])))
    emit(data, as_json, *parts)


def _peers(against: str) -> list[str]:
    peers = [p.strip() for p in against.split(",") if p.strip()]
    if peers == ["best"]:
        return list(_SYSTEMS[:-1])
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
    example: Example, names: list[str], own: Callable[[], Callable[..., Any]]
) -> tuple[dict[str, Callable[[], list[Tensor]]], dict[str, dict[str, Any]]]:
    """A call of each system, and the seconds that compiling took, its first call included. `own`
    compiles with accel."""
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    systems: dict[str, dict[str, Any]] = {}
    for name in names:
        start = time.perf_counter()
        call = _call(own() if name == "accel" else _peer(name, example), example)
        with torch.no_grad():
            call()
        systems[name] = {}
        if name != "eager":
            systems[name]["compile_seconds"] = time.perf_counter() - start
        calls[name] = call
    return calls, systems


def _peer(name: str, example: Example) -> Callable[..., Any]:
    if name == "eager":
        return example.model
    compiled: Callable[..., Any] = torch.compile(example.model, mode=_MODES[name])
    return compiled


def _accel(example: Example, target: str, options: dict[str, Any]) -> Callable[[], accel.Compiled]:
    """Compiles when first called."""

    @cache
    def compiled() -> accel.Compiled:
        return accel.compile(
            example.model,
            inputs=example.args,
            kwargs=example.kwargs,
            target=target,
            options=options,
        )

    return compiled


def _own_call(model: CompiledModel, example: Example) -> Call:
    """The example's call of the compiled model, on flat lists."""
    entry = next(iter(model.entry_points.values()))
    leaves, _ = tree.flatten((example.args, example.kwargs))
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    return Call(entry, [], tensors, {})


def _moved(example: Example, device: torch.device) -> Example:
    leaves, description = tree.flatten((example.args, example.kwargs))
    moved = [t.to(device) if isinstance(t, Tensor) else t for t in leaves]
    args, kwargs = tree.unflatten(description, moved)
    return Example(example.name, example.model.to(device), args, kwargs, example.dynamic)


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
