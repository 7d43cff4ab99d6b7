"""What generators of code share about dtypes: which they know, and what scalars are computed in.

Small floats compute in float32 and are rounded where they are stored or cast; sub-byte integers are
read from packed rows. How the small dtypes lie in memory is each generator's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from accel.ir.types import SUB_BYTE_BITS

_PLAIN = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint8: "uint8",
    torch.uint16: "uint16",
    torch.uint32: "uint32",
    torch.uint64: "uint64",
}
_SMALL = {torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool}


def is_known(dtype: torch.dtype) -> bool:
    if dtype in SUB_BYTE_BITS:
        return SUB_BYTE_BITS[dtype] in (1, 2, 4)
    return dtype in _PLAIN or dtype in _SMALL


def is_signed(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or not str(dtype).startswith("torch.uint")


def compute(dtype: torch.dtype) -> str:
    """Type of a scalar while it is computed with."""
    if dtype == torch.bool:
        return "bool"
    if dtype in SUB_BYTE_BITS:
        return "int8" if is_signed(dtype) else "uint8"
    return _PLAIN.get(dtype) or "float32"


def storage_type(dtype: torch.dtype, small: Mapping[torch.dtype, str]) -> str:
    """Element type in memory; `small` says what the small floats and bool are stored as."""
    if dtype in SUB_BYTE_BITS:
        return "uint8"
    return _PLAIN.get(dtype) or small[dtype]
