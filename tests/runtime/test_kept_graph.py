"""When a recording of a training step may be replayed, as far as it can be seen without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from accel.runtime.kept_graph import Recording


def recording(inputs: list[torch.Tensor], results: list[torch.Tensor], kept: list[int]) -> Any:
    made = Recording(None, [], list(range(len(inputs))), results)  # type: ignore[arg-type]
    made.watch(inputs, kept)
    return made


def test_results_that_somebody_holds() -> None:
    x, results = torch.randn(4, 6), [torch.randn(3), torch.randn(5), torch.randn(2)]
    one = recording([x], results, [0, 2])
    assert one.fits([x])
    held = results[2].detach()
    assert not one.fits([x])
    view = held[:1]
    del held
    assert not one.fits([x]), "a view holds the memory as well"
    del view
    assert one.fits([x])
    copied = results[1].detach()  # of this one callers get copies: it may be held
    assert one.fits([x]) and copied.shape == (5,)


def test_a_saved_tensor_holds_a_result() -> None:
    x, results = torch.randn(4), [torch.randn(3)]
    one = recording([x], results, [0])
    weight = torch.randn(3, requires_grad=True)
    loss = (weight * results[0].detach()).sum()
    assert not one.fits([x])
    loss.backward()
    del loss
    assert one.fits([x])


def test_arguments_elsewhere_or_in_another_order() -> None:
    x = torch.randn(6, 6)
    one = recording([x], [], [])
    assert one.fits([x]) and one.fits([x.detach()])
    assert not one.fits([x.clone()])
    assert not one.fits([x.t()])
    assert not one.fits([x[1:]])
