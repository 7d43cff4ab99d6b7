"""Index arithmetic: where in a tensor an element lies, as a function of loop variables.

An `Affine` is a constant plus coefficients times atoms. Atoms are loop variables (`Axis`),
quotients and remainders that do not simplify, and positions read from memory (`Datum`).
Coefficients are ints or sympy expressions of the symbolic sizes, so a permute, a slice or a reshape
that only splits and merges stays linear, and strides can be read off: that is what lets loops over
neighbouring axes be merged, and tells which accesses are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy

from accel.ir.types import Dim, Shape, simplify_dim


class Atom:
    """Compared by identity; `Indexer` makes equal quotients and remainders one object."""

    __slots__ = ("order",)
    order: int


class Axis(Atom):
    """A loop variable: 0 <= value < extent."""

    __slots__ = ("extent", "name")

    def __init__(self, name: str, extent: Dim, order: int) -> None:
        self.name, self.extent, self.order = name, extent, order

    def __repr__(self) -> str:
        return f"{self.name}<{self.extent}"


class Quotient(Atom):
    """floor(value / divisor)."""

    __slots__ = ("divisor", "value")

    def __init__(self, value: Affine, divisor: Dim, order: int) -> None:
        self.value, self.divisor, self.order = value, divisor, order


class Remainder(Atom):
    """value - divisor * floor(value / divisor)."""

    __slots__ = ("divisor", "value")

    def __init__(self, value: Affine, divisor: Dim, order: int) -> None:
        self.value, self.divisor, self.order = value, divisor, order


class Datum(Atom):
    """An integer computed at run time: an index that was loaded. `code` is its expression."""

    __slots__ = ("axes", "code")

    def __init__(self, code: Any, axes: frozenset[Axis], order: int) -> None:
        self.code, self.axes, self.order = code, axes, order


Terms: TypeAlias = tuple[tuple[Atom, Dim], ...]


@dataclass(frozen=True)
class Affine:
    """constant + sum of coefficient * atom, atoms in order and coefficients nonzero."""

    constant: Dim = 0
    terms: Terms = ()

    def __hash__(self) -> int:
        return hash((self.constant, self.terms))

    def plus(self, other: Affine | Dim, factor: Dim = 1) -> Affine:
        """self + factor * other."""
        if not isinstance(other, Affine):
            return Affine(_add(self.constant, _multiply(other, factor)), self.terms)
        sums: dict[Atom, Dim] = dict(self.terms)
        for atom, coefficient in other.terms:
            sums[atom] = _add(sums.get(atom, 0), _multiply(coefficient, factor))
        return _affine(_add(self.constant, _multiply(other.constant, factor)), sums)

    def times(self, factor: Dim) -> Affine:
        return Affine().plus(self, factor)

    @property
    def axes(self) -> frozenset[Axis]:
        """All loop variables that the value depends on."""
        found: set[Axis] = set()
        for atom, _ in self.terms:
            if isinstance(atom, Axis):
                found.add(atom)
            elif isinstance(atom, Datum):
                found |= atom.axes
            elif isinstance(atom, (Quotient, Remainder)):
                found |= atom.value.axes
        return frozenset(found)

    @property
    def single_axis(self) -> Axis | None:
        """The axis, if the value is just one loop variable."""
        if self.constant == 0 and len(self.terms) == 1:
            atom, coefficient = self.terms[0]
            if isinstance(atom, Axis) and coefficient == 1:
                return atom
        return None

    def coefficient(self, axis: Axis) -> Dim | None:
        """The linear coefficient of an axis; None if the axis is also divided.

        A datum has been read before, so axes in its own address do not count.
        """
        result: Dim = 0
        for atom, c in self.terms:
            if atom is axis:
                result = c
            elif isinstance(atom, (Quotient, Remainder)) and axis in atom.value.axes:
                return None
        return result


def _add(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return simplify_dim(sympy.expand(a + b))


def _multiply(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return simplify_dim(sympy.expand(a * b))


def _affine(constant: Dim, sums: dict[Atom, Dim]) -> Affine:
    terms = [(atom, c) for atom, c in sums.items() if c != 0]
    terms.sort(key=lambda t: t[0].order)
    return Affine(constant, tuple(terms))


def exact_quotient(a: Dim, b: Dim) -> Dim | None:
    """a / b if it is an integer for all sizes."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    ratio = sympy.cancel(sympy.sympify(a) / b)
    return simplify_dim(ratio) if ratio.is_integer else None


def at_least(a: Dim, b: Dim) -> bool:
    """Whether a >= b for all sizes, provably."""
    if isinstance(a, int) and isinstance(b, int):
        return a >= b
    return bool(sympy.expand(sympy.sympify(a) - b).is_nonnegative)


@dataclass
class Indexer:
    """Makes axes and divides affine values; remembers by what each axis would better be split."""

    splits: dict[Axis, set[Dim]] = field(default_factory=dict)
    _made: dict[tuple[type, Affine, Dim], Atom] = field(default_factory=dict)
    _count: int = 0

    def axis(self, name: str, extent: Dim) -> Axis:
        self._count += 1
        return Axis(name, extent, self._count)

    def datum(self, code: Any, axes: frozenset[Axis]) -> Affine:
        self._count += 1
        return Affine(0, ((Datum(code, axes, self._count), 1),))

    def of(self, axis: Axis) -> Affine:
        return Affine(0, ((axis, 1),))

    def divide(self, value: Affine, divisor: Dim) -> tuple[Affine, Affine]:
        """floor(value / divisor) and the remainder, as simple as can be proved."""
        if divisor in (0, 1):  # the index of an axis of length 0 is never computed
            return value, Affine()
        whole, rest = self._take_multiples(value, divisor)
        low, high = self.range(rest)
        bounded = low is not None and high is not None and at_least(low, 0)
        if bounded and at_least(_add(divisor, -1), high):
            return whole, rest
        if isinstance(divisor, int):
            coarse = self._divide_coarse(rest, divisor)
            if coarse is not None:
                return whole.plus(coarse[0]), coarse[1]
        self._note_split(rest, divisor)
        quotient = Affine(0, ((self._atom(Quotient, rest, divisor), 1),))
        remainder = Affine(0, ((self._atom(Remainder, rest, divisor), 1),))
        return whole.plus(quotient), remainder

    def _take_multiples(self, value: Affine, divisor: Dim) -> tuple[Affine, Affine]:
        """Splits off the terms that the divisor divides."""
        whole: dict[Atom, Dim] = {}
        rest: dict[Atom, Dim] = {}
        for atom, c in value.terms:
            q = exact_quotient(c, divisor)
            if q is None:
                rest[atom] = c
            else:
                whole[atom] = q
        base, left = 0, value.constant
        if isinstance(left, int) and isinstance(divisor, int):
            base, left = divmod(left, divisor)
        elif left != 0 and (q := exact_quotient(left, divisor)) is not None:
            return _affine(q, whole), _affine(0, rest)
        return _affine(base, whole), _affine(left, rest)

    def _divide_coarse(self, value: Affine, divisor: int) -> tuple[Affine, Affine] | None:
        """(g a + b) / divisor = a / (divisor / g), if g divides divisor and 0 <= b < g."""
        for g in sorted({math.gcd(c, divisor) for _, c in value.terms if isinstance(c, int)}):
            if g <= 1 or g == divisor:
                continue
            coarse, fine = self._take_multiples(value, g)
            low, high = self.range(fine)
            if low is None or high is None or not coarse.terms:
                continue
            if at_least(low, 0) and at_least(g - 1, high):
                quotient, remainder = self.divide(coarse, divisor // g)
                return quotient, remainder.times(g).plus(fine)
        return None

    def _note_split(self, value: Affine, divisor: Dim) -> None:
        axis = value.single_axis
        if axis is not None and exact_quotient(axis.extent, divisor) is not None:
            self.splits.setdefault(axis, set()).add(divisor)

    def _atom(self, kind: type[Any], value: Affine, divisor: Dim) -> Atom:
        key = (kind, value, divisor)
        if key not in self._made:
            self._count += 1
            self._made[key] = kind(value, divisor, self._count)
        return self._made[key]

    def range(self, value: Affine) -> tuple[Dim | None, Dim | None]:
        """Smallest and largest value, None where unknown."""
        low: Dim | None = value.constant
        high: Dim | None = value.constant
        for atom, c in value.terms:
            bottom, top = self._atom_range(atom)
            if not at_least(c, 0):
                if not at_least(0, c):
                    return None, None
                bottom, top = top, bottom
            low = None if low is None or bottom is None else _add(low, _multiply(c, bottom))
            high = None if high is None or top is None else _add(high, _multiply(c, top))
        return low, high

    def _atom_range(self, atom: Atom) -> tuple[Dim | None, Dim | None]:
        if isinstance(atom, Axis):
            return 0, _add(atom.extent, -1)
        if isinstance(atom, Remainder):
            return 0, _add(atom.divisor, -1)
        if isinstance(atom, Quotient):
            low, high = self.range(atom.value)
            if isinstance(low, int) and isinstance(high, int) and isinstance(atom.divisor, int):
                return low // atom.divisor, high // atom.divisor
        return None, None

    def flatten(self, index: Sequence[Affine], shape: Sequence[Dim]) -> Affine:
        """C-order position in a dense tensor."""
        position = Affine()
        for i, extent in zip(index, shape):
            position = position.times(extent).plus(i)
        return position

    def reshape(self, index: Sequence[Affine], shape: Shape, source: Shape) -> tuple[Affine, ...]:
        """The index in `source` of the element at `index` of its reshape to `shape`.

        Axes are matched in groups of equal size, so that untouched ones stay as they are.
        """
        result: list[Affine] = []
        for outer, inner in matched_groups(shape, source):
            part = [index[i] for i in outer]
            flat = self.flatten(part, [shape[i] for i in outer])
            found: list[Affine] = []
            for i in reversed(inner[1:]):
                flat, remainder = self.divide(flat, source[i])
                found.append(remainder)
            if inner:
                found.append(flat)
            result.extend(reversed(found))
        return tuple(result)


def matched_groups(shape: Shape, source: Shape) -> Iterable[tuple[list[int], list[int]]]:
    """Minimal runs of axes of both shapes with equal numbers of elements, in order."""
    i = j = 0
    while i < len(shape) or j < len(source):
        left, right = [], []
        a: Dim = 1
        b: Dim = 1
        if i < len(shape):
            left, a, i = [i], shape[i], i + 1
        if j < len(source):
            right, b, j = [j], source[j], j + 1
        while a != b and (i < len(shape) or j < len(source)):
            grow_left = i < len(shape) and (j >= len(source) or _grows(a, b))
            if grow_left:
                left.append(i)
                a, i = _multiply(a, shape[i]), i + 1
            else:
                right.append(j)
                b, j = _multiply(b, source[j]), j + 1
        yield left, right


def _grows(a: Dim, b: Dim) -> bool:
    """Whether the side with product a should take one more axis to catch up with b."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    if exact_quotient(b, a) is not None:
        return True
    return exact_quotient(a, b) is None and at_least(b, a)
