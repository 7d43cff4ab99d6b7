"""Elements of less than a byte: stored packed, used unpacked.

Storage (the same as `accel.ir.storage`'s): rows of the last axis, element 0 in the lowest bits of
byte 0, each row rounded up to whole bytes. A test holds the two to each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accel.errors import ArtifactError

_BITS: dict[torch.dtype, int] = {
    getattr(torch, f"{kind}{bits}"): bits for kind in ("int", "uint") for bits in range(1, 8)
}


def is_sub_byte(dtype: torch.dtype) -> bool:
    return dtype in _BITS


def stored_shape(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of the uint8 tensor that holds a packed tensor of `shape`."""
    return (*shape[:-1], ((shape[-1] if shape else 1) * _BITS[dtype] + 7) // 8)


def unpack(packed: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """One element per entry: int8 for signed dtypes, uint8 for unsigned ones.

    Args:
        packed: uint8, of `stored_shape(shape, dtype)`.

    Raises ArtifactError if the packed tensor has another shape.
    """
    if tuple(packed.shape) != stored_shape(shape, dtype):
        raise ArtifactError(f"packed {dtype} tensor of shape {tuple(packed.shape)} for {shape}")
    bits, last = _BITS[dtype], shape[-1] if shape else 1
    octets = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    stream = octets.reshape(*packed.shape[:-1], packed.shape[-1] * 8)[..., : last * bits]
    fields = stream.reshape(*stream.shape[:-1], last, bits)
    weights = torch.tensor([1 << b for b in range(bits)], dtype=torch.int16)
    if not str(dtype).startswith("torch.uint"):
        weights[-1] = -weights[-1]  # two's complement: the top bit counts negative
        return (fields.to(torch.int16) * weights).sum(-1).to(torch.int8).reshape(shape)
    return (fields.to(torch.int16) * weights).sum(-1).to(torch.uint8).reshape(shape)
