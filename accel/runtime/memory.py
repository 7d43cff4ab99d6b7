"""What the process does with memory: large freed blocks are kept, and compiling pauses Python's gc.

glibc maps blocks over 32 MB afresh and returns them when freed; writing a 50 MB result then costs
12,000 page faults (a third of the time of the linear that makes it, measured). ONNX Runtime's arena
and PyTorch's CUDA allocator keep such memory as well. `ACCEL_MALLOC=system` leaves glibc alone.

Python looks for garbage cycles whenever enough objects were made, and then walks all that torch and
its friends have loaded: 0.1 s each time, several times while a program's objects are made, and
nearly nothing is found. `collection_paused` puts that off until the work is done.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from accel.config import keeps_memory

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES = 1 << 30


@cache
def keep_large_blocks() -> bool:
    """Tells glibc once per process. False where it was not done (another libc, or the option)."""
    if not (sys.platform == "linux" and keeps_memory()):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))


@contextmanager
def collection_paused() -> Iterator[None]:
    """No automatic search for garbage cycles inside; nested and concurrent uses count as one.

    Reference counts free memory as ever. A collection that the caller has switched off stays off.
    """
    with _pauses.lock:
        if _pauses.running == 0:
            _pauses.was_on = gc.isenabled()
            gc.disable()
        _pauses.running += 1
    try:
        yield
    finally:
        with _pauses.lock:
            _pauses.running -= 1
            if _pauses.running == 0 and _pauses.was_on:
                gc.enable()


class _Pauses:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = 0
        self.was_on = True


_pauses = _Pauses()
