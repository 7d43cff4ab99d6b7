"""What happens once per function: weights are checked, packed for libraries, kernels looked up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from accel.errors import ArtifactError
from accel.runtime.analysis import Analysis
from accel.runtime.interfaces import HostCode, KernelFunction, Libraries, LibraryCall, Operand
from accel.runtime.memory import keep_large_blocks
from accel.runtime.plan import FunctionPlan, SizeExpr, Step, dtype_of
from accel.runtime.steps import Parts, describe, view_function
from accel.runtime.subbyte import is_sub_byte, stored_shape


class WeightSource(Protocol):
    """Where weights come from: a mapped file, or tensors in memory."""

    def check(self, names: Sequence[str]) -> None:
        """Raises ArtifactError if a weight is missing, or damaged since it was written."""

    def tensor(self, name: str) -> Tensor:
        """The stored tensor (packed for sub-byte dtypes). It is never written."""

    def release(self, name: str) -> None:
        """Gives memory back that only holds what the file holds. Using the tensor stays legal."""


class TensorWeights:
    """Weights in memory: what a compiler in this process has. `name -> stored tensor`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def check(self, names: Sequence[str]) -> None:
        for name in names:
            self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ArtifactError(f"there is no weight named '{name}'")
        return self._tensors[name]

    def release(self, name: str) -> None:
        return None


class PreparedCalls:
    """Prepared library calls, shared by all functions of a model: equal calls pack once.

    Weights are told apart by name, so these functions must read from one source.
    """

    def __init__(self) -> None:
        self._calls: dict[str, LibraryCall] = {}

    def get(
        self, libraries: Libraries, step: Step, operands: Sequence[Operand | None], labels: str
    ) -> LibraryCall:
        key = json.dumps([step.name, step.options, labels], sort_keys=True)
        if key not in self._calls:
            self._calls[key] = libraries(step.name).prepare(step.options, operands)
        return self._calls[key]


def prepare(
    plan: FunctionPlan,
    analysis: Analysis,
    weights: WeightSource,
    libraries: Libraries,
    host: HostCode | None,
    prepared: PreparedCalls,
) -> Parts:
    """Everything that all calls of the function share. May take long: it packs the weights."""
    keep_large_blocks()
    dtypes = [dtype_of(v.dtype) for v in plan.values]
    weights.check(sorted({v.name for v in plan.values if v.kind == "weight"}))
    constants = _constants(plan, dtypes, weights)
    calls: dict[int, LibraryCall] = {}
    kernels: dict[int, KernelFunction] = {}
    first = next((i for i, step in enumerate(plan.steps) if step.kind != "view"), -1)
    for number, step in enumerate(plan.steps):
        if step.kind == "kernel":
            if host is None:
                raise ArtifactError("the plan has kernels, and no host code", where=describe(step))
            opening = getattr(host, "opening", host.function)
            find = opening if number == first else host.function
            kernels[number] = find(step.name)
    for number in _largest_first(plan, constants):
        step = plan.steps[number]
        operands = [_operand(plan, v, constants, dtypes) for v in step.inputs]
        labels = [_label(plan, analysis, v, constants) for v in step.inputs]
        calls[number] = prepared.get(libraries, step, operands, json.dumps(labels))
        for value in step.inputs:
            if value in constants:
                weights.release(plan.values[analysis.roots[value][0]].name)
    return Parts(plan, analysis, constants, calls, kernels, _slots(plan), dtypes)


def _largest_first(plan: FunctionPlan, constants: Mapping[int, Tensor]) -> list[int]:
    """Library steps by the size of their weights.

    While a weight is packed it is in memory twice: the largest one when little else is.
    """

    def size(number: int) -> int:
        inputs = plan.steps[number].inputs
        return sum(constants[v].nbytes for v in inputs if v in constants)

    numbers = [i for i, step in enumerate(plan.steps) if step.kind == "library"]
    return sorted(numbers, key=size, reverse=True)


def _slots(plan: FunctionPlan) -> list[int]:
    """Inputs come first, in the order of arguments."""
    slots = [-1] * len(plan.values)
    for slot, value in enumerate(plan.inputs):
        slots[value] = slot
    rest = (v for v in range(len(slots)) if slots[v] < 0)
    for slot, value in enumerate(rest, len(plan.inputs)):
        slots[value] = slot
    return slots


def _constants(
    plan: FunctionPlan, dtypes: Sequence[torch.dtype], weights: WeightSource
) -> dict[int, Tensor]:
    """Weights, and views of weights whose shapes are the same in every call."""
    constants: dict[int, Tensor] = {}
    for value, spec in enumerate(plan.values):
        if spec.kind == "weight":
            constants[value] = _weight(spec.name, spec.shape, dtypes[value], weights)
    for step in plan.steps:
        if step.kind == "view" and step.inputs[0] in constants:
            shape = plan.values[step.outputs[0]].shape
            if _is_static([*shape, *step.options.values()]):
                view = view_function(step, tuple(shape), {})(constants[step.inputs[0]])  # type: ignore[arg-type]
                if list(view.shape) != shape:
                    raise ArtifactError(f"the view has shape {shape}", where=describe(step))
                constants[step.outputs[0]] = view
    return constants


def _is_static(sizes: Sequence[object]) -> bool:
    return all(
        isinstance(s, int) or (isinstance(s, list) and all(isinstance(e, int) for e in s))
        for s in sizes
    )


def _weight(
    name: str, shape: Sequence[SizeExpr], dtype: torch.dtype, weights: WeightSource
) -> Tensor:
    tensor = weights.tensor(name)
    if not all(isinstance(s, int) for s in shape):
        raise ArtifactError(f"weight '{name}' has a symbolic shape")
    wanted_shape: tuple[int, ...] = tuple(shape)  # type: ignore[arg-type]
    wanted = dtype
    if is_sub_byte(dtype):
        wanted, wanted_shape = torch.uint8, stored_shape(wanted_shape, dtype)
    if tensor.dtype != wanted or tuple(tensor.shape) != wanted_shape:
        raise ArtifactError(
            f"weight '{name}' is {tensor.dtype} {list(tensor.shape)}; the plan wants {wanted} "
            f"{list(wanted_shape)}"
        )
    return tensor.detach()


def _operand(
    plan: FunctionPlan, value: int, constants: Mapping[int, Tensor], dtypes: Sequence[torch.dtype]
) -> Operand | None:
    if value < 0:
        return None
    shape = tuple(s if isinstance(s, int) else None for s in plan.values[value].shape)
    return Operand(dtypes[value], shape, constants.get(value))


def _label(
    plan: FunctionPlan, analysis: Analysis, value: int, constants: Mapping[int, Tensor]
) -> object:
    """Tells operands apart: two steps with equal labels and options are the same call."""
    if value < 0:
        return None
    spec = plan.values[value]
    if value in constants:
        view = constants[value]
        name = plan.values[analysis.roots[value][0]].name
        place = [view.storage_offset(), list(view.shape), list(view.stride())]
        return [spec.dtype, name, place]
    return [spec.dtype, [s if isinstance(s, int) else None for s in spec.shape]]
