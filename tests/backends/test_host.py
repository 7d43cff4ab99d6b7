"""Loading kernel libraries: bytes in, functions out, and nothing else."""

from __future__ import annotations

import ctypes
import gc
import os

import pytest
import torch

from accel.errors import ArtifactError
from accel.runtime.host import HostLibrary
from tests.backends.kernels import Runner, f32, function_of


@pytest.fixture(scope="module")
def code() -> tuple[bytes, str]:
    compiled = Runner([function_of([f32(4)], lambda b, x: b.neg(x))]).compiled
    return compiled.library, compiled.symbols[0]


def run(library: HostLibrary, symbol: str) -> torch.Tensor:
    x, y = torch.arange(4.0), torch.zeros(4)
    words = (ctypes.c_int64 * 2)(x.data_ptr(), y.data_ptr())
    library.function(symbol)(ctypes.addressof(words))
    return y


def test_runs_from_bytes(code: tuple[bytes, str]) -> None:
    assert torch.equal(run(HostLibrary(code[0]), code[1]), -torch.arange(4.0))


def test_two_libraries_are_not_mistaken_for_each_other(code: tuple[bytes, str]) -> None:
    other = Runner([function_of([f32(4)], lambda b, x: b.exp(x))]).compiled
    libraries = [HostLibrary(code[0]), HostLibrary(other.library)]
    assert torch.equal(run(libraries[0], code[1]), -torch.arange(4.0))
    torch.testing.assert_close(run(libraries[1], other.symbols[0]), torch.arange(4.0).exp())


def test_functions_keep_their_library_and_descriptors_are_closed(code: tuple[bytes, str]) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = descriptors()
    function = HostLibrary(code[0]).function(code[1])
    gc.collect()
    x, y = torch.ones(4), torch.zeros(4)
    words = (ctypes.c_int64 * 2)(x.data_ptr(), y.data_ptr())
    function(ctypes.addressof(words))
    assert torch.equal(y, -x)
    del function
    gc.collect()
    assert descriptors() == before


def test_missing_functions_and_other_symbols_are_refused(code: tuple[bytes, str]) -> None:
    library = HostLibrary(code[0])
    for symbol in ("accel_0123456789abcdef", "malloc", "system", "accel_x; y", ""):
        with pytest.raises(ArtifactError):
            library.function(symbol)


@pytest.mark.parametrize("bad", [b"", b"not a library", b"\x7fELF" + bytes(100)])
def test_bytes_that_are_no_library(bad: bytes) -> None:
    with pytest.raises(ArtifactError, match="does not load"):
        HostLibrary(bad)


def test_a_library_of_something_else_is_refused(tmp_path: object) -> None:
    path = torch._C.__file__
    with open(path, "rb") as file:
        content = file.read()
    with pytest.raises(ArtifactError):
        HostLibrary(content)
