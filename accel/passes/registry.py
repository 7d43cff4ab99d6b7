"""All passes by name: `load_passes()` imports every module of this package.

A pass registers itself where it is defined; whoever takes pass names from a user (the compiler, the
command line) calls this first, so that adding a technique is adding its file.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import accel.passes
from accel.passes.base import Pass, all_passes


@cache
def _import_all() -> None:
    for found in pkgutil.walk_packages(accel.passes.__path__, "accel.passes."):
        importlib.import_module(found.name)


def load_passes() -> dict[str, type[Pass]]:
    """Every pass of the package, and those that the user's own modules registered, by name."""
    _import_all()
    return all_passes()
