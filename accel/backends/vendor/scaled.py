"""cuBLAS's products of float8 codes with scales, and when they are faster than generated ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from accel.ir.capability import LibraryMatch
from accel.ir.module import Op, Value
from accel.ir.types import Dim, product, same_shape

NAME = "torch.scaled_mm"
_MULTIPLE = 16  # of rows of a weight and their length
_RESULTS = (torch.float16, torch.bfloat16)
_FIRST_CAPABILITY = 89  # with tensor cores of float8
# Rows of x. A generated kernel of fewer is bound by the weight's stream, and faster (1.2 times on
# an H200); with more cuBLAS is: 1.1 to 1.8 times up to 128 rows, 2 to 2.5 times from 512 on.
_FEW = 4


@dataclass
class _Scaled:
    """A product of codes, as one call computes it.

    Attributes:
        ops: the linear and what follows it, in order.
        copies: conversions of its operands, which others may read too.
        first: whose scale is multiplied first: "row", "column", or "one" where both are numbers.
    """

    ops: list[Op]
    copies: list[Op] = field(default_factory=list)
    first: str = "one"


class ScaledLinear:
    """`torch.scaled_mm`: codes of float8 times codes, the scales of rows and columns (or one of
    each), a bias, one rounding. `capability`: of the GPU, 90 for sm_90."""

    name = NAME

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def match(self, op: Op) -> LibraryMatch | None:
        found = _find(op) if self.capability >= _FIRST_CAPABILITY else None
        if found is None:
            return None
        dtype = str(found.ops[-1].result.dtype).removeprefix("torch.")
        options = (("first", found.first), ("dtype", dtype))
        return LibraryMatch(NAME, found.ops, options, found.copies)


def is_faster(op: Op, capability: int) -> str | None:
    """Why cuBLAS multiplies the codes of a linear; None where a generated kernel is faster, or the
    only one."""
    rows = product(op.result.shape[:-1])
    if isinstance(rows, int) and rows <= _FEW:
        return None
    if capability < _FIRST_CAPABILITY or _find(op) is None:
        return None
    return "cuBLAS multiplies codes of float8 faster"


def _find(op: Op) -> _Scaled | None:
    if op.name != "linear" or len(op.operands) != 2 or op.operands[0] is op.operands[1]:
        return None
    casts = [v.op for v in op.operands if v.op is not None and v.op.name == "cast"]
    if len(casts) != 2 or any(c.operands[0].dtype != torch.float8_e4m3fn for c in casts):
        return None
    weight = op.operands[1]
    whole = all(isinstance(d, int) and d > 0 and d % _MULTIPLE == 0 for d in weight.shape)
    if not whole or op.result.dtype != torch.float32:
        return None
    found = _Scaled([op], casts)
    value, kinds = op.result, []
    for _ in range(2):
        user, other = _joined(value, "mul")
        if user is None or other is None:
            return None
        kinds.append(_kind(other, value))
        found.ops.append(user)
        value = user.result
    if sorted(kinds) == ["column", "row"]:
        found.first = kinds[0]
    elif kinds != ["one", "one"]:
        return None
    user, other = _joined(value, "add")
    if user is not None and other is not None:
        if _kind(other, value) != "column" or other.op is None or other.op.name != "cast":
            return None
        found.copies.append(other.op)
        found.ops.append(user)
        value = user.result
    last = value.single_user
    if last is None or last.name != "cast" or last.result.dtype not in _results(found):
        return None
    bias = found.copies[2:]
    if any(b.operands[0].dtype != last.result.dtype for b in bias):
        return None
    found.ops.append(last)
    return found


def _results(found: _Scaled) -> tuple[torch.dtype, ...]:
    return _RESULTS if found.first == "one" else (torch.bfloat16,)


def _joined(value: Value, name: str) -> tuple[Op | None, Value | None]:
    """The op of this name that alone reads a value without changing its shape, and what else it
    reads."""
    user = value.single_user
    if user is None or user.name != name or not same_shape(user.result.shape, value.shape):
        return None, None
    first, second = user.operands
    return user, second if first is value else first


def _kind(scale: Value, value: Value) -> str:
    """What a scale (or bias) of float32 is one for: "row", "column", "one", or "" for else."""
    shape, whole = tuple(scale.shape), tuple(value.shape)
    if scale.dtype != torch.float32:
        return ""
    if all(_is_one(d) for d in shape):
        return "one"
    if len(shape) == len(whole) and _is_one(shape[-1]) and same_shape(shape[:-1], whole[:-1]):
        return "row"
    ahead = all(_is_one(d) for d in shape[:-1])
    return "column" if ahead and same_shape(shape[-1:], whole[-1:]) else ""


def _is_one(size: Dim) -> bool:
    return isinstance(size, int) and size == 1
