"""`accel run`: one call of an artifact, on files or on random inputs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save
from torch import Tensor

import accel
from accel.cli.calls import Entry, InputFile, Inputs, Seed, Sizes, Trust, prepare_call
from accel.cli.output import Json, emit, facts, format_seconds, progress, table

app = typer.Typer()
_SHOWN = 4


@app.command()
def run(
    artifact: Annotated[Path, typer.Argument(help="An .accel file.")],
    inputs: Inputs = None,
    file: InputFile = None,
    sizes: Sizes = None,
    entry: Entry = "",
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write outputs to a .safetensors file.")
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run an artifact on files or on random inputs."""
    with progress("loading", as_json):
        start = time.perf_counter()
        model = accel.load(artifact, trust=trust)
        load_seconds = time.perf_counter() - start
    call = prepare_call(model, entry, inputs or [], file, sizes or [], seed)
    with progress("running", as_json), torch.no_grad():
        start = time.perf_counter()
        results = call.run()
        seconds = time.perf_counter() - start
    named = {f"output{i}": t for i, t in enumerate(results)}
    if output is not None:
        output.write_bytes(save({name: t.contiguous().clone() for name, t in named.items()}))
    data: dict[str, Any] = {
        "entry": call.entry.name,
        "load_seconds": load_seconds,
        "call_seconds": seconds,
        "sizes": call.sizes,
        "inputs": {n: describe(t) for n, t in zip(call.names, call.inputs)},
        "outputs": {n: describe(t) for n, t in named.items()},
    }
    times = f"loaded in {format_seconds(load_seconds)}, first call {format_seconds(seconds)}"
    rows = [
        (name, d["dtype"], d["shape"], d["min"], d["mean"], d["max"], d["first"])
        for name, d in {**data["inputs"], **data["outputs"]}.items()
    ]
    columns = ("tensor", "dtype", "shape", ">min", ">mean", ">max", "first values")
    emit(data, as_json, table("", columns, rows), facts([(call.entry.name, times)]))


def describe(tensor: Tensor) -> dict[str, Any]:
    """A tensor as JSON-able facts. Statistics of numbers only, and of none if it is empty."""
    wide = tensor.detach().double() if not tensor.is_complex() else tensor.detach().abs().double()
    empty = tensor.numel() == 0
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "min": None if empty else _short(wide.min()),
        "mean": None if empty else _short(wide.mean()),
        "max": None if empty else _short(wide.max()),
        "first": [_short(v) for v in wide.flatten()[:_SHOWN]],
    }


def _short(value: Tensor) -> float | str:
    """Six digits; NaN and infinities, which JSON lacks, as text."""
    number = float(f"{value.item():.6g}")
    return number if value.isfinite() else str(number)
