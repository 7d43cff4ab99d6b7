"""Programs for a GPU, run on the CPU: kernels by Triton's interpreter, the rest by torch.

What runs here belongs in a `tests.backends.triton_worker.Worker`, whose Triton interprets.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from typing import Any

import torch

from accel.backends.cubin.compile import loaded
from accel.backends.triton import TritonBackend, dependent
from accel.backends.triton.kernel import LaunchCode
from accel.compiler import gpu
from accel.compiler.assemble import weights_on
from accel.compiler.lower import KernelSymbol, Launch, lower_function
from accel.compiler.options import Options
from accel.compiler.pipeline import tensor_pipeline
from accel.compiler.sizes import size_expr
from accel.compiler.targets import get_target
from accel.ir import Module
from accel.ir.module import Op
from accel.ir.types import substitute
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.runtime import libraries
from accel.runtime.executor import CompiledFunction
from accel.runtime.interfaces import KernelFunction
from tests.backends.triton_worker import _Libdevice, interpretable

_POINTERS = {
    "*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16, "*i64": torch.int64,
    "*i32": torch.int32, "*i1": torch.bool, "*i8": torch.int8, "*u8": torch.uint8,
}  # fmt: skip


class InterpretedHost:
    """Kernels of a program by name, as `accel.runtime` calls them."""

    def __init__(self) -> None:
        self.launches: dict[str, LaunchCode] = {}
        self._sources = ExitStack()
        self._functions: dict[str, KernelFunction] = {}

    def function(self, symbol: str) -> KernelFunction:
        if symbol not in self._functions:
            self._functions[symbol] = self._load(self.launches[symbol])
        return self._functions[symbol]

    def _load(self, code: LaunchCode) -> KernelFunction:
        module: Any = self._sources.enter_context(loaded(interpretable(code.source), code.name))
        module.libdevice = _Libdevice()
        setattr(module, dependent.LAUNCH, lambda: None)
        setattr(module, dependent.WAIT, lambda: None)
        kernel = getattr(module, code.name)
        count = len(code.reads) + len(code.writes)
        types = [_POINTERS[t] for t in list(code.signature.values())[:count]]

        def run(address: int) -> None:
            words = (ctypes.c_int64 * (count + len(code.sizes))).from_address(address)
            args: list[Any] = [_pointer(w, t) for w, t in zip(words, types)]
            args += words[count:]
            status = torch.zeros(1, dtype=torch.int32)
            args += [status] if code.checks else []
            sizes = dict(zip(code.sizes, words[count:]))
            programs = int(substitute(code.programs, sizes))
            kernel[(programs,)](*args, **code.constants)
            assert not int(status), f"{code.name} met an index out of range"

        return run

    def close(self) -> None:
        self._sources.close()


def _pointer(address: int, dtype: torch.dtype) -> torch.Tensor:
    memory = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


def functions_of(module: Module, host: InterpretedHost) -> dict[str, CompiledFunction]:
    """The functions of a module as they are compiled for a GPU, on the CPU."""
    target, backend = get_target("h200"), TritonBackend()
    context = Context(target=target, generator=backend, libraries=gpu.libraries())
    tensor = PassManager(tensor_pipeline(Options.of(None)), context)
    tensor.run(module)
    PassManager(list(gpu.KERNEL_PIPELINE), context).run(module, after=tensor)
    symbols = {
        op: _symbol(op, backend, host)
        for function in module.functions.values()
        for op in function.ops
        if op.name == "kernel"
    }
    cpu = torch.device("cpu")
    plans = [lower_function(f, module, symbols) for f in module.functions.values()]
    weights = weights_on(cpu, module.weights)
    return {
        plan.name: CompiledFunction(plan, weights, libraries=libraries.get, host=host, device=cpu)
        for plan in plans
    }


def _symbol(op: Op, backend: TritonBackend, host: InterpretedHost) -> KernelSymbol:
    (name,), made = backend.generate([op])
    code = made[name]
    launches = []
    for one in code.launches:
        host.launches[one.name] = one
        reads = tuple((slot.kind, slot.number) for slot in one.reads)
        writes = tuple((slot.kind, slot.number) for slot in one.writes)
        pairs = tuple(one.inplace), tuple(one.updates)
        launches.append(Launch(one.name, reads, writes, tuple(one.sizes), *pairs))
    return KernelSymbol(
        name,
        launches=tuple(launches),
        scratch=tuple(size_expr(size) for size in code.scratch),
        zeroed=tuple(code.zeroed),
    )
