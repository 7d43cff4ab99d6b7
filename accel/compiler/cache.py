"""The persistent compile cache: generated kernels by what they compute, where, and with what.

A key is the hash of every kernel's structure, the target, and the versions of accel and of the code
generator. An entry is one data-only file: a JSON header with a hash of the
payload, then the payload. Entries are written to a temporary file and renamed, so a compile that
fails, or two at once, never leave a damaged entry; a damaged one is a miss, and is removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.config import cache_dir, logger

_LOG = logger("cache")
_MAGIC = b"accel-cache-1\n"
_LIMIT_BYTES = 2 << 30


@dataclass(frozen=True)
class CacheEntry:
    """A JSON header and a binary payload."""

    header: dict[str, Any]
    payload: bytes


def cache_key(*parts: str) -> str:
    """A key over strings; their boundaries matter."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(f"{len(part)}:".encode())
        hasher.update(part.encode())
    return hasher.hexdigest()


class CompileCache:
    """A folder of entries, the oldest used of which go when it grows over `limit_bytes`."""

    def __init__(self, folder: Path | None = None, limit_bytes: int = _LIMIT_BYTES) -> None:
        self.folder = folder or cache_dir() / "kernels"
        self.limit_bytes = limit_bytes

    def get(self, key: str) -> CacheEntry | None:
        """The entry, or None. A damaged entry is removed, and the log says so."""
        path = self.folder / key
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        entry = _decode(data)
        if entry is None:
            _LOG.warning("removed a damaged cache entry: %s", path.name)
            path.unlink(missing_ok=True)
            return None
        os.utime(path)
        return entry

    def put(self, key: str, header: dict[str, Any], payload: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = json.dumps({**header, "_sha256": _digest(header, payload)}, sort_keys=True)
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + f"{len(text)}\n".encode() + text.encode() + payload)
            os.replace(temporary, self.folder / key)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._trim()

    def entries(self) -> list[Path]:
        """Entry files, the least recently used first."""
        if not self.folder.is_dir():
            return []
        files = [p for p in self.folder.iterdir() if p.is_file() and not p.name.startswith(".")]
        return sorted(files, key=lambda p: p.stat().st_mtime)

    def clear(self) -> int:
        """Removes every entry; returns how many there were."""
        files = self.entries()
        for path in files:
            path.unlink(missing_ok=True)
        return len(files)

    def _trim(self) -> None:
        files = self.entries()
        total = sum(p.stat().st_size for p in files)
        for path in files:
            if total <= self.limit_bytes:
                return
            total -= path.stat().st_size
            path.unlink(missing_ok=True)


def _digest(header: dict[str, Any], payload: bytes) -> str:
    hasher = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    hasher.update(payload)
    return hasher.hexdigest()


def _decode(data: bytes) -> CacheEntry | None:
    if not data.startswith(_MAGIC):
        return None
    length, newline, rest = data[len(_MAGIC) :].partition(b"\n")
    if not newline or not length.isdigit() or int(length) > len(rest):
        return None
    try:
        header = json.loads(rest[: int(length)])
    except ValueError:
        return None
    payload = rest[int(length) :]
    if not isinstance(header, dict):
        return None
    recorded = header.pop("_sha256", None)
    return CacheEntry(header, payload) if recorded == _digest(header, payload) else None
