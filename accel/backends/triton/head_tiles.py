"""Heads of queries, keys and values as matrices that TMA copies blocks of rows of.

[B, H, S, D] in memory, [B, S, H * D] as a projection leaves it, or a part of a fused one: in each
of them the rows of a head lie a constant stride apart, in one matrix that is the whole argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from accel.backends.loops.index import Affine, Axis, Indexer, exact_quotient
from accel.backends.loops.trace import Index
from accel.backends.triton.attention_loop import over, padded
from accel.backends.triton.attention_plan import Plan
from accel.backends.triton.attention_tiles import OverlappedTile
from accel.backends.triton.maps import MULTIPLE, Loads
from accel.backends.triton.operands import is_stored
from accel.ir.module import Op, Value
from accel.ir.types import Dim, same_dim

DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tiles:
    """An argument as a matrix of which a block of consecutive rows is one tile.

    `row` and `column` say where a head starts; `rows` is how many there are in all.
    """

    value: Value
    rows: Dim
    stride: int
    row: Affine
    column: Affine


def tiles_of(indexer: Indexer, value: Value, index: Index, width: int) -> Tiles | None:
    """`value` [B, H, rows, width] at `index`, perhaps behind views; None if TMA cannot copy it."""
    if not is_stored(value):
        return None
    loads = Loads(indexer)
    loads.element(value, index)
    if len(loads.found) != 1:
        return None
    place, flat = loads.found[0]
    row, column = index[2].single_axis, index[3].single_axis
    if row is None or column is None or flat.coefficient(column) != 1:
        return None
    stride = flat.coefficient(row)
    if not isinstance(stride, int) or stride <= 0 or stride * place.dtype.itemsize % MULTIPLE:
        return None
    down, across = Affine(), Affine()
    for part in _terms(flat, (row, column)):
        whole = _quotient(part, stride)
        down, across = (down.plus(whole), across) if whole else (down, across.plus(part))
    low, high = indexer.range(across)
    if not (isinstance(low, int) and isinstance(high, int) and low >= 0 and high + width <= stride):
        return None
    rows = exact_quotient(place.type.numel(), stride)
    return None if rows is None else Tiles(place, rows, stride, down, across)


def _terms(flat: Affine, without: Sequence[Axis]) -> list[Affine]:
    parts = [Affine(0, ((atom, c),)) for atom, c in flat.terms if atom not in without]
    return [*parts, Affine(flat.constant)] if flat.constant != 0 else parts


def _quotient(part: Affine, stride: int) -> Affine | None:
    """The part in rows; None if it is not whole ones."""
    if not part.terms:
        whole = exact_quotient(part.constant, stride)
        return None if whole is None else Affine(whole)
    ((atom, coefficient),) = part.terms
    whole = exact_quotient(coefficient, stride)
    return None if whole is None else Affine(0, ((atom, whole),))


# -- which attentions have them -----------------------------------------------------------------


def reason(op: Op) -> str | None:
    """Why an attention has no such kernel, whatever its memory layout is; None if it has one."""
    q, k, v, *_ = op.arguments()
    if q.dtype not in DTYPES:
        return f"attention of {q.dtype} by wgmma"
    if any(padded(int(x.shape[3])) != x.shape[3] or x.shape[3] < 64 for x in (q, v)):
        return f"heads of size {q.shape[3]} and {v.shape[3]} by TMA"
    causal, offset = bool(op.attribute("causal")), op.attribute("offset")
    if causal and not (isinstance(offset, int) and offset >= 0):
        return "queries before the first key"
    if op.attribute("window") is not None:
        sizes = (q.shape[2], k.shape[2])
        return None if causal and fits(*sizes, offset) else "queries behind the last key"
    return None


def fits(queries: Dim, keys: Dim, offset: Dim) -> bool:
    """Whether under a causal mask the last query sees no more keys than there are."""
    if same_dim(queries, keys) and offset == 0:
        return True
    known = isinstance(queries, int) and isinstance(keys, int) and isinstance(offset, int)
    return known and queries + offset <= keys


def shifts(keys: Dim, columns: int) -> bool:
    """Whether the last block of keys ends with them: it has keys of the block before, and none of
    the next batch."""
    return isinstance(keys, int) and keys >= columns and keys % columns != 0


def operands_reason(plan: Plan, tile: OverlappedTile) -> str | None:
    """Why TMA does not bring these operands in these tiles; None if it does."""
    return operands_of(plan, plan.indexer, tile)[1]


def operands_of(
    plan: Plan, indexer: Indexer, tile: OverlappedTile
) -> tuple[list[Tiles], str | None]:
    _, k, v, *_ = plan.op.arguments()
    found = [
        tiles_of(indexer, value, index, int(value.shape[3]))
        for value, index in ((plan.queries, plan.query), (k, plan.key), (v, plan.value))
    ]
    made = [t for t in found if t is not None]
    if len(made) < 3:
        return made, "operands that are no matrices that TMA can copy"
    keys = k.shape[2]
    if over(keys, tile.columns) and not shifts(keys, tile.columns) and made[2].row.terms:
        # Values beyond the end have the weight 0, but 0 times what is no number is none.
        return made, "blocks of keys that overrun into the next batch"
    return made, None
