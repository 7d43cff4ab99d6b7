"""`accel tune`: an artifact, tuned in place for the GPU of this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from accel.cli.calls import Trust
from accel.cli.explain import tuning_parts
from accel.cli.output import Json, emit, facts, format_seconds, progress
from accel.compiler.retune import tune_artifact

app = typer.Typer()


@app.command()
def tune(
    artifact: Annotated[Path, typer.Argument(help="An .accel file for a GPU.")],
    mode: Annotated[
        str, typer.Option("--tune", help="quick: a minute at most; full: ten.")
    ] = "quick",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Time kernels on this machine's GPU, and keep the fastest in the artifact."""
    with progress(f"tuning {artifact}", as_json):
        made = tune_artifact(artifact, mode, trust)
    rows = [
        (f"@{name}", f"{format_seconds(seconds)} -> {format_seconds(made.after[name])}")
        for name, seconds in made.before.items()
    ]
    rows.append(("wrote", made.path) if made.replaced else ("kept", made.reason))
    emit(asdict(made), as_json, *tuning_parts({"tuning": made.tuning}), facts(rows))
