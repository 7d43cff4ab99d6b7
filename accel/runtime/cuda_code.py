"""Generated GPU kernels as bytes: what a compiler writes into an artifact, and a runtime loads.

    accel-cuda-1 \\n length \\n {"arch": "sm_90", "kernels": {name: {...}}} cubin, PTX, cubin, ...

The header is JSON: how to launch each kernel (warps, shared memory, how many programs as a size
expression), and where its machine code lies, and its PTX (zlib), which newer GPUs are given. It is
data; the code is native code, and is loaded only from files that the user trusts, as a CPU's is.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from accel.errors import ArtifactError
from accel.runtime.plan import SizeExpr
from accel.runtime.tensor_map import TensorMap, tensor_map

MAGIC = b"accel-cuda-1\n"
_LARGEST_HEADER = 64 << 20
_LARGEST_PTX = 64 << 20
_MOST_MAPS = 16


@dataclass(frozen=True)
class CudaKernel:
    """How to launch one kernel.

    Attributes:
        symbol: its name in the cubin.
        tensors: how many addresses it takes first.
        sizes: symbols that it takes next, as int64.
        checks: the address of a status word follows, which is set if an index is out of range.
        spare: so many null pointers follow.
        programs: the grid's size, from `sizes`.
        shared: bytes of dynamic shared memory.
        dependent: it may be launched while earlier kernels run: it waits for them itself.
        maps: tensor maps, which it takes after the status word (`accel.runtime.tensor_map`).
    """

    symbol: str
    tensors: int
    sizes: tuple[str, ...]
    checks: bool
    spare: int
    programs: SizeExpr
    warps: int
    shared: int
    offset: int = 0
    length: int = 0
    ptx_length: int = 0
    dependent: bool = False
    maps: tuple[TensorMap, ...] = ()


@dataclass(frozen=True)
class CudaCode:
    """All kernels of a program for one architecture ("sm_90")."""

    arch: str
    kernels: Mapping[str, CudaKernel]
    machine_code: memoryview

    def cubin(self, name: str) -> bytes:
        one = self.kernels[name]
        return bytes(self.machine_code[one.offset : one.offset + one.length])

    def ptx(self, name: str) -> bytes:
        """The kernel's PTX; empty if it has none. Raises ArtifactError for damaged data."""
        one = self.kernels[name]
        start = one.offset + one.length
        packed = bytes(self.machine_code[start : start + one.ptx_length])
        unpacker = zlib.decompressobj()
        try:
            text = unpacker.decompress(packed, _LARGEST_PTX) if packed else b""
        except zlib.error as error:
            raise ArtifactError(f"damaged GPU kernels: {error}", where=name) from error
        if packed and not unpacker.eof:
            raise ArtifactError("damaged GPU kernels: PTX is cut off or too long", where=name)
        return text


def is_cuda_code(data: bytes) -> bool:
    return data.startswith(MAGIC)


def pack(
    arch: str,
    kernels: Mapping[str, tuple[CudaKernel, bytes]],
    ptx: Mapping[str, bytes] | None = None,
) -> bytes:
    """The bytes of kernels with their cubins, and PTX by name. Equal input, equal bytes."""
    header: dict[str, object] = {}
    parts: list[bytes] = []
    offset = 0
    for name in sorted(kernels):
        kernel, cubin = kernels[name]
        text = (ptx or {}).get(name, b"")
        portable = zlib.compress(text) if text else b""
        header[name] = {
            **asdict(kernel),
            "offset": offset,
            "length": len(cubin),
            "ptx_length": len(portable),
        }
        parts += [cubin, portable]
        offset += len(cubin) + len(portable)
    text = json.dumps({"arch": arch, "kernels": header}, sort_keys=True).encode()
    return b"".join([MAGIC, f"{len(text)}\n".encode(), text, *parts])


def unpack(data: bytes) -> CudaCode:
    """Reads what `pack` wrote. Raises ArtifactError for anything else."""
    if not is_cuda_code(data):
        raise ArtifactError("the file holds no GPU kernels")
    length, newline, _ = data[len(MAGIC) : len(MAGIC) + 20].partition(b"\n")
    if not newline or not length.isdigit() or int(length) > min(len(data), _LARGEST_HEADER):
        raise ArtifactError("damaged GPU kernels: no header")
    start = len(MAGIC) + len(length) + 1
    try:
        header = json.loads(data[start : start + int(length)])
        code = memoryview(data)[start + int(length) :]
        kernels = {str(n): _kernel(k, len(code)) for n, k in header["kernels"].items()}
        arch = str(header["arch"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"damaged GPU kernels: {error}") from error
    return CudaCode(arch, kernels, code)


def _kernel(data: dict[str, object], room: int) -> CudaKernel:
    kernel = CudaKernel(**data)  # type: ignore[arg-type]
    numbers = (kernel.tensors, kernel.spare, kernel.warps, kernel.shared, kernel.offset,
               kernel.length, kernel.ptx_length)  # fmt: skip
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a number is missing")
    if type(kernel.checks) is not bool or type(kernel.dependent) is not bool:
        raise ValueError("a truth value is missing")
    if not 0 < kernel.warps <= 32 or kernel.spare > 16 or kernel.tensors > 1024:
        raise ValueError("launch parameters out of range")
    if kernel.offset + kernel.length + kernel.ptx_length > room:
        raise ValueError("machine code is cut off")
    if not isinstance(kernel.symbol, str) or not isinstance(kernel.sizes, (list, tuple)):
        raise ValueError("no symbol")
    if not all(isinstance(s, str) for s in kernel.sizes):
        raise ValueError("bad sizes")
    if not isinstance(kernel.maps, (list, tuple)) or len(kernel.maps) > _MOST_MAPS:
        raise ValueError("bad tensor maps")
    maps = tuple(tensor_map(dict(m), kernel.tensors) for m in kernel.maps)  # type: ignore[call-overload]
    made = {**data, "sizes": tuple(kernel.sizes), "maps": maps}
    return CudaKernel(**made)  # type: ignore[arg-type]
