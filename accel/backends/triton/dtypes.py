"""How each torch dtype is stored, and what scalars of it are computed in, in Triton.

As for CPUs: small floats compute in float32 and are rounded where they are stored or cast; bool is
a byte in memory and an int1 in registers. Conversions to float8, and those of sub-byte integers,
are arithmetic on their bits, which is exact, means the same on every architecture, and rounds and
overflows as torch does.
"""

from __future__ import annotations

import torch

from accel.backends.loops.dtypes import compute as compute
from accel.backends.loops.dtypes import is_known as is_known
from accel.backends.loops.dtypes import is_signed as is_signed
from accel.backends.loops.dtypes import storage_type
from accel.backends.triton import float8
from accel.backends.triton.text import Block, Expr, element_type, number, solid
from accel.ir.types import SUB_BYTE_BITS

_STORED_AS = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "uint8",
    torch.float8_e5m2: "uint8",
    torch.bool: "int1",
}
_POINTERS = {
    "float64": "*fp64", "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16",
    "int1": "*i1", "int8": "*i8", "int16": "*i16", "int32": "*i32", "int64": "*i64",
    "uint8": "*u8", "uint16": "*u16", "uint32": "*u32", "uint64": "*u64",
}  # fmt: skip


def storage(dtype: torch.dtype) -> str:
    """Element type in memory, as Triton names it (without "tl.")."""
    return storage_type(dtype, _STORED_AS)


def pointer(stored: str) -> str:
    """The pointer type of a kernel's signature: float16 -> *fp16."""
    return _POINTERS[stored]


def scratch(kind: str) -> str:
    """Element type of scratch memory for values computed in `kind`."""
    return "int1" if kind == "bool" else kind


def width(kind: str) -> int:
    """Bytes of an element of scratch memory."""
    return 1 if kind in ("int1", "bool") else int(getattr(torch, kind).itemsize)


def from_storage(loaded: Expr, dtype: torch.dtype, block: Block) -> Expr:
    """A loaded element (not of a sub-byte dtype) as a scalar to compute with."""
    if dtype in (torch.float16, torch.bfloat16):
        return Expr(f"{loaded}.to(tl.float32)", "float32", loaded.dims)
    if dtype == torch.float8_e5m2:
        byte = block.let(str(loaded), "uint8", loaded.dims, "byte")
        half = f"({byte}.to(tl.uint16) << 8).to(tl.float16, bitcast=True)"
        return Expr(f"{half}.to(tl.float32)", "float32", loaded.dims)
    if dtype == torch.float8_e4m3fn:
        byte = block.let(str(loaded), "uint8", loaded.dims, "byte")
        return Expr(f"{float8.NAME}({byte})", "float32", loaded.dims)
    return Expr(loaded.text, compute(dtype), loaded.dims)


def to_storage(value: Expr, dtype: torch.dtype, block: Block) -> Expr:
    """A computed scalar as an element to store, rounded to nearest even."""
    value = solid(value)
    if dtype in (torch.float16, torch.bfloat16):
        return Expr(f"{value}.to({element_type(storage(dtype))})", storage(dtype), value.dims)
    if dtype == torch.float8_e5m2:
        return _to_float8(value, block, mantissa=2, bias=15)
    if dtype == torch.float8_e4m3fn:
        return _to_float8(value, block, mantissa=3, bias=7)
    return value


def _to_float8(value: Expr, block: Block, *, mantissa: int, bias: int) -> Expr:
    """The byte of a float8, rounded to nearest even.

    Normal numbers round by carrying in float32's own bits; below the smallest normal, adding a
    number whose last bit is float8's last bit rounds in hardware. Too large a number becomes
    infinite (e5m2) or the largest one (e4m3fn), as in torch from 2.13 on; before, the latter was
    NaN.
    """
    dims = value.dims

    def let(text: str, kind: str, stem: str) -> Expr:
        return block.let(text, kind, dims, stem)

    shift = 23 - mantissa
    raw = let(f"{value}.to(tl.int32, bitcast=True)", "int32", "raw")
    sign = let(f"({raw} >> 24) & 0x80", "int32", "sign")
    size = let(f"{raw} & 0x7FFFFFFF", "int32", "size")
    half = (1 << (shift - 1)) - 1
    even = let(f"({size} >> {shift}) & 1", "int32", "even")
    moved = (127 - bias) << mantissa
    normal = let(f"(({size} + {half} + {even}) >> {shift}) - {moved}", "int32", "normal")
    magic = 2.0 ** (23 - mantissa - bias + 1)
    bits = int.from_bytes(torch.tensor(magic).numpy().tobytes(), "little")
    tiny = let(
        f"({size}.to(tl.float32, bitcast=True) + {magic!r}).to(tl.int32, bitcast=True) - {bits}",
        "int32",
        "tiny",
    )
    limit = (127 - bias + 1) << 23  # float32's bits of the smallest normal float8
    byte = let(f"tl.where({size} < {limit}, {tiny}, {normal})", "int32", "byte")
    largest = 0x7E if mantissa == 3 else 0x7C
    byte = let(f"tl.where({byte} > {largest}, {largest}, {byte})", "int32", "byte")
    byte = let(f"tl.where({size} > 0x7F800000, 0x7F, {byte})", "int32", "byte")
    return Expr(f"({byte} | {sign}).to(tl.uint8)", "uint8", dims)


def rounded(value: Expr, dtype: torch.dtype, block: Block) -> Expr:
    """A scalar rounded to a dtype and back: what an explicit cast to a small float does."""
    if not (dtype.is_floating_point and dtype.itemsize < 4):
        return value
    stored = to_storage(value, dtype, block)
    return from_storage(Expr(stored.text, "stored", value.dims), dtype, block)


def from_byte(byte: Expr, place: Expr, dtype: torch.dtype, block: Block) -> Expr:
    """Element number `place` of a byte of packed sub-byte elements."""
    width = SUB_BYTE_BITS[dtype]
    dims = byte.dims | place.dims
    shift = f"({place}) * {width}" if width != 1 else f"{place}"
    text = f"({byte}.to(tl.int32) >> ({shift})) & {(1 << width) - 1}"
    entry = block.let(text, "int32", dims, "entry")
    if is_signed(dtype):
        sign = 1 << (width - 1)
        return Expr(f"(({entry} ^ {sign}) - {sign}).to(tl.int8)", "int8", dims)
    return Expr(f"{entry}.to(tl.uint8)", "uint8", dims)


def cast(value: Expr, kind: str) -> Expr:
    """Between compute types, neither of them bool unless both are."""
    if value.kind == kind:
        return value
    return Expr(f"{solid(value)}.to({element_type(kind)})", kind, value.dims)


def _fits(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a small float holds every value of the source: bytes, or narrower ones."""
    if target.itemsize == 1 or source == torch.bool:
        return False
    return source in SUB_BYTE_BITS or source.itemsize == 1


def convert(value: Expr, source: torch.dtype, target: torch.dtype, block: Block) -> Expr:
    """`Tensor.to` on one scalar, both sides in their compute types."""
    have, want = compute(source), compute(target)
    if target == torch.bool:
        if source == torch.bool:
            return value
        return Expr(f"({solid(value)} != {number(0, have)})", "bool", value.dims)
    if target.is_floating_point:
        wide = cast(value, want)
        return wide if source == target or _fits(source, target) else rounded(wide, target, block)
    if source.is_floating_point and want not in ("int32", "int64"):
        # As CUDA does: through an integer that holds what the small one wraps.
        return cast(cast(value, "int64"), want)
    return cast(value, want)
