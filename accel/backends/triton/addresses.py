"""Index arithmetic as Triton text: sizes, and affine values over the loops of a tile.

Triton divides towards zero, so a floor division of what may be negative is written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy

from accel.backends.loops.index import (
    Affine,
    Atom,
    Axis,
    Datum,
    Indexer,
    Quotient,
    Remainder,
    at_least,
)
from accel.backends.loops.merge import group_extent
from accel.backends.triton.text import Block, Expr
from accel.errors import BackendError
from accel.ir.types import Dim, numerator, product, same_dim

Group = tuple[Axis, ...]


def size_name(symbol: str) -> str:
    """The parameter of a symbolic size: no variable of a program is named so."""
    return f"{symbol}_"


def size_text(dim: Dim) -> str:
    """A size as source; symbols are parameters of the kernel, all positive."""
    if isinstance(dim, int):
        return str(dim)
    if dim.is_Integer:
        return str(int(dim))
    if dim.is_Symbol:
        return size_name(dim.name)
    if dim.is_Add:
        over, under = numerator(dim)
        if under != 1:  # whole as a sum: its terms are not
            return f"({size_text(over)} // {size_text(under)})"
        return "(" + " + ".join(size_text(a) for a in dim.args) + ")"
    if dim.is_Mul:
        over, under = dim.as_numer_denom()
        if under != 1:
            return f"({size_text(over)} // {size_text(under)})"
        return "(" + " * ".join(size_text(a) for a in dim.args) + ")"
    if dim.is_Pow and dim.exp.is_Integer and dim.exp > 0:
        return "(" + " * ".join([size_text(dim.base)] * int(dim.exp)) + ")"
    if isinstance(dim, (sympy.floor, sympy.ceiling)):
        over, under = sympy.together(dim.args[0]).as_numer_denom()
        if isinstance(dim, sympy.ceiling):
            over = over + under - 1
        return f"({size_text(over)} // {size_text(under)})"
    if isinstance(dim, sympy.Mod):
        return "(" + " % ".join(size_text(a) for a in dim.args) + ")"
    if isinstance(dim, (sympy.Max, sympy.Min)):
        name = "tl.maximum" if isinstance(dim, sympy.Max) else "tl.minimum"
        text = size_text(dim.args[0])
        for part in dim.args[1:]:
            text = f"{name}({text}, {size_text(part)})"
        return text
    raise BackendError(f"a size uses a function that kernels do not know: {dim}")


class Addresses:
    """Text of affine values, given a variable for each group of merged loops.

    Args:
        kind: "int32", or "int64" where an address may not fit.
    """

    def __init__(self, indexer: Indexer, kind: str) -> None:
        self.indexer, self.kind = indexer, kind
        self.groups: list[tuple[Group, Expr]] = []

    def bind(self, group: Group, variable: Expr) -> None:
        self.groups.append((group, variable))

    def unbind(self, group: Group) -> None:
        self.groups = [g for g in self.groups if g[0] is not group]

    def code(self, value: Affine) -> Expr:
        """The value as source, of type `kind` (a literal where it is a constant)."""
        left = dict(value.terms)
        parts: list[tuple[str, frozenset[str]]] = []
        for group, variable in self.groups:
            stride = even_stride(left, group)
            if stride is not None:
                for axis in group:
                    left.pop(axis, None)
                if stride != 0:
                    parts.append((_scaled(variable.text, stride), variable.dims))
        for atom, coefficient in left.items():
            expr = self._atom(atom)
            parts.append((_scaled(expr.text, coefficient), expr.dims))
        if value.constant != 0 or not parts:
            parts.append((size_text(value.constant), frozenset()))
        text = parts[0][0]
        for part, _ in parts[1:]:
            text = f"{text} - {part[1:]}" if part.startswith("-") else f"{text} + {part}"
        dims: frozenset[str] = frozenset().union(*(d for _, d in parts))
        return Expr(text, self.kind, dims)

    def _atom(self, atom: object) -> Expr:
        if isinstance(atom, Axis):
            return self._axis(atom)
        if isinstance(atom, Datum):
            assert isinstance(atom.code, Expr)
            return atom.code
        assert isinstance(atom, (Quotient, Remainder))
        inner = self.code(atom.value)
        by = size_text(atom.divisor)
        low, _ = self.indexer.range(atom.value)
        positive = low is not None and at_least(low, 0)
        if isinstance(atom, Quotient):
            text = f"(({inner}) // {by})" if positive else _floor_quotient(inner.text, by)
        elif positive:
            text = f"(({inner}) % {by})"
        else:
            text = f"((({inner}) % {by} + {by}) % {by})"
        return Expr(text, self.kind, inner.dims)

    def _axis(self, axis: Axis) -> Expr:
        """One axis of a merged loop, by division."""
        for group, variable in reversed(self.groups):
            if axis in group:
                place = group.index(axis)
                below = group_extent(group[place + 1 :])
                text = variable.text
                if below != 1:
                    text = f"({text} // {size_text(below)})"
                if place != 0:
                    text = f"({text} % {size_text(axis.extent)})"
                return Expr(text, self.kind, variable.dims)
        raise BackendError(f"axis {axis!r} is used outside of its loop")


def even_stride(terms: Mapping[Atom, Dim], group: Group) -> Dim | None:
    """How far a value moves in one step of a merged loop; None if not evenly."""
    near = terms.get(group[-1], 0)
    expected = near
    for axis, inner in zip(reversed(group[:-1]), reversed(group[1:])):
        expected = product((expected, inner.extent))
        if not same_dim(terms.get(axis, 0), expected):
            return None
    return near


def _floor_quotient(value: str, by: str) -> str:
    return f"(({value} - ((({value}) % {by} + {by}) % {by})) // {by})"


def _scaled(text: str, factor: Dim) -> str:
    return text if factor == 1 else f"{text} * {size_text(factor)}"


def decompose(flat: Expr, groups: Sequence[Group], block: Block, addresses: Addresses) -> None:
    """Binds each group to its part of a flat position over all of them, in C order.

    What moves evenly over all of them (a dense result, say) is addressed by the position itself.
    """
    rest = flat
    if len(groups) > 1:
        addresses.bind(tuple(axis for group in groups for axis in group), flat)
    for number, group in reversed(list(enumerate(groups))):
        if number == 0:
            addresses.bind(group, rest)
            return
        extent = size_text(group_extent(group))
        part = block.let(f"{rest} % {extent}", flat.kind, flat.dims, "i")
        rest = block.let(f"{rest} // {extent}", flat.kind, flat.dims, "i")
        addresses.bind(group, part)
