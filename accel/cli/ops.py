"""`accel ops`: the IR's vocabulary."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from accel.cli.output import Json, emit, table
from accel.errors import OptionError
from accel.ir import OpDefinition, definitions
from accel.names import near

app = typer.Typer()


@app.command()
def ops(
    names: Annotated[list[str] | None, typer.Argument(help="Only these ops.")] = None,
    as_json: Json = False,
) -> None:
    """List the IR's ops: signature, traits, meaning."""
    known = {d.name: d for d in definitions()}
    for name in names or []:
        if name not in known:
            raise OptionError(f"no op named '{name}'", advice=near(name, known))
    chosen = [known[n] for n in names] if names else sorted(known.values(), key=lambda d: d.name)
    data = [describe(d) for d in chosen]
    rows = [(f"accel.{d['name']}", d["signature"], " ".join(d["traits"]), d["doc"]) for d in data]
    emit(data, as_json, table("", ("op", "signature", "traits", "meaning"), rows))


def describe(d: OpDefinition) -> dict[str, Any]:
    """One op as JSON-able facts."""
    operands = [
        ("*" if o.variadic else "") + o.name + ("?" if o.optional else "") for o in d.operands
    ]
    attributes = [
        a.name if a.default is inspect.Parameter.empty else f"{a.name}={a.default}"
        for a in d.attributes
    ]
    return {
        "name": d.name,
        "signature": f"({', '.join(operands)})"
        + (f" {{{', '.join(attributes)}}}" * bool(attributes)),
        "traits": [str(t.name).lower() for t in d.traits],
        "composite": d.decompose is not None,
        "doc": (d.doc or "").strip().split("\n")[0],
    }
