"""GELU and its slope, in both forms (Hendrycks and Gimpel, 2016), and the logistic function.

The tanh form is computed by the identity (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), which costs one
exponential and loses no digits where tanh(u) is close to -1. Where the result has 16 bits, so does
the other form: the logarithm of the normal distribution's lower tail is close to a polynomial. Of
numbers that had 16 bits the logistic function is computed to 20 bits, in half the instructions and
without a branch: products have it in their epilogues.
"""

from __future__ import annotations

import math

import torch

from accel.backends.triton import dtypes
from accel.backends.triton.text import Block, Expr, dims_of, number, solid
from accel.ir.module import Op, Value

_SLOPE = math.sqrt(2 / math.pi)
_CUBE = 0.044715 * _SLOPE
# log2 of that tail, log2(Phi(-a)), for 0 <= a < 6 (Phi(-6) = 1e-9), from the power 7 of a down; it
# keeps falling beyond. The tail is 7e-6 off at most, relatively. By reweighted least squares.
# One power less would rise beyond; two less gets 487 float16 numbers wrong, more than erf does.
# Groups of warps that take turns do not hide an epilogue altogether: an instruction for each of the
# 12608 x 3072 numbers of ViT-B/16's product costs 1.7 of 115 us on an H200.
_LOG_TAIL = (-1.7939014469448011e-06, 6.072861287975684e-05, -0.0009232049342244864,
             0.008476920425891876, -0.053891073912382126, -0.45854148268699646,
             -1.151214361190796, -1.0)  # fmt: skip


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


def short_sigmoid(x: Expr, kind: str, block: Block) -> Expr:
    """1 / (1 + exp(-x)) of a number that had 16 bits."""
    scaled = f"{x} * {number(-math.log2(math.e), kind)}"
    power = block.let(f"tl.exp2({scaled})", kind, x.dims, "power")
    return Expr(f"1.0 / (1.0 + {power})", kind, x.dims)


def had_16_bits(value: Value) -> bool:
    """Whether a value is a 16-bit float, or was one before casts."""
    while value.op is not None and value.op.name == "cast":
        value = value.op.operands[0]
    dtype: torch.dtype = value.dtype
    return dtype.is_floating_point and dtype.itemsize <= 2


def _share(op: Op, x: Expr, kind: str, block: Block) -> Expr:
    if op.attribute("approximate") == "tanh":
        square = f"{x} * {x} * {number(2 * _CUBE, kind)}"
        inner = block.let(f"{x} * ({number(2 * _SLOPE, kind)} + {square})", kind, x.dims, "inner")
        power = block.let(f"libdevice.exp(-{inner})", kind, x.dims, "power")
        return block.let(f"1.0 / (1.0 + {power})", kind, x.dims, "share")
    if op.result.dtype.itemsize == 2:
        return _short_share(x, kind, block)
    root = number(math.sqrt(0.5), kind)
    erf = block.let(f"libdevice.erf({x} * {root})", kind, x.dims, "erf")
    return block.let(f"0.5 * {erf} + 0.5", kind, x.dims, "share")


def _short_share(x: Expr, kind: str, block: Block) -> Expr:
    """Phi(x), in a third of erf's instructions. Of all float16 numbers, 44 get another GELU than
    the correctly rounded one; by way of erf, which loses the lower tail's digits, it is 454."""
    size = block.let(f"tl.abs({x})", kind, x.dims, "size")
    power = str(_LOG_TAIL[0])
    for factor in _LOG_TAIL[1:]:
        power = str(block.let(f"{power} * {size} + {factor}", kind, x.dims, "power"))
    tail = block.let(f"tl.exp2({power})", kind, x.dims, "tail")
    return block.let(f"tl.where({x} < 0.0, {tail}, 1.0 - {tail})", kind, x.dims, "share")
