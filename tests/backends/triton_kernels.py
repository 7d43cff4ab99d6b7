"""Runs a function of tensor-level ops as one generated Triton kernel, for tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.kernel import LaunchCode, Slot
from accel.ir import Function, Op
from accel.ir.interpret import bind_symbols
from accel.ir.types import SUB_BYTE_BITS, Dim, substitute
from tests.backends.gluon_interpreter import MapOf
from tests.backends.kernels import kernel_of, poisoned
from tests.backends.triton_worker import Job, Worker

BACKEND = TritonBackend()


@dataclass(frozen=True)
class Generated:
    """A kernel that was run, and the backend whose tile and sizes it was generated with."""

    kind: str
    kernel: Op
    backend: TritonBackend


# What was run in this process, for a report (`benchmarks.gpu_numerics`), by `_key`.
RUNS: Counter[str] = Counter()
KERNELS: dict[str, Generated] = {}


class IndexFailure(Exception):
    """A kernel reported an index out of range."""


class InterpretedKernels:
    """Functions as kernels, run by Triton's interpreter in another process.

    Arguments from number `weights` on are constants of the program, if it is given.
    """

    def __init__(
        self,
        functions: Sequence[Function],
        worker: Worker,
        kinds: Sequence[str] = (),
        backend: TritonBackend = BACKEND,
        weights: int | None = None,
    ) -> None:
        self.functions, self.worker = list(functions), worker
        kinds = kinds or ["pointwise"] * len(functions)
        kernels = [kernel_of(f, kind, weights) for f, kind in zip(functions, kinds, strict=True)]
        self.weights, self.kinds = weights, list(kinds)
        self.names, self.made = backend.generate(kernels)
        self.ran = [Generated(*one, backend) for one in zip(self.kinds, kernels)]
        self.keys = [_key(name, backend) for name in self.names]

    def source(self, number: int) -> str:
        return "\n".join(one.source for one in self.made[self.names[number]].launches)

    def __call__(self, number: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        function, code = self.functions[number], self.made[self.names[number]]
        KERNELS.setdefault(self.keys[number], self.ran[number])
        RUNS[self.keys[number]] += 1
        shapes = [
            tuple(map(int, a.shape)) if a.dtype in SUB_BYTE_BITS else tuple(t.shape)
            for a, t in zip(function.args, inputs)
        ]
        symbols = bind_symbols(function, shapes)
        memory: dict[Slot, Tensor] = {}
        for i, tensor in enumerate(inputs):
            memory[Slot("input", i)] = tensor.contiguous()
        for i, result in enumerate(function.results):
            shape = [int(substitute(d, symbols)) for d in result.shape]
            memory[Slot("result", i)] = poisoned(shape, result.dtype)
        for i, size in enumerate(code.scratch):
            memory[Slot("scratch", i)] = poisoned([_value(size, symbols)], torch.uint8)
        for i in code.zeroed:
            memory[Slot("scratch", i)].zero_()
        for launch in code.launches:
            for written, read in launch.updates:
                memory[launch.writes[written]] = memory[launch.reads[read]].clone()
            self._launch(launch, memory, symbols)
        for i in code.zeroed:
            assert not memory[Slot("scratch", i)].any(), "a scratch buffer is left as it was found"
        return [memory[Slot("result", i)] for i in range(len(function.results))]

    def _launch(
        self, launch: LaunchCode, memory: dict[Slot, Tensor], symbols: dict[str, int]
    ) -> None:
        slots = [*launch.reads, *launch.writes]
        types = list(launch.signature.values())
        args: list[object] = [_viewed(memory[s], t) for s, t in zip(slots, types)]
        args += [symbols[name] for name in launch.sizes]
        if launch.checks:
            args.append(torch.zeros(1, dtype=torch.int32))
        positions = list(range(len(launch.reads), len(slots)))
        if launch.checks:
            positions.append(len(args) - 1)
        names = [slot.name for slot in slots]
        for m in launch.maps:
            rows = _value(m.rows, symbols)
            args.append(MapOf(names.index(m.pointer), rows, m.columns, m.stride, m.box))
        programs = _value(launch.programs, symbols)
        if any(memory[s].numel() == 0 for s in launch.writes):
            programs = 0
        constant = {Slot("input", i) for i in range(self.weights or 0, len(memory))}
        awaited = [
            i
            for i, s in enumerate(launch.reads)
            if s not in launch.early and (self.weights is None or s not in constant)
        ]
        job = Job(launch.source, launch.name, args, launch.constants, programs, positions, awaited)
        made = self.worker.run(job)
        for slot, tensor in zip(launch.writes, made):
            memory[slot] = _unviewed(tensor, memory[slot])
        if launch.checks and int(made[-1]):
            raise IndexFailure(launch.name)


def _key(name: str, backend: TritonBackend) -> str:
    """A kernel's name says what it computes; the rest is how."""
    tile = "" if backend.tile is None else f" {backend.tile}"
    return f"{name} {backend.arch} {backend.sms}{' tf32' if backend.tf32 else ''}{tile}"


def _value(size: Dim, symbols: dict[str, int]) -> int:
    return int(substitute(size, symbols))


def _viewed(tensor: Tensor, pointer: str) -> Tensor:
    """A tensor under the type that the kernel's parameter has."""
    wanted = {
        "*fp64": torch.float64, "*fp32": torch.float32, "*fp16": torch.float16,
        "*bf16": torch.bfloat16, "*i1": torch.bool, "*i8": torch.int8, "*i16": torch.int16,
        "*i32": torch.int32, "*i64": torch.int64, "*u8": torch.uint8, "*u16": torch.uint16,
        "*u32": torch.uint32, "*u64": torch.uint64,
    }[pointer]  # fmt: skip
    if tensor.dtype == wanted:
        return tensor
    return tensor.reshape(-1).view(wanted)


def _unviewed(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.dtype == like.dtype:
        return tensor
    if math.prod(like.shape) == 0:
        return like
    return tensor.reshape(-1).view(like.dtype).reshape(like.shape)
