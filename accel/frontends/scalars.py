"""Python numbers, sizes, and numbers known only at run time, as 0-d values.

PyTorch traces the latter as symbolic expressions: over size symbols, and over symbols that stand
for a tensor's element (`x.item()`) or a number argument. Arithmetic on them becomes ops, done in
float64 or int64 as Python does it, and is cast where it meets a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from accel.errors import CaptureError
from accel.frontends.symbols import Symbols
from accel.ir.builder import Builder
from accel.ir.module import Value
from accel.ir.types import Dim

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_BINARY = {
    "FloatPow": "pow",
    "PowByNatural": "pow",
    "Pow": "pow",
    "FloatTrueDiv": "div",
    "IntTrueDiv": "div",
    "FloorDiv": "floor_div",
    "CleanDiv": "floor_div",
    "Mod": "remainder",
    "PythonMod": "remainder",
    "Max": "maximum",
    "Min": "minimum",
    "Add": "add",
    "Mul": "mul",
}
_UNARY = {
    "FloorToInt": "floor",
    "CeilToInt": "ceil",
    "TruncToInt": "trunc",
    "RoundToInt": "round",
    "Abs": "abs",
}


class Scalars:
    """Makes 0-d values at the builder's place.

    Attributes:
        numbers: values of torch's symbols that are numbers, not sizes.
    """

    def __init__(self, builder: Builder, symbols: Symbols) -> None:
        self._b = builder
        self._symbols = symbols
        self.numbers: dict[sympy.Expr, Value] = {}
        self._known: dict[tuple[Any, ...], Value] = {}
        self._sizes: dict[Dim, Value] = {}

    def value(self, number: Any, dtype: torch.dtype) -> Value:
        """A Python number, or a symbolic one, as a 0-d value of `dtype`."""
        if isinstance(number, SYMBOLIC):
            expr = number.node.expr
            if expr.free_symbols & self.numbers.keys():
                return self._b.cast_to(self._compute(expr, _wide(expr)), dtype)
            plain = self._symbols.plain(expr)
            if plain.is_number:
                return self.value(int(plain) if plain.is_Integer else float(plain), dtype)
            if plain.is_integer:
                return self._b.cast_to(self.size(plain), dtype)
            return self._b.cast_to(self._compute(expr, torch.float64), dtype)
        key = (type(number), repr(number), dtype)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._b.scalar(number, dtype)
        return found

    def size(self, dim: Dim) -> Value:
        """A size as a 0-d int64 value."""
        if isinstance(dim, int) or dim.is_Integer:
            return self.value(int(dim), torch.int64)
        if dim not in self._sizes:
            self._sizes[dim] = self._b.size(value=dim)
        return self._sizes[dim]

    def _compute(self, expr: sympy.Expr, dtype: torch.dtype) -> Value:
        """An expression over torch's symbols and functions, in int64 or float64."""
        if expr.is_number:
            return self.value(int(expr) if expr.is_Integer else float(expr), dtype)
        if expr in self.numbers:
            return self._b.cast_to(self.numbers[expr], dtype)
        if isinstance(expr, sympy.Symbol):
            return self._b.cast_to(self.size(self._symbols.dim(expr)), dtype)
        name = type(expr).__name__
        if name in ("ToFloat", "Identity"):
            return self._b.cast_to(self._compute(expr.args[0], _wide(expr.args[0])), dtype)
        unary = _UNARY.get(name) or name.removeprefix("OpaqueUnaryFn_")
        make: Callable[..., Value] | None = getattr(self._b, unary, None) if unary else None
        if len(expr.args) == 1 and make is not None:
            return self._b.cast_to(make(self._compute(expr.args[0], torch.float64)), dtype)
        if name not in _BINARY:
            raise CaptureError(
                f"the number {expr}, known only at run time", where=str(self._b.location or "")
            )
        if _BINARY[name] in ("div", "pow") and dtype == torch.int64:
            return self._b.cast_to(self._compute(expr, torch.float64), dtype)
        combine: Callable[..., Value] = getattr(self._b, _BINARY[name])
        total, *rest = (self._compute(a, dtype) for a in expr.args)
        for part in rest:
            total = combine(total, part)
        return total


def _wide(expr: sympy.Expr) -> torch.dtype:
    return torch.int64 if expr.is_integer else torch.float64
