"""Keeps large freed blocks in the process, so that each call does not fault its results in anew.

glibc maps blocks over 32 MB afresh and returns them when freed; writing a 50 MB result then costs
12,000 page faults (a third of the time of the linear that makes it, measured). ONNX Runtime's arena
and PyTorch's CUDA allocator keep such memory as well. `ACCEL_MALLOC=system` leaves glibc alone.
"""

from __future__ import annotations

import ctypes
import sys
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
