"""Calls of an artifact's entry points with tensors from files, or made up.

--input x=image.npy --input mask=ones --input ids=0..49152 --size length=64 --inputs all.safetensors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from torch import Tensor

from accel.cli.inputs import InputSpec, Size, load_tensors, make_tensor, read_array
from accel.errors import InputError, OptionError
from accel.names import near
from accel.runtime.cuda import require_device
from accel.runtime.model import CompiledModel, EntryPoint
from accel.runtime.plan import FunctionPlan, ValueSpec, dtype_of, evaluate_size

# A dynamic size that nobody names gets this value, where its range allows it.
_TYPICAL_SIZE = 16

Inputs: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", help="NAME=file.npy, zeros, ones or LOW..HIGH. Repeatable."),
]
InputFile: TypeAlias = Annotated[
    Path | None, typer.Option("--inputs", help="A .safetensors file with inputs by name.")
]
Sizes: TypeAlias = Annotated[
    list[str] | None, typer.Option("--size", help="NAME=N, for a dynamic size. Repeatable.")
]
Entry: TypeAlias = Annotated[str, typer.Option("--entry", help="Entry point; default: the first.")]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", help="Of random inputs.")]
Dtype: TypeAlias = Annotated[
    str,
    typer.Option("--dtype", help="Cast the model and its floating inputs, for example bfloat16."),
]
Tune: TypeAlias = Annotated[
    str, typer.Option("--tune", help="Time kernels on the GPU here: off, quick or full.")
]
Trust: TypeAlias = Annotated[
    bool, typer.Option("--trust", help="Load native code that no key you trust has signed.")
]


@dataclass
class Call:
    """One call: the entry point, its input tensors, and the sizes that they have."""

    entry: EntryPoint
    names: list[str]
    inputs: list[Tensor]
    sizes: dict[str, int]

    def run(self) -> list[Tensor]:
        return self.entry.run(self.inputs)


def prepare_call(
    model: CompiledModel,
    entry: str,
    inputs: Sequence[str],
    file: Path | None,
    sizes: Sequence[str],
    seed: int,
) -> Call:
    """A call of an entry point. Raises OptionError for names that it does not have."""
    if entry and entry not in model.entry_points:
        raise OptionError(f"no entry point named '{entry}'", advice=near(entry, model.entry_points))
    chosen = model.entry_points[entry or next(iter(model.entry_points))]
    require_device(chosen.function.device)
    plan = chosen.function.plan
    count = chosen.convention.inputs_count
    values = [plan.values[v] for v in plan.inputs[:count]]
    names = [v.name or f"input{i}" for i, v in enumerate(values)]
    given = _pairs(inputs, "--input", names)
    tensors = load_tensors(file) if file is not None else {}
    for name in tensors:
        if name not in names:
            raise OptionError(f"'{file}' has '{name}', which is no input", advice=near(name, names))
    tensors |= {n: read_array(text) for n, text in given.items() if text.endswith(".npy")}
    known = size_values(sizes, plan)
    _sizes_of(names, values, tensors, known)
    for name, (low, high) in plan.symbols.items():
        known.setdefault(name, max(low, min(_TYPICAL_SIZE, high or _TYPICAL_SIZE)))
    made = [
        (
            tensors[name] if name in tensors else _make(value, given.get(name, ""), known, seed + i)
        ).to(chosen.function.device)
        for i, (name, value) in enumerate(zip(names, values))
    ]
    return Call(chosen, names, made, known)


def _pairs(texts: Sequence[str], option: str, names: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise OptionError(f"{option} {text}: write NAME=VALUE")
        if name not in names:
            raise OptionError(f"{option} {text}: there is no '{name}'", advice=near(name, names))
        found[name] = value
    return found


def size_values(sizes: Sequence[str], plan: FunctionPlan) -> dict[str, int]:
    """Dynamic sizes that a user names."""
    return {n: _size(t, n) for n, t in _pairs(sizes, "--size", list(plan.symbols)).items()}


def _size(text: str, name: str) -> int:
    if not text.isdigit():
        raise OptionError(f"--size {name}={text}: not a size")
    return int(text)


def _sizes_of(
    names: Sequence[str],
    values: Sequence[ValueSpec],
    tensors: Mapping[str, Tensor],
    known: dict[str, int],
) -> None:
    """Takes the values of dynamic sizes from the tensors that are given."""
    for name, value in zip(names, values):
        if name not in tensors:
            continue
        shape = tensors[name].shape
        if len(shape) != len(value.shape):
            raise InputError(
                f"input '{name}' has {len(shape)} axes, the program takes {len(value.shape)}"
            )
        for size, expr in zip(shape, value.shape):
            if isinstance(expr, str):
                known.setdefault(expr, size)


def _make(value: ValueSpec, fill: str, sizes: Mapping[str, int], seed: int) -> Tensor:
    shape = tuple(Size(evaluate_size(s, sizes)) for s in value.shape)
    return make_tensor(InputSpec(value.name, dtype_of(value.dtype), shape, fill), seed)
