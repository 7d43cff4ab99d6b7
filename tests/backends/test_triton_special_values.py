"""NaN and infinities through kernels of every template: they reach what eager's reach, no more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from accel.backends.triton import TritonBackend
from tests.backends.special_values import agrees, cases, poisoned_inputs, stored
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

CASES = cases()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


@pytest.mark.parametrize("name", CASES)
def test_numbers_that_are_none(worker: Worker, name: str) -> None:
    special = CASES[name]
    function = special.function()
    backend = TritonBackend("sm_90", special.sms, special.tile)
    runner = InterpretedKernels([function], worker, [special.kind], backend)
    for operand, inputs in poisoned_inputs(special):
        difference = agrees(special, inputs, runner(0, stored(function, inputs)))
        assert not difference, f"operand {operand}: {difference}\n{runner.source(0)}"
