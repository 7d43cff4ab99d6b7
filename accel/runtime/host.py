"""Loads generated kernels: a shared object given as bytes.

The bytes have been checked and trusted before (`accel.runtime.loader`). They are loaded from an
anonymous file in memory, so nothing can change them in between, and no path is left behind.
"""

from __future__ import annotations

import ctypes
import os

from accel.errors import ArtifactError
from accel.runtime.interfaces import HostCode, KernelFunction


class SharedObject:
    """Kernels of one shared object. It stays loaded as long as the process lives.

    So does its file handle: the dynamic loader knows libraries by name, and would take another file
    under the same /proc/self/fd/N for the library that it has loaded already.
    """

    def __init__(self, data: bytes) -> None:
        handle = os.memfd_create("accel-kernels")
        try:
            with os.fdopen(os.dup(handle), "wb") as file:
                file.write(data)
            self._library = ctypes.CDLL(f"/proc/self/fd/{handle}")
        except OSError as error:
            os.close(handle)
            raise ArtifactError(f"the host code cannot be loaded: {error}") from error

    def function(self, symbol: str) -> KernelFunction:
        """The kernel of that name: takes the address of its argument words."""
        try:
            found = self._library[symbol]
        except (AttributeError, ValueError) as error:
            raise ArtifactError(f"the host code has no kernel '{symbol}'") from error
        found.argtypes, found.restype = [ctypes.c_void_p], None
        return found


def load_host_code(data: bytes) -> HostCode:
    """Loads a shared object. Raises ArtifactError if the system cannot."""
    return SharedObject(data)
