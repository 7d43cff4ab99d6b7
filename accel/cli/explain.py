"""`accel explain`: the ledger that travels in the artifact, and the kernels that lose the most."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import accel
from accel.cli.calls import (
    Entry,
    InputFile,
    Inputs,
    Seed,
    Sizes,
    Trust,
    prepare_call,
    size_values,
)
from accel.cli.figures import heaviest, measured, predicted, rows_table, total
from accel.cli.output import Json, emit, facts, format_seconds, progress, table
from accel.errors import OptionError
from accel.names import near
from accel.passes.ledger import Ledger
from accel.runtime.artifact import Artifact
from accel.runtime.plan import FunctionPlan

app = typer.Typer()

_MOST, _MOST_CHOICES = 10, 24  # lines


@app.command()
def explain(
    artifact: Annotated[Path, typer.Argument(help="An .accel file.")],
    rules: Annotated[bool, typer.Option("--rules", help="Count rewrites by rule.")] = False,
    misses: Annotated[bool, typer.Option("--misses", help="List what nearly happened.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="The kernels that have the highest floors.")
    ] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Run it: the kernels furthest from their floors."),
    ] = False,
    entry: Entry = "",
    inputs: Inputs = None,
    file: InputFile = None,
    sizes: Sizes = None,
    seed: Seed = 0,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Show what each pass did, as a waterfall, and what nearly happened."""
    with Artifact(artifact) as opened:
        manifest = opened.manifest
        ledger = Ledger.from_json(dict(manifest.ledger))
        line = None
        if kernels and not measure:
            plan = _plan(manifest.functions, entry)
            known = {n: low for n, (low, _) in plan.symbols.items()}
            line = predicted(opened, plan, known | size_values(sizes or [], plan))
    parts: list[Any] = [ledger.table(), ledger.waterfall()]
    data = ledger.to_json()
    data |= {k: manifest.report[k] for k in ("tuning", "failed_kernels") if k in manifest.report}
    parts += tuning_parts(manifest.report)
    if measure:
        model = accel.load(artifact, trust=trust)
        call = prepare_call(model, entry, inputs or [], file, sizes or [], seed)
        with progress("timing each kernel", as_json), torch.no_grad():
            line = measured(model, call.entry, call.inputs, call.sizes)
        title = "the kernels furthest from their floors"
        parts += [rows_table(title, line.furthest(_MOST), line), facts(total(line))]
    elif line is not None:
        title = "the kernels with the highest floors; --measure runs them"
        parts += [rows_table(title, heaviest(line, _MOST), line), facts(total(line))]
    if line is not None:
        data["roofline"] = line.to_json()
    if rules:
        parts.append(ledger.rules_table())
    if misses:
        parts.append(ledger.misses_table() if ledger.misses else "no near misses")
    elif ledger.misses:
        parts.append(f"{len(ledger.misses)} near misses: --misses lists them")
    emit(data, as_json, *parts)


def _plan(plans: Mapping[str, FunctionPlan], entry: str) -> FunctionPlan:
    if entry and entry not in plans:
        raise OptionError(f"no entry point named '{entry}'", advice=near(entry, plans))
    return plans[entry or next(iter(plans))]


def tuning_parts(report: Mapping[str, Any]) -> list[Any]:
    """What tuning chose and gained, and kernels that did not compile; nothing if there is none."""
    parts: list[Any] = []
    tuning = report.get("tuning")
    if isinstance(tuning, dict):
        chosen = "measured" if tuning["by"] == "measured" else "chosen by cost model"
        why = f": {tuning['reason']}" if tuning["reason"] else f" on {tuning['device']}"
        saved = f", {format_seconds(tuning['saved_seconds'])} less than the cost model's choices"
        head = f"tuning ({tuning['mode']}): {chosen}{why}"
        parts.append(head + (saved if tuning["by"] == "measured" else ""))
        rows = [_choice(c) for c in sorted(tuning["kernels"], key=_gain, reverse=True)]
        columns = ("kernel", "kind", ">calls", "chosen", "by", ">time", ">cost model's", ">tried")
        parts.append(table("", columns, rows[:_MOST_CHOICES]))
    for one in report.get("failed_kernels", ()):
        parts.append(
            f"{one['kernel']} does not compile: {one['reason']}; source: {one['source']}; computed "
            f"by {one['instead']}"
        )
    return parts


def _gain(choice: Mapping[str, Any]) -> float:
    return float(choice["calls"] * (choice["model_seconds"] - choice["seconds"]))


def _choice(choice: Mapping[str, Any]) -> tuple[Any, ...]:
    times = (choice["seconds"], choice["model_seconds"])
    shown = [format_seconds(t) if t else "" for t in times]
    return (choice["name"], choice["kind"], choice["calls"], choice["chosen"], choice["by"],
            *shown, choice["tried"] or "")  # fmt: skip
