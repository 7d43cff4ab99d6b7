"""The form of a deferred norm: what `defer_norms` writes, and `select_products` puts into kernels.

A product that makes x also adds up what it has of each row of x, `PART` columns at a time
(`parts_of`); a product that reads x multiplies its sums, which no rounding has touched yet, by one
number a row (`scaling_of`). Both are plain ops, so that they can be found wherever they are:

    parts     %f = cast(%x)  %q = mul(%f, %f)  %g = reshape(%q) [.., T, 128]  %p = sum(%g) [.., T]
    scaling   %t = linear(cast(%x), cast(%w))  %u = mul(%t, %r [.., 1])  %z = cast(%u)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.types import same_dim, same_shape

PART = 128  # columns whose sum a product leaves: what every kernel's tile is a multiple of
NARROW = (torch.float16, torch.bfloat16)


def emit_parts(b: Builder, x: Value, *, sums: bool) -> list[Value]:
    """Sums over parts of the rows of x [.., N]: of x (if `sums`), and of its squares; each float32
    [.., N / PART]."""
    wide = b.cast(x, dtype=torch.float32)
    terms = [*([wide] if sums else []), b.mul(wide, wide)]
    *lead, columns = x.shape
    shape = (*lead, int(columns) // PART, PART)
    return [b.sum(b.reshape(t, shape=shape), axes=(len(lead) + 1,), keepdim=False) for t in terms]


def parts_of(x: Value) -> list[Op]:
    """The ops that add up x in parts, if any do; x's other users are no part of it."""
    found: list[Op] = []
    for wide in x.users:
        if wide.name != "cast" or wide.result.dtype != torch.float32 or x.dtype not in NARROW:
            continue
        inner: list[Op] = []
        for user in wide.result.users:
            squared = user.name == "mul" and user.operands[0] is user.operands[1]
            chain = _summed(user.result) if squared else None
            made = [user, *chain] if chain is not None else _summed_by(user, wide.result)
            if made is None:
                break
            inner += made
        else:
            found += [wide, *dict.fromkeys(inner)]
    return found


def _summed(value: Value) -> list[Op] | None:
    user = value.single_user
    return None if user is None else _summed_by(user, value)


def _summed_by(user: Op, value: Value) -> list[Op] | None:
    """[reshape, sum] of a value over parts of its last axis, if that is what its user begins."""
    shape = (*value.shape[:-1], int(value.shape[-1]) // PART, PART)
    if user.name != "reshape" or not same_shape(user.result.shape, shape):
        return None
    total = user.result.single_user
    if total is None or total.name != "sum" or total.attribute("keepdim"):
        return None
    return [user, total] if tuple(total.attribute("axes")) == (len(shape) - 1,) else None


def widened(linear: Op) -> list[Op]:
    """The conversions of x and of a stored weight that a product in float32 has before it."""
    found: list[Op] = []
    for value in linear.operands[:2]:
        made = value.op
        if made is None or made.name != "cast" or value.dtype != torch.float32:
            return []
        if made.operands[0].dtype not in NARROW:
            return []
        found.append(made)
    x, weight = (op.operands[0] for op in found)
    stored = weight.op is not None and weight.op.name == "constant"
    return found if stored and x.dtype == weight.dtype and len(linear.operands) == 2 else []


def scaling_of(linear: Op) -> list[Op]:
    """What makes 16-bit numbers of such a product's float32 sums, in order: numbers of a row or of
    a column that multiply them or are added, and the conversion, which is the last op."""
    if not widened(linear):
        return []
    found: list[Op] = []
    value = linear.result
    while True:
        user = value.single_user
        if user is None or not user.has(Trait.ELEMENTWISE):
            return []
        if not same_shape(user.result.shape, value.shape):
            return []
        found += [
            made for v in user.operands if v is not value and (made := _beside(v)) is not None
        ]
        found.append(user)
        value = user.result
        if user.name == "cast":
            return found if value.dtype in NARROW else []


def statistics_of(scaling: Sequence[Op]) -> list[Op]:
    """The ops that make a row's numbers in `scaling` of sums over parts; none if they come from
    elsewhere."""
    found: dict[Op, None] = {}
    rows = [v for op in scaling for v in op.operands if v.shape and same_dim(v.shape[-1], 1)]
    pending = [v.op for v in rows]
    while pending:
        op = pending.pop()
        if op is None or not (op.name in ("sum", "full") or op.has(Trait.ELEMENTWISE)):
            return []
        if op in found or op.name == "full":
            continue
        found[op] = None
        if op.name != "sum":
            pending += [v.op for v in op.operands]
    return list(found)


def _beside(value: Value) -> Op | None:
    """The op that multiplies a number of each row with one of each column, or widens a stored bias,
    for one reader."""
    op = value.op
    if op is None or len(value.uses) != 1:
        return None
    if op.name == "cast":
        source = op.operands[0].op
        return op if source is not None and source.name == "constant" else None
    small = all(not same_shape(v.shape, value.shape) for v in op.operands)
    return op if op.name == "mul" and small else None
