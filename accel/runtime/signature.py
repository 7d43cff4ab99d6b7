"""Does a call fit what was compiled? And which sizes does it have?

`Signature.bind` checks the tensors of a call against the declared inputs and returns the value of
each size symbol. Every refusal is an InputError that names the argument, what is wanted, and what
was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.errors import ArtifactError, InputError
from accel.runtime.plan import (
    FunctionPlan,
    SizeExpr,
    dtype_of,
    evaluate_condition,
    evaluate_size,
)


@dataclass(frozen=True, slots=True)
class _Argument:
    label: str
    dtype: torch.dtype
    shape: tuple[SizeExpr, ...]


class Signature:
    """The inputs of one function: dtypes, shapes, symbols with their ranges."""

    def __init__(self, plan: FunctionPlan, device: torch.device) -> None:
        self.function = plan.name
        self.device = device
        self.symbols = plan.symbols
        self.guards = plan.guards
        self.arguments = [
            _Argument(
                f"'{spec.name}'" if spec.name else f"number {position}",
                dtype_of(spec.dtype),
                tuple(spec.shape),
            )
            for position, spec in enumerate(plan.values[v] for v in plan.inputs)
        ]
        self._plain: list[tuple[int, int, str]] = [
            (i, axis, expr)
            for i, a in enumerate(self.arguments)
            for axis, expr in enumerate(a.shape)
            if isinstance(expr, str)
        ]
        self._derived: list[tuple[int, int, SizeExpr]] = [
            (i, axis, expr)
            for i, a in enumerate(self.arguments)
            for axis, expr in enumerate(a.shape)
            if isinstance(expr, list)
        ]
        self._check_solvable(plan)

    def _check_solvable(self, plan: FunctionPlan) -> None:
        known = {expr for _, _, expr in self._plain}
        for _, _, expr in self._derived:
            known |= _names(expr)
        used = set().union(*(_names(e) for v in plan.values for e in v.shape))
        missing = sorted(used - known)
        if missing:
            raise ArtifactError(
                f"no argument's shape gives the size '{missing[0]}'",
                where=f"function '{self.function}'",
            )

    def bind(self, inputs: Sequence[Any]) -> dict[str, int]:
        """The value of each symbol; InputError if `inputs` do not fit."""
        if len(inputs) != len(self.arguments):
            raise self._error(f"takes {len(self.arguments)} tensors, got {len(inputs)}")
        for argument, tensor in zip(self.arguments, inputs):
            self._check_tensor(argument, tensor)
        values: dict[str, int] = {}
        for i, axis, name in self._plain:
            values.setdefault(name, inputs[i].shape[axis])
        for i, axis, expr in self._derived:
            _solve(expr, inputs[i].shape[axis], values)
        for i, axis, expr in self._derived:
            for name in _names(expr) - values.keys():
                raise self._error(
                    f"cannot tell the size '{name}': axis {axis} of argument "
                    f"{self.arguments[i].label} has size {inputs[i].shape[axis]}, which is no "
                    f"{_text(expr)}"
                )
        self._check_shapes(inputs, values)
        self._check_ranges(inputs, values)
        for guard in self.guards:
            if not evaluate_condition(guard, values):
                sizes = ", ".join(f"{name} = {value}" for name, value in values.items())
                raise self._error(
                    f"was compiled for {_text_of_condition(guard)}; this call has {sizes}"
                )
        return values

    def _error(self, what: str, advice: str = "") -> InputError:
        return InputError(f"'{self.function}' {what}", advice=advice)

    def _check_tensor(self, argument: _Argument, tensor: Any) -> None:
        label = f"argument {argument.label}"
        if not isinstance(tensor, Tensor):
            raise self._error(f"wants a tensor for {label}, got {type(tensor).__name__}")
        if tensor.dtype != argument.dtype:
            raise self._error(
                f"wants {_name(argument.dtype)} for {label}, got {_name(tensor.dtype)}",
                f"convert it: .to({argument.dtype})",
            )
        if tensor.device != self.device:
            raise self._error(
                f"runs on {self.device}; {label} is on {tensor.device}",
                f"move it: .to('{self.device}')",
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            raise self._error(f"wants a dense tensor for {label}", "convert it with .to_dense()")
        if len(tensor.shape) != len(argument.shape):
            raise self._error(
                f"wants shape {_format(argument.shape)} for {label}, got {list(tensor.shape)}"
            )

    def _check_shapes(self, inputs: Sequence[Tensor], values: dict[str, int]) -> None:
        for argument, tensor in zip(self.arguments, inputs):
            for axis, (expr, size) in enumerate(zip(argument.shape, tensor.shape)):
                wanted = expr if isinstance(expr, int) else evaluate_size(expr, values)
                if wanted == size:
                    continue
                note = "" if isinstance(expr, int) else f" ({_text(expr)} = {wanted})"
                raise self._error(
                    f"wants shape {_format(argument.shape)} for argument {argument.label}, got "
                    f"{list(tensor.shape)}: axis {axis} has size {size}, not {wanted}{note}",
                    "compile with dynamic shapes if this size is to vary"
                    if isinstance(expr, int)
                    else "",
                )

    def _check_ranges(self, inputs: Sequence[Tensor], values: dict[str, int]) -> None:
        for name, (low, high) in self.symbols.items():
            if name not in values:
                continue  # in no shape at all
            if values[name] < low or (high is not None and values[name] > high):
                place = self._place(name)
                bounds = f"{low} and up" if high is None else f"{low} to {high}"
                small = "compile for it: no or one element along an axis is a program of its own"
                raise self._error(
                    f"was compiled for {name} of {bounds}; {place} gives {values[name]}",
                    small
                    if values[name] < low <= 2
                    else "compile with a wider range for this size",
                )

    def _place(self, name: str) -> str:
        places: list[tuple[int, int, SizeExpr]] = [*self._plain, *self._derived]
        for i, axis, expr in places:
            if name in _names(expr):
                return f"axis {axis} of argument {self.arguments[i].label}"
        return "the call"


def _names(expr: SizeExpr) -> set[str]:
    if isinstance(expr, str):
        return {expr}
    if isinstance(expr, list):
        return set().union(*(_names(e) for e in expr[1:]))
    return set()


def _solve(expr: SizeExpr, size: int, values: dict[str, int]) -> None:
    """Finds the one unknown symbol in a sum or product; leaves `values` alone if it cannot."""
    unknown = _names(expr) - values.keys()
    if len(unknown) != 1:
        return
    if isinstance(expr, str):
        values[expr] = size
        return
    assert isinstance(expr, list)
    parts = expr[1:]
    inside = [e for e in parts if _names(e) & unknown]
    if len(inside) != 1 or expr[0] not in ("+", "*"):
        return
    rest = 0 if expr[0] == "+" else 1
    for e in parts:
        if e is not inside[0]:
            value = evaluate_size(e, values)
            rest = rest + value if expr[0] == "+" else rest * value
    if expr[0] == "+":
        _solve(inside[0], size - rest, values)
    elif rest and size % rest == 0:
        _solve(inside[0], size // rest, values)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _format(shape: tuple[SizeExpr, ...]) -> str:
    return "[" + ", ".join(_text(e) for e in shape) + "]"


def _text(expr: SizeExpr) -> str:
    if not isinstance(expr, list):
        return str(expr)
    operator, *rest = expr
    texts = [_text(e) if not isinstance(e, list) else f"({_text(e)})" for e in rest]
    if operator in ("max", "min"):
        return f"{operator}({', '.join(texts)})"
    return operator.join(texts)


def _text_of_condition(condition: list[Any]) -> str:
    kind, *rest = condition
    if kind == "not":
        return f"not ({_text_of_condition(rest[0])})"
    if kind in ("and", "or"):
        return f" {kind} ".join(f"({_text_of_condition(c)})" for c in rest)
    return f"{_text(rest[0])} {kind} {_text(rest[1])}"
