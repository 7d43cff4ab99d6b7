"""Which device a compiled program runs on, and its weights there."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from accel.runtime.cuda import CudaLibrary
from accel.runtime.cuda_code import is_cuda_code
from accel.runtime.host import HostLibrary
from accel.runtime.interfaces import HostCode
from accel.runtime.prepare import WeightSource

CPU = torch.device("cpu")


def device_of(kind: str) -> torch.device:
    """The device for a target's kind, "cpu" or "cuda": the current GPU for the latter.

    A program for a GPU can be made and written to a file where there is none.
    """
    if kind != "cuda":
        return CPU
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def load_code(data: bytes, device: torch.device = CPU) -> HostCode:
    """Generated kernels from their bytes, which must be trusted."""
    if is_cuda_code(data):
        return CudaLibrary(data, device)
    return HostLibrary(data)


class DeviceWeights:
    """Weights of another source, copied to a device when they are first used, once each."""

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        self._source, self._device = source, device
        self._copies: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def check(self, names: Sequence[str]) -> None:
        self._source.check(names)

    def tensor(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._copies:
                tensor = self._source.tensor(name).to(self._device)
                # A part of a larger tensor may start anywhere; kernels read 16 bytes at a time.
                self._copies[name] = tensor.clone() if tensor.data_ptr() % 16 else tensor
                self._source.release(name)
            return self._copies[name]

    def release(self, name: str) -> None:
        return None
