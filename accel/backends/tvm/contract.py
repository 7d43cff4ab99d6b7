"""Matrix products of few rows as reductions.

With one row of x, a linear reads its whole weight for one multiplication an element: memory is the
limit, and a plain reduction over each weight row reaches it, decoding of compressed weights
included. A few rows share each read. For many rows a vendor's blocked product is far better.
"""

from __future__ import annotations

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.types import product

MOST_ROWS = 8


def reason(op: Op) -> str | None:
    """None if a kernel of kind "gemv" may hold this contraction, else the reason why not."""
    if op.name != "linear":
        return f"accel.{op.name} has no generated code"
    x = op.operands[0]
    rows = product(x.shape[:-1])
    if not x.dtype.is_floating_point:
        return f"a linear of {x.dtype}"
    if not isinstance(rows, int) or rows > MOST_ROWS:
        return f"a linear of {rows} rows"
    return None


def expand_linear(op: Op) -> Value:
    """sum over k of x[m, k] w[n, k], plus the bias, before `op`."""
    b = Builder(before=op)
    x, weight, bias = op.arguments()
    rows, depth, columns = product(x.shape[:-1]), x.shape[-1], weight.shape[0]
    left = b.reshape(b.widen(x), shape=(rows, 1, depth))
    right = b.reshape(b.widen(weight), shape=(1, columns, depth))
    total = b.sum(b.mul(left, right), axes=(2,))
    if bias is not None:
        total = b.add(total, b.widen(bias))
    return b.cast_to(b.reshape_to(total, op.result.shape), op.result.dtype)
