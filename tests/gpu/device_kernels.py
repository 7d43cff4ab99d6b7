"""Runs generated kernels on the GPU, for tests. Compiling is spread over processes."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.kernel import Slot
from accel.compiler.gpu import kernel_binary
from accel.ir import Function
from accel.ir.interpret import bind_symbols
from accel.ir.storage import pack_sub_byte
from accel.ir.types import SUB_BYTE_BITS, substitute
from accel.runtime.cuda import CudaLibrary
from accel.runtime.cuda_code import pack
from tests.backends.kernels import kernel_of, poisoned


@dataclass(frozen=True)
class Kernel:
    """A function to compile as a kernel of one kind.

    Attributes:
        weights: arguments from this number on are constants.
        sms, tile: of the backend.
    """

    function: Function
    kind: str = "pointwise"
    weights: int | None = None
    sms: int = 132
    tile: Any = None

    def backend(self, arch: str) -> TritonBackend:
        return TritonBackend(arch, self.sms, self.tile)


# Makes the same kernels in every process.
Suite = Callable[[], list[Kernel]]
Job = tuple[Suite, str, list[int]]  # the suite, the architecture, the kernels' numbers
Made = dict[int, tuple[Any, bytes]]  # launch descriptions and packed code by kernel number


def device_arch() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def compile_some(job: Job) -> Made:
    suite, arch, numbers = job
    kernels = suite()
    made: Made = {}
    for number in numbers:
        one = kernels[number]
        compiled = one.backend(arch).compile([kernel_of(one.function, one.kind, one.weights)])
        (name,) = compiled.names
        launches = compiled.launches[name]
        code = {launch.name: kernel_binary(launch) for launch in launches}
        described = [(x.name, x.reads, x.writes, x.code.sizes, x.code.updates) for x in launches]
        sizes = compiled.scratch[name], compiled.zeroed[name]
        made[number] = ((described, sizes, compiled.sources), pack(arch, code))
    return made


@cache
def _workers() -> tuple[ProcessPoolExecutor, int]:
    """One pool for all suites of a process: a worker takes seconds to start."""
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    count = max(1, min(16, os.cpu_count() or 1) // beside)
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    atexit.register(pool.shutdown)
    return pool, count


class DeviceKernels:
    """The kernels that `suite()` makes, compiled for this GPU."""

    def __init__(self, suite: Suite) -> None:
        kernels, arch = suite(), device_arch()
        self.functions = [one.function for one in kernels]
        self.made: Made = {}
        pool, count = _workers()
        parts = min(4 * count, max(len(kernels) // 2, 1))
        jobs: list[Job] = [(suite, arch, list(range(i, len(kernels), parts))) for i in range(parts)]
        for part in pool.map(compile_some, jobs):
            self.made.update(part)
        self.libraries: dict[int, CudaLibrary] = {}

    def source(self, number: int) -> str:
        return "\n".join(self.made[number][0][2].values())

    def __call__(self, number: int, inputs: Sequence[Tensor], calls: int = 1) -> list[Tensor]:
        """Results of the last of some calls, on the CPU. Inputs as the interpreter takes them:
        elements of less than a byte are packed here. Raises ExecutionError for an index out of
        range."""
        function = self.functions[number]
        (launches, (scratch, zeroed), _), code = self.made[number]
        device = torch.device("cuda", torch.cuda.current_device())
        if number not in self.libraries:
            self.libraries[number] = CudaLibrary(code, device)
        library = self.libraries[number]
        symbols = bind_symbols(function, [tuple(t.shape) for t in inputs])
        memory: dict[Slot, Tensor] = {}
        for i, (arg, x) in enumerate(zip(function.args, inputs, strict=True)):
            stored = pack_sub_byte(x, arg.dtype) if arg.dtype in SUB_BYTE_BITS else x
            memory[Slot("input", i)] = stored.contiguous().to(device)
        for i, result in enumerate(function.results):
            shape = [int(substitute(d, symbols)) for d in result.shape]
            memory[Slot("result", i)] = poisoned(shape, result.dtype).to(device)
        for i, size in enumerate(scratch):
            count = int(substitute(size, symbols))
            made = poisoned([count], torch.uint8).to(device)
            memory[Slot("scratch", i)] = made.zero_() if i in zeroed else made
        for _ in range(calls):
            for name, reads, writes, sizes, updates in launches:
                if any(memory[s].numel() == 0 for s in writes):
                    continue
                for written, read in updates:
                    memory[writes[written]].copy_(memory[reads[read]])
                words = [memory[s].data_ptr() for s in (*reads, *writes)]
                words += [symbols[s] for s in sizes]
                array = (ctypes.c_int64 * len(words))(*words)
                library.function(name)(ctypes.addressof(array))
        torch.cuda.synchronize()
        library.raise_failure()
        return [memory[Slot("result", i)].cpu() for i in range(len(function.results))]
