"""In-place operations and views as pure programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from accel.errors import CaptureError
from tests.frontends.support import assert_close, captured, check


def chain(x: Tensor) -> Any:
    y = x * 2
    y[:, 1:3] += 1
    y[0] = 7
    y.t()[2].mul_(3)
    return y, y.sum()


def stale_view(x: Tensor) -> Any:
    y = x.clone()
    row, flat, before = y[1], y.view(-1), y[1] + 0
    y[:, 0] = 5
    return row, flat, before


def view_of_view(x: Tensor) -> Any:
    y = x.clone()
    y.view(2, 2, 6)[1].select(0, 1)[2:5:2] = -1
    return y


def windows(x: Tensor) -> Any:
    y = x.clone()
    y.diagonal().zero_()
    y.unfold(1, 2, 2)[0].fill_(9)
    return y


def parts(x: Tensor) -> Any:
    y = torch.zeros(4, 6)
    y[:, ::2] = x[:, ::2]
    left, right = y.split(3, dim=1)
    right.neg_()
    y.unbind(0)[2].add_(5)
    y.chunk(2)[1].mul_(2)
    return y, left, right


def unsafe_parts(x: Tensor) -> Any:
    y = x * 2
    left, right = torch.unsafe_chunk(y, 2, dim=1)
    left.add_(right)
    y[2:2] = 5
    return y, right


def masks(x: Tensor) -> Any:
    mask = x > 0
    y = x.clone()
    y[mask] = 0.5
    y.masked_fill_(y == 0.5, 2.0)
    y[torch.tensor([0, 2])] = 3.0
    y.index_put_((torch.tensor([1]), torch.tensor([2])), torch.tensor(8.0))
    return y


def shapes(x: Tensor) -> Any:
    y = x + 1
    z = y * 2
    y.unsqueeze_(0)
    y.transpose_(0, 1)
    y += 1
    return y, z, y.squeeze_(1)


def casts(x: Tensor) -> Any:
    counts = torch.zeros(6, dtype=torch.int64)
    counts += (x > 0).sum(0)
    half = x.to(torch.bfloat16).clone()
    half.mul_(x)
    x.copy_(torch.arange(6))
    return counts, half


def loops(x: Tensor) -> Any:
    total = torch.empty(4, 6)
    for i in range(4):
        total[i] = x[i] * i
    total.clamp_(min=0).sqrt_()
    return total


def bits(x: Tensor) -> Any:
    m = x > 0
    m &= x < 1
    m |= x < -1
    m ^= True
    return m, ~m


CASES: list[Callable[[Tensor], Any]] = [
    chain, stale_view, view_of_view, windows, parts, unsafe_parts, masks, shapes, casts, loops,
    bits,
]  # fmt: skip


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_writes_are_what_eager_does(function: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    check(function, torch.randn(4, 6))


def test_a_written_input_is_a_result() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        x.view(-1)[3] = 0
        return x * y

    program = check(function, torch.randn(4, 6), torch.randn(4, 6))
    assert program.main.metadata["results"][1] == {"kind": "mutation", "argument": 0}
    assert program.main.donates == {1: 0}


def test_a_view_that_nobody_writes_through_costs_nothing() -> None:
    program = check(lambda x: (x[1:3].t() * 2, x.view(-1)), torch.randn(4, 6))
    assert program.ops == ["slice", "permute", "full", "mul", "reshape", "return"]


def test_data_is_the_tensor_itself() -> None:
    check(lambda x: (x * 1).data * 2 + x.detach(), torch.randn(3))


def test_vmap_is_seen_through() -> None:
    weight = torch.randn(5, 6)
    check(
        lambda x: torch.vmap(lambda r: torch.nn.functional.linear(r, weight))(x), torch.randn(4, 6)
    )


def test_a_write_where_elements_share_memory_is_refused() -> None:
    def function(x: Tensor) -> Tensor:
        wide = (x + 1).expand(3, 4)
        return wide.add_(1)

    with pytest.raises(CaptureError):
        captured(function, torch.randn(4))


def test_outer_parts_of_any_size() -> None:
    """The place of a part is known although a row's size is not."""

    def function(x: Tensor) -> Tensor:
        y = torch.stack([x, x * 2, x * 3])
        y[1:] += 1
        y[0, :, ::2] = 0
        return y

    program = captured(function, torch.randn(4, 6), dynamic_shapes=({0: Dim("rows")},))
    for rows in (2, 5):
        x = torch.randn(rows, 6)
        assert_close(program(x), function(x))
