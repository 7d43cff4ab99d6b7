"""What attention masks say: which part of a mask is a band around the diagonal.

A boolean mask is a conjunction of a band (causal, sliding window) and the rest; an additive mask is
a sum of such masks written as 0 and minus infinity, and biases. `MaskReader` takes them apart: by
structure (`tri_mask`, logical and, where, broadcasts) and, for stored masks, by their values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.ir.affine import is_nonnegative
from accel.ir.module import Op, Value, constant_name
from accel.ir.patterns import splat_value
from accel.ir.storage import WeightStore
from accel.ir.types import Dim, same_dim, same_shape, simplify_dim
from accel.passes.algebra import without_leading_ones
from accel.passes.position_rules import larger, smaller
from accel.passes.stored_masks import StoredMask, chosen, read_stored

# Scores this much lower than others have weight 0 after softmax, in every float format.
HIDDEN = -6e4
# Adding a score of ordinary size to this number gives this number, in float64 too.
ABSORBS = -1e30


@dataclass(frozen=True)
class Band:
    """Column j is seen from row i if j - i <= `upper` and j - i > `lower` (None: no bound)."""

    upper: Dim | None = None
    lower: Dim | None = None

    @property
    def is_everything(self) -> bool:
        return self.upper is None and self.lower is None

    def also(self, other: Band) -> Band | None:
        """The conjunction; None where symbolic bounds do not compare."""
        upper = self.upper if other.upper is None else other.upper
        if self.upper is not None and other.upper is not None:
            upper = smaller(self.upper, other.upper)
            if upper is None:
                return None
        lower = self.lower if other.lower is None else other.lower
        if self.lower is not None and other.lower is not None:
            lower = larger(self.lower, other.lower)
            if lower is None:
                return None
        return Band(upper, lower)

    def complement(self) -> Band | None:
        """What the band hides, if that is a band: it has one bound only."""
        if self.upper is not None and self.lower is None:
            return Band(lower=self.upper)
        if self.lower is not None and self.upper is None:
            return Band(upper=self.lower)
        return None

    def every_row_sees_something(self, rows: Dim, columns: Dim) -> bool:
        """Provably, for a mask of this size."""
        upper = simplify_dim(columns - 1) if self.upper is None else self.upper
        if not is_nonnegative(upper):
            return False
        if self.lower is None:
            return True
        # Row i sees (i + lower, i + upper] inside [0, columns): the last row is the critical one.
        not_empty = is_nonnegative(simplify_dim(upper - self.lower - 1))
        last = is_nonnegative(simplify_dim(columns - 1 - rows - self.lower))
        return not_empty and last


@dataclass(frozen=True)
class Mask:
    """A mask over [..., rows, columns], taken apart.

    `band` and `rest` hold together; `bias` are additive values on top. An entry of `rest` is a
    boolean value and whether it must be true (or else false) where a key is seen.
    """

    band: Band = field(default_factory=Band)
    rest: tuple[tuple[Value, bool], ...] = ()
    bias: tuple[Value, ...] = ()

    def also(self, other: Mask) -> Mask | None:
        band = self.band.also(other.band)
        if band is None:
            return None
        return Mask(band, (*self.rest, *other.rest), (*self.bias, *other.bias))


class MaskReader:
    """Takes masks of one module apart; remembers what stored ones say."""

    def __init__(self, weights: WeightStore) -> None:
        self.weights = weights
        self._stored: dict[tuple[Value, bool], Band | None] = {}

    def boolean(self, value: Value, rows: Dim, columns: Dim, wanted: bool = True) -> Mask:
        """A boolean mask as a band and the rest. It broadcasts to [..., rows, columns].

        With `wanted` false, the mask says which keys are hidden.
        """
        op = value.op
        whole = Mask(rest=((value, wanted),))
        if op is None:
            return whole
        if op.name == "full":
            return Mask() if op.attribute("value") is wanted else whole
        inner = without_leading_ones(value)
        if inner is not value:
            return self.boolean(inner, rows, columns, wanted)
        if op.name == "broadcast_to":
            return self.boolean(op.operands[0], rows, columns, wanted)
        if op.name == "logical_not":
            if op.operands[0].dtype != torch.bool:
                return whole
            return self.boolean(op.operands[0], rows, columns, not wanted)
        joins = op.name == ("logical_and" if wanted else "logical_or")
        if joins and all(v.dtype == torch.bool for v in op.operands):
            parts = [self.boolean(v, rows, columns, wanted) for v in op.operands]
            return parts[0].also(parts[1]) or whole
        truth = chosen(op)
        if truth is not None:
            return self.boolean(truth[0], rows, columns, wanted is truth[1])
        found: Band | None
        if op.name == "tri_mask" and same_shape(value.shape, (rows, columns)):
            band = _tri_band(op, columns)
            found = band if wanted else band.complement()
        else:
            found = self._stored_band(value, rows, columns, wanted)
        return whole if found is None else Mask(found)

    def additive(self, value: Value, rows: Dim, columns: Dim) -> Mask:
        """An additive mask as a band, boolean rest and biases.

        Adding 0 or minus infinity is only the same as hiding where every row sees something; the
        caller checks that (`Band.every_row_sees_something`), or keeps the mask as it is.
        """
        op = value.op
        whole = Mask(bias=(value,))
        if op is None:
            return whole
        number = splat_value(value)
        if number == 0:
            return Mask()
        inner = without_leading_ones(value)
        if inner is not value:
            return self.additive(inner, rows, columns)
        if op.name == "broadcast_to":
            return self.additive(op.operands[0], rows, columns)
        if op.name == "cast" and op.operands[0].dtype.is_floating_point:
            read = self.additive(op.operands[0], rows, columns)
            return whole if read.bias else read
        if op.name == "add":
            parts = [self.additive(v, rows, columns) for v in op.operands]
            return parts[0].also(parts[1]) or whole
        if op.name in ("mul", "div"):  # a mask that is scaled with the scores
            factor = splat_value(op.operands[1])
            read = self.additive(op.operands[0], rows, columns)
            scaled = isinstance(factor, float) and 0.02 <= factor <= 50
            return read if scaled and not read.bias else whole
        found = hidden_unless(op) if op.name == "where" else None
        if found is not None:
            condition, wanted, shown = found
            seen = self.boolean(condition, rows, columns, wanted)
            return seen.also(self.additive(shown, rows, columns)) or whole
        stored = self._stored_band(value, rows, columns, True)
        return whole if stored is None else Mask(stored)

    def is_repeated(self, value: Value, axis: int) -> bool:
        """Whether a stored value is the same all along the axis."""
        name = constant_name(value)
        if name is None:
            return False
        tensor = self.weights.tensor(name)
        return torch.equal(tensor, tensor.narrow(axis, 0, 1).expand_as(tensor))

    def _stored_band(self, value: Value, rows: Dim, columns: Dim, wanted: bool) -> Band | None:
        """The band that a stored mask spells out, or None if it is none."""
        if len(value.shape) < 2 or any(d != 1 for d in value.shape[:-2]):
            return None
        if not (same_dim(value.shape[-2], rows) and same_dim(value.shape[-1], columns)):
            return None
        if value.dtype != torch.bool and not value.dtype.is_floating_point:
            return None
        key = (value, wanted)
        if key not in self._stored:
            stored = read_stored(value, self.weights)
            self._stored[key] = None if stored is None else _part_band(stored, wanted)
        return self._stored[key]


def _part_band(stored: StoredMask, wanted: bool) -> Band | None:
    """The band of a part of a stored mask, counted from where the part begins."""
    band = band_of(stored.matrix if wanted else ~stored.matrix)
    if band is None:
        return None
    shift = stored.column - stored.row
    upper, lower = (
        None if d is None else simplify_dim(d - shift) for d in (band.upper, band.lower)
    )
    return Band(upper, lower)


def _tri_band(op: Op, columns: Dim) -> Band:
    upper, lower = op.attribute("diagonal"), op.attribute("lower")
    bounded = not is_nonnegative(simplify_dim(upper - columns + 1))
    return Band(upper if bounded else None, lower)


def hidden_unless(op: Op) -> tuple[Value, bool, Value] | None:
    """(condition, true, x) of where(condition, x, -big), (condition, false, x) the other way."""
    condition, x, y = op.operands
    for wanted, shown, hidden in ((True, x, y), (False, y, x)):
        low = splat_value(hidden)
        if isinstance(low, float) and low <= HIDDEN:
            return condition, wanted, shown
    return None


def band_of(mask: Tensor) -> Band | None:
    """The band of a [..., rows, columns] mask, boolean or of 0 and minus infinity; None if none."""
    matrix = mask.reshape(mask.shape[-2:])
    if mask.dtype == torch.bool:
        seen = matrix
    elif mask.dtype.is_floating_point:
        seen = matrix == 0
        if not bool((seen | (matrix <= HIDDEN)).all()):
            return None
    else:
        return None
    if not bool(seen.any()):
        return None
    rows, columns = matrix.shape
    distance = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    there = distance[seen]
    upper, lower = int(there.max()), int(there.min()) - 1
    if not torch.equal(seen, (distance <= upper) & (distance > lower)):
        return None
    return Band(
        upper if upper < columns - 1 else None,
        lower if lower >= 1 - rows else None,
    )
