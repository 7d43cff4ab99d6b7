"""Kernels that follow one another run as one call: same results, same errors, and what is known
of the call before is used only where it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import accel
from accel.errors import ExecutionError
from tests.passes.causal_models import tiny

pytest.importorskip("tvm")


def test_a_decoding_step_is_few_calls_and_computes_the_same():
    pytest.importorskip("transformers")
    model = accel.compile_generator(tiny("llama"), capacity=32)
    loop = model.generator.loop
    function = model.entry_points["decode"].function
    ids, tokens = torch.tensor([[5, 6, 7]]), torch.tensor([9])
    results = []
    with torch.no_grad():
        for _ in range(3):  # the first call runs step by step
            _, state = loop.prefill(ids, loop.empty(1))
            results.append(loop.decode(tokens, torch.tensor(3), state)[0])
        bound = function._lanes[-1].current
        assert len(bound._merged) < len(bound._runs) // 4
        assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
        with pytest.raises(ExecutionError, match="out of range") as caught:
            loop.decode(tokens, torch.tensor(32), loop.empty(1))
        assert caught.value.where.startswith("accel_")


class Chain(nn.Module):
    """Kernels, and between them an operation that torch runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.softmax(x.sin(), -1).cumsum(-1)
        return torch.sort(x.cos(), dim=-1).values.softmax(-1).cumsum(0)


def test_other_steps_come_between():
    model = Chain().eval()
    fast = accel.compile(model, inputs=(torch.randn(8, 8),))
    for _ in range(3):
        x = torch.randn(8, 8)
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
        strided = torch.randn(8, 16)[:, ::2]
        torch.testing.assert_close(fast(strided), model(strided), atol=1e-5, rtol=1e-5)


def test_a_strided_view_of_what_a_kernel_made_is_read_after_it():
    """Values, cut from one product with the keys, are multiplied by a generated kernel."""
    pytest.importorskip("transformers")
    loop = accel.compile_generator(tiny("llama"), capacity=32, cache="int4").generator.loop
    with torch.no_grad():
        runs = [loop.prefill(torch.tensor([[5, 6, 7, 8]]), loop.empty(1)) for _ in range(3)]
    for logits, state in runs[1:]:
        assert torch.equal(logits, runs[0][0])
        assert all(map(torch.equal, state, runs[0][1]))


@pytest.fixture
def four_threads() -> Iterator[None]:
    """More threads than this machine may have cores: who waits must let others run."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Layers(nn.Module):
    """Large and small kernels in turns, with scratch memory and an index that may be wrong."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(50, 512))
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(3))
        self.norm = nn.LayerNorm(512)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.softmax(layer(self.norm(x)), -1) + x
            x = x + torch.var(x, 0)  # reduces over rows
        return self.norm(x + self.table[ids].sum(0))


def compiled() -> tuple[Callable[..., Tensor], Layers]:
    model = Layers().eval()
    example = (torch.randn(4, 512), torch.tensor([1]))
    return accel.compile(model, inputs=example), model


@pytest.mark.usefixtures("four_threads")
def test_a_team_computes_what_threads_compute_kernel_by_kernel():
    fast, model = compiled()
    with torch.no_grad():
        for _ in range(20):
            inputs = torch.randn(4, 512), torch.randint(50, (1,))
            wanted = model(*inputs)
            torch.testing.assert_close(fast(*inputs), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("four_threads")
def test_all_threads_of_a_team_stop_at_a_failure():
    fast, model = compiled()
    good = torch.randn(4, 512), torch.tensor([3])
    with torch.no_grad():
        for _ in range(5):
            torch.testing.assert_close(fast(*good), model(*good))
            with pytest.raises(ExecutionError, match="out of range"):
                fast(good[0], torch.tensor([50]))


class Running(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.softmax(x + y, -1).cumsum(-1).exp().softmax(0)


def test_what_is_known_of_a_tensor_ends_with_its_memory():
    model = Running().eval()
    fast = accel.compile(model, inputs=(torch.randn(16, 16), torch.randn(16, 16)))
    x, y = torch.randn(16, 16), torch.randn(16, 16)

    def same() -> None:
        torch.testing.assert_close(fast(x, y), model(x, y), atol=1e-5, rtol=1e-5)

    for _ in range(3):
        same()
    for change in (
        lambda: x.set_(torch.randn(16, 16)),  # the same object, elsewhere
        lambda: x.t_(),  # the same memory, other strides
        lambda: y.set_(x),  # two arguments in the same memory
        lambda: y.add_(1.0),
    ):
        change()
        for _ in range(3):
            same()
    for _ in range(20):  # objects that come and go, some at the same place
        x = torch.randn(16, 16)
        same()


def test_a_failed_call_is_not_remembered():
    fast, model = compiled()
    x, ids = torch.randn(4, 512), torch.tensor([3])
    with torch.no_grad():
        for _ in range(3):
            fast(x, ids)
        ids.fill_(50)
        with pytest.raises(ExecutionError, match="out of range"):
            fast(torch.randn(4, 512), ids)
        ids.fill_(7)
        torch.testing.assert_close(fast(x, ids), model(x, ids))


def test_a_loop_over_tokens_may_change_its_state_between_calls():
    pytest.importorskip("transformers")
    model = accel.compile_generator(tiny("llama"), capacity=32)
    loop = model.generator.loop
    decode = model.entry_points["decode"].function
    with torch.no_grad():
        states = [loop.prefill(torch.tensor([[5, 6, n]]), loop.empty(1))[1] for n in (7, 8)]
        kept = [[t.clone() for t in state] for state in states]
        inputs = [torch.tensor([[9]]), torch.tensor(3)]
        wanted = [decode([*inputs, *map(torch.clone, state)])[0] for state in kept]
        for turn in (0, 0, 1, 1, 0, 1):
            for tensor, value in zip(states[turn], kept[turn]):
                tensor.copy_(value)
            made, *state = decode.again([*inputs, *states[turn]])
            assert torch.equal(made, wanted[turn])
            assert all(a is b for a, b in zip(state, states[turn]))
        again = [t.clone() for t in kept[0]]  # new tensors, perhaps where old ones were
        assert torch.equal(decode.again([*inputs, *again])[0], wanted[0])
