"""Why a generator has no code for an op, whatever the code is made of."""

from __future__ import annotations

from accel.backends.loops import dtypes
from accel.ir.module import Op, Value
from accel.ir.types import SUB_BYTE_BITS

_LARGEST_SUPPORTED_RANK = 12


def type_reason(op: Op) -> str | None:
    """None if kernels know the dtypes and ranks of the op's operands and results."""
    for value in (*op.operands, *op.results):
        if not dtypes.is_known(value.dtype):
            return f"dtype {value.dtype}"
        if value.type.rank > _LARGEST_SUPPORTED_RANK:
            return f"rank {value.type.rank}"
    for value in op.operands:
        if value.dtype in SUB_BYTE_BITS and not is_stored(value):
            return "a sub-byte operand that is not a stored weight"
    if any(r.dtype in SUB_BYTE_BITS for r in op.results):
        return "a result of less than a byte an element"
    return None


def is_stored(value: Value) -> bool:
    """Whether kernels get the value packed: weights are, and region arguments stand for them."""
    return value.op is None or value.op.name == "constant"
