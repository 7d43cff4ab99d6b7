"""accel: a deep-learning graph compiler whose every technique is a pass with a checked contract.

    fast = accel.compile(model)                                # a callable with the same signature
    fast = torch.compile(model, backend="accel")               # also in training
    accel.package(model, inputs, path="m.accel")               # ahead of time
    fast = accel.load("m.accel")                               # runs without the compiler

Attributes are imported when first used, so that loading an artifact never imports the compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel.compiler.api import Compiled as Compiled
    from accel.compiler.api import compile as compile
    from accel.compiler.api import package as package
    from accel.compiler.language import compile_generator as compile_generator
    from accel.compiler.language import package_generator as package_generator
    from accel.compiler.options import Options as Options
    from accel.compiler.options import list_options as list_options
    from accel.compiler.targets import Target as Target
    from accel.compiler.targets import list_targets as list_targets
    from accel.errors import AccelError as AccelError
    from accel.loading import generate as generate
    from accel.loading import load as load
    from accel.runtime.model import CompiledModel as CompiledModel

__version__ = "0.1.0"

_WHERE = {
    "AccelError": "accel.errors",
    "Compiled": "accel.compiler.api",
    "CompiledModel": "accel.runtime.model",
    "Options": "accel.compiler.options",
    "Target": "accel.compiler.targets",
    "compile": "accel.compiler.api",
    "compile_generator": "accel.compiler.language",
    "generate": "accel.loading",
    "list_options": "accel.compiler.options",
    "list_targets": "accel.compiler.targets",
    "load": "accel.loading",
    "package": "accel.compiler.api",
    "package_generator": "accel.compiler.language",
}

__all__ = [*sorted(_WHERE), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'accel' has no attribute '{name}'")
    memory = importlib.import_module("accel.runtime.memory")
    with memory.collection_paused():  # modules are no garbage
        value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
