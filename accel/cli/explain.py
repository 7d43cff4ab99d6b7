"""`accel explain`: the ledger that travels in the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from accel.cli.output import Json, emit
from accel.passes.ledger import Ledger
from accel.runtime.artifact import Artifact

app = typer.Typer()


@app.command()
def explain(
    artifact: Annotated[Path, typer.Argument(help="An .accel file.")],
    rules: Annotated[bool, typer.Option("--rules", help="Count rewrites by rule.")] = False,
    misses: Annotated[bool, typer.Option("--misses", help="List what nearly happened.")] = False,
    as_json: Json = False,
) -> None:
    """Show what each pass did, as a waterfall, and what nearly happened."""
    with Artifact(artifact) as opened:
        ledger = Ledger.from_json(dict(opened.manifest.ledger))
    parts: list[Any] = [ledger.table(), ledger.waterfall()]
    if rules:
        parts.append(ledger.rules_table())
    if misses:
        parts.append(ledger.misses_table() if ledger.misses else "no near misses")
    elif ledger.misses:
        parts.append(f"{len(ledger.misses)} near misses: --misses lists them")
    emit(ledger.to_json(), as_json, *parts)
