"""Recording CUDA graphs, as far as it can be seen without a GPU."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from accel.runtime.cuda_graph import RECORDING, Opening
from tests.runtime.support import Plan, same


def test_no_search_for_garbage_within_a_recording() -> None:
    """The end of an old graph, found as garbage, would end the recording."""
    assert gc.isenabled()
    with RECORDING:
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), RECORDING:
        raise ZeroDivisionError
    assert gc.isenabled()


def test_one_recording_at_a_time() -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def record() -> None:
        nonlocal inside, most
        for _ in range(200):
            with RECORDING:
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def opening_of(plan: Plan, inputs: list[torch.Tensor], *outputs: int) -> Opening | None:
    """What a recording for these inputs would leave out."""
    run = plan.compile(*outputs)
    run(inputs)
    bound = run._lanes[0].current
    assert bound is not None
    return bound.opening()


def test_the_first_step_by_itself_and_the_rest() -> None:
    """The rest looks at no argument that the first step alone reads."""
    p = Plan()
    x, y = p.input(3, 4), p.input(3, 4)
    first = p.kernel("reverse", x)
    total = p.kernel("add", first, y)
    result = p.kernel("mul", total, y)
    opening = opening_of(p, [torch.randn(3, 4), torch.randn(3, 4)], result)
    assert opening is not None and opening.arguments == {0}
    for given in (torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(13)[1:].view(3, 4)):
        inputs = [given, torch.randn(3, 4)]
        opening.run(inputs)
        same(opening.rest([torch.empty(0), inputs[1]]), p.reference(inputs))


def test_an_argument_that_others_read_is_copied_too() -> None:
    p = Plan()
    x, y = p.input(8), p.input(8)
    result = p.kernel("reverse", p.kernel("mul", p.kernel("fold", x, y), y))
    opening = opening_of(p, [torch.randn(8), torch.randn(8)], result)
    assert opening is not None and opening.arguments == {0}
    inputs = [torch.randn(8), torch.randn(8)]
    opening.run(inputs)
    same(opening.rest([torch.empty(0), inputs[1]]), p.reference(inputs))


def test_first_steps_that_belong_to_the_recording() -> None:
    p = Plan()  # something else reads the argument
    x = p.input(8)
    assert opening_of(p, [torch.randn(8)], p.kernel("add", p.kernel("reverse", x), x)) is None
    p = Plan()  # a result is a view of the argument
    x = p.input(8)
    total = p.kernel("reverse", p.kernel("reverse", x))
    assert opening_of(p, [torch.randn(8)], total, p.view("reshape", x, [2, 4])) is None
    p = Plan()  # the step's own result is handed out
    assert opening_of(p, [torch.randn(8)], p.kernel("reverse", p.input(8))) is None
    p = Plan()  # a library call
    x, w = p.input(2, 4), p.weight("w", torch.randn(4, 4))
    assert opening_of(p, [torch.randn(2, 4)], p.kernel("reverse", p.library(x, w))) is None
    p = Plan()  # memory of an argument is taken over
    x, y = p.input(8), p.input(8)
    total = p.kernel("add", p.kernel("reverse", x), y)
    p.donates = {0: 1}
    assert opening_of(p, [torch.randn(8), torch.randn(8)], total) is None
