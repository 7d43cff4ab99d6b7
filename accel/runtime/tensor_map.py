"""Tensor maps: how a GPU's copy engine (TMA, from Hopper on) is told what a matrix looks like.

A map is 128 bytes that only the CUDA driver can write: address, sizes, strides, and the box that
one copy brings, laid out in shared memory as the tensor cores want it. What lies outside of the
matrix arrives as zeros, so no kernel needs masks for its operands. A kernel takes a map by value,
then its sizes and strides as integers, as Triton's compiled functions do:

    map (128 bytes), rows int32, columns int32, stride int64, 1 int64

A map depends on the address, so it is made at the launch; equal ones are made once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accel.errors import ExecutionError
from accel.runtime.plan import SizeExpr, evaluate_size

PARAMETERS = 5  # of a kernel, for each map
_BYTES, _ALIGNMENT = 128, 64
_L2_128_BYTES = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
_MOST_BOX, _MOST_TYPE, _MOST_SWIZZLE = 256, 15, 7
_MOST_CACHED = 1024


@dataclass(frozen=True)
class TensorMap:
    """A matrix as kernels copy it.

    Attributes:
        tensor: position of its address among the kernel's tensors.
        shape: rows and columns, in elements.
        stride: elements from one row to the next; a multiple of 16 bytes.
        box: rows and columns of one copy.
        width: bytes of an element.
        element: CUDA's number of the element's type (CUtensorMapDataType).
        swizzle: CUDA's number of the pattern in shared memory (CUtensorMapSwizzle).
    """

    tensor: int
    shape: tuple[SizeExpr, SizeExpr]
    stride: SizeExpr
    box: tuple[int, int]
    width: int
    element: int
    swizzle: int


def tensor_map(data: Mapping[str, Any], tensors: int) -> TensorMap:
    """A map from JSON. Raises ValueError, KeyError or TypeError for what is none."""
    made = TensorMap(**{**data, "shape": _pair(data["shape"]), "box": _pair(data["box"])})
    numbers = (made.tensor, *made.box, made.width, made.element, made.swizzle)
    if not all(type(n) is int and n >= 0 for n in numbers) or made.tensor >= tensors:
        raise ValueError("a tensor map with a bad number")
    if not all(0 < n <= _MOST_BOX for n in made.box) or made.width not in (1, 2, 4, 8):
        raise ValueError("a tensor map's box out of range")
    if made.element > _MOST_TYPE or made.swizzle > _MOST_SWIZZLE:
        raise ValueError("a tensor map of an unknown type")
    return made


def _pair(data: object) -> tuple[Any, Any]:
    if not isinstance(data, (list, tuple)) or len(data) != 2:
        raise ValueError("a tensor map has two dimensions")
    return data[0], data[1]


class Encoded:
    """One map for one address and one set of sizes, and the integers that follow it.

    `places` are the addresses of the parameters' values, in order, for as long as this lives.
    """

    def __init__(
        self, library: ctypes.CDLL, one: TensorMap, address: int, sizes: Mapping[str, int]
    ) -> None:
        rows, columns = (evaluate_size(e, sizes) for e in one.shape)
        stride = evaluate_size(one.stride, sizes)
        self._memory = (ctypes.c_uint8 * (_BYTES + _ALIGNMENT))()
        at = ctypes.addressof(self._memory)
        at += -at % _ALIGNMENT
        shape = (ctypes.c_uint64 * 2)(columns, rows)
        strides = (ctypes.c_uint64 * 1)(stride * one.width)
        box = (ctypes.c_uint32 * 2)(one.box[1], one.box[0])
        steps = (ctypes.c_uint32 * 2)(1, 1)
        code = library.cuTensorMapEncodeTiled(
            ctypes.c_void_p(at), ctypes.c_int(one.element), ctypes.c_uint32(2),
            ctypes.c_void_p(address), shape, strides, box, steps, ctypes.c_int(0),
            ctypes.c_int(one.swizzle), ctypes.c_int(_L2_128_BYTES), ctypes.c_int(0),
        )  # fmt: skip
        if code:
            raise ExecutionError(
                f"CUDA refuses a tensor map of {rows} x {columns}: error {code}",
                where="a generated GPU kernel",
            )
        self._integers = (
            ctypes.c_int32(rows), ctypes.c_int32(columns),
            ctypes.c_int64(stride), ctypes.c_int64(1),
        )  # fmt: skip
        self.places = [at, *(ctypes.addressof(i) for i in self._integers)]


class Encoder:
    """All maps of one kernel.

    Args:
        library: libcuda.
        sizes: the names of the sizes that follow the tensors in a launch's words.
        tensors: how many addresses come before them.
    """

    def __init__(
        self, library: ctypes.CDLL, maps: Sequence[TensorMap], sizes: Sequence[str], tensors: int
    ) -> None:
        self.library, self.maps, self.sizes, self.tensors = library, tuple(maps), sizes, tensors
        self._made: dict[tuple[int, ...], list[Encoded]] = {}

    def key(self, words: Sequence[int]) -> tuple[int, ...]:
        """What the maps of a launch depend on."""
        return (*(words[m.tensor] for m in self.maps), *words[self.tensors :])

    def encoded(self, words: Sequence[int]) -> list[Encoded]:
        """The maps of a launch. Raises ExecutionError if CUDA refuses one."""
        key = self.key(words)
        made = self._made.get(key)
        if made is None:
            sizes = dict(zip(self.sizes, words[self.tensors :]))
            made = [Encoded(self.library, m, words[m.tensor], sizes) for m in self.maps]
            if len(self._made) >= _MOST_CACHED:
                self._made.clear()
            self._made[key] = made
        return made
