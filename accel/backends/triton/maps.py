"""Matrices that a kernel copies with the tensor memory accelerator (TMA), from Hopper on.

A `MapCode` is a parameter of the Triton function through which a tile of a matrix is loaded or
stored at once (`m0.load([row, k])`); the runtime makes what it stands for, a tensor map, from the
address of a tensor that the launch gets anyway (`accel.runtime.tensor_map`).
"""

from __future__ import annotations

from dataclasses import dataclass

from accel.ir.types import Dim

FIRST_CAPABILITY = 90
PARAMETERS = 5  # of the compiled function, for each: the map, two sizes, two strides
MULTIPLE = 16  # bytes, of every stride


@dataclass(frozen=True)
class MapCode:
    """One matrix.

    Attributes:
        name: the parameter.
        pointer: the parameter with the tensor's address.
        element: Triton's name of the element type ("fp16").
        rows, columns, stride: the matrix in elements; `columns` are adjacent.
        box: rows and columns of a tile.
        layout: how Gluon code lays a tile out in shared memory; "" leaves it to Triton.
    """

    name: str
    pointer: str
    element: str
    rows: Dim
    columns: int
    stride: int
    box: tuple[int, int]
    layout: str = ""

    @property
    def type(self) -> str:
        """Triton's type of the parameter."""
        tail = f",{self.layout}" if self.layout else ""
        return f"tensordesc<{self.element}[{self.box[0]}, {self.box[1]}]{tail}>"


@dataclass(frozen=True)
class MapLayout:
    """What Triton has decided about a map.

    Attributes:
        box: rows and columns of one copy; a tile may take several.
        width: bytes of an element; element, swizzle: CUDA's numbers of the type and the pattern.
    """

    box: tuple[int, int]
    width: int
    element: int
    swizzle: int


# Triton counts element types as the device does, the driver in another order.
_HOST_ELEMENT = {8: 10, 9: 8, 10: 9}


def map_layouts(described: object) -> tuple[MapLayout, ...]:
    """From Triton's metadata (`tensordesc_meta`)."""
    found = described if isinstance(described, (list, tuple)) else ()
    return tuple(
        MapLayout(
            (int(one["block_size"][0]), int(one["block_size"][1])),
            int(one["elem_size"]),
            _HOST_ELEMENT.get(int(one["elem_type"]), int(one["elem_type"])),
            int(one["swizzle"]),
        )
        for one in found
    )
