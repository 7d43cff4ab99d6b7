"""`accel verify`: does an artifact compute here what it computed where it was made?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from accel.cli.calls import Trust
from accel.cli.output import Json, emit, progress, table
from accel.errors import VerificationFailedError
from accel.runtime.verify import verify_artifact

app = typer.Typer()


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="An .accel file.")],
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Replay an artifact's golden vectors on this machine. Exit code 9 if something fails."""
    with progress("verifying", as_json):
        found = verify_artifact(artifact, trust)
    colours = {"passed": "green", "failed": "red", "note": "dim"}
    rows = [
        (c.name, f"[{colours[c.result]}]{c.result}[/]", c.detail.replace("[", "\\["), c.advice)
        for c in found.checks
    ]
    data = {
        "ok": found.ok,
        "checks": [asdict(c) for c in found.checks],
        "deviations": [{**asdict(d), "ok": d.ok} for d in found.deviations],
    }
    emit(data, as_json, table("", ("check", "result", "detail", "what to do"), rows))
    if not found.ok:
        raise typer.Exit(VerificationFailedError.exit_code)
