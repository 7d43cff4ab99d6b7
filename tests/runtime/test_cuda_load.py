"""Which code a GPU gets, what a driver's refusal means, kernels as bytes. No GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from accel.compiler.gpu import portable
from accel.config import c_compiler
from accel.errors import AccelError, ArtifactError, MissingDependencyError, OutOfMemoryError
from accel.runtime.cuda import CudaLibrary, driver
from accel.runtime.cuda_code import CudaKernel, pack, unpack
from accel.runtime.cuda_load import image_for, load_error

PTX = b".version 8.7\n.target sm_90\n.address_size 64\n" * 50
KERNEL = CudaKernel("one", 2, (), False, 0, 4, 4, 0)


@pytest.mark.parametrize(
    ("arch", "capability", "wanted"),
    [
        ("sm_80", (8, 0), "cubin"),
        ("sm_80", (8, 6), "cubin"),
        ("sm_80", (9, 0), "ptx"),
        ("sm_90", (9, 0), "cubin"),
        ("sm_90a", (9, 0), "cubin"),
        ("sm_90", (10, 0), "ptx"),
        ("sm_90", (12, 0), "ptx"),
        ("sm_100", (12, 0), "ptx"),
    ],
)
def test_newer_gpus_are_given_ptx(arch: str, capability: tuple[int, int], wanted: str) -> None:
    assert image_for(arch, capability, "a GPU") == wanted


@pytest.mark.parametrize(
    ("arch", "capability"), [("sm_90", (8, 0)), ("sm_86", (8, 0)), ("sm_100", (9, 0))]
)
def test_older_gpus_are_refused(arch: str, capability: tuple[int, int]) -> None:
    with pytest.raises(ArtifactError, match=f"for {arch}; an old GPU is sm_"):
        image_for(arch, capability, "an old GPU")


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (2, OutOfMemoryError, "no memory"),
        (200, ArtifactError, "machine code"),
        (209, ArtifactError, "no code for this GPU"),
        (218, MissingDependencyError, "too old"),
        (221, MissingDependencyError, "too old"),
        (222, MissingDependencyError, "CUDA 11.8"),
        (803, MissingDependencyError, "too old"),
        (719, ArtifactError, "CUDA error 719"),
    ],
)
def test_refusals_are_typed(code: int, kind: type[AccelError], said: str) -> None:
    error = load_error(code, "ptxas: line 3\nmore", "accel_k", 11080)
    assert type(error) is kind and said in error.what and error.where == "accel_k"


def test_ptx_travels_with_machine_code() -> None:
    other = CudaKernel("two", 1, (), False, 0, 4, 4, 0)
    data = pack("sm_90", {"a": (KERNEL, b"cubin a"), "b": (other, b"cubin b")}, {"a": PTX})
    code = unpack(data)
    assert (code.cubin("a"), code.cubin("b")) == (b"cubin a", b"cubin b")
    assert (code.ptx("a"), code.ptx("b")) == (PTX, b"")
    assert len(data) < len(PTX)


def test_damaged_ptx_is_found() -> None:
    data = pack("sm_90", {"a": (KERNEL, b"cubin")}, {"a": PTX})
    with pytest.raises(ArtifactError, match="cut off"):
        unpack(data[:-1])
    packed = zlib.compress(PTX)
    broken = data.replace(packed, packed[:10] + bytes(len(packed) - 10))
    with pytest.raises(ArtifactError, match="damaged GPU kernels"):
        unpack(broken).ptx("a")
    short = data.replace(packed, zlib.compress(PTX, 0)[: len(packed)])
    with pytest.raises(ArtifactError, match="damaged GPU kernels"):
        unpack(short).ptx("a")


def test_ptx_is_portable_where_no_instruction_belongs_to_one_architecture() -> None:
    plain = ".version 8.7\n.target sm_90a\nld.global.v4.b32 {%r1};"
    assert portable(plain) == plain.replace("sm_90a", "sm_90").encode()
    assert portable(plain + "wgmma.mma_async.sync.aligned") == b""
    assert portable(".target sm_80\n") == b".target sm_80\n"


WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@WITHOUT_GPU
def test_a_machine_without_a_gpu_is_said() -> None:
    library = CudaLibrary(pack("sm_90", {"a": (KERNEL, b"cubin")}), torch.device("cuda", 0))
    with pytest.raises(MissingDependencyError, match="for a GPU, and torch finds none here"):
        library.function("a")
    with pytest.raises(MissingDependencyError, match="no CUDA driver"):
        driver()


@WITHOUT_GPU
def test_a_driver_without_the_functions_is_too_old(tmp_path: Path) -> None:
    """A libcuda of CUDA 11, which has no cuLaunchKernelEx."""
    source = tmp_path / "old.c"
    source.write_text("int cuLaunchKernel(void) { return 0; }\n")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([c_compiler(), "-shared", "-fPIC", "-o", library, source], check=True)
    program = "from accel.runtime.cuda import driver\ndriver()"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    last = "\n".join(done.stderr.strip().splitlines()[-2:])
    assert done.returncode == 1 and "MissingDependencyError" in last
    assert "driver is too old" in last and "cuLaunchKernelEx" in last and "CUDA 12" in last
