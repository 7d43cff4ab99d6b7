"""Which code of a kernel a GPU gets, and what it means when the driver refuses it.

A GPU runs machine code of its own architecture. A newer one gets the kernel's PTX, which the driver
compiles when it loads it (and keeps in a cache of its own). A kernel whose PTX uses instructions
that one architecture alone has (Hopper's wgmma, say) carries none, and does not run elsewhere.
"""

from __future__ import annotations

import ctypes
from typing import Literal

from accel.errors import AccelError, ArtifactError, MissingDependencyError, OutOfMemoryError

_LOG_BYTES = 8192
_ERROR_LOG, _ERROR_LOG_BYTES = 5, 6  # CU_JIT_ERROR_LOG_BUFFER, ..._SIZE_BYTES

_OUT_OF_MEMORY = 2
_DAMAGED = {200: "CUDA_ERROR_INVALID_IMAGE", 300: "CUDA_ERROR_INVALID_SOURCE"}
_OTHER_GPU = {209: "CUDA_ERROR_NO_BINARY_FOR_GPU"}
_OLD_DRIVER = {
    34: "CUDA_ERROR_STUB_LIBRARY",
    218: "CUDA_ERROR_INVALID_PTX",
    221: "CUDA_ERROR_JIT_COMPILER_NOT_FOUND",
    222: "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    804: "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
}


def image_for(arch: str, capability: tuple[int, int], gpu: str) -> Literal["cubin", "ptx"]:
    """What a GPU of this compute capability is given of code made for `arch` ("sm_90").

    Machine code runs within a major version, from the minor version it was made for; PTX on every
    later GPU. Raises ArtifactError for an older GPU.
    """
    number = int(arch.removeprefix("sm_").rstrip("a"))
    wanted = (number // 10, number % 10)
    if capability[0] == wanted[0] and capability[1] >= wanted[1]:
        return "cubin"
    if capability > wanted:
        return "ptx"
    raise ArtifactError(
        f"the kernels are for {arch}; {gpu} is sm_{capability[0]}{capability[1]}",
        advice="compile for this GPU's target (accel targets lists them)",
    )


def no_portable_code(name: str, arch: str, gpu: str) -> ArtifactError:
    """The error of a kernel without PTX on a newer GPU."""
    return ArtifactError(
        f"a kernel uses instructions that only {arch} has, and {gpu} is newer",
        where=name,
        advice="compile for this GPU's target (accel targets lists them)",
    )


def load_error(code: int, log: str, name: str, driver_version: int) -> AccelError:
    """What a code of cuModuleLoadDataEx means to a user. `driver_version`: 13000 for CUDA 13.0."""
    detail = log.strip().partition("\n")[0]
    tail = f": {detail}" if detail else ""
    said = f"CUDA {driver_version // 1000}.{driver_version % 1000 // 10}"
    if code == _OUT_OF_MEMORY:
        return OutOfMemoryError(
            "the GPU has no memory left for a kernel's code", where=name, advice="free some"
        )
    if code in _OLD_DRIVER:
        return MissingDependencyError(
            f"the NVIDIA driver (for {said}) is too old for this kernel "
            f"({_OLD_DRIVER[code]}){tail}",
            where=name,
            advice="update the NVIDIA driver, or compile with a Triton that is as old as it",
        )
    if code in _OTHER_GPU:
        return ArtifactError(
            f"a kernel has no code for this GPU ({_OTHER_GPU[code]}){tail}",
            where=name,
            advice="compile for this GPU's target (accel targets lists them)",
        )
    if code in _DAMAGED:
        return ArtifactError(
            f"the driver (for {said}) does not take a kernel's machine code "
            f"({_DAMAGED[code]}){tail}",
            where=name,
            advice="update the NVIDIA driver if it is older than the compiler; else the file is "
            "damaged",
        )
    return ArtifactError(f"a kernel does not load (CUDA error {code}){tail}", where=name)


def load_module(library: ctypes.CDLL, image: bytes, name: str) -> ctypes.c_void_p:
    """Loads machine code or PTX into the current context. Raises what `load_error` returns."""
    module = ctypes.c_void_p()
    log = ctypes.create_string_buffer(_LOG_BYTES)
    options = (ctypes.c_int * 2)(_ERROR_LOG, _ERROR_LOG_BYTES)
    values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
    code = library.cuModuleLoadDataEx(ctypes.byref(module), image, 2, options, values)
    if code:
        raise load_error(code, log.value.decode(errors="replace"), name, driver_version(library))
    return module


def driver_version(library: ctypes.CDLL) -> int:
    """The CUDA version that the driver is for: 13000 for 13.0; 0 if it does not say."""
    number = ctypes.c_int()
    return number.value if library.cuDriverGetVersion(ctypes.byref(number)) == 0 else 0
