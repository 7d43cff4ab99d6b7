"""A function's steps as one CUDA graph, for one set of sizes.

The first call runs the steps one by one, which loads kernels and lets libraries choose; the second
records them; later ones copy the inputs to where the recording reads them and replay it. A first
step that alone reads an argument (a photograph, say) is launched by itself before the recording,
and reads it where it is. Results are copied out, so that the next call does not overwrite what a
caller holds. State that a result may take over (a donated argument: a KV cache, say) is read and
written where it is, as long as the caller passes the same memory again. A function with a step that
cannot be recorded (one that waits for the device, say) goes on step by step; the log and `reason`
say why.

A recording keeps memory, so their number is bounded (`GraphLimit`): the one that was used least
recently goes, and has to be used more often than before to be recorded again. Sizes that come once
are never recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.config import logger
from accel.errors import ExecutionError, OutOfMemoryError
from accel.runtime.memory import collection_paused

_log = logger("runtime")
_ALIGNMENT = 16

_MOST_GRAPHS = 16  # of one function and arena
PATIENCE = 4  # times as many calls before a dropped recording is made again


class _Recording:
    """Around every recording: one at a time in a process, and no search for garbage cycles. Where
    that finds an old graph, its end within a recording is the recording's as well."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = ExitStack()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._inside.enter_context(collection_paused())

    def __exit__(self, *error: object) -> None:
        try:
            self._inside.close()
        finally:
            self._lock.release()


RECORDING = _Recording()

Steps = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Opening:
    """A function's first step, which no recording needs to hold.

    Attributes:
        arguments: places of those that no later step reads, and no result shares memory with.
        run: launches the step for a call's arguments.
        rest: runs the other steps; those arguments are not looked at.
    """

    arguments: frozenset[int]
    run: Callable[[Sequence[Tensor]], None]
    rest: Steps


class GraphRunner:
    """Runs steps on a device, recorded from the second call on. One call at a time.

    Args:
        steps: runs all steps on the current stream.
        check: raises if a kernel reported a failure.
        donates: result -> argument whose memory the result may take.
        record: False leaves the steps as they are.
        pool: memory for what the steps allocate, shared by runners that never run at the same time:
            nothing in it outlives a call, since results are copied out.

    `after_recording` is called when there is one more recording. `opening`: the first of the steps,
    if it may be launched by itself.
    """

    def __init__(
        self,
        steps: Steps,
        device: torch.device,
        check: Callable[[], None],
        *,
        donates: Mapping[int, int],
        record: bool,
        name: str,
        pool: Any,
    ) -> None:
        self._steps, self._device, self._check, self._name = steps, device, check, name
        self._donates, self._record, self._pool = dict(donates), record, pool
        self.after_recording: Callable[[], None] = lambda: None
        self.opening: Opening | None = None
        self._calls = 0
        self._wanted = 2  # the call that is recorded
        self.reason = "" if record else "recording is switched off"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._results: list[Tensor] = []
        self._in_place: dict[int, int] = {}  # results that lie in a donated argument's memory
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def drop(self) -> None:
        """Gives the recording and its memory back; many more calls are wanted for the next one."""
        self._graph, self._inputs, self._results, self._in_place = None, [], [], {}
        self._calls, self._wanted = 1, self._wanted * PATIENCE

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """One call. Raises ExecutionError for a failure of this call or an earlier one."""
        if torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                return self._run(inputs)
        return self._run(inputs)

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self._check()
        self._wait_for_last_call()
        try:
            if self._graph is None:
                self._calls += 1
                if self._calls >= self._wanted and self._record:
                    self._capture(inputs)
                if self._graph is None:
                    return self._step_by_step(inputs)
            return self._replay(self._graph, inputs)
        finally:
            assert self._done is not None
            self._done.record()

    def _wait_for_last_call(self) -> None:
        """Buffers are the same in every call: one on another stream must be over."""
        stream = torch.cuda.current_stream()
        if self._done is None:
            self._done = torch.cuda.Event()
        elif stream != self._stream:
            stream.wait_event(self._done)
        self._stream = stream

    def _replay(self, graph: torch.cuda.CUDAGraph, inputs: Sequence[Tensor]) -> list[Tensor]:
        same = []
        opened = self.opening.arguments if self.opening is not None else ()
        for i, (kept, given) in enumerate(zip(self._inputs, inputs)):
            same.append(kept.data_ptr() == given.data_ptr() and kept.stride() == given.stride())
            if not same[-1] and i not in opened:
                kept.copy_(given)
        if self.opening is not None:
            self.opening.run(inputs)
        graph.replay()
        in_place = {r for r, argument in self._in_place.items() if same[argument]}
        return [r if i in in_place else r.clone() for i, r in enumerate(self._results)]

    def _step_by_step(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        results = self._steps([x if is_aligned(x) else dense_copy(x) for x in inputs])
        if self._calls == 1:
            torch.cuda.current_stream().synchronize()
            self._check()
        return results

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        taken = set(self._donates.values())
        self._inputs = [
            x if i in taken and is_aligned(x) and x.is_contiguous() else dense_copy(x)
            for i, x in enumerate(inputs)
        ]
        steps = self._steps if self.opening is None else self.opening.rest
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(side):
                # Libraries set themselves up on this stream; state must not change by that.
                self._steps([dense_copy(x) for x in self._inputs])
            side.synchronize()
            # One recording at a time: a recording waits for the device before it starts, which
            # would end another one.
            with (
                RECORDING,
                torch.cuda.graph(graph, self._pool, side, capture_error_mode="thread_local"),
            ):
                self._results = steps(self._inputs)
        except (RuntimeError, ExecutionError) as error:
            self._inputs, self._results, self._record = [], [], False
            leave_recording(self._device, self._pool)
            if isinstance(error, (torch.OutOfMemoryError, OutOfMemoryError)):
                raise
            self.reason = str(error)
            _log.warning("'%s' runs without a CUDA graph: %s", self._name, error)
            return
        torch.cuda.current_stream().wait_stream(side)
        for i in self.opening.arguments if self.opening is not None else ():
            self._inputs[i] = self._inputs[i].new_empty(0)  # nothing reads the copy any more
        self._in_place = {
            result: argument
            for result, argument in self._donates.items()
            if share(self._results[result], self._inputs[argument])
        }
        self._graph = graph
        self.after_recording()


def leave_recording(device: torch.device, pool: Any) -> None:
    """After a recording into `pool` that failed, which leaves torch's generator and allocator
    behind in it: the next random number would be an error, and freed memory would not come back."""
    generator = torch.cuda.default_generators[device.index or 0]
    generator.graphsafe_set_state(generator.clone_state())
    try:
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)
    except RuntimeError as error:  # torch did get so far by itself
        _log.debug("the recording's memory pool: %s", error)


class GraphLimit:
    """Bounds the recordings of one function and arena; the least recently used goes first."""

    def __init__(self, most: int = _MOST_GRAPHS) -> None:
        self.most = most

    def enforce(self, runners: Iterable[GraphRunner | None]) -> None:
        """Drops what is over the bound. `runners`: the least recently used first."""
        recorded = [r for r in runners if r is not None and r.recorded]
        for runner in recorded[: max(0, len(recorded) - self.most)]:
            runner.drop()


def is_aligned(x: Tensor) -> bool:
    return x.data_ptr() % _ALIGNMENT == 0


def share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def dense_copy(x: Tensor) -> Tensor:
    """A copy at an aligned address. C order, as kernels read."""
    return x.clone(memory_format=torch.contiguous_format)
