"""The plan: what a compiled function does, as data. The artifact stores it, the executor runs it.

A plan is a list of steps over numbered values. Sizes are JSON expressions: an int, a symbol's name,
or a list such as ["*", "s0", 64]; so nothing here needs sympy, and nothing is evaluated as code.

Values:
    input    argument i of the call
    weight   a tensor of the artifact's weight file (mmap'ed), by name
    buffer   memory of the arena, planned by `accel.runtime.planner`; written by kernel steps
    owned    allocated by a library or ATen step, freed after its last use
    view     another value's memory under another shape/stride (a "view" step defines it)

Steps:
    kernel   a generated function of the host library: `symbol(inputs..., outputs..., dims...)`;
             inputs are dense in C order (the executor makes them so), outputs are buffers
    library  a registered vendor call (`accel.runtime.libraries`): returns its outputs
    aten     an ATen overload by name, arguments from a template
    view     reshape, permute, slice, expand: no computation
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from accel.errors import ArtifactError

LARGEST_SIZE = 1 << 62

SizeExpr = int | str | list[Any]
ValueKind = Literal["input", "weight", "buffer", "owned", "view"]
StepKind = Literal["kernel", "library", "aten", "view"]


@dataclass
class ValueSpec:
    """One value: where it lives, its dtype, and its logical shape.

    A weight of a sub-byte dtype ("int4") is bound to its stored form (uint8, rows of packed
    elements) in kernel and library steps, and to one int8 or uint8 per element in ATen steps.
    """

    kind: ValueKind
    dtype: str  # torch's name without the prefix: "float32", "int4"
    shape: list[SizeExpr]
    name: str = ""  # weight name or a hint for people
    index: int = 0  # argument number of an input


@dataclass
class Step:
    """One step. `inputs` and `outputs` number values (-1: an absent optional operand).

    kernel: name = symbol, dims = run-time sizes passed after the buffers.
        options["inplace"] = [[output, input], ...] (positions in `outputs` and `inputs`): the
        kernel may write that output over that input, since element i of the one needs only
        element i of the other.
    library: name = library entry, options = its parameters.
    aten: name = overload, e.g. "aten::topk.default"; options["args"], options["kwargs"] are
        templates: {"operand": i} (a position in `inputs`), {"size": expr}, {"dtype": "float32"},
        {"list": [...]}, {"complex": [re, im]}, {"torch": name} for a device, layout or memory
        format ("cpu", "strided", "contiguous_format"), and plain None, bool, int, float, str.
    view: name = "reshape" | "expand" (the output's shape says the rest), "permute"
        (options["axes"]), "slice" (options["axis"], "start", "stop", "step"; sizes may be
        expressions).
    `source` is the IR op or the user's place, for error messages.
    """

    kind: StepKind
    name: str
    inputs: list[int]
    outputs: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    dims: list[SizeExpr] = field(default_factory=list)
    source: str = ""


@dataclass
class FunctionPlan:
    """One entry point.

    `inputs` and `outputs` number values; `symbols` maps a size's name to its [min, max] (max null:
    no bound); `donates` maps result -> argument. `guards` are conditions on symbols that a call
    must meet besides: ["<", size, size] (and <=, ==, !=), ["not", c], ["and", c...], ["or", c...].
    `metadata` carries the calling convention (`accel.runtime.convention`) for whoever wraps the
    executor.
    """

    name: str
    values: list[ValueSpec]
    inputs: list[int]
    outputs: list[int]
    steps: list[Step]
    symbols: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    donates: dict[int, int] = field(default_factory=dict)
    guards: list[list[Any]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


def evaluate_size(expr: SizeExpr, symbols: Mapping[str, int]) -> int:
    """The value of a size expression. Raises ArtifactError for anything malformed or huge."""
    if isinstance(expr, bool):
        raise ArtifactError(f"bad size expression {expr!r}")
    if isinstance(expr, int):
        return expr
    if isinstance(expr, str):
        if expr not in symbols:
            raise ArtifactError(f"size '{expr}' has no value")
        return symbols[expr]
    if not isinstance(expr, list) or not expr:
        raise ArtifactError(f"bad size expression {expr!r}")
    function, *rest = expr
    result = _apply(function, [evaluate_size(e, symbols) for e in rest])
    if result is None or abs(result) > LARGEST_SIZE:
        raise ArtifactError(f"bad size expression {str(expr)[:80]}")
    return result


def _apply(function: object, values: list[int]) -> int | None:
    if function == "+" and values:
        return sum(values)
    if function == "*" and values:
        return math.prod(values)
    if function in ("//", "%") and len(values) == 2 and values[1] != 0:
        return values[0] // values[1] if function == "//" else values[0] % values[1]
    if function == "**" and len(values) == 2 and 0 <= values[1] < 64:
        return int(values[0] ** values[1])
    if function in ("max", "min") and values:
        return max(values) if function == "max" else min(values)
    return None


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}


def evaluate_condition(condition: Any, symbols: Mapping[str, int], depth: int = 0) -> bool:
    """Whether a guard holds. Raises ArtifactError for anything malformed."""
    if not isinstance(condition, list) or len(condition) < 2 or depth > 16:
        raise ArtifactError(f"bad condition {str(condition)[:80]}")
    kind, *rest = condition
    if kind in ("and", "or", "not"):
        values = [evaluate_condition(c, symbols, depth + 1) for c in rest]
        if kind == "not":
            return not values[0]
        return all(values) if kind == "and" else any(values)
    if not isinstance(kind, str) or kind not in _COMPARE or len(rest) != 2:
        raise ArtifactError(f"bad condition {str(condition)[:80]}")
    return _COMPARE[kind](evaluate_size(rest[0], symbols), evaluate_size(rest[1], symbols))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name from a manifest; ArtifactError if there is none."""
    dtype = getattr(torch, name, None) if name.isidentifier() else None
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"unknown dtype '{name}'")
    return dtype
