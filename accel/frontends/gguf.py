"""GGUF files: the header, read with every count and size checked against the file.

    file = read_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
    file.metadata["general.architecture"], file.tensors["token_embd.weight"].shape

A GGUF file is a magic word, a version, two counts, typed key/value pairs, a table of tensors, and
their bytes (the format is described in ggml's `docs/gguf.md`). Nothing in the header is believed:
memory is taken for what the file has, never for what it says it has. The sizes of the encodings
come from the `gguf` package, which also decodes them (`decode_tensor`).
"""

from __future__ import annotations

import importlib
import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.errors import InputError, MissingDependencyError

_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_NESTING = 4
_STRING, _ARRAY = 8, 9
# Codes of scalar values: struct's letter and size.
_SCALARS = {
    0: ("B", 1),
    1: ("b", 1),
    2: ("H", 2),
    3: ("h", 2),
    4: ("I", 4),
    5: ("i", 4),
    6: ("f", 4),
    7: ("?", 1),
    10: ("Q", 8),
    11: ("q", 8),
    12: ("d", 8),
}
# The least that one entry takes: a pair (length, code, one byte), a tensor (length, dims, code,
# offset).
_LEAST_PAIR, _LEAST_TENSOR = 13, 32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: `shape` as torch has it (outermost first), `offset` from the start."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    code: int
    offset: int
    bytes: int


@dataclass
class GgufFile:
    """What a file's header says, checked.

    Attributes:
        pairs, table: where each pair of the metadata, and the list of tensors, begins and ends.
        start: where the tensors' bytes begin, at a multiple of `alignment`.
        size: the file's.
    """

    path: Path
    version: int
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)
    pairs: dict[str, tuple[int, int]] = field(default_factory=dict)
    table: tuple[int, int] = (0, 0)
    start: int = 0
    alignment: int = 32
    size: int = 0

    def fail(self, what: str) -> InputError:
        return _damaged(self.path, what)


def read_gguf(path: str | Path) -> GgufFile:
    """The checked header of a GGUF file.

    Raises InputError for what is no GGUF file or a damaged one, and MissingDependencyError without
    the `gguf` package.
    """
    path = Path(path)
    sizes = encodings()
    try:
        size = path.stat().st_size
        if size < 24:
            raise _damaged(path, f"it has {size} bytes, which is less than a header")
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Reader(path, data, sizes).read()
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror or error}") from error


def encodings() -> dict[int, tuple[str, int, int]]:
    """Code -> name, values of a block, bytes of a block."""
    constants = _gguf("constants")
    sizes: dict[int, tuple[str, int, int]] = {
        int(kind): (kind.name, int(block), int(count))
        for kind, (block, count) in constants.GGML_QUANT_SIZES.items()
    }
    return sizes


def decode_tensor(tensor: GgufTensor, data: Any) -> Tensor:
    """A tensor's values: float32, or its own dtype where the file stores plain floats or integers.

    `data` is the file's memory. Raises InputError for encodings that the `gguf` package cannot
    decode.
    """
    quants, constants = _gguf("quants"), _gguf("constants")
    numpy = importlib.import_module("numpy")
    kind = constants.GGMLQuantizationType(tensor.code)
    raw = numpy.frombuffer(data, numpy.uint8, count=tensor.bytes, offset=tensor.offset)
    plain = {"F32": "f4", "F16": "f2", "F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4"}
    if tensor.encoding in plain:
        values = raw.view(plain[tensor.encoding]).reshape(tensor.shape)
        return torch.from_numpy(values.astype(values.dtype, copy=True))
    try:
        rows = quants.quant_shape_to_byte_shape(tensor.shape, kind)
        values = quants.dequantize(raw.reshape(rows), kind)
    except (NotImplementedError, ValueError) as error:
        raise InputError(
            f"tensor '{tensor.name}' is encoded as {tensor.encoding}, which is not supported"
        ) from error
    return torch.from_numpy(values.reshape(tensor.shape))


def _gguf(part: str) -> Any:
    try:
        return importlib.import_module(f"gguf.{part}")
    except ImportError as error:
        raise MissingDependencyError(
            "GGUF files are decoded by the package gguf, which is not installed",
            advice="pip install 'accel-compiler[hf]'",
        ) from error


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"the GGUF file is damaged: {what}",
        where=str(path),
        advice="copy or convert the file again",
    )


class _Reader:
    """Reads forward through the file's memory; every read is bounded by the file's end."""

    def __init__(self, path: Path, data: mmap.mmap, sizes: dict[int, tuple[str, int, int]]) -> None:
        self.path, self.data, self.sizes = path, data, sizes
        self.at, self.end = 0, len(data)

    def fail(self, what: str) -> InputError:
        return _damaged(self.path, what)

    def read(self) -> GgufFile:
        if self.take(4) != b"GGUF":
            raise InputError(
                "the file is no GGUF file: it does not begin with 'GGUF'", where=str(self.path)
            )
        (version,) = self.unpack("I", 4)
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            order = "big-endian files are" if swapped in _VERSIONS else f"version {version} is"
            raise InputError(
                f"GGUF: {order} not supported; versions 2 and 3 are", where=str(self.path)
            )
        tensors, pairs = self.unpack("QQ", 16)
        left = self.end - self.at
        if pairs > left // _LEAST_PAIR or tensors > left // _LEAST_TENSOR:
            raise self.fail(f"{tensors} tensors and {pairs} values do not fit {self.end} bytes")
        found = GgufFile(self.path, version)
        for _ in range(pairs):
            begin = self.at
            key = self.string()
            if key in found.metadata:
                raise self.fail(f"'{key[:80]}' is given twice")
            (code,) = self.unpack("I", 4)
            found.metadata[key] = self.value(code, key)
            found.pairs[key] = (begin, self.at)
        begin = self.at
        entries = [self.entry() for _ in range(tensors)]
        found.table, found.size = (begin, self.at), self.end
        self.place(found, entries)
        return found

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise self.fail(f"it ends at byte {self.end}, inside of a value of {count} bytes")
        start, self.at = self.at, self.at + count
        return self.data[start : self.at]

    def unpack(self, letters: str, count: int) -> tuple[Any, ...]:
        return struct.unpack("<" + letters, self.take(count))

    def string(self) -> str:
        (length,) = self.unpack("Q", 8)
        return self.take(length).decode("utf-8", "replace")

    def value(self, code: int, key: str, depth: int = 0) -> Any:
        if code in _SCALARS:
            letter, size = _SCALARS[code]
            return self.unpack(letter, size)[0]
        if code == _STRING:
            return self.string()
        if code != _ARRAY:
            raise self.fail(f"'{key[:80]}' has a value of type {code}, which does not exist")
        if depth == _MAX_NESTING:
            raise self.fail(f"'{key[:80]}' holds arrays inside of arrays")
        inner, count = self.unpack("IQ", 12)
        least = _SCALARS[inner][1] if inner in _SCALARS else 8
        if count > (self.end - self.at) // least:
            raise self.fail(f"'{key[:80]}' has {count} entries, more than the file has bytes")
        if inner in _SCALARS:
            letter, size = _SCALARS[inner]
            return list(self.unpack(f"{count}{letter}", count * size))
        return [self.value(inner, key, depth + 1) for _ in range(count)]

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, encoding and offset of a tensor."""
        name = self.string()
        (rank,) = self.unpack("I", 4)
        if rank > _MAX_DIMS:
            raise self.fail(f"tensor '{name[:80]}' has {rank} dimensions")
        dims: tuple[int, ...] = self.unpack(f"{rank}Q", 8 * rank)
        code, offset = self.unpack("IQ", 12)
        return name, tuple(reversed(dims)), code, offset

    def place(self, found: GgufFile, entries: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        """Where each tensor's bytes lie: inside of the file, aligned, and nobody else's."""
        alignment = found.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self.at // alignment) * alignment
        found.start, found.alignment = start, alignment
        for name, shape, code, offset in entries:
            if name in found.tensors:
                raise self.fail(f"tensor '{name[:80]}' is there twice")
            if code not in self.sizes:
                raise self.fail(f"tensor '{name[:80]}' has encoding {code}, which does not exist")
            kind, block, width = self.sizes[code]
            if any(d < 1 for d in shape) or (shape[-1] if shape else 1) % block:
                raise self.fail(
                    f"tensor '{name[:80]}' is {list(shape)}, in {kind} blocks of {block}"
                )
            size = math.prod(shape) // block * width
            if offset % alignment or start + offset + size > self.end:
                raise self.fail(
                    f"tensor '{name[:80]}' {list(shape)} {kind}: {size} bytes at {start + offset}, "
                    f"and the file has {self.end}"
                )
            found.tensors[name] = GgufTensor(name, shape, kind, code, start + offset, size)
        last, end = "", start
        key: Callable[[GgufTensor], int] = lambda t: t.offset  # noqa: E731
        for tensor in sorted(found.tensors.values(), key=key):
            if tensor.offset < end:
                raise self.fail(f"tensors '{last[:80]}' and '{tensor.name[:80]}' overlap")
            last, end = tensor.name, tensor.offset + tensor.bytes
