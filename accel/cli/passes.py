"""`accel passes`: the techniques, what each promises, and its options."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from accel.cli.output import Json, emit, facts, table
from accel.cli.plugins import Load, load_all_passes
from accel.errors import OptionError
from accel.names import near
from accel.passes.base import Contract, Pass

app = typer.Typer()


@app.command()
def passes(
    names: Annotated[list[str] | None, typer.Argument(help="Only these, in full.")] = None,
    load: Load = None,
    as_json: Json = False,
) -> None:
    """List the passes, their contracts and options."""
    known = load_all_passes(load)
    for name in names or []:
        if name not in known:
            raise OptionError(f"no pass named '{name}'", advice=near(name, known))
    data = [describe(known[name]) for name in names or known]
    if names:
        parts: list[Any] = []
        for d in data:
            parts += [facts([("pass", d["name"]), ("contract", d["contract"])]), d["doc"], ""]
            parts.append(options_table(d["options"]))
        emit(data, as_json, *parts)
        return
    rows = [
        (d["name"], d["contract"], ", ".join(d["options"]), d["doc"].split("\n")[0]) for d in data
    ]
    emit(data, as_json, table("", ("pass", "contract", "options", "what it does"), rows))


def options_table(options: dict[str, dict[str, Any]]) -> Any:
    rows = [(name, o["type"], o["default"]) for name, o in options.items()]
    return table("", ("option", "type", "default"), rows) if rows else "no options\n"


def describe(cls: type[Pass]) -> dict[str, Any]:
    """One pass as JSON-able facts."""
    fields: tuple[dataclasses.Field[Any], ...] = (
        dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    )
    return {
        "name": cls.name,
        "contract": contract_text(cls.contract),
        "doc": inspect.getdoc(cls) or "",
        "module": cls.__module__,
        "options": {f.name: {"type": str(f.type), "default": _default(f)} for f in fields},
    }


def contract_text(contract: Contract) -> str:
    if contract.kind == "approximate":
        return f"{contract.metric} <= {contract.bound:g}"
    return "exact, new constants rounded once" if contract.stores_constants else "exact"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    return "required"
