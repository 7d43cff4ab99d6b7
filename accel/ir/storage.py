"""Weights of a module: name -> tensor, loaded when asked for, addressed by content hash.

A tensor of a sub-byte dtype (say `torch.int4`) is stored packed: rows of the last axis, element 0
in the lowest bits of byte 0, each row rounded up to whole bytes. In a running program the same
tensor has one element per entry, in int8 or uint8.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.errors import VerifyError
from accel.ir.types import SUB_BYTE_BITS, TensorType, value_dtype


@dataclass
class Weight:
    """One stored tensor. `load` returns the *stored* form (packed for sub-byte dtypes)."""

    type: TensorType
    load: Callable[[], Tensor]
    digest: str | None = None
    origin: str = ""  # name in the user's model, if it came from there


class WeightStore:
    """Named constants. Tensors are shared between copies of a store and never written."""

    def __init__(self) -> None:
        self._entries: dict[str, Weight] = {}

    def add(self, name: str, tensor: Tensor, *, origin: str = "") -> str:
        """Stores a tensor under a fresh name derived from `name`; returns the name."""
        type = TensorType(tuple(tensor.shape), tensor.dtype)
        return self.add_lazy(name, type, lambda: tensor, origin=origin)

    def add_lazy(
        self, name: str, type: TensorType, load: Callable[[], Tensor], *, origin: str = ""
    ) -> str:
        unique, n = name, 1
        while unique in self._entries:
            unique, n = f"{name}_{n}", n + 1
        self._entries[unique] = Weight(type, load, origin=origin)
        return unique

    def add_sub_byte(self, name: str, values: Tensor, dtype: torch.dtype) -> str:
        """Stores unpacked int8/uint8 `values` as packed `dtype`; exact, or VerifyError."""
        packed = pack_sub_byte(values, dtype)
        return self.add_lazy(name, TensorType(tuple(values.shape), dtype), lambda: packed)

    def type(self, name: str) -> TensorType:
        return self._entry(name).type

    def stored(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU: packed bytes for sub-byte dtypes."""
        return self.in_place(name).cpu()

    def in_place(self, name: str) -> Tensor:
        """The same on the device where it is: a model on a GPU need not be copied to run there."""
        return self._entry(name).load()

    def tensor(self, name: str) -> Tensor:
        """The tensor as a program sees it, on the CPU: one element per entry."""
        entry, tensor = self._entry(name), self.stored(name)
        if entry.type.dtype in SUB_BYTE_BITS:
            shape = tuple(int(d) for d in entry.type.shape)
            return unpack_sub_byte(tensor, entry.type.dtype, shape)
        return tensor

    def origin(self, name: str) -> str:
        return self._entry(name).origin

    def digest(self, name: str) -> str:
        """sha256 over dtype, shape and bytes: equal weights have equal digests."""
        entry = self._entry(name)
        if entry.digest is None:
            entry.digest = tensor_digest(entry.load(), str(entry.type))
        return entry.digest

    def remove(self, name: str) -> None:
        del self._entries[name]

    def copy(self) -> WeightStore:
        new = WeightStore()
        new._entries = dict(self._entries)
        return new

    def pick(self, *names: str) -> WeightStore:
        """A store of these weights alone, which stay whatever happens to the names here."""
        new = WeightStore()
        new._entries = {name: self._entry(name) for name in names}
        return new

    def names(self) -> list[str]:
        return list(self._entries)

    def nbytes(self) -> int:
        return sum(int(w.type.nbytes()) for w in self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _entry(self, name: str) -> Weight:
        if name not in self._entries:
            raise VerifyError(f"the module has no weight named '{name}'")
        return self._entries[name]


def tensor_digest(tensor: Tensor, label: str = "") -> str:
    """sha256 of a tensor's elements in C order, prefixed by `label`."""
    hasher = hashlib.sha256(label.encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        hasher.update(flat.view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def pack_sub_byte(values: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 tensor [..., ceil(last * bits / 8)] of the int values [..., last]; [1] of a 0-d one.

    Raises VerifyError if a value does not fit the dtype.
    """
    bits = SUB_BYTE_BITS[dtype]
    if values.is_floating_point() or values.is_complex():
        raise VerifyError(f"{values.dtype} values are not integers to pack as {dtype}")
    half = 1 << (bits - 1)
    low, high = (0, 2 * half - 1) if value_dtype(dtype) == torch.uint8 else (-half, half - 1)
    if values.numel() and (int(values.min()) < low or int(values.max()) > high):
        raise VerifyError(f"values outside of [{low}, {high}] do not fit {dtype}")
    lead, last = tuple(values.shape[:-1]), values.shape[-1] if values.dim() else 1
    rows = math.prod(lead)
    fields = (values.to(torch.uint8) & ((1 << bits) - 1)).reshape(rows, last)
    # Eight elements fill `bits` bytes, whatever the width: element i starts at bit i * bits.
    groups = -(-last // 8)
    octets = torch.nn.functional.pad(fields, (0, groups * 8 - last)).reshape(rows, groups, 8)
    packed = torch.zeros(rows, groups, bits, dtype=torch.uint8)
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        packed[..., byte] |= octets[..., i] << offset
        if offset + bits > 8:
            packed[..., byte + 1] |= octets[..., i] >> (8 - offset)
    length = -(-last * bits // 8)
    return packed.reshape(rows, groups * bits)[:, :length].reshape(*lead, length)


def unpack_sub_byte(packed: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The int8 (signed) or uint8 tensor of `shape` that `pack_sub_byte` packed.

    Raises VerifyError if `packed` has not as many bytes as that takes.
    """
    bits = SUB_BYTE_BITS[dtype]
    last = shape[-1] if shape else 1
    rows, length, groups = math.prod(shape[:-1]), -(-last * bits // 8), -(-last // 8)
    if packed.dtype != torch.uint8 or packed.numel() != rows * length:
        raise VerifyError(
            f"{packed.numel()} {packed.dtype} where {dtype} {list(shape)} takes "
            f"{rows * length} bytes"
        )
    stream = torch.nn.functional.pad(packed.reshape(rows, length), (0, groups * bits - length))
    stream = stream.reshape(rows, groups, bits)
    fields = torch.empty(rows, groups, 8, dtype=torch.uint8)
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        field = stream[..., byte] >> offset
        if offset + bits > 8:
            field = field | (stream[..., byte + 1] << (8 - offset))
        fields[..., i] = field & ((1 << bits) - 1)
    wide = fields.reshape(rows, groups * 8)[:, :last].reshape(shape)
    if value_dtype(dtype) == torch.uint8:
        return wide.contiguous()
    sign = 1 << (bits - 1)
    return ((wide ^ sign).to(torch.int8) - sign).contiguous()
