"""A compiled function for one set of sizes and one arena: closures, one a step.

`Bound.accepts` compares a call's tensors with what was bound; `run` executes the closures, as a
CUDA graph where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

from accel.errors import AccelError, ExecutionError, OutOfMemoryError
from accel.runtime.binding import Binding
from accel.runtime.cuda_graph import GraphRunner, Opening, dense_copy, is_aligned
from accel.runtime.plan import Step
from accel.runtime.runs import Run
from accel.runtime.seen import Seen
from accel.runtime.sequence import Unchanged, merge
from accel.runtime.steps import Parts, StepBuilder, describe

# Called with each step's number; the step runs inside of what it returns.
Around = Callable[[int], AbstractContextManager[object]]

NO_MEMORY = (torch.OutOfMemoryError, OutOfMemoryError, MemoryError)
_CPU_IS_FULL = "can't allocate memory"  # a RuntimeError of torch's without a type of its own


class Bound:
    """A function for one set of sizes and one arena."""

    def __init__(
        self, parts: Parts, binding: Binding, arena: Tensor, inputs: Sequence[Tensor]
    ) -> None:
        builder = StepBuilder(parts, binding, arena)
        built = builder.build()
        self._runs: list[Run] = [run for run, _ in built]
        self._steps: list[Step | None] = [step for _, step in built]
        self._unchanged = Unchanged()
        merged = merge(built, builder.parts_of, self._unchanged)
        self._merged: list[Run] = [run for run, _ in merged]
        self._merged_steps: list[Step | None] = [step for _, step in merged]
        self._keep = (builder.keep, builder.static)
        self._first = builder.parts_of.get(0)
        self._parts, self._binding = parts, binding
        self._device, self._on_cpu = arena.device, arena.is_cpu
        self.graph: GraphRunner | None = None
        plan, slots = parts.plan, parts.slots
        order = sorted(range(len(slots)), key=lambda value: slots[value])
        self._template = [builder.static[v] for v in order[len(plan.inputs) :]]
        self._expected = [(parts.dtypes[v], binding.shapes[v]) for v in plan.inputs]
        self._raw, self._dense = _inputs_of_kernels(parts)
        self._donated = list(parts.analysis.donated.values())
        self._results = [slots[v] for v in plan.outputs]
        self._copies = _results_to_copy(parts)
        self._checked = False
        self._seen = Seen(len(plan.inputs))
        self._changed: list[int] = []
        self._starts = [0] * len(plan.inputs)  # of the storages of these arguments

    def others(self, inputs: Sequence[Tensor]) -> list[int]:
        """Places of arguments that are other objects than in the last call."""
        return self._seen.others(inputs)

    def accepts(self, inputs: Sequence[Tensor], changed: Sequence[int] | None = None) -> bool:
        """Whether a call has exactly these dtypes and sizes. False sends it to the slow path.

        Args:
            changed: places to look at; None: all.
        """
        if len(inputs) != len(self._expected):
            return False
        grad = torch.is_grad_enabled()
        for i in range(len(inputs)) if changed is None else changed:
            tensor, (dtype, shape) = inputs[i], self._expected[i]
            try:
                if (
                    tensor.dtype is not dtype
                    or tensor.shape != shape
                    or tensor.is_cpu is not self._on_cpu
                    or not (self._on_cpu or tensor.device == self._device)
                    or tensor.layout is not torch.strided
                    or (grad and tensor.requires_grad)
                ):
                    return False
            except AttributeError:  # no tensor: the slow path says so
                return False
        return True

    def drop(self) -> None:
        """Ends the recording now: it hangs in a cycle with this object."""
        if self.graph is not None:
            self.graph.drop()
            self.graph = None

    def run(self, inputs: Sequence[Tensor], changed: Sequence[int] | None = None) -> list[Tensor]:
        """One call. `changed`: places of arguments to look at; None: all."""
        if self.graph is not None:
            run: Callable[[Sequence[Tensor]], list[Tensor]] = self.graph
        else:
            run = partial(self.run_steps, changed=changed)
        if torch.is_autocast_enabled(self._device.type):  # the plan says every dtype
            with torch.autocast(self._device.type, enabled=False):
                return run(inputs)
        return run(inputs)

    def run_steps(
        self, inputs: Sequence[Tensor], changed: Sequence[int] | None = None
    ) -> list[Tensor]:
        seen = self._seen
        values: list[Any] = [*inputs, *self._template]
        try:
            places = self._make_plain(values, seen.moved(inputs) if changed is None else changed)
            if places != self._changed:
                self._changed = places
                self._unchanged.slots = frozenset(range(len(inputs))).difference(places)
            for i in places:
                seen.note(i, inputs[i] if values[i] is inputs[i] else None)
            if self._checked:
                self._execute(self._merged, self._merged_steps, values)
            else:
                seen.forget()
                self._execute(self._runs, self._steps, values, check=True)
                self._checked = True
        except BaseException:
            seen.forget()  # a sequence may not have taken note
            raise
        return self._results_of(values)

    def _results_of(self, values: Sequence[Any]) -> list[Tensor]:
        results = [values[slot] for slot in self._results]
        for i in self._copies:
            results[i] = results[i].clone()
        return results

    def _execute(
        self,
        runs: Sequence[Run],
        steps: Sequence[Step | None],
        values: list[Any],
        *,
        check: bool = False,
    ) -> None:
        remaining = iter(runs)
        try:
            if check:
                for run, step in zip(remaining, steps):
                    run(values)
                    self._check(step, values)
            else:
                for run in remaining:
                    run(values)
        except (AccelError, *NO_MEMORY):
            raise
        except Exception as error:
            step = steps[len(steps) - length_hint(remaining) - 1]
            kind = OutOfMemoryError if _CPU_IS_FULL in str(error) else ExecutionError
            raise kind(
                f"{type(error).__name__}: {error}", where=describe(step) if step else ""
            ) from error

    def opening(self) -> Opening | None:
        """The first step, if it is a kernel that alone reads an argument and writes to the arena;
        None if not, or if memory of arguments is taken over."""
        part, first = self._first, self._steps[0] if self._steps else None
        if part is None or part.function is None or part.made or part.copies or self._donated:
            return None
        plan, last = self._parts.plan, self._parts.analysis.last
        number = next(i for i, step in enumerate(plan.steps) if step is first)
        read = [slot for _, slot in part.dynamic]
        alone = frozenset(i for i in read if last[plan.inputs[i]] == number)

        def run(inputs: Sequence[Tensor]) -> None:
            values: list[Any] = [*inputs, *self._template]
            for i in self._make_plain(values, read):
                values[i] = values[i] if is_aligned(values[i]) else dense_copy(values[i])
            self._execute(self._runs[:1], self._steps[:1], values)

        def rest(inputs: Sequence[Tensor]) -> list[Tensor]:
            values: list[Any] = [*inputs, *self._template]
            self._execute(self._runs[1:], self._steps[1:], values)
            return self._results_of(values)

        return Opening(alone, run, rest) if alone else None

    def run_within(self, inputs: Sequence[Tensor], around: Around) -> list[Tensor]:
        """`run_steps` with something around each step."""
        self._seen.forget()
        values: list[Any] = [*inputs, *self._template]
        self._make_plain(values, range(len(inputs)))
        numbers = {id(step): number for number, step in enumerate(self._parts.plan.steps)}
        for run, step in zip(self._runs, self._steps):
            with around(numbers[id(step)]) if step is not None else nullcontext():
                run(values)
        return [values[slot] for slot in self._results]

    def _make_plain(self, values: list[Any], places: Sequence[int]) -> list[int]:
        """Kernels read memory: lazily negated, conjugated and strided tensors are written out.

        Args:
            places: of arguments that may need it; the others were plain in the last call.

        Returns all places of `values` that are not what they were in the last call.
        """
        changed = list(places)
        for i in changed:
            tensor = values[i]
            if i in self._raw and (tensor.is_neg() or tensor.is_conj()):
                tensor = tensor.resolve_neg().resolve_conj()
            values[i] = tensor.contiguous() if i in self._dense else tensor
        if not self._donated:
            return changed
        starts = self._starts
        for i in changed:
            starts[i] = values[i].untyped_storage().data_ptr()
        if len(set(starts)) == len(starts):
            return changed
        for i in self._donated:
            if starts.count(starts[i]) > 1:  # another argument shares this memory
                values[i] = values[i].clone(memory_format=torch.contiguous_format)
                changed.append(i)
        return sorted(set(changed))

    def _check(self, step: Step | None, values: list[Any]) -> None:
        """In the first call: libraries and operators return what the plan declares."""
        for value in step.outputs if step is not None else ():
            tensor = values[self._parts.slots[value]]
            shape, dtype = self._binding.shapes[value], self._parts.dtypes[value]
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.shape != shape:
                got = (
                    f"{tensor.dtype} {list(tensor.shape)}"
                    if isinstance(tensor, Tensor)
                    else type(tensor).__name__
                )
                raise ExecutionError(
                    f"returned {got} where {dtype} {list(shape)} is declared",
                    where=describe(step) if step else "",
                )


def _inputs_of_kernels(parts: Parts) -> tuple[set[int], set[int]]:
    """Arguments whose memory kernels read, and those that they read directly (or take over)."""
    position = {v: i for i, v in enumerate(parts.plan.inputs)}
    raw: set[int] = set()
    dense = set(parts.analysis.donated.values())
    for step in parts.plan.steps:
        if step.kind == "kernel":
            dense |= {position[v] for v in step.inputs if v in position}
            roots = {r for v in step.inputs for r in parts.analysis.roots[v]}
            raw |= {position[r] for r in roots if r in position}
    return raw | dense, dense


def _results_to_copy(parts: Parts) -> list[int]:
    """Results that share memory with a weight or with an earlier result."""
    taken: set[int] = set()
    copies = []
    for i, value in enumerate(parts.plan.outputs):
        roots = set(parts.analysis.roots[value])
        if roots & taken or any(parts.plan.values[r].kind == "weight" for r in roots):
            copies.append(i)
        taken |= roots
    return copies
