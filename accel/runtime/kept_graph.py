"""CUDA graphs for the two halves of a training step, whose results are not copied.

A forward hands gigabytes of activations to its backward, and that gradients to an optimizer; copies
would cost more than recording saves. So a recording's results are handed out where they lie, as
tensors that share their memory, and a recording is replayed only when nobody holds one of them: the
storages' reference counts say so, whatever holds them (autograd's saved tensors, a view, `.grad`).
Else another recording is made or taken, with memory of its own: a second microbatch before the
first one's backward, gradients that are added up. Beyond a few recordings a call runs step by step,
with new memory.

Arguments that come from the same memory again and again (parameters; a forward's activations, which
lie in its recording) are read where they are, and a recording is taken only if they lie there
still. All others (a batch) are copied to the recording's own memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import le
from typing import Any

import torch
from torch import Tensor

from accel.config import logger
from accel.errors import ExecutionError, OutOfMemoryError
from accel.runtime.cuda_graph import (
    PATIENCE,
    RECORDING,
    GraphRunner,
    is_aligned,
    leave_recording,
    share,
)

_log = logger("runtime")

MOST_SIZES = 2  # whose recordings a function keeps, with all their activations
_MOST = 4  # recordings of one set of sizes
_REMEMBERED = 4  # calls whose addresses are remembered
_PATIENT = 3  # calls that wait for all arguments to come from known places
_MOST_COPIED = 64 << 20  # bytes of others that a call may copy: more costs what recording saves
_ADDRESS, _STRIDE = Tensor.data_ptr, Tensor.stride
# How many tensors and Python objects share a storage, given by its handle.
_HOLDERS: Callable[[int], int] = torch._C._storage_Use_Count


@dataclass
class Recording:
    """One graph: where it reads, which arguments are copied there, what it hands out.

    What is read in place is known by its address alone: holding it would keep the recording that
    it comes from from ever being free again.
    """

    graph: torch.cuda.CUDAGraph
    copied: list[tuple[int, Tensor]]  # argument, the recording's own memory
    fixed: list[int]  # arguments that are read in place
    results: list[Tensor]

    def __post_init__(self) -> None:
        self.addresses: list[int] = []
        self.strides: list[tuple[int, ...]] = []
        self.storages: list[Any] = []  # of results that are handed out without a copy
        self.handles: list[int] = []  # those storages, as torch's functions take them
        self.at_rest: list[int] = []  # how many refer to each while nobody holds it

    def watch(self, inputs: Sequence[Tensor], kept: Sequence[int]) -> None:
        """Notes where arguments lie, and who holds the results that are handed out."""
        fixed = [inputs[i] for i in self.fixed]
        self.addresses, self.strides = list(map(_ADDRESS, fixed)), list(map(_STRIDE, fixed))
        self.storages = [self.results[i].untyped_storage() for i in kept]
        self.handles = [storage._cdata for storage in self.storages]
        self.at_rest = list(map(_HOLDERS, self.handles))

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether what is read in place lies where it lay, and nobody holds the results.

        Nothing runs on the device until this is known: hence no loops in Python.
        """
        fixed = [inputs[i] for i in self.fixed]
        if list(map(_ADDRESS, fixed)) != self.addresses:
            return False
        if list(map(_STRIDE, fixed)) != self.strides:
            return False
        return all(map(le, map(_HOLDERS, self.handles), self.at_rest))


class KeptGraphRunner(GraphRunner):
    """Runs steps on a device, recorded once their arguments come from known places.

    `keep` are the results that are handed out without a copy; the others are copied.
    """

    def __init__(self, *args: Any, keep: Collection[int], **options: Any) -> None:
        super().__init__(*args, **options)
        self._keep = frozenset(keep)
        self._recordings: list[Recording] = []
        self._known: list[deque[int]] = []
        self._places: list[bool] = []  # which arguments lie where they lay before

    @property
    def recorded(self) -> bool:
        return bool(self._recordings)

    def drop(self) -> None:
        """Gives the recordings back; their results stay as long as somebody holds them."""
        self._recordings, self._known = [], []
        self._calls, self._wanted = 1, self._wanted * PATIENCE

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self._check()
        self._wait_for_last_call()
        try:
            for one in self._recordings:
                if one.fits(inputs):
                    return self._hand_out(one, inputs)
            self._calls += 1
            strange = self._learn(inputs)
            ready = strange == 0 or (strange <= _MOST_COPIED and self._calls >= _PATIENT)
            room = self._calls >= self._wanted and len(self._recordings) < _MOST
            if self._record and ready and room:
                made = self._record_steps(inputs)
                if made is not None:
                    return self._hand_out(made, inputs)
            return self._without_recording(inputs)
        finally:
            assert self._done is not None
            self._done.record()

    def _without_recording(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Step by step; if memory runs out, again with that of the recordings."""
        try:
            return self._step_by_step(inputs)
        except (torch.OutOfMemoryError, OutOfMemoryError):
            if not self._recordings:
                raise
            _log.info("'%s': recordings make room", self._name)
            self.drop()
            torch.cuda.empty_cache()
            return self._step_by_step(inputs)

    def _learn(self, inputs: Sequence[Tensor]) -> int:
        """How many of the arguments' bytes lie where none lay in an earlier call."""
        if not self._known:
            self._known = [deque(maxlen=_REMEMBERED) for _ in inputs]
        strange = 0
        self._places = []
        for tensor, known in zip(inputs, self._known):
            address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            self._places.append(address in known and is_aligned(tensor))
            if not self._places[-1]:
                strange += size
                known.append(address)
        return strange

    def _hand_out(self, one: Recording, inputs: Sequence[Tensor]) -> list[Tensor]:
        for i, own in one.copied:
            own.copy_(inputs[i])
        one.graph.replay()
        return [r.detach() if i in self._keep else r.clone() for i, r in enumerate(one.results)]

    def _record_steps(self, inputs: Sequence[Tensor]) -> Recording | None:
        taken = set(self._donates.values())
        in_place = [place and i not in taken for i, place in enumerate(self._places)]
        read = [x if place else x.clone() for x, place in zip(inputs, in_place)]
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        # Results outlive a call: in a shared pool they might lie where another recording writes.
        pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.stream(side):
                # Libraries set themselves up on this stream; state must not change by that.
                self._steps([x if place else x.clone() for x, place in zip(read, in_place)])
            side.synchronize()
            with (
                RECORDING,
                torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"),
            ):
                results = self._steps(read)
        except (RuntimeError, ExecutionError) as error:
            self._record = False
            leave_recording(self._device, pool)
            if isinstance(error, (torch.OutOfMemoryError, OutOfMemoryError)):
                _log.warning("'%s': no memory for another recording", self._name)
                self.reason = "no memory for a recording"
                torch.cuda.empty_cache()
                return None
            self.reason = str(error)
            _log.warning("'%s' runs without a CUDA graph: %s", self._name, error)
            return None
        torch.cuda.current_stream().wait_stream(side)
        self._keep -= {i for i in self._keep if any(share(results[i], x) for x in read)}
        made = Recording(
            graph,
            [(i, x) for i, x in enumerate(read) if not in_place[i]],
            [i for i, place in enumerate(in_place) if place],
            results,
        )
        made.watch(read, sorted(self._keep))
        self._recordings.append(made)
        self.after_recording()
        return made
