"""Masks that a model keeps as a tensor, and what it makes of them with numbers.

    self.register_buffer("bias", torch.tril(torch.ones(1024, 1024)))
    scores.masked_fill(self.bias[:length, :length] == 0, float("-inf"))

`read_stored` computes such a mask on the whole tensor (slices and elementwise ops change places),
so that its values can be looked at; `chosen` sees through a mask that was written as two numbers
and compared again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.ir.module import Op, Value, constant_name
from accel.ir.op import Trait
from accel.ir.patterns import splat_value
from accel.ir.storage import WeightStore
from accel.ir.types import same_shape

_MOST_ELEMENTS = 1 << 26
_COMPARISONS = {
    "eq": torch.eq,
    "ne": torch.ne,
    "gt": torch.gt,
    "ge": torch.ge,
    "lt": torch.lt,
    "le": torch.le,
}


@dataclass(frozen=True)
class StoredMask:
    """A mask is the part of `matrix` [R, C] that starts at `row` and `column`."""

    matrix: Tensor
    row: int = 0
    column: int = 0


def read_stored(value: Value, weights: WeightStore) -> StoredMask | None:
    """The values of a mask [1..., rows, columns] that follows from one stored tensor.

    None where it follows from something else as well, or the slices begin at symbolic places.
    """
    name = constant_name(value)
    if name is not None:
        lead = value.shape[:-2]
        if len(value.shape) < 2 or not value.type.is_static or any(d != 1 for d in lead):
            return None
        tensor = weights.tensor(name)
        if tensor.numel() > _MOST_ELEMENTS or not _is_mask(tensor.dtype):
            return None
        return StoredMask(tensor.reshape(tensor.shape[-2:]))
    op = value.op
    if op is None or not op.operands:
        return None
    if op.name == "slice":
        return _sliced(op, weights)
    if op.name == "reshape" and same_shape(op.operands[0].shape[-2:], value.shape[-2:]):
        return read_stored(op.operands[0], weights)
    if not op.has(Trait.ELEMENTWISE) or len(op.results) != 1:
        return None
    return _computed(op, weights)


def _is_mask(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype in (torch.bool, torch.uint8, torch.int64, torch.int32)


def _sliced(op: Op, weights: WeightStore) -> StoredMask | None:
    rank = len(op.result.shape)
    axis, start = op.attribute("axis") % rank, op.attribute("start")
    if axis < rank - 2 or op.attribute("step") != 1 or not isinstance(start, int):
        return None
    inner = read_stored(op.operands[0], weights)
    if inner is None:
        return None
    row = inner.row + (start if axis == rank - 2 else 0)
    return StoredMask(inner.matrix, row, inner.column + (start if axis == rank - 1 else 0))


def _computed(op: Op, weights: WeightStore) -> StoredMask | None:
    """An elementwise op of stored masks and numbers."""
    given: list[Any] = []
    first: StoredMask | None = None
    for operand in op.operands:
        number = splat_value(operand)
        if number is not None:
            given.append(torch.tensor(number, dtype=operand.dtype))
            continue
        found = read_stored(operand, weights)
        if found is None:
            return None
        if first is not None and (found.row, found.column) != (first.row, first.column):
            return None
        first = first or found
        given.append(found.matrix)
    if first is None or op.definition.evaluate is None:
        return None
    made = op.definition.evaluate(*given, **op.definition.complete_attributes(op.attributes))
    same = isinstance(made, Tensor) and made.dim() == 2
    return StoredMask(made, first.row, first.column) if same else None


def chosen(op: Op | None) -> tuple[Value, bool] | None:
    """(condition, what it must be) of a truth that follows from where(condition, number, number).

    Masks of 0 and minus infinity are made boolean again so: `mask == 0`, `mask.bool()`.
    """
    if op is None:
        return None
    against: Any = 0
    if op.name in _COMPARISONS:
        test, against = _COMPARISONS[op.name], splat_value(op.operands[1])
    elif op.name == "cast" and op.result.dtype == torch.bool:
        test = torch.ne
    else:
        return None
    source = op.operands[0]
    made = source.op
    if made is None or made.name != "where" or against is None:
        return None
    truths = []
    for operand in made.operands[1:]:
        number = splat_value(operand)
        if number is None:
            return None
        pair = (torch.tensor(n, dtype=source.dtype) for n in (number, against))
        truths.append(bool(test(*pair)))
    return (made.operands[0], truths[0]) if truths[0] is not truths[1] else None
