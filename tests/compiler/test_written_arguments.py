"""Models that write to their arguments: every other result is as it was before the write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accel
from accel.errors import CaptureError, InputError
from accel.runtime.verify import verify_artifact
from accel.writes import overlap


def swap(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    kept = x.clone()
    x.copy_(y)
    y.copy_(kept)
    return x - y


def moved(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x.copy_(y)
    y.zero_()
    return x + y


def kept_whole(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    old = x.clone()
    x.zero_()
    return old, old[1], y


def kept_sum(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    old = x + 0
    x.mul_(2).add_(y)
    return old.view(-1), x * y


def through_a_buffer(model: Any, x: Tensor, y: Tensor) -> Tensor:
    old = model.kept.clone()
    model.kept.copy_(x)
    x.copy_(old)
    return old + y


def two_buffers(model: Any, x: Tensor, y: Tensor) -> Tensor:
    model.kept.copy_(model.other)
    model.other.mul_(1)
    model.kept.add_(x)
    return model.kept - model.other


class Model(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("kept", torch.arange(6.0).view(2, 3))
        self.register_buffer("other", torch.ones(2, 3))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.body(self, x, y)


BODIES = [swap, moved, kept_whole, kept_sum, through_a_buffer, two_buffers]


@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("how", ["compile", "package", "torch"])
def test_results_are_those_of_eager(body: Any, how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager, model = Model(body).eval(), Model(body).eval()
    given = (torch.randn(2, 3), torch.randn(2, 3))
    if how == "compile":
        fast: Any = accel.compile(model)
    elif how == "package":
        accel.package(model, [t.clone() for t in given], path=tmp_path / "m.accel")
        fast = accel.load(tmp_path / "m.accel")
    else:
        torch._dynamo.reset()
        fast = torch.compile(model, backend="accel")
    for _ in range(3):
        wanted_args, args = ([t.clone() for t in given] for _ in range(2))
        with torch.no_grad():
            wanted, got = eager(*wanted_args), fast(*args)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(args, wanted_args, rtol=0, atol=1e-6)


def test_state_is_not_the_callers_memory() -> None:
    """What a model copied from an argument stays when the caller writes over the argument."""
    fast = accel.compile(Model(through_a_buffer).eval())
    x, y = torch.ones(2, 3), torch.zeros(2, 3)
    with torch.no_grad():
        fast(x, y)
        x.fill_(9)
        assert torch.equal(fast(torch.zeros(2, 3), y), torch.ones(2, 3))


def add_to_first(x: Tensor, y: Tensor) -> Tensor:
    x.add_(1)
    return x + y


@pytest.mark.parametrize("alike", [True, False])
def test_arguments_that_share_memory(alike: bool) -> None:
    """A compiled model refuses them; `torch.compile` gives what eager PyTorch gives."""
    memory, same = torch.ones(7), torch.ones(7)
    views = (lambda t: (t, t)) if alike else (lambda t: (t[1:], t[:-1]))
    wanted = add_to_first(*views(same))
    with pytest.raises(InputError, match="shares memory with 'y'"):
        accel.compile(add_to_first)(*views(memory))
    assert torch.equal(memory, torch.ones(7))
    torch._dynamo.reset()
    fast = torch.compile(add_to_first, backend="accel")
    for given in (torch.ones(7), memory):  # the first call compiles
        assert torch.equal(fast(*views(given)), wanted)
        assert torch.equal(given, same)
    apart = torch.ones(8)
    assert torch.equal(accel.compile(add_to_first)(apart[::2], apart[1::2]), torch.full((4,), 3.0))
    assert torch.equal(apart, torch.tensor([2.0, 1] * 4))


def test_overlap_is_of_elements() -> None:
    a = torch.zeros(6, 8)
    assert overlap(a[2:4], a[3])
    assert overlap(a[:, 1:3], a.view(torch.int32)[:, 2])
    assert not overlap(a[:3], a[3:])
    assert not overlap(a[:, ::2], a[:, 1::2])
    assert not overlap(a[:0], a)
    assert not overlap(a, torch.zeros(6, 8))


READ_AS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.view(torch.int32),
    lambda x: torch.view_as_complex(x),
    lambda x: torch.view_as_complex(x).conj(),
    lambda x: torch.view_as_complex(x).conj().imag,
    lambda x: x.t(),
]


@pytest.mark.parametrize("read", READ_AS)
def test_memory_of_an_argument_read_as_something_else(read: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    fast, x = torch.compile(read, backend="accel"), torch.randn(3, 2)
    with torch.no_grad():
        got, wanted = fast(x), read(x)
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted)
    z = torch.randn(3, dtype=torch.complex64)
    torch._dynamo.reset()
    with torch.no_grad():
        conjugate = torch.compile(lambda t: t.conj(), backend="accel")(z)
    assert torch.equal(conjugate, z.conj())


class Counter(nn.Module):
    """A state of which every program of the model has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total += x.sum(0)
        return x * self.calls + self.total


def test_programs_for_several_sizes_share_state() -> None:
    eager, fast = Counter().eval(), accel.compile(Counter().eval())
    for rows in (1, 2, 1, 3, 2):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(fast(x), eager(x))


def test_saving_leaves_state_alone_and_what_was_saved_starts_anew(tmp_path: Path) -> None:
    x = torch.ones(2, 3)
    fast = accel.compile(Counter().eval(), inputs=(x,))
    first, second = fast(x), fast(x)
    fast.save(tmp_path / "m.accel")
    assert torch.equal(fast(x), second + (second - first))
    assert verify_artifact(tmp_path / "m.accel").ok
    assert torch.equal(accel.load(tmp_path / "m.accel")(x), first)


def test_what_a_model_draws_is_replayed(tmp_path: Path) -> None:
    accel.package(lambda x: x + torch.rand(4), (torch.ones(4),), path=tmp_path / "m.accel")
    assert verify_artifact(tmp_path / "m.accel").ok
    state = torch.get_rng_state()
    verify_artifact(tmp_path / "m.accel")
    assert torch.equal(state, torch.get_rng_state())


class Growing(nn.Module):
    """A mask that is made again for longer texts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > self.mask.shape[0]:
            self.mask = torch.ones(x.shape[0], x.shape[0]).tril()
        return self.mask[: x.shape[0], : x.shape[0]] @ x


def test_a_buffer_that_changes_its_size(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CaptureError, match=r"'mask' another size: \[2, 2\] becomes \[4, 4\]"):
        accel.compile(Growing().eval(), inputs=(torch.ones(4, 3),))
    fast = accel.compile(Growing().eval(), inputs=(torch.ones(2, 3),))
    assert torch.equal(fast(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    with pytest.raises(CaptureError, match="must have same reduction dim"):
        accel.compile(nn.Linear(2, 2).eval(), inputs=(torch.ones(4, 3),))
    assert not caplog.records  # torch's own account of it
