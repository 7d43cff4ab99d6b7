"""A model on the command line with its example inputs, ready to compile or to capture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accel.cli.inputs import dynamic_shapes, example_inputs, parse_input
from accel.cli.models import load_model
from accel.errors import OptionError
from accel.frontends.export import capture
from accel.ir import Module


@dataclass
class Example:
    """A model, arguments for a call, and which sizes of them may change."""

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: dict[str, Any] | None


def load_example(
    spec: str, inputs: Sequence[str], seed: int, dtype: torch.dtype | None = None
) -> Example:
    """The model of a spec with inputs from `--input`, or those that its builder gave.

    Raises OptionError if there are none.
    """
    specs = [parse_input(text) for text in inputs]
    found = load_model(spec, dtype)
    if specs:
        args, kwargs = example_inputs(specs, seed)
        shapes = dynamic_shapes(found.model, specs)
        return Example(found.name, found.model, args, dict(kwargs), shapes)
    if found.inputs is None:
        raise OptionError(
            f"'{spec}' needs example inputs", advice='for example --input "input_ids:i64[1,?128]"'
        )
    return Example(found.name, found.model, found.inputs, {}, None)


def capture_model(spec: str, inputs: Sequence[str], seed: int) -> Module:
    """The captured program of a model, for inference."""
    example = load_example(spec, inputs, seed)
    return capture(example.model, example.args, example.kwargs, dynamic_shapes=example.dynamic)
