"""Sums over rows, which leave one number for each column (a bias's gradient, say)."""

from __future__ import annotations

from accel.ir.module import Op, Value

_AROUND = ("cast", "reshape")


def column_sum(value: Value) -> Op | None:
    """The sum over all axes but the last one that a value is, casts and reshapes after it aside.

    None if it is no such sum, or if the number of columns is not known.
    """
    op = value.op
    while op is not None and op.name in _AROUND:
        op = op.operands[0].op
    if op is None or op.name != "sum":
        return None
    x = op.operands[0]
    axes = sorted(int(a) % x.type.rank for a in op.attribute("axes"))
    return op if axes == list(range(x.type.rank - 1)) and isinstance(x.shape[-1], int) else None
