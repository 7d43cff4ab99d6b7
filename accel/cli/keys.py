"""`accel keys`: whose native code may run here. Artifacts are signed with one's own key."""

from __future__ import annotations

from typing import Annotated

import typer

from accel.cli.output import Json, emit, facts
from accel.runtime.trust import add_trusted_key, own_public_key, trusted_keys

app = typer.Typer(no_args_is_help=True, help="Show one's own key, and trust others'.")


@app.command()
def show(as_json: Json = False) -> None:
    """One's own public key (made if there is none) and the keys that are trusted."""
    own = own_public_key()
    others = sorted(trusted_keys() - {own})
    rows = [("own", own), *(("trusted", key) for key in others)]
    emit({"own": own, "trusted": others}, as_json, facts(rows))


@app.command()
def trust(
    key: Annotated[str, typer.Argument(help="A public key: 64 hex digits.")],
    comment: Annotated[str, typer.Option(help="Whose it is.")] = "",
    as_json: Json = False,
) -> None:
    """Trust host code that is signed with this key."""
    add_trusted_key(key, comment)
    emit({"trusted": key}, as_json, f"host code signed with {key} is trusted now")
