"""Weights on disk: one safetensors file inside the archive, mapped into memory in place.

The manifest lists each tensor's dtype, shape and sha256, in order; that determines the safetensors
header and all offsets, so the header in the file is compared with the one made from the manifest,
and nothing in it is trusted. A tensor's bytes are hashed by several threads when a function that
uses it is prepared, not before: loading takes no longer for a large model, and damage is found
before it is computed with.

Sub-byte tensors are stored packed, as U8 (`accel.runtime.subbyte`). Tensors whose size is a
multiple of 64 bytes come first, so these lie at multiples of 64 bytes; one of the others is copied
when used if it does not.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.errors import ArtifactError
from accel.runtime.archive import ALIGNMENT, Archive
from accel.runtime.plan import LARGEST_SIZE, dtype_of
from accel.runtime.subbyte import is_sub_byte, stored_shape

_CHUNK = 1 << 20
_MAX_HEADER = 64 << 20
_PAGE = mmap.PAGESIZE

_SAFETENSORS: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}


@dataclass(frozen=True)
class WeightSpec:
    """One tensor: torch's dtype name, its logical shape, and the sha256 of its stored bytes."""

    dtype: str
    shape: list[int]
    sha256: str


@dataclass(frozen=True)
class StoredWeight:
    """A tensor to write. `load` gives the stored form: uint8 rows for a sub-byte dtype."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def stored_type(dtype: torch.dtype, shape: Sequence[int]) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype and shape in the file."""
    if is_sub_byte(dtype):
        return torch.uint8, stored_shape(tuple(shape), dtype)
    if dtype not in _SAFETENSORS:
        raise ArtifactError(
            f"tensors of dtype {dtype} cannot be stored", advice="cast it to a narrower dtype"
        )
    return dtype, tuple(shape)


def _bytes_of(dtype: str, shape: Sequence[int]) -> int:
    kind, stored = stored_type(dtype_of(dtype), shape)
    if min(stored, default=0) < 0 or len(stored) > 64:
        raise ArtifactError(f"a weight of shape {list(shape)[:8]}")
    size = kind.itemsize * math.prod(stored)
    if size > LARGEST_SIZE:
        raise ArtifactError(f"a weight of shape {list(shape)[:8]}")
    return size


def layout(specs: Mapping[str, tuple[str, Sequence[int]]]) -> tuple[bytes, dict[str, int], int]:
    """The safetensors header, each tensor's offset in the file, and the file's size.

    `specs` maps names to (dtype, logical shape), in the order of the file.
    """
    header: dict[str, dict[str, object]] = {}
    ends: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in specs.items():
        kind, stored = stored_type(dtype_of(dtype), shape)
        start, end = end, end + _bytes_of(dtype, shape)
        header[name] = {
            "dtype": _SAFETENSORS[kind],
            "shape": list(stored),
            "data_offsets": [start, end],
        }
        ends[name] = start
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    raw = len(text).to_bytes(8, "little") + text
    return raw, {name: len(raw) + start for name, start in ends.items()}, len(raw) + end


def in_file_order(weights: Mapping[str, StoredWeight]) -> list[str]:
    """Names, aligned ones first, then the largest (which is aligned too)."""

    def key(name: str) -> tuple[bool, int, str]:
        weight = weights[name]
        size = _bytes_of(str(weight.dtype).removeprefix("torch."), weight.shape)
        return (size % ALIGNMENT != 0, -size, name)

    return sorted(weights, key=key)


def flat_bytes(tensor: Tensor) -> Tensor:
    """A tensor's elements in C order as a flat uint8 tensor, without a copy if they lie so.

    Raises ArtifactError for a tensor whose elements do not all lie in memory.
    """
    if tensor.layout is not torch.strided:
        raise ArtifactError(
            f"tensors of layout {tensor.layout} cannot be stored",
            advice="convert the model's own with to_dense() before it is packaged",
        )
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def memory_of(flat: Tensor) -> memoryview:
    """The memory of a flat uint8 tensor, which must outlive the view."""
    if flat.numel() == 0:
        return memoryview(b"")
    array = (ctypes.c_uint8 * flat.numel()).from_address(flat.data_ptr())
    return memoryview(array).cast("B")


def file_chunks(
    header: bytes, weights: Mapping[str, StoredWeight], names: Iterable[str]
) -> Iterator[tuple[str, bytes | memoryview]]:
    """(name, bytes) in file order; the header comes first, under the name ""."""
    yield "", header
    for name in names:
        weight = weights[name]
        tensor = weight.load()
        if (tensor.dtype, tuple(tensor.shape)) != stored_type(weight.dtype, weight.shape):
            raise ArtifactError(
                f"weight '{name}' is {tensor.dtype} {list(tensor.shape)}, declared "
                f"{weight.dtype} {list(weight.shape)}"
            )
        flat = flat_bytes(tensor)
        data = memory_of(flat)
        for at in range(0, len(data), 64 * _CHUNK):
            yield name, data[at : at + 64 * _CHUNK]


class MappedWeights:
    """The weights of an open artifact, as a `WeightSource`.

    The file is mapped privately: writing to a tensor would change this process's copy only.
    Raises ArtifactError if the header or the size of the file is not what `specs` says.
    """

    def __init__(self, archive: Archive, name: str, specs: Mapping[str, WeightSpec]) -> None:
        self._archive, self.specs = archive, specs
        entry = archive.entries[name]
        raw, offsets, size = layout({n: (s.dtype, s.shape) for n, s in specs.items()})
        if len(raw) > _MAX_HEADER or size != entry.size:
            raise archive.fail(f"'{name}' has {entry.size} bytes; the manifest says {size}")
        if archive.read_at(entry.offset, len(raw)) != raw:
            raise archive.fail(f"the header of '{name}' does not fit the manifest")
        self._offsets = {n: entry.offset + o for n, o in offsets.items()}
        self._lock = threading.Lock()
        self._checked: set[str] = set()
        self._tensors: dict[str, Tensor] = {}
        self._map = mmap.mmap(
            archive.fileno(),
            archive.size,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )

    def nbytes(self, name: str) -> int:
        spec = self._spec(name)
        return _bytes_of(spec.dtype, spec.shape)

    def _spec(self, name: str) -> WeightSpec:
        if name not in self.specs:
            raise self._archive.fail(f"the artifact has no weight '{name}'")
        return self.specs[name]

    def check(self, names: Sequence[str]) -> None:
        """Hashes what was not hashed before. Raises ArtifactError naming a damaged tensor."""
        with self._lock:
            fresh = [n for n in dict.fromkeys(names) if n not in self._checked]
            fresh.sort(key=self.nbytes, reverse=True)
            workers = max(1, min(torch.get_num_threads(), 8))
            if sum(map(self.nbytes, fresh)) < 4 * _CHUNK or workers == 1:
                digests = [self._digest(n) for n in fresh]
            else:
                with ThreadPoolExecutor(workers) as pool:
                    digests = list(pool.map(self._digest, fresh))
            for name, digest in zip(fresh, digests):
                if digest != self._spec(name).sha256:
                    raise self._archive.fail(f"weight '{name}' is damaged: its hash does not fit")
                self._checked.add(name)

    def _digest(self, name: str) -> str:
        """Reads the file, not the map: hashed pages do not count as this process's memory."""
        hasher = hashlib.sha256()
        buffer = bytearray(_CHUNK)
        at, end = self._offsets[name], self._offsets[name] + self.nbytes(name)
        while at < end:
            view = memoryview(buffer)[: end - at]
            count = os.preadv(self._archive.fileno(), [view], at)
            if count == 0:
                raise self._archive.fail("the file is shorter than it was when it was opened")
            hasher.update(view[:count])
            at += count
        return hasher.hexdigest()

    def tensor(self, name: str) -> Tensor:
        """The stored tensor; it is hashed first if `check` has not seen it. Never write to it."""
        if name not in self._checked:
            self.check([name])
        with self._lock:
            found = self._tensors.get(name)
            if found is None:
                found = self._tensors[name] = self._make(name)
        return found

    def _make(self, name: str) -> Tensor:
        spec, size = self._spec(name), self.nbytes(name)
        dtype, shape = stored_type(dtype_of(spec.dtype), spec.shape)
        if size == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        flat = torch.frombuffer(
            self._map, dtype=torch.uint8, count=size, offset=self._offsets[name]
        )
        if self._offsets[name] % ALIGNMENT:
            flat = flat.clone()
        return flat.view(dtype).view(shape)

    def release(self, name: str) -> None:
        """Gives the pages back. They hold only what the file holds; touching reads it again."""
        start = self._offsets[name] // _PAGE * _PAGE
        end = self._offsets[name] + self.nbytes(name)
        if end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
