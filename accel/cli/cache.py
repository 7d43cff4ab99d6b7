"""`accel cache`: the compile cache of generated kernels."""

from __future__ import annotations

from typing import Annotated

import typer

from accel.cli.output import Json, emit, facts, format_bytes
from accel.compiler.cache import CompileCache

app = typer.Typer(no_args_is_help=True, help="Show or clear the compile cache.")


@app.command()
def info(as_json: Json = False) -> None:
    """Where the cache is, and how much it holds."""
    cache = CompileCache()
    sizes = [path.stat().st_size for path in cache.entries()]
    data = {
        "folder": str(cache.folder),
        "entries": len(sizes),
        "bytes": sum(sizes),
        "limit_bytes": cache.limit_bytes,
    }
    rows = [
        ("folder", cache.folder),
        ("entries", len(sizes)),
        ("size", f"{format_bytes(sum(sizes))} of at most {format_bytes(cache.limit_bytes)}"),
    ]
    emit(data, as_json, facts(rows))


@app.command()
def clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove every entry."""
    cache = CompileCache()
    if not yes and not as_json:
        typer.confirm(f"Remove {len(cache.entries())} entries of {cache.folder}?", abort=True)
    removed = cache.clear()
    emit({"removed": removed}, as_json, f"removed {removed} entries")
