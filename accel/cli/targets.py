"""`accel targets`: what code can be made for."""

from __future__ import annotations

import typer

from accel.cli.output import Json, emit, table
from accel.compiler.targets import list_targets

app = typer.Typer()


@app.command()
def targets(as_json: Json = False) -> None:
    """List the targets that code can be made for."""
    found = list_targets()
    rows = [
        (t.name, t.kind, t.arch, t.cores, f"{t.bandwidth / 1e9:.0f} GB/s", " ".join(t.features))
        for t in found.values()
    ]
    columns = ("name", "kind", "arch", ">cores", ">bandwidth", "features")
    emit({name: t.to_json() for name, t in found.items()}, as_json, table("", columns, rows))
