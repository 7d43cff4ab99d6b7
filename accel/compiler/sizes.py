"""Symbolic sizes as JSON expressions (`accel.runtime.plan.SizeExpr`)."""

from __future__ import annotations

from typing import Any

import sympy

from accel.errors import BackendError
from accel.ir.types import Dim, numerator
from accel.runtime.plan import SizeExpr


def size_expr(dim: Dim) -> SizeExpr:
    """The JSON form of a dimension. Raises BackendError for functions that plans do not know."""
    if isinstance(dim, int):
        return dim
    if dim.is_Integer:
        return int(dim)
    if dim.is_Symbol:
        return str(dim.name)
    if dim.is_Add:
        over, under = numerator(dim)
        if under != 1:  # whole as a sum: its terms are not
            return ["//", size_expr(over), size_expr(under)]
        return ["+", *map(size_expr, dim.args)]
    if dim.is_Mul:
        return _product(dim)
    if dim.is_Pow and dim.exp.is_Integer and dim.exp > 0:
        return ["**", size_expr(dim.base), int(dim.exp)]
    if isinstance(dim, (sympy.floor, sympy.ceiling)):
        over, under = sympy.together(dim.args[0]).as_numer_denom()
        if isinstance(dim, sympy.ceiling):
            over = over + under - 1
        return ["//", size_expr(over), size_expr(under)]
    if isinstance(dim, (sympy.Max, sympy.Min)):
        return ["max" if isinstance(dim, sympy.Max) else "min", *map(size_expr, dim.args)]
    if isinstance(dim, sympy.Mod):
        return ["%", *map(size_expr, dim.args)]
    raise BackendError(f"a size uses a function that plans do not know: {dim}")


def _product(dim: Any) -> SizeExpr:
    """A product; a rational factor is a division, exact because sizes are integers."""
    over, under = dim.as_numer_denom()
    if under != 1:
        return ["//", size_expr(over), size_expr(under)]
    return ["*", *map(size_expr, dim.args)]
