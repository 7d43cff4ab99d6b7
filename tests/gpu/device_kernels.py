"""Runs generated kernels on the GPU, for tests. Compiling is spread over processes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.kernel import Slot
from accel.compiler.gpu import kernel_binary
from accel.ir import Function
from accel.ir.interpret import bind_symbols
from accel.ir.types import SUB_BYTE_BITS, substitute
from accel.runtime.cuda import CudaLibrary
from accel.runtime.cuda_code import pack
from tests.backends.kernels import kernel_of, poisoned

Suite = Callable[[], list[Function]]


def device_arch() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def compile_some(
    suite: Suite, arch: str, numbers: list[int], kind: str, weights: int | None
) -> dict[int, tuple[object, bytes]]:
    """Launch descriptions and packed code of some of a suite's functions, by number."""
    functions, backend = suite(), TritonBackend(arch)
    made: dict[int, tuple[object, bytes]] = {}
    for number in numbers:
        compiled = backend.compile([kernel_of(functions[number], kind, weights)])
        (name,) = compiled.names
        launches = compiled.launches[name]
        code = {one.name: kernel_binary(one) for one in launches}
        described = [(one.name, one.reads, one.writes, one.code.sizes) for one in launches]
        sizes = compiled.scratch[name], compiled.zeroed[name]
        made[number] = ((described, sizes, compiled.sources), pack(arch, code))
    return made


class DeviceKernels:
    """The functions that `suite()` makes (the same in every process), compiled for this GPU as
    kernels of one kind. Arguments from number `weights` on are constants, if it is given."""

    def __init__(self, suite: Suite, kind: str = "pointwise", weights: int | None = None) -> None:
        self.functions = suite()
        self.made: dict[int, tuple[Any, bytes]] = {}
        count = len(self.functions)
        workers = min(16, os.cpu_count() or 1, max(count // 4, 1))
        parts = [list(range(start, count, workers)) for start in range(workers)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            arch = [device_arch()] * workers
            options = [kind] * workers, [weights] * workers
            for part in pool.map(compile_some, [suite] * workers, arch, parts, *options):
                self.made.update(part)
        self.libraries: dict[int, CudaLibrary] = {}

    def source(self, number: int) -> str:
        return "\n".join(self.made[number][0][2].values())

    def __call__(self, number: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Results, on the CPU. Raises ExecutionError for an index out of range."""
        function = self.functions[number]
        (launches, (scratch, zeroed), _), code = self.made[number]
        device = torch.device("cuda", torch.cuda.current_device())
        if number not in self.libraries:
            self.libraries[number] = CudaLibrary(code, device)
        library = self.libraries[number]
        shapes = [
            tuple(map(int, a.shape)) if a.dtype in SUB_BYTE_BITS else tuple(t.shape)
            for a, t in zip(function.args, inputs)
        ]
        symbols = bind_symbols(function, shapes)
        memory: dict[Slot, Tensor] = {}
        for i, tensor in enumerate(inputs):
            memory[Slot("input", i)] = tensor.contiguous().to(device)
        for i, result in enumerate(function.results):
            shape = [int(substitute(d, symbols)) for d in result.shape]
            memory[Slot("result", i)] = poisoned(shape, result.dtype).to(device)
        for i, size in enumerate(scratch):
            count = int(substitute(size, symbols))
            made = poisoned([count], torch.uint8).to(device)
            memory[Slot("scratch", i)] = made.zero_() if i in zeroed else made
        for name, reads, writes, sizes in launches:
            if any(memory[s].numel() == 0 for s in writes):
                continue
            words = [memory[s].data_ptr() for s in (*reads, *writes)]
            words += [symbols[s] for s in sizes]
            array = (ctypes.c_int64 * len(words))(*words)
            library.function(name)(ctypes.addressof(array))
        torch.cuda.synchronize()
        library.raise_failure()
        return [memory[Slot("result", i)].cpu() for i in range(len(function.results))]
