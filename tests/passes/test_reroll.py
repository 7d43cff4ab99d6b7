"""reroll and generalize: loops over the tokens, as captures unroll them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from accel.compiler.capture_text import capture_text
from accel.errors import CaptureError, OptionError
from accel.frontends.export import capture
from accel.ir import Module, interpret, parse_module, print_module, verify
from accel.passes.manager import run_pipeline

TOKENS = 5


class Loop(nn.Module):
    """A recurrent layer: one step of `cell` a token."""

    def __init__(self, cell: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        made = []
        for t in range(x.shape[1]):
            state, y = self.cell(state, x[:, t])
            made.append(y)
        return torch.stack(made, dim=1)


class Written(nn.Module):
    """The results are written side by side; what the last token leaves is read after the loop."""

    def forward(self, x: Tensor) -> Tensor:
        state, high = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]) - 1e3
        out = torch.zeros_like(x)
        for t in range(x.shape[1]):
            out[:, t] = torch.exp(state - high.abs()) + x[:, t]
            high = torch.maximum(high, x[:, t] + state)
            state = state * 0.5 + x[:, t]
        return out * state[:, None]


def decay(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.exp(-x.abs()) * state + x
    return state, torch.tanh(state)


def delayed(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The carry is what was read."""
    return x, state - x


def rolled(model: nn.Module) -> Module:
    module = capture(model, (torch.randn(2, TOKENS, 3),))
    run_pipeline(module, f"reroll{{tokens={TOKENS}}}", validate=True)
    verify(module)
    return module


@pytest.mark.parametrize("model", [Loop(decay), Loop(delayed), Written()])
def test_a_loop_becomes_a_scan(model):
    module = rolled(model)
    names = [op.name for op in module.main.ops]
    assert names.count("scan") == 1 and "slice_update" not in names and "cat" not in names
    x = torch.randn(2, TOKENS, 3)
    torch.testing.assert_close(interpret(module.main, [x], module.weights)[0], model(x))


def test_a_scan_prints_and_parses():
    text = print_module(rolled(Loop(decay)))
    again = parse_module(text)
    verify(again)
    assert print_module(again) == text


def test_the_last_state_is_a_result():
    (scan,) = [op for op in rolled(Written()).main.ops if op.name == "scan"]
    assert scan.attributes["carries"] == 2  # and what follows from both is computed again
    assert any(r.uses for r in scan.results[:2])


class Uneven(nn.Module):
    """One token is treated in another way."""

    def forward(self, x: Tensor) -> Tensor:
        state, made = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = state + x[:, t] * (2 if t == 3 else 1)
            made.append(state)
        return torch.stack(made, dim=1)


class TwoBack(nn.Module):
    """A token reads what the one before the last made."""

    def forward(self, x: Tensor) -> Tensor:
        made = [x[:, 0], x[:, 1]]
        for t in range(2, x.shape[1]):
            made.append(made[t - 2] + x[:, t])
        return torch.stack(made, dim=1)


class Backwards(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        state, made = torch.zeros_like(x[:, 0]), []
        for t in reversed(range(x.shape[1])):
            state = state * 0.5 + x[:, t]
            made.append(state)
        return torch.stack(made, dim=1)


@pytest.mark.parametrize("model", [Uneven(), TwoBack(), Backwards()])
def test_what_only_looks_like_a_loop_stays(model):
    assert all(op.name != "scan" for op in rolled(model).main.ops)


def test_a_text_is_not_that_short():
    module = capture(Loop(decay), (torch.randn(2, TOKENS, 3),))
    with pytest.raises(OptionError, match="tokens = 0"):
        run_pipeline(module, "reroll")


class Text(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(16, 8), layer, nn.Linear(8, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.layer(self.table(input_ids)))


@pytest.mark.parametrize("layer", [Loop(decay), Written()])
@pytest.mark.parametrize("tokens", [2, 7, 30])
def test_one_program_for_every_length(layer, tokens):
    torch.manual_seed(0)
    model = Text(layer).eval()
    module = capture_text(model, capacity=32, batch=0)
    ids = torch.randint(0, 16, (3, tokens))
    got = interpret(module.main, [ids], module.weights)[0]
    torch.testing.assert_close(got, model(ids), rtol=1e-5, atol=1e-6)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Loop(decay)(x) / x.shape[1]


class Square(nn.Module):
    """Sizes that grow with the square of the length."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        return Loop(decay)(x) + torch.zeros(n * n)[: n * n].sum() + torch.arange(n * n)[-1]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Uneven(), "once for each token"),
        (Mean(), "depends on the length"),
        (Square(), "other than linearly"),
    ],
)
def test_models_that_are_no_one_program_are_refused(layer, reason):
    with pytest.raises(CaptureError, match=reason) as caught:
        capture_text(Text(layer).eval(), capacity=32)
    assert "test_reroll.py" in caught.value.where
