"""Values that are affine in their own position: constant + sum of coefficient[axis] * index[axis].

Positions, ranges and what is computed from them (`arange`, `iota`, sums, slices, broadcasts) are of
this kind. Knowing it, a pass can read a causal mask out of comparisons of positions, or see that an
indexing is a slice, for symbolic sizes too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from accel.ir.module import Op, Value
from accel.ir.types import Dim, is_integer, same_dim, simplify_dim, symbol_names

_DEEPEST = 40


@dataclass(frozen=True)
class Affine:
    """`constant + sum(coefficients[axis] * index[axis])`; axes count from the end: -1 is last."""

    constant: Dim
    coefficients: dict[int, Dim] = field(default_factory=dict)

    @property
    def is_constant(self) -> bool:
        return not self.coefficients

    def plus(self, other: Affine, sign: int = 1) -> Affine:
        terms = dict(self.coefficients)
        for axis, c in other.coefficients.items():
            terms[axis] = simplify_dim(terms.get(axis, 0) + sign * c)
        kept = {a: c for a, c in terms.items() if not same_dim(c, 0)}
        return Affine(simplify_dim(self.constant + sign * other.constant), kept)

    def times(self, factor: Dim) -> Affine:
        if same_dim(factor, 0):
            return Affine(0)
        terms = {a: simplify_dim(c * factor) for a, c in self.coefficients.items()}
        return Affine(simplify_dim(self.constant * factor), terms)

    def moved(self, where: Callable[[int], int | None]) -> Affine | None:
        """The same over other axes; None if an axis with a coefficient has no place."""
        terms: dict[int, Dim] = {}
        for axis, c in self.coefficients.items():
            target = where(axis)
            if target is None:
                return None
            terms[target] = c
        return Affine(self.constant, terms)


class AffineAnalysis:
    """Affine forms of the values of a program, each worked out once."""

    def __init__(self) -> None:
        self._known: dict[Value, Affine | None] = {}
        self._depth = 0

    def __call__(self, value: Value) -> Affine | None:
        """The affine form of an integer value, or None if it has none (or it is not known)."""
        if value in self._known:
            return self._known[value]
        self._known[value] = None
        op = value.op
        form = _FORMS.get(op.name) if op is not None else None
        if op is None or form is None or self._depth > _DEEPEST or not is_integer(value.dtype):
            return None
        self._depth += 1
        made = form(op, self)
        self._depth -= 1
        if made is not None:
            # An axis of size 1 has index 0 only.
            rank = len(value.shape)
            ones = {i - rank for i, d in enumerate(value.shape) if _is_one(d)}
            kept = {a: c for a, c in made.coefficients.items() if a not in ones}
            self._known[value] = Affine(made.constant, kept)
        return self._known[value]


Form: TypeAlias = Callable[[Op, AffineAnalysis], Affine | None]


def _full(op: Op, of: AffineAnalysis) -> Affine | None:
    number = op.attribute("value")
    return Affine(int(number)) if isinstance(number, int) else None


def _size(op: Op, of: AffineAnalysis) -> Affine | None:
    return Affine(op.attribute("value"))


def _iota(op: Op, of: AffineAnalysis) -> Affine | None:
    axis = op.attribute("axis")
    rank = len(op.result.shape)
    place = axis - rank if axis >= 0 else axis
    return Affine(op.attribute("start"), {place: op.attribute("step")})


def _arange(op: Op, of: AffineAnalysis) -> Affine | None:
    start, step = op.attribute("start"), op.attribute("step")
    if isinstance(start, float) or isinstance(step, float):
        return None
    return Affine(start, {-1: step})


def _sum(sign: int) -> Form:
    def form(op: Op, of: AffineAnalysis) -> Affine | None:
        a, b = (of(v) for v in op.operands)
        return None if a is None or b is None else a.plus(b, sign)

    return form


def _mul(op: Op, of: AffineAnalysis) -> Affine | None:
    a, b = (of(v) for v in op.operands)
    if a is None or b is None:
        return None
    if a.is_constant:
        return b.times(a.constant)
    return a.times(b.constant) if b.is_constant else None


def _neg(op: Op, of: AffineAnalysis) -> Affine | None:
    a = of(op.operands[0])
    return None if a is None else a.times(-1)


def _cast(op: Op, of: AffineAnalysis) -> Affine | None:
    """Casts between integers; a narrowing one only where the values fit."""
    source, dtype = op.operands[0].dtype, op.result.dtype
    a = of(op.operands[0])
    if a is None or not is_integer(source):
        return None
    if dtype.itemsize < source.itemsize:
        limits = bounds(a, op.result.shape)
        info = torch.iinfo(dtype)
        if limits is None or not all(isinstance(d, int) for d in limits):
            return None
        if limits[0] < info.min or limits[1] > info.max:
            return None
    return a


def _permute(op: Op, of: AffineAnalysis) -> Affine | None:
    a = of(op.operands[0])
    axes = op.attribute("axes")
    rank = len(axes)
    return None if a is None else a.moved(lambda axis: axes.index(axis + rank) - rank)


def _broadcast(op: Op, of: AffineAnalysis) -> Affine | None:
    return of(op.operands[0])


def _reshape(op: Op, of: AffineAnalysis) -> Affine | None:
    """Reshapes that only add or remove axes of size 1."""
    a = of(op.operands[0])
    before, after = op.operands[0].shape, op.result.shape
    old = [i - len(before) for i, d in enumerate(before) if not _is_one(d)]
    new = [i - len(after) for i, d in enumerate(after) if not _is_one(d)]
    if a is None:
        return None
    if a.is_constant:
        return a
    same = len(old) == len(new) and all(same_dim(before[i], after[j]) for i, j in zip(old, new))
    return a.moved(dict(zip(old, new)).get) if same else None


def _slice(op: Op, of: AffineAnalysis) -> Affine | None:
    a = of(op.operands[0])
    axis = op.attribute("axis")
    axis -= len(op.result.shape) if axis >= 0 else 0
    if a is None or axis not in a.coefficients:
        return a
    c = a.coefficients[axis]
    constant = simplify_dim(a.constant + c * op.attribute("start"))
    return Affine(constant, {**a.coefficients, axis: simplify_dim(c * op.attribute("step"))})


def _cat(op: Op, of: AffineAnalysis) -> Affine | None:
    """Pieces that go on where the one before ends: [-1] and [0, 1, 2...], say."""
    rank = len(op.result.shape)
    axis = op.attribute("axis") % rank - rank
    start: Dim = 0
    pieces: list[tuple[Dim, Affine]] = []
    for operand in op.operands:
        piece = of(operand)
        if piece is None:
            return None
        pieces.append((start, piece))
        start = simplify_dim(start + operand.shape[axis])
    first = pieces[0][1]
    step: Dim | None = next(
        (p.coefficients[axis] for _, p in pieces if axis in p.coefficients), None
    )
    if step is None and len(pieces) > 1:
        behind, second = pieces[1]
        step = simplify_dim(second.constant - first.constant) if same_dim(behind, 1) else 0
    whole = Affine(first.constant, {**first.coefficients, axis: step or 0})
    for (begin, piece), operand in zip(pieces, op.operands):
        here = Affine(simplify_dim(whole.constant + (step or 0) * begin), whole.coefficients)
        if _is_one(operand.shape[axis]):  # index 0 only
            piece = Affine(piece.constant, {**piece.coefficients, axis: step or 0})
        difference = here.plus(piece, -1)
        if difference.coefficients or not same_dim(difference.constant, 0):
            return None
    return whole.plus(Affine(0))


def _lookup(op: Op, of: AffineAnalysis) -> Affine | None:
    """A one-dimensional affine value read at affine positions."""
    table = of(op.operands[0])
    where = of(op.operands[1]) if len(op.operands) == 2 else None
    if table is None or where is None or len(op.operands[0].shape) != 1:
        return None
    limits = bounds(where, op.operands[1].shape)
    if limits is None or not is_nonnegative(limits[0]):
        return None  # a negative position counts from the end
    return where.times(table.coefficients.get(-1, 0)).plus(Affine(table.constant))


_FORMS: dict[str, Form] = {
    "full": _full,
    "size": _size,
    "iota": _iota,
    "arange": _arange,
    "add": _sum(1),
    "sub": _sum(-1),
    "mul": _mul,
    "neg": _neg,
    "cast": _cast,
    "permute": _permute,
    "broadcast_to": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "cat": _cat,
    "index": _lookup,
    "gather": _lookup,
}


def _is_one(dim: Dim) -> bool:
    return isinstance(dim, int) and dim == 1


def bounds(a: Affine, shape: tuple[Dim, ...]) -> tuple[Dim, Dim] | None:
    """Smallest and largest value over a shape; None where a coefficient's sign is not known."""
    low: Dim = a.constant
    high: Dim = a.constant
    for axis, c in a.coefficients.items():
        if not isinstance(c, int) or -axis > len(shape):
            return None
        last = c * (shape[axis] - 1)
        if c > 0:
            high = simplify_dim(high + last)
        else:
            low = simplify_dim(low + last)
    return low, high


def is_negative(dim: Dim) -> bool:
    """Provably < 0 for positive symbols."""
    if isinstance(dim, int):
        return dim < 0
    return bool(dim.is_negative) or (bool(symbol_names(dim)) and bool((-dim).is_positive))


def is_nonnegative(dim: Dim) -> bool:
    """Provably >= 0 for positive symbols."""
    if isinstance(dim, int):
        return dim >= 0
    if dim.is_nonnegative:
        return True
    # Symbols are at least 1: s - 1 + k is not negative.
    shifted = dim.subs({s: s + 1 for s in dim.free_symbols}).expand()
    return bool(shifted.is_nonnegative)
