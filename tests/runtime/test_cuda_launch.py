"""How dependent kernels are described: in an artifact, and to the CUDA driver."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace

import pytest

from accel.errors import ArtifactError
from accel.runtime.cuda import _DEPENDENT, _Attribute, _Config
from accel.runtime.cuda_code import MAGIC, CudaKernel, pack, unpack

KERNEL = CudaKernel("one", 2, (), False, 0, 4, 4, 0)


def test_structures_are_laid_out_as_the_driver_reads_them() -> None:
    # CUlaunchAttribute is an int, 4 bytes, and a union of 64; CUlaunchConfig has 7 ints, the
    # stream, a pointer to attributes and their number.
    assert ctypes.sizeof(_Attribute) == 72 and _Attribute.value.offset == 8
    assert ctypes.sizeof(_Config) == 56
    assert (_Config.shared.offset, _Config.stream.offset) == (24, 32)
    assert (_Config.attributes.offset, _Config.count.offset) == (40, 48)
    assert (_DEPENDENT.id, _DEPENDENT.value) == (6, 1)


@pytest.mark.parametrize("dependent", [True, False])
def test_an_artifact_says_which_kernels_wait_themselves(dependent: bool) -> None:
    kernel = replace(KERNEL, dependent=dependent)
    found = unpack(pack("sm_90", {"one": (kernel, b"code")}))
    assert found.kernels["one"].dependent is dependent


def test_anything_but_a_truth_value_is_damage() -> None:
    data = pack("sm_90", {"one": (KERNEL, b"code")})
    length, _, rest = data[len(MAGIC) :].partition(b"\n")
    header = json.loads(rest[: int(length)])
    header["kernels"]["one"]["dependent"] = 1
    text = json.dumps(header).encode()
    with pytest.raises(ArtifactError, match="truth value"):
        unpack(b"".join([MAGIC, f"{len(text)}\n".encode(), text, rest[int(length) :]]))
