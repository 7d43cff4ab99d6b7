"""Out of memory: a typed error, after which the process goes on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import accel
from accel.errors import ExecutionError, OutOfMemoryError
from accel.runtime import executor

TOO_MANY = 1 << 23  # rows: their square needs 2**48 bytes


class Pairs(torch.nn.Module):
    """n rows in, a product of n x n inside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ x.T + 1).sum(1)


def compiled() -> accel.Compiled:
    length = torch.export.Dim("n", max=1 << 24)
    return accel.compile(Pairs(), inputs=(torch.randn(8, 4),), dynamic_shapes=({0: length},))


def test_a_smaller_call_works_after_one_that_was_too_large() -> None:
    fast, x = compiled(), torch.randn(64, 4)
    with torch.no_grad():
        wanted = Pairs()(x)
        torch.testing.assert_close(fast(x), wanted)
        with pytest.raises(OutOfMemoryError, match="not enough memory") as caught:
            fast(torch.randn(TOO_MANY, 4))
        torch.testing.assert_close(fast(x), wanted)
    assert caught.value.id == "ACCEL054" and "smaller batch" in caught.value.advice
    assert isinstance(caught.value, ExecutionError)


def test_nothing_of_the_failed_call_stays() -> None:
    fast = compiled()
    function = next(iter(fast._latest()[1].entry_points.values())).function
    with torch.no_grad():
        fast(torch.randn(64, 4))
        with pytest.raises(OutOfMemoryError):
            fast(torch.randn(TOO_MANY, 4))
    assert [(lane.arena.numel(), len(lane.bound)) for lane in function._lanes] in ([], [(0, 0)])


def test_arenas_of_idle_functions_are_given_back() -> None:
    idle = compiled()
    with torch.no_grad():
        wanted = idle(torch.ones(64, 4))
        function = next(iter(idle._latest()[1].entry_points.values())).function
        assert function._lanes and function._lanes[0].bound
        executor.release_memory(torch.device("cpu"))
        assert not function._lanes
        assert torch.equal(idle(torch.ones(64, 4)), wanted)
