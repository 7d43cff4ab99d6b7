"""Inputs on the command line.

input_ids:i64[1,?128]              a tensor by its argument's name; ?128: dynamic, 128 as example
input_ids:i64[batch?2,len?128]     named sizes: equal names are equal sizes
input_ids:i64[1,?128:8..2048]      with a range
input_ids:i64[1,?128]=0..49152     random values from a range (default: integers 0..100, N(0,1))
mask:f32[1,128]=ones               zeros, ones, or a .npy file
f32[8,64]                          positional, without a name
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim

from accel.errors import InputError, OptionError
from accel.ir.types import DTYPE_BY_NAME

_SPEC = re.compile(r"(?:([^:\[\]=]+):)?\s*([\w<>]+)\s*\[([^\]]*)\](?:=(.+))?")
_DIM = re.compile(r"(?:(\w*)\?)?(\d+)(?::(\d+)\.\.(\d+)?)?")
_RANGE = re.compile(r"(-?[\d.e+-]+?)\.\.(-?[\d.e+-]+)")
_DTYPES = {**DTYPE_BY_NAME, "bool": torch.bool, "u8": torch.uint8}
_INTEGER_RANGE = (0, 100)


@dataclass(frozen=True)
class Size:
    """One dimension: an example, and whether it may change; `name` ties equal sizes."""

    example: int
    dynamic: bool = False
    name: str = ""
    min: int | None = None
    max: int | None = None


@dataclass(frozen=True)
class InputSpec:
    """One input: name ("" is positional), dtype, sizes, and how to fill it ("" is random)."""

    name: str
    dtype: torch.dtype
    sizes: tuple[Size, ...]
    fill: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.example for s in self.sizes)


def parse_dtype(text: str) -> torch.dtype | None:
    """A floating dtype by torch's name or the short one; None for "". Raises OptionError."""
    if not text:
        return None
    found = _DTYPES.get(text) or getattr(torch, text, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(
            f"'{text}' is no floating dtype", advice="float32, float16 or bfloat16; f16 and so on"
        )
    return found


def parse_input(text: str) -> InputSpec:
    """The spec of a text (see the module's docstring). Raises OptionError with what is wrong."""
    found = _SPEC.fullmatch(text.strip())
    if found is None:
        raise OptionError(
            f"cannot read the input '{text}'", advice='for example "input_ids:i64[1,?128]"'
        )
    name, dtype, sizes, fill = found.groups()
    if dtype not in _DTYPES:
        known = "f32 f16 bf16 f64 i64 i32 i8 u8 bool"
        raise OptionError(f"input '{text}': no dtype '{dtype}'", advice=f"known: {known}, ...")
    parsed = tuple(_parse_size(s, text) for s in sizes.split(",")) if sizes.strip() else ()
    return InputSpec((name or "").strip(), _DTYPES[dtype], parsed, fill or "")


def _parse_size(text: str, whole: str) -> Size:
    found = _DIM.fullmatch(text.strip())
    if found is None:
        raise OptionError(
            f"input '{whole}': cannot read the size '{text}'", advice="128, ?128 or len?128:8..2048"
        )
    name, example, low, high = found.groups()
    if name is None and low is not None:
        raise OptionError(f"input '{whole}': the fixed size '{text}' has a range", advice="use ?")
    bounds = (int(low) if low else None, int(high) if high else None)
    return Size(int(example), name is not None, name or "", *bounds)


def make_tensor(spec: InputSpec, seed: int) -> Tensor:
    """The tensor of a spec. The same seed gives the same values."""
    generator = torch.Generator().manual_seed(seed)
    if spec.fill in ("zeros", "ones"):
        return torch.full(spec.shape, int(spec.fill == "ones"), dtype=spec.dtype)
    if spec.fill and not _RANGE.fullmatch(spec.fill):
        return _checked(read_array(spec.fill), spec)
    found = _RANGE.fullmatch(spec.fill)
    low, high = _range(found, spec)
    if spec.dtype == torch.bool:
        return torch.randint(0, 2, spec.shape, generator=generator).bool()
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        if found is None:
            return torch.randn(spec.shape, generator=generator).to(spec.dtype)
        return (torch.rand(spec.shape, generator=generator) * (high - low) + low).to(spec.dtype)
    return torch.randint(int(low), int(high), spec.shape, generator=generator).to(spec.dtype)


def _range(found: re.Match[str] | None, spec: InputSpec) -> tuple[float, float]:
    """The numbers LOW..HIGH of a fill. Raises OptionError for what is no range."""
    if found is None:
        return _INTEGER_RANGE
    kind = float if spec.dtype.is_floating_point or spec.dtype.is_complex else int
    try:
        low, high = kind(found[1]), kind(found[2])
    except ValueError:
        low = high = 0
    if not low < high:
        raise OptionError(
            f"'{spec.fill}' is no range of {spec.dtype}", advice="write LOW..HIGH, LOW < HIGH"
        )
    return low, high


def _checked(tensor: Tensor, spec: InputSpec) -> Tensor:
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        raise InputError(
            f"'{spec.fill}' holds {tensor.dtype} {list(tensor.shape)}, "
            f"the spec says {spec.dtype} {list(spec.shape)}",
            where=f"input '{spec.name}'",
        )
    return tensor


def read_array(path: str) -> Tensor:
    """The array of a .npy file; pickled objects are refused."""
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(f"cannot read '{path}': {error}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, by name."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"cannot read '{path}': {error}") from error


def example_inputs(
    specs: Sequence[InputSpec], seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword arguments; each input has its own seed."""
    tensors = [make_tensor(spec, seed + i) for i, spec in enumerate(specs)]
    positional = tuple(t for s, t in zip(specs, tensors) if not s.name)
    return positional, {s.name: t for s, t in zip(specs, tensors) if s.name}


def dynamic_shapes(model: nn.Module, specs: Sequence[InputSpec]) -> dict[str, Any] | None:
    """What `torch.export` wants to know about dynamic sizes; None if all are fixed."""
    if not any(size.dynamic for spec in specs for size in spec.sizes):
        return None
    parameters = list(inspect.signature(model.forward).parameters)
    unnamed = iter(parameters)
    dims: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    for spec in specs:
        name = spec.name or next(unnamed, "")
        if name not in parameters:
            raise OptionError(
                f"the model has no argument '{name}'", advice=f"it has: {', '.join(parameters)}"
            )
        axes = {i: _dim(s, dims) for i, s in enumerate(spec.sizes) if s.dynamic}
        shapes[name] = axes or None
    return shapes


def _dim(size: Size, dims: dict[str, Any]) -> Any:
    """One Dim for each name; unnamed sizes without a range are left to the tracer."""
    if not size.name and size.min is None:
        return Dim.AUTO
    name = size.name or f"size{len(dims)}"
    if name not in dims:
        limits = {k: v for k, v in (("min", size.min), ("max", size.max)) if v is not None}
        dims[name] = Dim(name, **limits)
    return dims[name]
