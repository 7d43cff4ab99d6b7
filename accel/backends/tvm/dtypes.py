"""How each torch dtype is stored in buffers and what scalars of it are computed in.

Small floats compute in float32 and are rounded where they are stored or cast; bool is a byte in
memory and a condition in registers. bfloat16 and float8 are moved as integers and converted by bit
arithmetic, which is exact, handles NaN and denormals, and vectorizes on any CPU. Sub-byte integers
are read from packed rows (element 0 in the lowest bits, rows rounded up to whole bytes).
"""

from __future__ import annotations

import math

import torch

from accel.backends.loops.dtypes import compute as compute
from accel.backends.loops.dtypes import is_known as is_known
from accel.backends.loops.dtypes import is_signed as is_signed
from accel.backends.loops.dtypes import storage_type
from accel.backends.tvm import tir
from accel.backends.tvm.tir import Block, Expr, bits, cast, const, intrinsic, select
from accel.ir.types import SUB_BYTE_BITS

_STORED_AS = {
    torch.float16: "float16",
    torch.bfloat16: "uint16",
    torch.float8_e4m3fn: "uint8",
    torch.float8_e5m2: "uint8",
    torch.bool: "uint8",
}
READ_ONLY = {torch.float8_e5m2, *SUB_BYTE_BITS}
_BEYOND = int(torch.tensor(math.inf).to(torch.float8_e4m3fn).view(torch.uint8))  # 448 or NaN
ONLY_CAST = {torch.float8_e4m3fn, *READ_ONLY}  # no other op has code for them


def storage(dtype: torch.dtype) -> str:
    """Element type of a buffer."""
    return storage_type(dtype, _STORED_AS)


def is_rounded(dtype: torch.dtype) -> bool:
    """Whether scalars of the dtype are computed with more precision than they are stored with."""
    return dtype.is_floating_point and dtype.itemsize < 4


def from_storage(value: Expr, dtype: torch.dtype, block: Block) -> Expr:
    """A loaded element (not of a sub-byte dtype) as a scalar to compute with."""
    if dtype == torch.bool:
        return tir.ne(value, const(0, "uint8"))
    if dtype == torch.bfloat16:
        return bits(cast(value, "uint32") << const(16, "uint32"), "float32")
    if dtype == torch.float16:
        return cast(value, "float32")
    if dtype == torch.float8_e5m2:
        half = bits(cast(value, "uint16") << const(8, "uint16"), "float16")
        return cast(half, "float32")
    if dtype == torch.float8_e4m3fn:
        return _from_e4m3(block.let(cast(value, "uint32"), "byte"), block)
    return value


def _from_e4m3(byte: Expr, block: Block) -> Expr:
    """The 7 low bits, moved to float32's exponent, are the value divided by 2^120."""
    low = block.let(byte & const(0x7F, "uint32"), "low")
    scaled = bits(low << const(20, "uint32"), "float32") * tir.f32(2.0**120)
    magnitude = select(tir.eq(low, const(0x7F, "uint32")), tir.f32(math.nan), scaled)
    sign = (byte & const(0x80, "uint32")) << const(24, "uint32")
    return bits(bits(block.let(magnitude, "magnitude"), "uint32") | sign, "float32")


def to_storage(value: Expr, dtype: torch.dtype, block: Block) -> Expr:
    """A computed scalar as an element to store, rounded to nearest even."""
    if dtype == torch.bool:
        return cast(value, "uint8")
    if dtype == torch.bfloat16:
        return cast(_bfloat16_bits(value, block), "uint16")
    if dtype == torch.float16:
        return cast(value, "float16")
    if dtype == torch.float8_e4m3fn:
        return cast(_e4m3_bits(value, block), "uint8")
    return value


def _e4m3_bits(value: Expr, block: Block) -> Expr:
    """The nearest float8_e4m3fn, ties to even, as uint32; beyond 464 what torch makes of it."""
    raw = block.let(bits(block.let(value, "wide"), "uint32"), "raw")
    size = block.let(raw & const(0x7FFFFFFF, "uint32"), "size")
    # Below 2^-6 steps are 2^-9: the last bit of a float32 near 2^14.
    step = tir.f32(2.0**14)
    small = bits(bits(size, "float32") + step, "uint32") - bits(step, "uint32")
    odd = (size >> const(20, "uint32")) & const(1, "uint32")
    large = size + odd + const(0x7FFFF, "uint32") - const(120 << 23, "uint32")
    large = large >> const(20, "uint32")
    made = select(size < const(121 << 23, "uint32"), small, large)
    made = select(size > const(0x43E80000, "uint32"), const(_BEYOND, "uint32"), made)  # 464
    made = select(size > const(0x7F800000, "uint32"), const(0x7F, "uint32"), made)
    return made | ((raw >> const(24, "uint32")) & const(0x80, "uint32"))


def _bfloat16_bits(value: Expr, block: Block) -> Expr:
    """The upper half of a float32, rounded to nearest even, as uint32; NaN stays NaN."""
    value = block.let(value, "wide")
    raw = block.let(bits(value, "uint32"), "raw")
    odd = (raw >> const(16, "uint32")) & const(1, "uint32")
    # A NaN's rounding could carry into the sign or clear its payload, so it gets its own bits.
    biased = cast(raw, "uint64") + cast(odd + const(0x7FFF, "uint32"), "uint64")
    biased = select(tir.is_nan(value), const(0x7FC00000, "uint64"), biased)
    return cast((biased >> const(16, "uint64")) & const(0xFFFF, "uint64"), "uint32")


def rounded(value: Expr, dtype: torch.dtype, block: Block) -> Expr:
    """A scalar rounded to a dtype and back: what an explicit cast to a small float does."""
    if dtype == torch.bfloat16:
        return bits(_bfloat16_bits(value, block) << const(16, "uint32"), "float32")
    if dtype == torch.float16:
        return cast(block.let(cast(value, "float16"), "half"), "float32")
    if dtype == torch.float8_e4m3fn:
        return _from_e4m3(block.let(_e4m3_bits(value, block), "byte"), block)
    return value


def from_byte(byte: Expr, place: Expr, dtype: torch.dtype, block: Block) -> Expr:
    """Element number `place` of a byte of packed sub-byte elements."""
    width = SUB_BYTE_BITS[dtype]
    shift = cast(place, "int32") * const(width, "int32")
    field = (cast(byte, "int32") >> shift) & const((1 << width) - 1, "int32")
    if is_signed(dtype):
        sign = const(1 << (width - 1), "int32")
        return cast((block.let(field, "field") ^ sign) - sign, "int8")
    return cast(field, "uint8")


def convert(value: Expr, source: torch.dtype, target: torch.dtype, block: Block) -> Expr:
    """`Tensor.to` on one scalar, both sides in their compute types."""
    have, want = compute(source), compute(target)
    if target == torch.bool:
        return tir.ne(value, const(0, have)) if source != torch.bool else value
    if target.is_floating_point:
        return rounded(cast(value, want), target, block) if source != target else value
    if source.is_floating_point:
        return _float_to_integer(value, have, want)
    return cast(value, want)


def _float_to_integer(value: Expr, have: str, want: str) -> Expr:
    """Truncates. Out of range, where C leaves it open, the result is the nearest or wraps."""
    wide = want if want in ("int32", "int64") else "int64"
    whole = intrinsic(wide, "llvm.fptosi.sat", value)
    if want == "uint64":
        # Above the signed range the difference to 2^63 is what fits.
        limit = const(2.0**63, have)
        high = intrinsic(wide, "llvm.fptosi.sat", value - limit)
        flipped = high ^ const(-(2**63), wide)
        whole = select(value >= limit, flipped, whole)
    return cast(whole, want)
