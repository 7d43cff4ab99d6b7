"""A function's steps as one CUDA graph, for one set of sizes.

The first call runs the steps one by one, which loads kernels and lets libraries choose; the second
records them; later ones copy the inputs to where the recording reads them and replay it. Results
are copied out, so that the next call does not overwrite what a caller holds. A function with a step
that cannot be recorded (one that waits for the device, say) goes on step by step, and the log says
which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from accel.config import logger
from accel.errors import ExecutionError

_log = logger("runtime")
_ALIGNMENT = 16

Steps = Callable[[Sequence[Tensor]], list[Tensor]]


class GraphRunner:
    """Runs steps on a device, recorded from the second call on.

    Args:
        steps: runs all steps on the current stream.
        check: raises if a kernel reported a failure.
        record: False leaves the steps as they are.
    """

    def __init__(
        self,
        steps: Steps,
        device: torch.device,
        check: Callable[[], None],
        *,
        record: bool,
        name: str,
    ) -> None:
        self._steps, self._device, self._check, self._name = steps, device, check, name
        self._record = record
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._results: list[Tensor] = []

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """One call. Raises ExecutionError for a failure of this call or an earlier one."""
        if torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                return self._run(inputs)
        return self._run(inputs)

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self._check()
        if self._graph is None:
            self._calls += 1
            if self._calls == 2 and self._record:
                self._capture(inputs)
            if self._graph is None:
                return self._step_by_step(inputs)
        for kept, given in zip(self._inputs, inputs):
            kept.copy_(given)
        self._graph.replay()
        return [r.clone() for r in self._results]

    def _step_by_step(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        aligned = [x if x.data_ptr() % _ALIGNMENT == 0 else _dense_copy(x) for x in inputs]
        results = self._steps(aligned)
        if self._calls == 1:
            torch.cuda.current_stream().synchronize()
            self._check()
        return results

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = [_dense_copy(x) for x in inputs]
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(side):
                self._steps(self._inputs)  # libraries set themselves up on this stream
            side.synchronize()
            with torch.cuda.graph(graph, stream=side):
                self._results = self._steps(self._inputs)
        except (RuntimeError, ExecutionError) as error:
            torch.cuda.synchronize(self._device)
            self._inputs, self._results, self._record = [], [], False
            _log.warning("'%s' runs without a CUDA graph: %s", self._name, error)
            return
        torch.cuda.current_stream().wait_stream(side)
        self._graph = graph

    @property
    def recorded(self) -> bool:
        return self._graph is not None


def _dense_copy(x: Tensor) -> Tensor:
    """A copy at an aligned address. C order, as kernels read."""
    return x.clone(memory_format=torch.contiguous_format)
