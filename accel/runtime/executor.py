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
from typing import Any

import torch
from torch import Tensor

from accel.errors import InputError, OutOfMemoryError
from accel.runtime.analysis import analyze
from accel.runtime.binding import Binding, Sizes
from accel.runtime.bound import NO_MEMORY, Around, Bound
from accel.runtime.cuda import require_device
from accel.runtime.cuda_graph import GraphLimit, GraphRunner
from accel.runtime.interfaces import HostCode, Libraries
from accel.runtime.kept_graph import MOST_SIZES, KeptGraphRunner
from accel.runtime.plan import FunctionPlan
from accel.runtime.prepare import PreparedCalls, WeightSource, prepare
from accel.runtime.signature import Signature
from accel.runtime.steps import Parts

_CPU = torch.device("cpu")
_MAX_LANES = 8  # arenas kept for concurrent calls
_MOST_SPARE = 256 << 20  # bytes that an arena which has to grow takes beyond what it needs
_MAX_BOUND = 32  # sets of sizes that a lane keeps closures for
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
        except NO_MEMORY as error:
            return self._call_with_less(inputs, error)

    def again(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """As a call, and tensors that are the objects of the last call are not looked at again.

        For a caller that never changes the size or the memory of a tensor that it passes, as a loop
        over tokens, which hands on what it got.
        """
        try:
            return self._call(inputs, trusting=True)
        except NO_MEMORY as error:
            return self._call_with_less(inputs, error)

    def _call(self, inputs: Sequence[Tensor], *, trusting: bool = False) -> list[Tensor]:
        lanes = self._lanes
        try:
            lane = lanes.pop()
        except IndexError:
            lane = _Lane(self)
        try:
            bound, changed = lane.current, None
            if bound is not None and trusting:
                changed = bound.others(inputs)
            if bound is None or not bound.accepts(inputs, changed):
                bound, changed = self._bind(lane, inputs), None
            return bound.run(inputs, changed)
        except NO_MEMORY:
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
            except NO_MEMORY as again:
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
        require_device(self.device)
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

    def _bind(self, lane: _Lane, inputs: Sequence[Tensor]) -> Bound:
        """The slow path: full checks, then closures for these sizes."""
        require_device(self.device)
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
        self.bound: OrderedDict[tuple[int, ...], Bound] = OrderedDict()
        self.current: Bound | None = None
        self.limit = GraphLimit() if function.keep is None else GraphLimit(MOST_SIZES)

    def clear(self) -> None:
        """Gives the arena and the recordings back."""
        for bound in self.bound.values():
            bound.drop()
        self.bound.clear()
        self.current, self.pool = None, None
        self.arena = torch.empty(0, dtype=torch.uint8)

    def _bound_recordings(self) -> None:
        self.limit.enforce(bound.graph for bound in self.bound.values())

    def add(
        self, key: tuple[int, ...], parts: Parts, binding: Binding, inputs: Sequence[Tensor]
    ) -> Bound:
        device = self.function.device
        if binding.placement.total > self.arena.numel() or self.arena.device != device:
            size = binding.placement.total
            if self.bound:  # sizes that grow call by call would end all recordings every time
                size = max(size, self.arena.numel() + min(self.arena.numel() // 2, _MOST_SPARE))
            self.clear()  # what is bound points into the old arena
            self.arena = torch.empty(size, dtype=torch.uint8, device=device)
        bound = self.bound[key] = Bound(parts, binding, self.arena, inputs)
        if device.type == "cuda":
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            bound.graph = self.function.graph_runner(bound.run_steps, self.pool)
            bound.graph.after_recording = self._bound_recordings
            if self.function.keep is None:
                bound.graph.opening = bound.opening()
        if len(self.bound) > _MAX_BOUND:
            _, oldest = self.bound.popitem(last=False)
            oldest.drop()
        return bound
