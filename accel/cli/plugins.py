"""`--load`: the user's own modules, imported so that the passes they register have names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import typer

from accel.cli.models import import_module_or_file
from accel.passes.base import Pass
from accel.passes.registry import load_passes

Load: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--load", help="A module or file with passes of your own. Repeatable."),
]


def load_all_passes(modules: Sequence[str] | None) -> dict[str, type[Pass]]:
    """accel's passes and those of the given modules, by name."""
    load_passes()
    for place in modules or ():
        import_module_or_file(place)
    return load_passes()
