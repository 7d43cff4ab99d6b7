"""Tensor maps: what is read from JSON, and what the driver is asked for."""

from __future__ import annotations

import ctypes
from dataclasses import asdict
from typing import Any

import pytest

from accel.errors import ArtifactError, ExecutionError
from accel.runtime.cuda_code import CudaKernel, pack, unpack
from accel.runtime.tensor_map import Encoder, TensorMap, tensor_map

MAP = TensorMap(1, ("s", 96), 128, (64, 32), 2, 6, 2)


class Library:
    """Stands for libcuda: keeps what it was called with, and answers `code`."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[dict[str, Any]] = []

    def cuTensorMapEncodeTiled(self, place: Any, element: Any, rank: Any, address: Any, shape: Any,
                               strides: Any, box: Any, steps: Any, *rest: Any) -> int:  # fmt: skip
        self.calls.append({
            "place": place.value, "element": element.value, "rank": rank.value,
            "address": address.value, "shape": list(shape), "strides": list(strides),
            "box": list(box), "rest": [r.value for r in rest],
        })  # fmt: skip
        return self.code


def read(address: int, kind: Any) -> int:
    return int(kind.from_address(address).value)


def test_maps_are_made_once_for_an_address_and_sizes() -> None:
    library = Library()
    encoder = Encoder(library, [MAP], ["s"], 3)  # type: ignore[arg-type]
    (one,) = encoder.encoded([16, 4096, 32, 70])
    assert encoder.encoded([48, 4096, 64, 70])[0] is one  # other tensors do not matter
    (call,) = library.calls
    assert call["address"] == 4096 and call["shape"] == [96, 70] and call["strides"] == [256]
    assert call["box"] == [32, 64] and call["element"] == 6 and call["rest"] == [0, 2, 2, 0]
    assert call["place"] % 64 == 0 and call["place"] == one.places[0]
    kinds = (ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.c_int64)
    assert [read(p, k) for p, k in zip(one.places[1:], kinds)] == [70, 96, 128, 1]
    assert encoder.encoded([16, 8192, 32, 70])[0] is not one
    assert encoder.encoded([16, 4096, 32, 71])[0] is not one


def test_a_refusal_is_an_error() -> None:
    encoder = Encoder(Library(1), [MAP], ["s"], 3)  # type: ignore[arg-type]
    with pytest.raises(ExecutionError, match="70 x 96"):
        encoder.encoded([16, 4096, 32, 70])


def test_artifacts_keep_maps() -> None:
    kernel = CudaKernel("k", 3, ("s",), False, 2, 132, 12, 1000, maps=(MAP,))
    found = unpack(pack("sm_90", {"k": (kernel, b"code")})).kernels["k"]
    assert found.maps == (MAP,) and found.warps == 12


@pytest.mark.parametrize("change", [
    {"tensor": 3}, {"tensor": -1}, {"box": [0, 32]}, {"box": [257, 32]}, {"box": [1, 2, 3]},
    {"width": 3}, {"element": 99}, {"swizzle": "a"}, {"shape": 5}, {"more": 1},
])  # fmt: skip
def test_damaged_maps_are_refused(change: dict[str, Any]) -> None:
    data = {**asdict(MAP), **change}
    with pytest.raises((ValueError, TypeError)):
        tensor_map(data, 3)
    kernel = CudaKernel("k", 3, ("s",), False, 2, 132, 12, 1000, maps=(MAP,))
    packed = pack("sm_90", {"k": (kernel, b"code")})
    with pytest.raises(ArtifactError):
        unpack(packed.replace(b'"tensor": 1', b'"tensor": 9'))
