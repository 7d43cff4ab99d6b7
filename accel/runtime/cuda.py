"""Loads generated GPU kernels and launches them through the CUDA driver. No compiler is imported.

Kernels run on torch's current stream, in torch's context, so they keep order with torch's own and
are captured in its CUDA graphs. A kernel that meets an index out of range sets a word in pinned
host memory; it is looked at when the device is known to have finished, and before the next call.

A dependent kernel (`CudaKernel.dependent`) is launched as one that may start while its predecessor
runs; CUDA graphs record that as an edge of its own kind. After a copy or a library's kernel, which
know nothing of it, it starts when they have ended.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch

from accel.errors import (
    ArtifactError,
    ExecutionError,
    MissingDependencyError,
    OutOfMemoryError,
)
from accel.runtime.cuda_code import CudaKernel, unpack
from accel.runtime.cuda_load import image_for, load_module, no_portable_code
from accel.runtime.interfaces import KernelFunction
from accel.runtime.plan import evaluate_size
from accel.runtime.tensor_map import Encoded, Encoder

_ALIGNMENT = 16
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_SHARED = 48 << 10
_OUT_OF_MEMORY = 2
_LARGEST_GRID = (1 << 31) - 1
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MOST_CONFIGS = 256


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and a union of 64 bytes of which one int is used."""

    _fields_: ClassVar = [("id", ctypes.c_int), ("padding", ctypes.c_char * 4),
                          ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]  # fmt: skip


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_: ClassVar = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
                          ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
                          ("attributes", ctypes.POINTER(_Attribute)),
                          ("count", ctypes.c_uint)]  # fmt: skip


# Pointers to the values of a kernel's parameters, and what some of these lie in.
_Parameters = tuple[ctypes.Array[ctypes.c_void_p], list[Encoded]]

# Constant, and kept alive for the configurations that point to it.
_DEPENDENT = _Attribute(_SERIALIZATION, b"", 1)


class Driver:
    """The few functions of libcuda that launching needs."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.launch = library.cuLaunchKernel
        self.launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7,
                                *[ctypes.c_void_p] * 3]  # fmt: skip
        self.launch_with = library.cuLaunchKernelEx
        self.launch_with.argtypes = [ctypes.POINTER(_Config), *[ctypes.c_void_p] * 3]
        self.library = library

    def call(self, name: str, *args: object) -> None:
        """Calls a function; ExecutionError if it fails."""
        self.check(getattr(self.library, name)(*args), name)

    def check(self, code: int, what: str) -> None:
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            reason = text.value.decode() if text.value else f"error {code}"
            if code == _OUT_OF_MEMORY:
                raise OutOfMemoryError(f"CUDA: {reason}", where=what, advice="free GPU memory")
            raise ExecutionError(f"CUDA: {reason}", where=what)


@cache
def driver() -> Driver:
    """The CUDA driver. MissingDependencyError if there is none."""
    for name in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        try:
            return Driver(library)
        except AttributeError as error:
            raise MissingDependencyError(
                f"the NVIDIA driver is too old: {error}", advice="update it: CUDA 12 or later"
            ) from error
    raise MissingDependencyError(
        "this machine has no CUDA driver (libcuda)", advice="run on a machine with an NVIDIA GPU"
    )


def require_device(device: torch.device) -> None:
    """Raises MissingDependencyError if the program's device is a GPU and torch finds none here."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError(
            "the program is for a GPU, and torch finds none here",
            advice="run it on a machine with an NVIDIA GPU and a CUDA build of torch",
        )


def check_device(arch: str, device: torch.device) -> None:
    """Raises ArtifactError if neither machine code for `arch` nor its PTX runs on the device."""
    gpu = torch.cuda.get_device_name(device)
    image_for(arch, torch.cuda.get_device_capability(device), gpu)


class CudaLibrary:
    """Kernels from `cuda_code.pack`'s bytes, loaded when they are first asked for.

    Args:
        device: a CUDA device; its context is torch's.

    Raises ArtifactError for bytes that are no kernels. A missing or another kind of device is an
    error when the first kernel is asked for.
    """

    def __init__(self, data: bytes, device: torch.device) -> None:
        self.code = unpack(data)
        self.device = device
        self._functions: dict[tuple[str, bool], KernelFunction] = {}
        self._modules: list[ctypes.c_void_p] = []
        self._lock = threading.Lock()
        self._status = torch.zeros(1, dtype=torch.int32)
        self._word: ctypes.c_int32 | None = None

    def function(self, symbol: str) -> KernelFunction:
        """The kernel of that name; ArtifactError if there is none."""
        return self._function(symbol, False)

    def opening(self, symbol: str) -> KernelFunction:
        """The kernel as the first one of a call: it starts when all work before has ended.

        So later ones may read the call's arguments before they wait for the kernels before them.
        """
        return self._function(symbol, True)

    def _function(self, symbol: str, first: bool) -> KernelFunction:
        with self._lock:
            if self._word is None:
                self._open()
            if (symbol, first) not in self._functions:
                self._functions[symbol, first] = self._load(symbol, first)
            return self._functions[symbol, first]

    def raise_failure(self) -> None:
        """Raises ExecutionError if a kernel that has finished met an index out of range."""
        if self._word is not None and self._word.value:
            self._word.value = 0
            raise ExecutionError("an index is out of range", where="a generated GPU kernel")

    def _open(self) -> None:
        """Looks for the device; a program may be made and stored where there is none."""
        require_device(self.device)
        check_device(self.code.arch, self.device)
        self._driver = driver()
        self._status = self._status.pin_memory()
        self._word = ctypes.c_int32.from_address(self._status.data_ptr())

    def _load(self, name: str, first: bool) -> KernelFunction:
        if name not in self.code.kernels:
            raise ArtifactError(f"the GPU code has no kernel '{name}'")
        kernel = self.code.kernels[name]
        kernel = replace(kernel, dependent=kernel.dependent and not first)
        function = ctypes.c_void_p()
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()  # makes sure of torch's context
            module = load_module(self._driver.library, self._image(name), name)
            self._driver.call(
                "cuModuleGetFunction", ctypes.byref(function), module, kernel.symbol.encode()
            )
            if kernel.shared > _STATIC_SHARED:
                self._driver.call(
                    "cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, kernel.shared
                )
        self._modules.append(module)
        return self._launcher(name, kernel, function)

    def _image(self, name: str) -> bytes:
        """Machine code, or PTX for a GPU that is newer than it."""
        gpu = torch.cuda.get_device_name(self.device)
        if image_for(self.code.arch, torch.cuda.get_device_capability(self.device), gpu) == "cubin":
            return self.code.cubin(name)
        text = self.code.ptx(name)
        if not text:
            raise no_portable_code(name, self.code.arch, gpu)
        return text + b"\0"

    def _launcher(self, name: str, kernel: CudaKernel, function: ctypes.c_void_p) -> KernelFunction:
        check, device = self._driver.check, self.device
        count = kernel.tensors + len(kernel.sizes)
        launch = self._driver_launch(kernel, function)
        fixed = kernel.programs if isinstance(kernel.programs, int) else None
        parameters_of = self._parameters(kernel)

        def run(address: int) -> None:
            words = (ctypes.c_int64 * count).from_address(address)
            for word in words[: kernel.tensors]:
                if word % _ALIGNMENT:
                    raise ExecutionError(f"a tensor's address is no multiple of {_ALIGNMENT}",
                                         where=name)  # fmt: skip
            parameters, _maps = parameters_of(address, words)  # maps live until the launch
            programs = fixed
            if programs is None:
                sizes = dict(zip(kernel.sizes, words[kernel.tensors :]))
                programs = evaluate_size(kernel.programs, sizes)
            if not 0 < programs <= _LARGEST_GRID:
                raise ExecutionError(f"a grid of {programs} programs", where=name)
            stream = torch.cuda.current_stream(device).cuda_stream
            code = launch(programs, stream, parameters)
            if code:
                check(code, name)

        return run

    def _parameters(self, kernel: CudaKernel) -> Callable[[int, Any], _Parameters]:
        """(address of the argument words, the words) -> pointers to all parameters."""
        count = kernel.tensors + len(kernel.sizes)
        status = ctypes.c_int64(self._status.data_ptr())
        null = ctypes.c_int64(0)
        first = [ctypes.addressof(status)] if kernel.checks else []
        last = [ctypes.addressof(null)] * kernel.spare
        encoder = Encoder(self._driver.library, kernel.maps, kernel.sizes, kernel.tensors)
        made: dict[Any, _Parameters] = {}

        def parameters(address: int, words: Any, keep: object = (status, null)) -> _Parameters:
            key = (address, *encoder.key(words)) if kernel.maps else address
            found = made.get(key)
            if found is None:
                maps = encoder.encoded(words) if kernel.maps else []
                places = [address + 8 * i for i in range(count)] + first
                places += [place for one in maps for place in one.places] + last
                if len(made) > 4096:
                    made.clear()
                made[key] = found = (ctypes.c_void_p * len(places))(*places), maps
            return found

        return parameters

    def _driver_launch(
        self, kernel: CudaKernel, function: ctypes.c_void_p
    ) -> Callable[[int, int, ctypes.Array[ctypes.c_void_p]], int]:
        """(programs, stream, parameters) -> CUDA's error code."""
        threads, shared = 32 * kernel.warps, kernel.shared
        if not kernel.dependent:
            plain = self._driver.launch
            return lambda programs, stream, parameters: plain(
                function, programs, 1, 1, threads, 1, 1, shared, stream, parameters, None
            )
        launch = self._driver.launch_with
        configs: dict[tuple[int, int], _Config] = {}  # never changed once made: threads share them

        def dependent(programs: int, stream: int, parameters: ctypes.Array[ctypes.c_void_p]) -> int:
            config = configs.get((programs, stream))
            if config is None:
                if len(configs) > _MOST_CONFIGS:
                    configs.clear()
                config = _Config((programs, 1, 1), (threads, 1, 1), shared, stream,
                                 ctypes.pointer(_DEPENDENT), 1)  # fmt: skip
                configs[programs, stream] = config
            return int(launch(config, function, parameters, None))

        return dependent
