"""Parameters that a compiled graph holds as constants, watched between calls.

A write that autograd sees counts up a tensor's version. Writes through `parameter.data`, or through
NumPy, do not: for these a few words of memory are compared, spread over the tensor. Whatever writes
a whole tensor (an average of weights, a checkpoint, a mask) changes some of them.
"""

from __future__ import annotations

import ctypes
from typing import TypeAlias

import torch
from torch import Tensor, nn

_WORDS = 4  # compared at each call: about 40 ns each

_Cell: TypeAlias = ctypes.c_uint64 | ctypes.c_uint8


class Frozen:
    """One input of a graph that is a constant of its program."""

    def __init__(self, index: int, tensor: Tensor) -> None:
        self.index, self.tensor = index, tensor
        self._version = version(tensor)
        strided = tensor.layout is torch.strided
        self._memory = tensor.untyped_storage() if strided else None  # stays while it is watched
        self._cells = cells_of(tensor) if strided else []
        self._words = [cell.value for cell in self._cells]

    def changed(self, given: Tensor) -> bool:
        """Whether the input is another tensor now, or was written."""
        return (
            given is not self.tensor
            or version(given) != self._version
            or [cell.value for cell in self._cells] != self._words
        )


def is_weight(tensor: Tensor) -> bool:
    """Whether Dynamo's input is a parameter or a buffer of a module."""
    return isinstance(tensor, nn.Parameter) or (
        getattr(tensor, "_dynamo_static_input_type", None) is not None
    )


def version(tensor: Tensor) -> tuple[int, int]:
    """Changes when the tensor is written in place or its memory is replaced."""
    return (-1 if tensor.is_inference() else tensor._version), tensor.data_ptr()


def cells_of(tensor: Tensor) -> list[_Cell]:
    """A few words of a tensor's memory, from its first to its last; none on a GPU."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or tensor.data_ptr() == 0:
        return []
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    size, start = (steps + 1) * tensor.element_size(), tensor.data_ptr()
    if size < 8:
        return [ctypes.c_uint8.from_address(start + i) for i in range(size)]
    places = {i * (size - 8) // (_WORDS - 1) for i in range(_WORDS)}
    return [ctypes.c_uint64.from_address(start + place) for place in sorted(places)]
