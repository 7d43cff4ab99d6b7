"""Runs a compiled function.

    function = CompiledFunction(plan, weights, libraries=get, host=code)
    results = function([x, mask])

The first call prepares: it checks the weights, packs them for the libraries and finds the kernels.
The first call with new sizes binds: it places the buffers and makes one closure a step (`steps`).
A call with known sizes compares shapes and runs the closures; nothing else.

Several threads may call a function at once: each call borrows a *lane*, which is an arena and the
closures that point into it. Results never lie in an arena, and never share memory with each other,
with a weight, or with a later call's results; they share memory with an argument only where the
function returns (a view of) it or the plan donates it.

Where memory runs out, the arenas and recordings of all functions on the device that are not running
are given back and the call is made once more, unless it may have changed state; then it is an
OutOfMemoryError, and a smaller call can follow.
"""

from __future__ import annotations

import gc
import threading
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

from accel.errors import AccelError, ExecutionError, InputError, OutOfMemoryError
from accel.runtime.analysis import analyze
from accel.runtime.binding import Binding, Sizes
from accel.runtime.cuda_graph import GraphLimit, GraphRunner
from accel.runtime.interfaces import HostCode, Libraries
from accel.runtime.kept_graph import MOST_SIZES, KeptGraphRunner
from accel.runtime.plan import FunctionPlan, Step
from accel.runtime.prepare import PreparedCalls, WeightSource, prepare
from accel.runtime.runs import Run
from accel.runtime.sequence import merge
from accel.runtime.signature import Signature
from accel.runtime.steps import Parts, StepBuilder, describe

_CPU = torch.device("cpu")
_MAX_LANES = 8  # arenas kept for concurrent calls
_MAX_BOUND = 32  # sets of sizes that a lane keeps closures for
Around = Callable[[int], AbstractContextManager[object]]
_NO_MEMORY = (torch.OutOfMemoryError, OutOfMemoryError, MemoryError)
_CPU_IS_FULL = "can't allocate memory"  # a RuntimeError of torch's without a type of its own
_ALIVE: weakref.WeakSet[CompiledFunction] = weakref.WeakSet()


class CompiledFunction:
    """One entry point, ready to be called with a flat list of tensors.

    Args:
        plan: what to do. It is checked: ArtifactError for a malformed plan.
        weights: where the plan's weights come from.
        libraries: finds vendor calls by name.
        host: generated kernels; None if the plan has no kernel steps.
        prepared: packed weights, shared between the functions of a model.
        device: where inputs, buffers and results are; the weights must be there too.
        graph: on a GPU, record the steps as a CUDA graph.
        keep: results that recordings hand out without a copy (`kept_graph`), for training.
    """

    def __init__(
        self,
        plan: FunctionPlan,
        weights: WeightSource,
        *,
        libraries: Libraries,
        host: HostCode | None = None,
        prepared: PreparedCalls | None = None,
        device: torch.device = _CPU,
        graph: bool = True,
        keep: Collection[int] | None = None,
    ) -> None:
        self.plan, self.device, self.graph, self.keep = plan, device, graph, keep
        self.analysis = analyze(plan)
        self.signature = Signature(plan, device)
        self._sizes = Sizes(plan, self.analysis)
        self._weights, self._libraries, self._host = weights, libraries, host
        self._prepared = prepared if prepared is not None else PreparedCalls()
        self._parts: Parts | None = None
        self._lock = threading.Lock()
        self._lanes: list[_Lane] = []
        _ALIVE.add(self)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Runs the function on one tensor per argument; returns one tensor per result.

        Raises InputError if the tensors do not fit, ExecutionError if a step fails,
        OutOfMemoryError if the device's memory does not do.
        """
        try:
            return self._call(inputs)
        except _NO_MEMORY as error:
            return self._call_with_less(inputs, error)

    def _call(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        lanes = self._lanes
        try:
            lane = lanes.pop()
        except IndexError:
            lane = _Lane(self)
        try:
            bound = lane.current
            if bound is None or not bound.accepts(inputs):
                bound = self._bind(lane, inputs)
            return bound.run(inputs)
        except _NO_MEMORY:
            lane.clear()
            raise
        finally:
            if len(lanes) < _MAX_LANES:
                lanes.append(lane)

    def step_by_step(self, inputs: Sequence[Tensor], around: Around | None = None) -> list[Tensor]:
        """One call on the current stream without a recording: to measure, or to record elsewhere.

        Args:
            around: called with each step's number; the step runs inside of what it returns.
        """
        lane = self._lanes.pop() if self._lanes else _Lane(self)
        try:
            bound = self._bind(lane, inputs)
            return bound.run_steps(inputs) if around is None else bound.run_within(inputs, around)
        finally:
            self._lanes.append(lane)

    def _call_with_less(self, inputs: Sequence[Tensor], error: BaseException) -> list[Tensor]:
        """Once more, after everything that idle functions keep was given back."""
        traceback.clear_frames(error.__traceback__)  # they hold the failed call's tensors
        release_memory(self.device)
        if not self.plan.donates:
            try:
                return self._call(inputs)
            except _NO_MEMORY as again:
                traceback.clear_frames(again.__traceback__)
                error = again
                release_memory(self.device)
        reason = str(getattr(error, "what", error)).partition(". ")[0]
        raise OutOfMemoryError(
            f"{self.device} has not enough memory for this call of '{self.plan.name}': {reason}",
            where=getattr(error, "where", ""),
            advice="call it with a smaller batch, or free memory that other tensors hold; the "
            "process can go on",
        ) from None

    def release(self) -> None:
        """Gives back the arenas and recordings that no call is using."""
        while self._lanes:
            try:
                self._lanes.pop().clear()
            except IndexError:  # another thread took the last one
                return

    def graphs(self) -> dict[str, Any]:
        """CUDA graphs: how many sets of sizes are recorded, how many run step by step, and why a
        recording failed ("" where none did)."""
        runners = [b.graph for lane in list(self._lanes) for b in list(lane.bound.values())]
        known = [r for r in runners if r is not None]
        recorded = sum(r.recorded for r in known)
        reason = next((r.reason for r in known if r.reason), "")
        return {"recorded": recorded, "step_by_step": len(known) - recorded, "reason": reason}

    def prepare(self) -> None:
        """Checks and packs the weights now rather than in the first call."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._parts is None:
                self._parts = prepare(
                    self.plan,
                    self.analysis,
                    self._weights,
                    self._libraries,
                    self._host,
                    self._prepared,
                )

    def reserve(self, inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """The steps for inputs of these sizes, with an arena of their own.

        For a caller that records them in a larger graph: every call of the returned function runs
        the steps, one call at a time, and takes nothing but inputs like these.
        """
        return self._bind(_Lane(self), inputs).run_steps

    def raise_failure(self) -> None:
        """Raises ExecutionError if a kernel that has finished met an index out of range."""
        check = getattr(self._host, "raise_failure", None) or _nothing
        check()

    def arena_bytes(self, symbols: dict[str, int]) -> tuple[int, int]:
        """The arena's size for these sizes, and the least that any placement would need."""
        with self._lock:
            placement = self._sizes.bind(symbols).placement
        return placement.total, placement.lower_bound

    def graph_runner(
        self, steps: Callable[[Sequence[Tensor]], list[Tensor]], pool: Any
    ) -> GraphRunner:
        """Runs steps on the GPU, as a recorded graph from the second call on."""
        check = getattr(self._host, "raise_failure", None) or _nothing
        options: dict[str, Any] = {
            "donates": self.plan.donates,
            "record": self.graph,
            "name": self.plan.name,
            "pool": pool,
        }
        if self.keep is not None:
            return KeptGraphRunner(steps, self.device, check, keep=self.keep, **options)
        return GraphRunner(steps, self.device, check, **options)

    def _bind(self, lane: _Lane, inputs: Sequence[Tensor]) -> _Bound:
        """The slow path: full checks, then closures for these sizes."""
        symbols = self.signature.bind(inputs)
        self._check_gradients(inputs)
        self.prepare()
        assert self._parts is not None
        key = tuple(symbols.values())
        bound = lane.bound.get(key)
        if bound is None:
            with self._lock, torch.inference_mode(False), torch.no_grad():
                binding = self._sizes.bind(symbols)
                try:
                    bound = lane.add(key, self._parts, binding, inputs)
                except (RuntimeError, MemoryError) as error:
                    raise OutOfMemoryError(
                        f"no memory for an arena of {binding.placement.total} bytes"
                    ) from error
        lane.bound.move_to_end(key)
        lane.current = bound
        lane.limit.enforce(b.graph for b in lane.bound.values())
        return bound

    def _check_gradients(self, inputs: Sequence[Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        for argument, tensor in zip(self.signature.arguments, inputs):
            if tensor.requires_grad:
                raise InputError(
                    f"argument {argument.label} of '{self.plan.name}' requires grad, and this "
                    "function was compiled for inference: its results would carry no gradient",
                    advice="call it under torch.no_grad(), or pass x.detach(); to train, use "
                    'torch.compile(model, backend="accel")',
                )


def release_memory(device: torch.device) -> None:
    """Gives back what all compiled functions on a device keep between calls, weights excepted."""
    for function in list(_ALIVE):
        if function.device == device:
            function.release()
    gc.collect()  # recordings that hang in cycles
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _nothing() -> None:
    return None


class _Lane:
    """An arena, and closures that point into it. Used by one call at a time."""

    def __init__(self, function: CompiledFunction) -> None:
        self.function = function
        self.pool: Any = None  # memory that the lane's CUDA graphs share
        self.arena = torch.empty(0, dtype=torch.uint8)
        self.bound: OrderedDict[tuple[int, ...], _Bound] = OrderedDict()
        self.current: _Bound | None = None
        self.limit = GraphLimit() if function.keep is None else GraphLimit(MOST_SIZES)

    def clear(self) -> None:
        """Gives the arena and the recordings back."""
        for bound in self.bound.values():
            if bound.graph is not None:
                bound.graph.drop()
                bound.graph = None
        self.bound.clear()
        self.current, self.pool = None, None
        self.arena = torch.empty(0, dtype=torch.uint8)

    def add(
        self, key: tuple[int, ...], parts: Parts, binding: Binding, inputs: Sequence[Tensor]
    ) -> _Bound:
        device = self.function.device
        if binding.placement.total > self.arena.numel() or self.arena.device != device:
            self.bound.clear()  # they point into the old arena
            self.current = None
            self.arena = torch.empty(binding.placement.total, dtype=torch.uint8, device=device)
        bound = self.bound[key] = _Bound(parts, binding, self.arena, inputs)
        if device.type == "cuda":
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            bound.graph = self.function.graph_runner(bound.run_steps, self.pool)
        if len(self.bound) > _MAX_BOUND:
            self.bound.popitem(last=False)
        return bound


class _Bound:
    """A function for one set of sizes and one arena."""

    def __init__(
        self, parts: Parts, binding: Binding, arena: Tensor, inputs: Sequence[Tensor]
    ) -> None:
        builder = StepBuilder(parts, binding, arena)
        built = builder.build()
        self._runs: list[Run] = [run for run, _ in built]
        self._steps: list[Step | None] = [step for _, step in built]
        merged = merge(built, builder.parts_of)
        self._merged: list[Run] = [run for run, _ in merged]
        self._merged_steps: list[Step | None] = [step for _, step in merged]
        self._keep = (builder.keep, builder.static)
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

    def accepts(self, inputs: Sequence[Tensor]) -> bool:
        """Whether a call has exactly these dtypes and sizes. False sends it to the slow path."""
        if len(inputs) != len(self._expected):
            return False
        grad = torch.is_grad_enabled()
        for tensor, (dtype, shape) in zip(inputs, self._expected):
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

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        run = self.graph or self.run_steps
        if torch.is_autocast_enabled(self._device.type):  # the plan says every dtype
            with torch.autocast(self._device.type, enabled=False):
                return run(inputs)
        return run(inputs)

    def run_steps(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values: list[Any] = [*inputs, *self._template]
        if self._raw or self._donated:
            self._make_plain(values)
        steps = self._merged_steps if self._checked else self._steps
        runs = iter(self._merged if self._checked else self._runs)
        try:
            if self._checked:
                for run in runs:
                    run(values)
            else:
                for run, step in zip(runs, self._steps):
                    run(values)
                    self._check(step, values)
                self._checked = True
        except (AccelError, *_NO_MEMORY):
            raise
        except Exception as error:
            step = steps[len(steps) - length_hint(runs) - 1]
            kind = OutOfMemoryError if _CPU_IS_FULL in str(error) else ExecutionError
            raise kind(
                f"{type(error).__name__}: {error}", where=describe(step) if step else ""
            ) from error
        results = [values[slot] for slot in self._results]
        for i in self._copies:
            results[i] = results[i].clone()
        return results

    def run_within(self, inputs: Sequence[Tensor], around: Around) -> list[Tensor]:
        """`run_steps` with something around each step."""
        values: list[Any] = [*inputs, *self._template]
        self._make_plain(values)
        numbers = {id(step): number for number, step in enumerate(self._parts.plan.steps)}
        for run, step in zip(self._runs, self._steps):
            with around(numbers[id(step)]) if step is not None else nullcontext():
                run(values)
        return [values[slot] for slot in self._results]

    def _make_plain(self, values: list[Any]) -> None:
        """Kernels read memory: lazily negated, conjugated and strided tensors are written out."""
        for i in self._raw:
            tensor = values[i]
            if tensor.is_neg() or tensor.is_conj():
                values[i] = tensor.resolve_neg().resolve_conj()
        for i in self._dense:
            if not values[i].is_contiguous():
                values[i] = values[i].contiguous()
        if self._donated:
            count = len(self._expected)
            starts = [values[i].untyped_storage().data_ptr() for i in range(count)]
            for i in self._donated:
                if starts.count(starts[i]) > 1:  # another argument shares this memory
                    values[i] = values[i].clone(memory_format=torch.contiguous_format)

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


def _inputs_of_kernels(parts: Parts) -> tuple[list[int], list[int]]:
    """Arguments whose memory kernels read, and those that they read directly (or take over)."""
    position = {v: i for i, v in enumerate(parts.plan.inputs)}
    raw: set[int] = set()
    dense = set(parts.analysis.donated.values())
    for step in parts.plan.steps:
        if step.kind == "kernel":
            dense |= {position[v] for v in step.inputs if v in position}
            roots = {r for v in step.inputs for r in parts.analysis.roots[v]}
            raw |= {position[r] for r in roots if r in position}
    return sorted(raw | dense), sorted(dense)


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
