"""No or one element along a dynamic axis: programs of their own, compiled when first called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import accel
from accel.errors import ExecutionError, InputError


class Branching(nn.Module):
    """Does something else with one token; its mask broadcasts over them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.up(self.norm(x)) * mask[:, :, None]
        if x.shape[1] > 1:
            y = y - y.mean(1, keepdim=True)
        return torch.softmax(y, -1)


def compiled() -> tuple[accel.Compiled, nn.Module]:
    torch.manual_seed(0)
    model = Branching().eval()
    fast = accel.compile(
        model,
        inputs=(torch.randn(3, 7, 16), torch.randn(3, 7)),
        dynamic_shapes=({0: "batch", 1: Dim("length", max=64)}, {0: "batch", 1: Dim("length")}),
    )
    return fast, model


@torch.no_grad()
def test_each_size_is_as_in_eager() -> None:
    fast, model = compiled()
    for batch, length in ((2, 5), (2, 1), (2, 0), (1, 5), (0, 5), (1, 1), (1, 9), (2, 5), (4, 1)):
        x, mask = torch.randn(batch, length, 16), torch.randn(batch, length)
        torch.testing.assert_close(fast(x, mask), model(x, mask))


@torch.no_grad()
def test_other_axes_stay_dynamic() -> None:
    fast, model = compiled()
    for length in (3, 8, 20):
        x, mask = torch.randn(1, length, 16), torch.randn(1, length)
        torch.testing.assert_close(fast(x, mask), model(x, mask))
    assert len(fast._small) == 1


def test_a_declared_minimum_holds() -> None:
    fast = accel.compile(
        nn.Softmax(-1),
        inputs=(torch.randn(4, 8),),
        dynamic_shapes=({0: Dim("rows", min=1, max=64)},),
    )
    assert fast(torch.ones(1, 8)).shape == (1, 8)
    with pytest.raises(InputError, match="gives 0"):
        fast(torch.ones(0, 8))
    with pytest.raises(InputError, match="gives 65"):
        fast(torch.ones(65, 8))


@torch.no_grad()
def test_an_artifact_is_the_general_program_and_says_so(tmp_path: Path) -> None:
    fast, model = compiled()
    fast(torch.randn(2, 1, 16), torch.randn(2, 1))
    fast.save(tmp_path / "m.accel")
    loaded = accel.load(tmp_path / "m.accel")
    x, mask = torch.randn(2, 5, 16), torch.randn(2, 5)
    torch.testing.assert_close(loaded(x, mask), model(x, mask))
    with pytest.raises(InputError, match="gives 1") as caught:
        loaded(x[:, :1], mask[:, :1])
    assert "a program of its own" in caught.value.advice


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x.sum(0))
        return self.total * 1


@torch.no_grad()
def test_state_is_one_programs() -> None:
    fast = accel.compile(
        Counter(), inputs=(torch.ones(3, 4),), dynamic_shapes=({0: Dim("rows", max=64)},)
    )
    assert fast(torch.ones(2, 4)).tolist() == [2.0] * 4
    with pytest.raises(InputError, match="gives 1"):
        fast(torch.ones(1, 4))
    assert fast(torch.ones(3, 4)).tolist() == [5.0] * 4


def test_a_call_of_another_structure_is_refused() -> None:
    fast, _ = compiled()
    with pytest.raises(InputError):
        fast(torch.ones(1, 1, 16))
    with pytest.raises(InputError):
        fast(torch.ones(1, 16), torch.ones(1, 1))


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda x, i: x[i] + 1, id="index"),
        pytest.param(lambda x, i: x.index_select(0, i).exp(), id="index_select"),
        pytest.param(lambda x, i: x.gather(0, i[:, None].expand(2, 4)) * 2, id="gather"),
        pytest.param(lambda x, i: torch.nn.functional.embedding(i, x) - 1, id="embedding"),
    ],
)
def test_elements_of_an_empty_tensor(read: Callable[[Tensor, Tensor], Tensor]) -> None:
    """There are none: an error, as in eager, and the process lives."""
    x, places = torch.empty(0, 4), torch.tensor([0, 1])
    with pytest.raises((IndexError, RuntimeError)):
        read(x, places)
    with pytest.raises(ExecutionError, match="ndex"):
        accel.compile(read, inputs=(x, places))(x, places)
    none = places[:0]
    got = accel.compile(lambda x, i: x[i] + 1, inputs=(x, none))(x, none)
    assert got.shape == (0, 4)
