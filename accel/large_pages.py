"""Memory on large pages, for weights that are read once a token.

Reading half a gigabyte from pages of 4 KB spends up to a tenth of the time on page tables
(measured on a virtual machine, where each look-up is two). Linux backs memory by pages of 2 MB
where a program asks for it before it first writes there. Files that are mapped have them where
the file system can.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from accel.config import keeps_memory

_LARGE_PAGE = 2 << 20
_LEAST_BYTES = 1 << 20
_CHUNK_BYTES = 64 << 20


def empty_on_large_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, for what stays: on Linux, memory backed by large pages.

    Tensors of a megabyte and more are cut from chunks of fresh memory; the last tensor of a chunk
    gives it back. `ACCEL_MALLOC=system` leaves all memory to the C library.
    """
    nbytes = dtype.itemsize * math.prod(shape)
    if nbytes < _LEAST_BYTES or not _has_large_pages():
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    with _chunk.lock:
        memory = _chunk.memory()
        if memory is None or _chunk.used + nbytes > len(memory):
            size = max(_CHUNK_BYTES, -(-nbytes // _LARGE_PAGE) * _LARGE_PAGE)
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            _chunk.memory, _chunk.used = weakref.ref(memory), 0
        flat = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=_chunk.used)
        _chunk.used += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    return flat.view(dtype).view(tuple(shape))


class _Chunk:
    """The memory that the next tensors are cut from."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.memory: Callable[[], mmap.mmap | None] = lambda: None
        self.used = 0


_chunk = _Chunk()


@cache
def _has_large_pages() -> bool:
    has = Path("/sys/kernel/mm/transparent_hugepage").exists()
    return sys.platform == "linux" and has and keeps_memory()
