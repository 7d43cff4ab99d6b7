"""Rewrites of the joint graph: what they make; losses and gradients stay what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel.frontends import joint
from accel.frontends.dynamo import Compiled, interpret_module, make_backend
from accel.ir import Module


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def programs(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Module], list[Tensor]]:
    """The compiled modules, and the loss with the gradients of floating inputs."""
    made: list[Module] = []

    def compile_function(
        module: Module, options: Mapping[str, Any], device: torch.device
    ) -> Compiled:
        assert device.type == "cpu"
        made.append(module)
        return interpret_module(module, options)

    fast = torch.compile(loss, backend=make_backend(compile_function), fullgraph=True)
    return made, results(fast, *inputs)


def results(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    own = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    value = loss(*own)
    value.sum().backward()
    return [value.detach(), *(x.grad for x in own if x.grad is not None)]


def agree(got: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = float(b.double().abs().max().clamp(min=1e-9))
        assert float((a.double() - b.double()).abs().max()) <= bound * scale


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore", [-100, 3])
def test_cross_entropy_keeps_a_logsumexp(reduction: str, ignore: int) -> None:
    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x * 2, target, reduction=reduction, ignore_index=ignore)

    x, target = torch.randn(6, 11), torch.tensor([0, 3, 10, 5, 3, 2])
    target[1] = ignore
    made, got = programs(loss, x, target)
    forward, backward = made
    names = {op.name for module in made for op in module.main.ops}
    assert not names & {"log_softmax", "nll_loss", "nll_loss_backward", "log_softmax_backward"}
    kept = [v for v in forward.main.results if v.type.rank == 2 and v.shape[1] == 11]
    assert len(kept) <= 1, "nothing over all classes is kept but the logits"
    assert any(op.name == "exp" for op in backward.main.ops)
    agree(got, results(loss, x, target), 1e-6)


def test_all_targets_ignored_is_nan_as_in_eager() -> None:
    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x, target, ignore_index=1)

    x, target = torch.randn(3, 5), torch.ones(3, dtype=torch.int64)
    _, got = programs(loss, x, target)
    wanted = results(loss, x, target)
    assert torch.isnan(got[0]) and torch.isnan(wanted[0])
    assert torch.equal(torch.isnan(got[1]), torch.isnan(wanted[1]))


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"weight": torch.rand(7)}])
def test_other_cross_entropies_stay_whole(options: dict[str, Any]) -> None:
    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x, target, **options)

    x, target = torch.randn(4, 7), torch.tensor([0, 3, 6, 5])
    made, got = programs(loss, x, target)
    assert any(op.name == "log_softmax" for op in made[0].main.ops)
    agree(got, results(loss, x, target), 1e-6)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "_on_gpu", lambda node: True)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_odd_products_are_padded_once_for_both_ways() -> None:
    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    x, weight = torch.randn(80, 64).bfloat16(), torch.randn(1001, 64).bfloat16()
    target = torch.randint(0, 1001, (80,))
    made, got = programs(loss, x, weight, target)
    pads = [op for module in made for op in module.main.ops if op.name == "pad"]
    assert len(pads) <= 3, "the weight in each program, and the gradient"
    for module in made:
        for op in module.main.ops:
            if op.name in ("matmul", "linear"):
                assert all(d % 8 == 0 for v in op.operands for d in v.shape)
    wide = [t.float() if t.is_floating_point() else t for t in (x, weight, target)]
    wanted = [t.bfloat16() for t in results(loss, *wide)]
    agree(got, wanted, 2e-2)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_even_and_wide_products_stay(dtype: torch.dtype) -> None:
    outputs = 1000 if dtype == torch.bfloat16 else 1001

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight).square().mean()

    made, _ = programs(
        loss, torch.randn(80, 64, dtype=dtype), torch.randn(outputs, 64, dtype=dtype)
    )
    assert not any(op.name == "pad" for module in made for op in module.main.ops)


def test_splits_are_slices_that_the_backward_takes_again() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b, c = (x * 2).split(4, dim=1)
            return torch.tanh(a) * b + c.exp()

    x = torch.randn(3, 12)
    made, got = programs(Gate(), x)
    assert any(op.name == "slice" for op in made[0].main.ops)
    agree(got, results(Gate(), x), 1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_of_logits_is_made_with_the_loss(
    reduction: str, dtype: torch.dtype, scale: float
) -> None:
    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = F.linear(x, weight).float()
        return F.cross_entropy(logits, target, reduction=reduction, ignore_index=2) * scale

    x, weight = torch.randn(24, 16).to(dtype), torch.randn(40, 16).to(dtype)
    target = torch.randint(0, 40, (24,))
    target[3] = 2
    made, got = programs(loss, x, weight, target)
    forward, backward = made
    assert any(op.name == "exp" for op in forward.main.ops)
    assert not any(op.name == "exp" for op in backward.main.ops)
    large = [v for v in backward.main.args if v.type.numel() == 24 * 40]
    assert [v.dtype for v in large] == [dtype], "one tensor over all classes is kept, rounded"
    exact = results(loss, x.double(), weight.double(), target)
    agree(
        [t.double() for t in got],
        [t.double() for t in exact],
        1e-6 if dtype == torch.float32 else 1e-2,
    )


def test_a_gradient_of_logits_that_something_else_reads_is_made_later() -> None:
    def loss(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(torch.tanh(F.linear(x, weight) + bias), target)

    x, weight, bias = torch.randn(24, 16), torch.randn(40, 16), torch.randn(40)
    inputs = (x, weight, bias, torch.randint(0, 40, (24,)))
    made, got = programs(loss, *inputs)
    assert any(op.name == "exp" for op in made[1].main.ops)
    agree(got, results(loss, *inputs), 1e-5)


def test_float16_gradients_of_logits_are_scaled_before_they_are_rounded() -> None:
    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target) * 65536

    x, weight = torch.randn(24, 16).half(), torch.randn(40, 16).half() / 8
    made, _ = programs(loss, x, weight, torch.randint(0, 40, (24,)))
    assert any(op.name == "exp" for op in made[1].main.ops)


@pytest.mark.parametrize("rows", [12, 16])
def test_positions_need_no_scattering(rows: int) -> None:
    def loss(x: Tensor, table: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return (x * F.embedding(places, table)).square().sum()

    x, table = torch.randn(3, 12, 8), torch.randn(rows, 8)
    made, got = programs(loss, x, table)
    names = {op.name for module in made for op in module.main.ops}
    assert not names & {"embedding_backward", "index_put"}
    agree(got, results(loss, x, table), 1e-5)


@pytest.mark.parametrize("padding", [None, 3])
def test_other_places_are_scattered(padding: int | None) -> None:
    def loss(x: Tensor, table: Tensor) -> Tensor:
        places = torch.arange(2, 2 + x.shape[1], device=x.device)
        if padding is not None:
            places = places - 2
        return (x * F.embedding(places, table, padding_idx=padding)).square().sum()

    x, table = torch.randn(3, 12, 8), torch.randn(16, 8)
    made, got = programs(loss, x, table)
    assert any(op.name == "embedding_backward" for op in made[1].main.ops)
    agree(got, results(loss, x, table), 1e-5)
