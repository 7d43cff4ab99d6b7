"""GELU and its slope, in both forms (Hendrycks and Gimpel, 2016).

The tanh form is computed by the identity (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), which costs one
exponential and loses no digits where tanh(u) is close to -1.
"""

from __future__ import annotations

import math

from accel.backends.triton import dtypes
from accel.backends.triton.text import Block, Expr, dims_of, number, solid
from accel.ir.module import Op

_SLOPE = math.sqrt(2 / math.pi)
_CUBE = 0.044715 * _SLOPE


def gelu(op: Op, args: list[Expr], block: Block) -> Expr:
    """x times the normal distribution's share below x."""
    kind, x = dtypes.compute(op.result.dtype), solid(args[0])
    share = _share(op, x, kind, block)
    return Expr(f"{x} * {share}", kind, x.dims)


def gelu_backward(op: Op, args: list[Expr], block: Block) -> Expr:
    """grad times the slope at x."""
    kind, grad, x = dtypes.compute(op.result.dtype), *(solid(a) for a in args)
    share = _share(op, x, kind, block)
    square = block.let(f"{x} * {x}", kind, x.dims, "square")
    if op.attribute("approximate") == "tanh":
        inner = f"({number(_SLOPE, kind)} + {square} * {number(3 * _CUBE, kind)})"
        rise = f"{share} * (1.0 - {share}) * 2.0 * {inner}"
    else:
        power = f"libdevice.exp({square} * {number(-0.5, kind)})"
        rise = f"{power} * {number(1 / math.sqrt(2 * math.pi), kind)}"
    slope = block.let(f"{share} + {x} * ({rise})", kind, x.dims, "slope")
    return Expr(f"{grad} * {slope}", kind, dims_of(grad, x))


def _share(op: Op, x: Expr, kind: str, block: Block) -> Expr:
    if op.attribute("approximate") == "tanh":
        square = f"{x} * {x} * {number(2 * _CUBE, kind)}"
        inner = block.let(f"{x} * ({number(2 * _SLOPE, kind)} + {square})", kind, x.dims, "inner")
        power = block.let(f"libdevice.exp(-{inner})", kind, x.dims, "power")
        return block.let(f"1.0 / (1.0 + {power})", kind, x.dims, "share")
    root = number(math.sqrt(0.5), kind)
    erf = block.let(f"libdevice.erf({x} * {root})", kind, x.dims, "erf")
    return block.let(f"0.5 * {erf} + 0.5", kind, x.dims, "share")
