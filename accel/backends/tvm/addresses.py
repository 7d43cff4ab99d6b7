"""Addresses as TIR expressions: sizes, and index expressions over loops that were merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy

from accel.backends.loops.index import Affine, Axis, Datum, Quotient, Remainder
from accel.backends.loops.merge import group_extent
from accel.backends.tvm import tir
from accel.backends.tvm.tir import Expr, Var
from accel.errors import BackendError
from accel.ir.types import Dim, numerator, product, same_dim


class Sizes:
    """Symbolic sizes as code: each symbol is an int64 parameter.

    `zero` is a parameter too, that is always 0: added to a number, it hides it from LLVM.
    """

    def __init__(self, symbols: Mapping[str, Var]) -> None:
        self.symbols = symbols
        self.zero = tir.var("zero")

    def code(self, dim: Dim) -> Expr:
        if isinstance(dim, int):
            return tir.i64(dim)
        if dim.is_Integer:
            return tir.i64(int(dim))
        if dim.is_Symbol:
            return self.symbols[dim.name]
        if dim.is_Add:
            over, under = numerator(dim)
            if under != 1:  # whole as a sum: its terms are not
                return tir.tirx.floordiv(self.code(over), self.code(under))
            return self._fold(dim.args, lambda a, b: a + b)
        if dim.is_Mul:
            over, under = dim.as_numer_denom()
            if under != 1:
                return tir.tirx.floordiv(self.code(over), self.code(under))
            return self._fold(dim.args, lambda a, b: a * b)
        if dim.is_Pow and dim.exp.is_Integer and dim.exp > 0:
            return self._fold((dim.base,) * int(dim.exp), lambda a, b: a * b)
        if isinstance(dim, (sympy.floor, sympy.ceiling)):
            over, under = sympy.together(dim.args[0]).as_numer_denom()
            if isinstance(dim, sympy.ceiling):
                over = over + under - 1
            return tir.tirx.floordiv(self.code(over), self.code(under))
        if isinstance(dim, sympy.Mod):
            return tir.tirx.floormod(*(self.code(a) for a in dim.args))
        if isinstance(dim, sympy.Max):
            return self._fold(dim.args, tir.tirx.max)
        if isinstance(dim, sympy.Min):
            return self._fold(dim.args, tir.tirx.min)
        raise BackendError(f"a size uses a function that kernels do not know: {dim}")

    def _fold(self, parts: Sequence[Dim], combine: object) -> Expr:
        result = self.code(parts[0])
        for part in parts[1:]:
            result = combine(result, self.code(part))  # type: ignore[operator]
        return result


class Addresses:
    """Code of affine values, given code for the loops."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.groups: list[tuple[tuple[Axis, ...], Expr]] = []
        self.single: dict[Axis, Expr] = {}

    def bind(self, group: tuple[Axis, ...], code: Expr) -> None:
        """`code` is the value of the loop over the group's axes."""
        if len(group) == 1:
            self.single[group[0]] = code
        else:
            self.groups.append((group, code))

    def unbind(self, group: tuple[Axis, ...]) -> None:
        self.single.pop(group[0], None)
        self.groups = [g for g in self.groups if g[0] != group]

    def code(self, value: Affine) -> Expr:
        left = dict(value.terms)
        parts: list[Expr] = []
        for group, variable in self.groups:
            stride = self._stride(value, group)
            if stride is not None:
                for axis in group:
                    left.pop(axis, None)
                if stride != 0:
                    parts.append(self._scaled(variable, stride))
        for atom, coefficient in left.items():
            parts.append(self._scaled(self._atom(atom), coefficient))
        if value.constant != 0 or not parts:
            parts.append(self.sizes.code(value.constant))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _stride(self, value: Affine, group: tuple[Axis, ...]) -> Dim | None:
        """How far the value moves in one step of a merged loop; None if not evenly."""
        coefficients = dict(value.terms)
        near = coefficients.get(group[-1], 0)
        expected = near
        for axis, inner in zip(reversed(group[:-1]), reversed(group[1:])):
            expected = product((expected, inner.extent))
            if not same_dim(coefficients.get(axis, 0), expected):
                return None
        return near

    def _scaled(self, code: Expr, factor: Dim) -> Expr:
        return code if factor == 1 else code * self.sizes.code(factor)

    def _atom(self, atom: object) -> Expr:
        if isinstance(atom, Axis):
            return self._axis(atom)
        if isinstance(atom, Datum):
            return atom.code
        if isinstance(atom, Quotient):
            return tir.tirx.floordiv(self.code(atom.value), self.sizes.code(atom.divisor))
        assert isinstance(atom, Remainder)
        return tir.tirx.floormod(self.code(atom.value), self.sizes.code(atom.divisor))

    def _axis(self, axis: Axis) -> Expr:
        """One axis of a merged loop, by division."""
        if axis in self.single:
            return self.single[axis]
        for group, variable in self.groups:
            if axis in group:
                place = group.index(axis)
                below = group_extent(group[place + 1 :])
                if below != 1:
                    variable = tir.tirx.floordiv(variable, self.sizes.code(below))
                if place == 0:
                    return variable
                return tir.tirx.floormod(variable, self.sizes.code(axis.extent))
        raise BackendError(f"axis {axis!r} is used outside of its loop")
