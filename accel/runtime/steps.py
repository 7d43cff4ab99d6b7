"""Builds the closures that one call of a function runs, one for each step.

A call keeps its tensors in a list of *slots*, inputs first. What is the same in every call with the
same sizes (weights, arena buffers, and views of both) is made here, once: its addresses are already
in the argument words of kernels, its views cost nothing. A closure only fetches the addresses of
tensors that are new in each call: inputs, results, and what libraries and ATen allocate.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accel.errors import ArtifactError
from accel.runtime.analysis import Analysis
from accel.runtime.aten import ArgumentReader, resolve
from accel.runtime.binding import Binding
from accel.runtime.interfaces import KernelFunction, LibraryCall, in_place
from accel.runtime.plan import FunctionPlan, Step, evaluate_size
from accel.runtime.runs import (
    Made,
    Run,
    TakeOver,
    aten_run,
    free,
    kernel_run,
    kernel_without_work,
    library_run,
)
from accel.runtime.sequence import Part
from accel.runtime.subbyte import is_sub_byte, unpack


@dataclass
class Parts:
    """What all calls of a function share.

    `constants` are weights, and views of weights whose shapes are the same in every call. `calls`
    and `kernels` are by step, `slots` and `dtypes` by value.
    """

    plan: FunctionPlan
    analysis: Analysis
    constants: dict[int, Tensor]
    calls: dict[int, LibraryCall]
    kernels: dict[int, KernelFunction]
    slots: list[int]
    dtypes: list[torch.dtype]
    dense: dict[tuple[int, tuple[int, ...]], Tensor] = field(default_factory=dict)
    unpacked: dict[int, Tensor] = field(default_factory=dict)


class StepBuilder:
    """Makes the closures for one set of sizes and one arena."""

    def __init__(self, parts: Parts, binding: Binding, arena: Tensor) -> None:
        self.parts, self.plan, self.binding = parts, parts.plan, binding
        self.device = arena.device
        self.static: list[Tensor | None] = [None] * len(self.plan.values)
        for value, tensor in parts.constants.items():
            self.static[value] = tensor
        for value, offset in binding.placement.offsets.items():
            self.static[value] = self._arena_view(arena, value, offset)
        for value in parts.analysis.zeroed:
            shape, dtype = binding.shapes[value], parts.dtypes[value]
            self.static[value] = torch.zeros(shape, dtype=dtype, device=arena.device)
        self.keep: list[Any] = []  # memory whose addresses are in argument words
        self.parts_of: dict[int, Part] = {}  # of kernels and frees, by place among the closures
        self._part: Part | None = None

    def build(self) -> list[tuple[Run, Step | None]]:
        """The closures in order; those without a step free what is no longer needed."""
        runs: list[tuple[Run, Step | None]] = []
        dying = self._dying()
        for number, step in enumerate(self.plan.steps):
            self._part = None
            run = self._run(number, step)
            if run is not None:
                if self._part is not None:
                    self.parts_of[len(runs)] = self._part
                runs.append((run, step))
            if dying[number]:
                self.parts_of[len(runs)] = Part(frees=dying[number])
                runs.append((free(dying[number]), None))
        return runs

    def _run(self, number: int, step: Step) -> Run | None:
        try:
            match step.kind:
                case "kernel":
                    return self._kernel(step, self.parts.kernels[number])
                case "library":
                    return self._library(step, self.parts.calls[number])
                case "aten":
                    return self._aten(step)
                case "view":
                    return self._view(step)
        except (RuntimeError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise ArtifactError(str(error), where=describe(step)) from error

    def _arena_view(self, arena: Tensor, value: int, offset: int) -> Tensor:
        dtype, shape = self.parts.dtypes[value], self.binding.shapes[value]
        end = offset + dtype.itemsize * _numel(shape)
        return arena[offset:end].view(dtype).view(shape)

    def _dying(self) -> list[list[int]]:
        """Slots of tensors that no step after this one names, by step."""
        a = self.parts.analysis
        dying: list[list[int]] = [[] for _ in self.plan.steps]
        taken = self.binding.placement.taken_over
        for value, last in enumerate(a.slot_last):
            owned = self.plan.values[value].kind in ("owned", "view") or value in taken
            if owned and self.static[value] is None and 0 <= last < len(dying):
                dying[last].append(self.parts.slots[value])
        return dying

    def _kernel(self, step: Step, function: KernelFunction) -> Run:
        sizes = [evaluate_size(e, self.binding.symbols) for e in step.dims]
        count = len(step.inputs) + len(step.outputs)
        words = (ctypes.c_int64 * (count + len(sizes)))(*([0] * count), *sizes)
        self.keep.append(words)
        dynamic: list[tuple[int, int]] = []
        for i, value in enumerate(step.inputs):
            tensor = self._dense_static(value)
            if tensor is None:
                dynamic.append((i, self.parts.slots[value]))
            else:
                words[i] = tensor.data_ptr()
        made: Made = []
        updates = {step.outputs[o]: step.inputs[i] for o, i in step.options.get("updates", [])}
        for i, value in enumerate(step.outputs, len(step.inputs)):
            static = self.static[value]
            if value in updates and not self._is_same(value, updates[value]):
                made.append((i, self.parts.slots[value], self._copier(value, updates[value])))
            elif static is None:
                made.append((i, self.parts.slots[value], self._maker(value)))
            else:
                words[i] = static.data_ptr()
        if not any(_numel(self.binding.shapes[v]) for v in step.outputs):
            return kernel_without_work(made)
        copies = any(not self._is_same(o, i) for o, i in updates.items())
        # Dynamic and yet bound: a strided view of the arena, which `fill` copies.
        copies |= any(self.static[step.inputs[i]] is not None for i, _ in dynamic)
        self._part = Part(function, words, dynamic, made, copies, weights=self._weights_of(step))
        return kernel_run(function, words, dynamic, made)

    def _weights_of(self, step: Step) -> tuple[int, int]:
        """Address and bytes of the largest weight that a kernel reads; (0, 0) if it reads none."""
        found = [self._dense_static(v) for v in step.inputs if v in self.parts.constants]
        largest = max((t for t in found if t is not None), key=lambda t: t.nbytes, default=None)
        return (0, 0) if largest is None else (largest.data_ptr(), largest.nbytes)

    def _dense_static(self, value: int) -> Tensor | None:
        """The tensor whose address a kernel can be given once and for all."""
        tensor = self.static[value]
        if tensor is None or tensor.is_contiguous():
            return tensor
        if self.binding.placement.offsets.keys().isdisjoint(self.parts.analysis.roots[value]):
            key = (value, tuple(tensor.shape))
            if key not in self.parts.dense:  # a view of a weight
                self.parts.dense[key] = tensor.contiguous()
            self.keep.append(self.parts.dense[key])
            return self.parts.dense[key]
        return None  # a strided view of the arena: copied in each call

    def _maker(self, value: int) -> Callable[[list[Any]], Tensor]:
        """Allocates a kernel's output that is not in the arena."""
        shape, dtype = self.binding.shapes[value], self.parts.dtypes[value]
        source = self.binding.placement.taken_over.get(value)
        if source is None and value in self.parts.analysis.donated:
            argument = self.plan.inputs[self.parts.analysis.donated[value]]
            if (self.binding.shapes[argument], self.parts.dtypes[argument]) == (shape, dtype):
                source = argument
        if source is None:
            device = self.device
            return lambda values: torch.empty(shape, dtype=dtype, device=device)
        slot = self.parts.slots[source]
        if self.parts.dtypes[source] == dtype:
            return TakeOver(slot)
        return lambda values: values[slot].contiguous().view(dtype)

    def _is_same(self, value: int, source: int) -> bool:
        """Whether a buffer is written over this very operand."""
        one, other = self.static[value], self.static[source]
        if one is not None:
            return other is not None and one.data_ptr() == other.data_ptr()
        if self.binding.placement.taken_over.get(value) == source:
            return True
        argument = self.parts.analysis.donated.get(value)
        return argument is not None and self.plan.inputs[argument] == source

    def _copier(self, value: int, source: int) -> Callable[[list[Any]], Tensor]:
        """A kernel's output that starts as a copy of an operand."""
        static, slot, fixed = self.static[value], self.parts.slots[source], self.static[source]

        def copy(values: list[Any]) -> Tensor:
            given: Tensor = values[slot] if fixed is None else fixed
            if static is None:
                return given.clone(memory_format=torch.contiguous_format)
            return static.copy_(given)

        return copy

    def _library(self, step: Step, call: LibraryCall) -> Run:
        operands: list[int] = []
        fixed: list[tuple[int, Tensor]] = []
        for value in step.inputs:
            if value < 0 or value in self.parts.constants:
                continue
            static = self.static[value]
            if static is not None:
                fixed.append((len(operands), static))
            operands.append(self.parts.slots[value])
        outputs = [self.parts.slots[v] for v in step.outputs]
        if any(v in self.parts.analysis.donated for v in step.outputs):
            call = in_place(call)
        return library_run(call, operands, fixed, outputs)

    def _aten(self, step: Step) -> Run:
        reader = ArgumentReader(
            lambda i: self._aten_operand(step, i),
            lambda e: evaluate_size(e, self.binding.symbols),
            self.device,
        )
        args = step.options.get("args", [])
        kwargs = step.options.get("kwargs", {})
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ArtifactError("malformed argument templates", where=describe(step))
        outputs = [self.parts.slots[v] for v in step.outputs]
        operator = resolve(step.name)
        return aten_run(
            operator._op,
            [reader.read(t) for t in args],
            {name: reader.read(t) for name, t in kwargs.items()},
            outputs,
            sequence=len(operator._schema.returns) != 1 or len(outputs) != 1,
        )

    def _aten_operand(self, step: Step, position: int) -> tuple[bool, Any]:
        if not 0 <= position < len(step.inputs):
            raise ArtifactError(f"operand {position} does not exist", where=describe(step))
        value = step.inputs[position]
        if value < 0:
            return True, None
        if is_sub_byte(self.parts.dtypes[value]):
            return True, self._unpacked(value)
        static = self.static[value]
        return (True, static) if static is not None else (False, self.parts.slots[value])

    def _unpacked(self, value: int) -> Tensor:
        if value not in self.parts.unpacked:
            shape = tuple(evaluate_size(e, {}) for e in self.plan.values[value].shape)
            packed = self.parts.constants[value]
            self.parts.unpacked[value] = unpack(packed, self.parts.dtypes[value], shape)
        return self.parts.unpacked[value]

    def _view(self, step: Step) -> Run | None:
        source, target = step.inputs[0], step.outputs[0]
        if self.static[target] is not None:
            return None
        make = view_function(step, self.binding.shapes[target], self.binding.symbols)
        tensor = self.static[source]
        if tensor is not None:
            made = make(tensor)
            self._check_view(step, made, target)
            if source in self.parts.constants or _share_memory(made, tensor):
                self.static[target] = made
                return None
            # A reshape that copies (of an expanded buffer) must read it in every call.
        read, write = self.parts.slots[source], self.parts.slots[target]

        def run(values: list[Any]) -> None:
            values[write] = make(values[read])

        return run

    def _check_view(self, step: Step, tensor: Tensor | None, value: int) -> None:
        assert tensor is not None
        if tuple(tensor.shape) != self.binding.shapes[value]:
            raise ArtifactError(
                f"a view of shape {list(tensor.shape)} where {list(self.binding.shapes[value])} "
                "is declared",
                where=describe(step),
            )


def view_function(
    step: Step, shape: tuple[int, ...], symbols: Mapping[str, int]
) -> Callable[[Tensor], Tensor]:
    """The view step as a function; `shape` is the result's."""

    def size(name: str, default: int = 1) -> int:
        return evaluate_size(step.options.get(name, default), symbols)

    match step.name:
        case "reshape":
            return lambda x: x.reshape(shape)
        case "expand":
            return lambda x: x.expand(shape)
        case "permute":
            axes = [evaluate_size(a, symbols) for a in step.options["axes"]]
            return lambda x: x.permute(axes)
        case _:
            axis, start, stop, stride = size("axis"), size("start"), size("stop"), size("step")
            if stride == 1:
                return lambda x: x.narrow(axis, start, stop - start)
            return lambda x: torch.ops.aten.slice.Tensor(x, axis, start, stop, stride)


def describe(step: Step) -> str:
    return f"{step.kind} step '{step.name}'" + (f" ({step.source})" if step.source else "")


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
