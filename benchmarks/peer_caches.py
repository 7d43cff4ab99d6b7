"""The compilers' caches while a row of a GPU benchmark is measured (`row_caches`), and what peers
compiled before, kept in a folder: `benchmarks.prepare_peers` writes it, timing reads it.

A peer that comes from a cache is the same code, and is timed as any other; only its seconds of
compiling are no figure then, and the tables have none. Caches hold for one kind of GPU and one
torch, which torch checks; they are code: use a folder that you made.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._inductor import async_compile


@contextmanager
def row_caches(kept: Path | None, row: str) -> Iterator[Callable[[str], bool]]:
    """Empty caches for all compilers, for the time of the block.

    Gives what is to be called before a system compiles: it says whether that starts from nothing.
    Among the peers of torch.compile only the first one does: the next ones find its kernels, or
    what was `kept` of them. Raises NotReady for a peer that was late before.
    """
    used = False

    def starts_fresh(system: str) -> bool:
        nonlocal used
        if not system.startswith("inductor"):
            return True
        found, before = load(kept, row, system), used
        used = True
        return not (found or before)

    with tempfile.TemporaryDirectory() as folder:
        own = {
            "ACCEL_CACHE_DIR": folder,
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        outside = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            yield starts_fresh
        finally:
            for name, value in outside.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


class NotReady(Exception):
    """A peer that was not ready in so many seconds when its cache was made."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not ready in {seconds:g} s")
        self.seconds = seconds


def end_compiling() -> None:
    """Ends what a peer that was given up still compiles, and readies its processes anew."""
    async_compile.shutdown_compile_workers()
    async_compile.AsyncCompile.warm_pool()
    async_compile.AsyncCompile.wait_pool_ready()


def load(folder: Path | None, row: str, system: str) -> bool:
    """Fills torch's caches with what a peer compiled; False where nothing was kept of it.

    Raises NotReady for one that had not finished in time.
    """
    if folder is None:
        return False
    late, kept = _late(folder, row, system), _kept(folder, row, system)
    if late.is_file():
        raise NotReady(json.loads(late.read_text())["seconds"])
    if not kept.is_file():
        return False
    if torch.compiler.load_cache_artifacts(kept.read_bytes()) is None:
        raise RuntimeError(f"{kept} is not a cache of this torch")
    return True


def save(folder: Path, row: str, system: str) -> int:
    """Keeps what this process has compiled so far; returns the bytes."""
    made = torch.compiler.save_cache_artifacts()
    if made is None:
        raise RuntimeError(f"torch kept nothing of {system} on {row}")
    _late(folder, row, system).unlink(missing_ok=True)
    return _kept(folder, row, system).write_bytes(made[0])


def save_late(folder: Path, row: str, system: str, seconds: float) -> None:
    """Notes that a system was not ready in so many seconds; what is kept of it stays good."""
    if _kept(folder, row, system).is_file():
        return
    _late(folder, row, system).write_text(json.dumps({"seconds": seconds}))


def _kept(folder: Path, row: str, system: str) -> Path:
    return folder / f"{row}.{system}.cache"


def _late(folder: Path, row: str, system: str) -> Path:
    return folder / f"{row}.{system}.late"
