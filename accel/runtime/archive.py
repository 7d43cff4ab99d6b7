"""The container of an artifact: a zip file in exactly one form.

Any zip tool reads it. This reader takes only what this writer writes, byte for byte: entries are
stored without compression one after the other, data starts at multiples of 64 bytes (so that
weights can be mapped into memory), every entry is zip64, times and attributes are constants, and
nothing lies between, before or after. The reader takes names, sizes and checksums from the central
directory, encodes all headers again from them and compares. So there is no room for an entry that
another tool would see differently, for a link, a second entry of the same name, compressed data
that grows, or a name that leaves the archive; and a flipped byte of any header is found.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from accel.errors import ArtifactError

ALIGNMENT = 64
_MAX_ENTRIES = 10_000
_MAX_DIRECTORY = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
_MAX_NAME = 200

_LOCAL = struct.Struct("<4sHHHHHLLLHH")
_CENTRAL = struct.Struct("<4sHHHHHHLLLHHHHHLL")
_END64 = struct.Struct("<4sQHHLLQQQQ")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4sHHHHLLH")
_TAIL = _END64.size + _LOCATOR.size + _END.size

_VERSION, _UTF8, _STORED = 45, 0x0800, 0
_TIME, _DATE = 0, (1 << 5) | 1  # 1980-01-01: equal contents make equal files
_REGULAR_FILE = 0o100644 << 16
_BIG16, _BIG32 = 0xFFFF, 0xFFFFFFFF
_PADDING = 0xD935  # the id of extra data that only aligns


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the archive: `size` bytes at `offset`. `header` is where its header starts."""

    name: str
    header: int
    offset: int
    size: int
    crc: int


def _local_header(name: str, start: int, size: int, crc: int) -> bytes:
    """The header at `start`; its length is such that the data begins at a multiple of 64."""
    raw = name.encode()
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    end = start + _LOCAL.size + len(raw) + len(extra)
    if end % ALIGNMENT:
        room = (-end - 4) % ALIGNMENT
        extra += struct.pack("<HH", _PADDING, room) + bytes(room)
    fields = (b"PK\3\4", _VERSION, _UTF8, _STORED, _TIME, _DATE, crc, _BIG32, _BIG32)
    return _LOCAL.pack(*fields, len(raw), len(extra)) + raw + extra


def _directory(entries: Iterable[Entry]) -> bytes:
    parts = []
    for e in entries:
        raw = e.name.encode()
        extra = struct.pack("<HHQQQ", 1, 24, e.size, e.size, e.header)
        made_by = 3 << 8 | _VERSION  # 3: attributes are Unix's
        fields = (made_by, _VERSION, _UTF8, _STORED, _TIME, _DATE, e.crc, _BIG32, _BIG32)
        counts = (len(raw), len(extra), 0, _BIG16, 0, _REGULAR_FILE, _BIG32)
        parts.append(_CENTRAL.pack(b"PK\1\2", *fields, *counts) + raw + extra)
    return b"".join(parts)


def _tail(count: int, start: int, size: int) -> bytes:
    end64 = _END64.pack(b"PK\6\6", 44, 3 << 8 | _VERSION, _VERSION, 0, 0, count, count, size, start)
    locator = _LOCATOR.pack(b"PK\6\7", 0, start + size, 1)
    return end64 + locator + _END.pack(b"PK\5\6", 0, 0, _BIG16, _BIG16, _BIG32, _BIG32, 0)


def check_name(name: str) -> str:
    """Raises ArtifactError for a name that is not a plain relative path."""
    if len(name) > _MAX_NAME or _NAME.fullmatch(name) is None:
        raise ArtifactError(f"an artifact cannot have a file named '{name[:80]}'")
    return name


class ArchiveWriter:
    """Writes entries one after the other into a seekable file; `close` writes the directory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.entries: dict[str, Entry] = {}
        self._end = 0

    def add(self, name: str, chunks: Iterable[bytes | memoryview]) -> Entry:
        """Writes one file. Raises ArtifactError for a bad name or one that was added before."""
        if check_name(name) in self.entries:
            raise ArtifactError(f"'{name}' is in the artifact already")
        start = self._end
        header = _local_header(name, start, 0, 0)
        self._file.write(header)
        size = crc = 0
        for chunk in chunks:
            self._file.write(chunk)
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
        self._file.seek(start)
        self._file.write(_local_header(name, start, size, crc))
        self._end = start + len(header) + size
        self._file.seek(self._end)
        entry = self.entries[name] = Entry(name, start, start + len(header), size, crc)
        return entry

    def close(self) -> None:
        directory = _directory(self.entries.values())
        self._file.write(directory)
        self._file.write(_tail(len(self.entries), self._end, len(directory)))


class Archive:
    """An open archive. Raises ArtifactError where the file differs from what the writer writes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise ArtifactError(
                f"cannot open '{self.path}': {error.strerror or error}",
                advice="check the path",
            ) from error
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.entries = self._read_directory()
        except OSError as error:
            self.close()
            raise ArtifactError(f"cannot read '{self.path}': {error.strerror or error}") from error
        except ArtifactError:
            self.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()

    def fail(self, what: str, advice: str = "") -> ArtifactError:
        return ArtifactError(
            what, where=str(self.path), advice=advice or "package the model again, or copy it again"
        )

    def read(self, name: str, limit: int) -> bytes:
        """A file's bytes, its checksum checked. ArtifactError if it has more than `limit`."""
        entry = self.entries.get(name)
        if entry is None:
            raise self.fail(f"the artifact has no '{name}'")
        if entry.size > limit:
            raise self.fail(f"'{name}' has {entry.size} bytes; at most {limit} are allowed")
        data = self.read_at(entry.offset, entry.size)
        if zlib.crc32(data) != entry.crc:
            raise self.fail(f"'{name}' is damaged: its checksum does not fit")
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes; ArtifactError if the file ends before."""
        parts = []
        while size:
            part = os.pread(self.fileno(), min(size, 1 << 30), offset)
            if not part:
                raise self.fail("the file is shorter than it was when it was opened")
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_directory(self) -> dict[str, Entry]:
        if self.size < _TAIL:
            raise self.fail("the file is too short to be an artifact")
        tail_at = self.size - _TAIL
        tail = self.read_at(tail_at, _TAIL)
        _, _, _, _, _, _, count, _, size, start = _END64.unpack_from(tail)
        if start + size != tail_at or tail != _tail(count, start, size):
            raise self._foreign()
        if count > _MAX_ENTRIES or size > _MAX_DIRECTORY:
            raise self.fail("the archive's directory is too large")
        raw = self.read_at(start, size)
        entries = self._parse(raw, count)
        if _directory(entries) != raw:
            raise self._foreign()
        self._check_headers(entries, start)
        return {e.name: e for e in entries}

    def _foreign(self) -> ArtifactError:
        zipped = self.read_at(0, 2) == b"PK"
        what = "the file is no artifact"
        if zipped:
            what = "the file is a zip that accel did not write, or it is truncated or damaged"
        return self.fail(what)

    def _parse(self, raw: bytes, count: int) -> list[Entry]:
        entries: list[Entry] = []
        names: set[str] = set()
        at = end = 0
        for _ in range(count):
            if at + _CENTRAL.size > len(raw):
                raise self._foreign()
            fields = _CENTRAL.unpack_from(raw, at)
            crc, name_size, extra_size = fields[7], fields[10], fields[11]
            at += _CENTRAL.size
            extra = raw[at + name_size : at + name_size + extra_size]
            if extra_size != 28 or len(extra) != 28:
                raise self._foreign()
            try:
                name = check_name(raw[at : at + name_size].decode("ascii"))
            except UnicodeDecodeError as error:
                raise self._foreign() from error
            if name in names:
                raise self.fail(f"'{name}' is in the archive twice")
            names.add(name)
            _, _, size, _, header = struct.unpack("<HHQQQ", extra)
            offset = header + len(_local_header(name, header, 0, 0))
            if header != end or offset + size > self.size:
                raise self._foreign()
            end = offset + size
            entries.append(Entry(name, header, offset, size, crc))
            at += name_size + extra_size
        return entries

    def _check_headers(self, entries: list[Entry], directory: int) -> None:
        end = entries[-1].offset + entries[-1].size if entries else 0
        if end != directory:
            raise self._foreign()
        for e in entries:
            if self.read_at(e.header, e.offset - e.header) != _local_header(
                e.name, e.header, e.size, e.crc
            ):
                raise self.fail(f"the header of '{e.name}' is damaged")
