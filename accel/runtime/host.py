"""Loads generated host code and makes its kernels callable.

The bytes must have been checked and trusted before (`accel.runtime.artifact`): loading native code
runs it. They are written to an anonymous file in memory, or where the system has none, to a file
that only this user can read, and never to a name that another process could have prepared.

Kernels run on torch's own OpenMP threads: two thread pools that wait actively for the same cores
would cost milliseconds a step. `torch.set_num_threads` is respected from one call to the next.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import os
import tempfile
import weakref
from collections.abc import Callable
from functools import cache

import torch

from accel.errors import ArtifactError, ExecutionError
from accel.runtime.interfaces import KernelFunction

_FAILURES = {
    1: "an index is out of range",
    2: "there is not enough memory for a kernel's scratch space",
}
_threads = torch.get_num_threads
_POOL_ENTRIES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


class HostLibrary:
    """A loaded shared object of kernels, unloaded when neither it nor its functions are in use.

    Raises ArtifactError if the bytes are no library for this machine.
    """

    def __init__(self, code: bytes) -> None:
        self._library, descriptor = _load(code)
        weakref.finalize(self, _unload, self._library._handle, descriptor).atexit = False
        use_pool = self._symbol("accel_use_pool")
        use_pool.argtypes = [ctypes.c_void_p] * 3
        use_pool.restype = None
        use_pool(*_pool())

        self.run_sequence: Callable[[int, int, int], int] | None = None
        with contextlib.suppress(ArtifactError):  # libraries made before there were sequences
            run = self._symbol("accel_run_kernels")
            run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
            run.restype = ctypes.c_int64
            self.run_sequence = run

    def function(self, symbol: str) -> KernelFunction:
        """The kernel of that name; ArtifactError if there is none.

        The function raises ExecutionError if the kernel reports a failure.
        """
        if not symbol.startswith("accel_") or not symbol.isidentifier():
            raise ArtifactError(f"'{symbol}' is no name of a generated kernel")
        run = self._symbol(symbol)
        run.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        run.restype = ctypes.c_int32
        entry = 0
        if self.run_sequence is not None:
            entry = ctypes.addressof(ctypes.c_char.in_dll(self._library, f"{symbol}_kernel"))
        return HostKernel(self, run, symbol, entry)

    def _symbol(self, name: str) -> ctypes._NamedFuncPointer:
        try:
            return self._library[name]
        except AttributeError as error:
            raise ArtifactError(f"the kernel library has no function '{name}'") from error


class HostKernel:
    """One kernel of a library, which it keeps loaded. `entry` is what a sequence knows it by."""

    __slots__ = ("_run", "entry", "library", "symbol")

    def __init__(
        self, library: HostLibrary, run: ctypes._NamedFuncPointer, symbol: str, entry: int
    ) -> None:
        self.library, self._run, self.symbol, self.entry = library, run, symbol, entry

    def __call__(self, address: int) -> None:
        code = self._run(address, _threads())
        if code:
            raise self.failure(code)

    def failure(self, code: int) -> ExecutionError:
        return ExecutionError(_FAILURES.get(code, f"failure {code}"), where=self.symbol)


def _load(code: bytes) -> tuple[ctypes.CDLL, int]:
    """The library, and the descriptor that keeps its name its own (-1 if it needs none)."""
    try:
        if hasattr(os, "memfd_create"):
            return _load_from_memory(code)
        return _load_from_file(code), -1
    except OSError as error:
        raise ArtifactError(
            f"the kernel library does not load: {error}",
            advice="compile again on this machine",
        ) from error


def _load_from_memory(code: bytes) -> tuple[ctypes.CDLL, int]:
    # The descriptor stays open: the loader knows libraries by path, and a second library under a
    # descriptor number that was free again would be taken for the first.
    descriptor = os.memfd_create("accel-kernels", os.MFD_CLOEXEC)
    try:
        view = memoryview(code)
        while view:
            view = view[os.write(descriptor, view) :]
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}"), descriptor
    except OSError:
        os.close(descriptor)
        raise


def _load_from_file(code: bytes) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="accel-") as folder:  # 0700, unique
        path = os.path.join(folder, "kernels.so")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(code)
        return ctypes.CDLL(path)


def _unload(handle: int, descriptor: int) -> None:
    _ctypes.dlclose(handle)
    if descriptor >= 0:
        os.close(descriptor)


@cache
def _pool() -> tuple[int | None, ...]:
    """Addresses of torch's OpenMP entry points; all None where it has none (kernels are serial)."""
    try:
        torch_library = ctypes.CDLL(torch._C.__file__)  # loaded already; finds what it depends on
        found = [
            ctypes.cast(getattr(torch_library, name), ctypes.c_void_p).value
            for name in _POOL_ENTRIES
        ]
    except (OSError, AttributeError):
        return (None,) * len(_POOL_ENTRIES)
    return tuple(found)
