"""Rules for values that follow from positions (`accel.ir.affine`): indexing and comparisons.

Indexing at consecutive positions is a slice; a comparison of row and column positions is a
`tri_mask`, and one that always (or never) holds is a constant. So masks that frontends build from
`arange` end up in one form, for symbolic sizes too. Part of `canonicalize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from accel.ir.affine import Affine, AffineAnalysis, bounds, is_negative, is_nonnegative
from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.patterns import splat_value
from accel.ir.rewrite import Made, RewriteContext, Rule
from accel.ir.types import Dim, is_integer, same_dim, same_shape, simplify_dim
from accel.passes.algebra import without_leading_ones


class IndexAsView(Rule):
    """index, gather and embedding at consecutive positions: slices, a permute and a reshape."""

    name, roots = "index_as_view", ("index", "gather", "embedding")

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        x, indices = op.operands[0], op.operands[1:]
        axes: Sequence[int] = (0,)
        if op.name != "embedding":
            axes = op.attribute("axes") if op.name == "index" else (op.attribute("axis"),)
        of = AffineAnalysis()
        reads = [_consecutive(of(v), v) for v in indices]
        if any(r is None for r in reads):
            return None
        places = [r[1] for r in reads if r is not None and r[1] is not None]
        if len(set(places)) != len(places):
            return None  # a diagonal
        found = [r for r in reads if r is not None]
        for axis, (start, _, length) in zip(axes, found):
            stop = simplify_dim(start + length)
            if not (start == 0 and same_dim(stop, x.shape[axis])):
                x = b.slice(x, axis=axis, start=start, stop=stop)
        return _arrange(b, x, axes, [place for _, place, _ in found], op.result.shape, indices)


def _consecutive(a: Affine | None, index: Value) -> tuple[Dim, int | None, Dim] | None:
    """(start, axis of the index from the end, length) of positions start, start + 1, ..."""
    if a is None or not is_nonnegative(a.constant):
        return None
    if a.is_constant:
        return a.constant, None, 1
    if len(a.coefficients) != 1:
        return None
    ((place, step),) = a.coefficients.items()
    return (a.constant, place, index.shape[place]) if same_dim(step, 1) else None


def _arrange(
    b: Builder,
    x: Value,
    axes: Sequence[int],
    places: Sequence[int | None],
    shape: tuple[Dim, ...],
    indices: Sequence[Value],
) -> Value:
    """Puts the sliced axes where the indices' axes stand in the result."""
    common = max(len(v.shape) for v in indices)
    adjacent = all(second - first == 1 for first, second in pairwise(axes))
    start = axes[0] if adjacent else 0
    rest = [i for i in range(len(x.shape)) if i not in axes]
    by_place = {common + p: axis for axis, p in zip(axes, places) if p is not None}
    middle = [by_place.get(i) for i in range(common)]
    moved = [m for m in middle if m is not None]
    gone = [axis for axis, p in zip(axes, places) if p is None]
    order = (*rest[:start], *moved, *rest[start:], *gone)
    permuted = x if order == tuple(range(len(order))) else b.permute(x, axes=order)
    sizes = iter([permuted.shape[i] for i in range(start, start + len(moved))])
    new = (
        *(permuted.shape[i] for i in range(start)),
        *(1 if m is None else next(sizes) for m in middle),
        *(permuted.shape[i] for i in range(start + len(moved), len(order) - len(gone))),
    )
    shaped = b.reshape_to(permuted, new)
    if same_shape(shaped.shape, shape):
        return shaped
    widened: Value = b.broadcast_to(shaped, shape=shape)
    return widened


# For each comparison of a and b: the sign and the k with which it says sign * (a - b) + k <= 0.
_AT_MOST_ZERO = {"le": (1, 0), "lt": (1, 1), "ge": (-1, 0), "gt": (-1, 1)}


class ComparePositions(Rule):
    """Comparisons of positions: constants, or a `tri_mask` over the last two axes."""

    name, roots = "compare_positions", ("le", "lt", "ge", "gt")

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        if not is_integer(op.operands[0].dtype):
            return None
        of = AffineAnalysis()
        left, right = (of(v) for v in op.operands)
        if left is None or right is None:
            return None
        sign, extra = _AT_MOST_ZERO[op.name]
        difference = left.plus(right, -1).times(sign).plus(Affine(extra))
        shape = op.result.shape
        limits = bounds(difference, shape)
        if limits is not None:
            if is_nonnegative(simplify_dim(-limits[1])):
                return b.full_of(shape, True, torch.bool)
            if is_negative(simplify_dim(-limits[0])):
                return b.full_of(shape, False, torch.bool)
        return _tri_mask(b, difference, shape)


class EqualPositions(Rule):
    """Positions that are equal everywhere, or nowhere: (i + 1) - i != 1 never holds."""

    name, roots = "equal_positions", ("eq", "ne")

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        if not is_integer(op.operands[0].dtype):
            return None
        of = AffineAnalysis()
        left, right = (of(v) for v in op.operands)
        if left is None or right is None:
            return None
        limits = bounds(left.plus(right, -1), op.result.shape)
        if limits is None:
            return None
        low, high = limits
        differ = is_negative(high) or is_negative(simplify_dim(-low))
        if not differ and not (same_dim(low, 0) and same_dim(high, 0)):
            return None
        return b.full_of(op.result.shape, differ == (op.name == "ne"), torch.bool)


class RunningSumOfOneNumber(Rule):
    """cumsum of one number everywhere counts: number * (1, 2, 3...)."""

    name, roots = "running_sum_of_one_number", ("cumsum",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        number = splat_value(op.operands[0])
        shape, dtype = op.result.shape, op.result.dtype
        if number is None or isinstance(number, complex) or not shape:
            return None
        if number == 0:
            return b.full_of(shape, 0, dtype)
        if number not in (1, True):
            return None
        axis = op.attribute("axis") % len(shape)
        counts = b.iota(shape=(shape[axis],), axis=0, dtype=torch.int64, start=1)
        column = b.reshape_to(counts, (shape[axis], *[1] * (len(shape) - axis - 1)))
        wide: Value = b.broadcast_to(b.cast_to(column, dtype), shape=shape)
        return wide


def _tri_mask(b: Builder, difference: Affine, shape: tuple[Dim, ...]) -> Made:
    """difference <= 0 as a mask of (column - row)."""
    if len(shape) < 2:
        return None
    terms = difference.coefficients
    column, row = terms.get(-1, 0), terms.get(-2, 0)
    if set(terms) - {-1, -2} or column not in (1, -1):
        return None
    if row != -column and not (row == 0 and same_dim(shape[-2], 1)):
        return None
    rows, columns = shape[-2:]
    if column == 1:  # column - row <= -constant
        diagonal: Dim = simplify_dim(-difference.constant)
        mask = b.tri_mask(rows=rows, columns=columns, diagonal=diagonal)
    else:  # column - row > constant - 1
        lower = simplify_dim(difference.constant - 1)
        mask = b.tri_mask(rows=rows, columns=columns, diagonal=columns, lower=lower)
    if same_shape(mask.shape, shape):
        made: Value = mask
    else:
        made = b.broadcast_to(mask, shape=shape)
    return made


class TriMaskAlways(Rule):
    """A triangular mask that covers everything, or nothing."""

    name, roots = "tri_mask_constant", ("tri_mask",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        diagonal, lower = op.attribute("diagonal"), op.attribute("lower")
        rows, columns = op.result.shape
        least, most = simplify_dim(1 - rows), simplify_dim(columns - 1)
        above = is_nonnegative(simplify_dim(diagonal - most))
        below = lower is None or is_negative(simplify_dim(lower - least))
        if above and below:
            return b.full_of(op.result.shape, True, torch.bool)
        if is_negative(simplify_dim(diagonal - least)):
            return b.full_of(op.result.shape, False, torch.bool)
        return None


class TriMaskAnd(Rule):
    """The conjunction of two bands of the same size is a band."""

    name, roots = "tri_mask_and", ("logical_and",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        first, second = (without_leading_ones(v).op for v in op.operands)
        if first is None or second is None or not first.name == second.name == "tri_mask":
            return None
        if not same_shape(first.result.shape, second.result.shape):
            return None
        diagonal = smaller(first.attribute("diagonal"), second.attribute("diagonal"))
        lowers = [v for m in (first, second) if (v := m.attribute("lower")) is not None]
        lower = lowers[0] if len(lowers) == 1 else larger(*lowers) if lowers else None
        if diagonal is None or (lowers and lower is None):
            return None
        rows, columns = op.result.shape[-2:]
        made = b.tri_mask(rows=rows, columns=columns, diagonal=diagonal, lower=lower)
        return b.reshape_to(made, op.result.shape)


def smaller(a: Dim, b: Dim) -> Dim | None:
    """The provably smaller of two sizes, or None."""
    if is_nonnegative(simplify_dim(b - a)):
        return a
    return b if is_nonnegative(simplify_dim(a - b)) else None


def larger(a: Dim, b: Dim) -> Dim | None:
    """The provably larger of two sizes, or None."""
    least = smaller(a, b)
    return None if least is None else (b if least is a else a)


def position_rules() -> list[Rule]:
    """All rules about positions."""
    return [
        IndexAsView(),
        ComparePositions(),
        EqualPositions(),
        RunningSumOfOneNumber(),
        TriMaskAlways(),
        TriMaskAnd(),
    ]
