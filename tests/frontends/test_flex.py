"""flex_attention in a model: what it computes, and that passes find attention in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import accel
from accel.frontends.export import capture
from accel.ir import interpret
from accel.ir.module import Op
from accel.passes.manager import run_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
LENGTH, HEADS, SIZE = 128, 4, 16
CLEAN = "canonicalize,cse,dce,raise_composites,raise_attention,canonicalize,cse,dce"
Mod = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Model(nn.Module):
    """One attention; `score` and `mask` are flex_attention's functions."""

    def __init__(self, score: Mod | None = None, mask: Mod | None = None, groups: int = HEADS):
        super().__init__()
        self.score, self.mask, self.groups = score, mask, groups
        self.project = nn.Linear(32, (HEADS + 2 * groups) * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).split([n * SIZE for n in (HEADS, self.groups, self.groups)], -1)
        q, k, v = (p.unflatten(-1, (-1, SIZE)).transpose(1, 2) for p in parts)
        n, block = x.shape[1], None
        if self.mask is not None:
            block = create_block_mask(self.mask, None, None, n, n, device=x.device)
        y: Any = flex_attention(q, k, v, score_mod=self.score, block_mask=block,
                                enable_gqa=self.groups != HEADS)  # fmt: skip
        return torch.flatten(y.transpose(1, 2), 2)


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i - j < 40)


def softcap(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return 2.0 * torch.tanh(s / 2.0)


def alibi(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + (j - i) * torch.exp2(-(h + 1.0))


DOCUMENT = torch.arange(LENGTH) // 50
BIAS = torch.randn(HEADS, LENGTH, generator=torch.Generator().manual_seed(0))


def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (DOCUMENT[i] == DOCUMENT[j]) & (j <= i)


def biased(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + BIAS[h, j]


def nothing(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i > 3)


def squared(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s * s


MODELS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    # What the model is made of, and attributes of the attention that it becomes (None: none).
    "plain": ({}, {"causal": False}),
    "causal": ({"mask": causal}, {"causal": True, "window": None}),
    "a window, groups": ({"mask": window, "groups": 2}, {"causal": True, "window": 40}),
    "a cap": ({"score": softcap}, {"causal": False, "softcap": 2.0}),
    "a cap and a window": (
        {"score": softcap, "mask": window}, {"causal": True, "window": 40, "softcap": 2.0},
    ),
    "alibi": ({"score": alibi, "mask": causal}, {"causal": True}),
    "documents": ({"mask": documents}, {"causal": True}),
    "a bias": ({"score": biased, "groups": 1}, {"causal": False}),
    "rows without keys": ({"mask": nothing}, {"causal": True}),
    "rows without keys, a cap": ({"mask": nothing, "score": softcap}, {"causal": True}),
    "other scores": ({"score": squared, "mask": causal}, None),
}  # fmt: skip


def made(name: str) -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = Model(**MODELS[name][0]).eval().requires_grad_(False), torch.randn(2, LENGTH, 32)
    return model, x, model(x)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_captured_and_found(name: str) -> None:
    model, x, want = made(name)
    module = capture(model, (x,))
    run_pipeline(module, CLEAN)
    (got,) = interpret(module.main, [x], module.weights)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    found: list[Op] = [op for op in module.main.ops if op.name == "attention"]
    attributes = MODELS[name][1]
    if attributes is None:
        assert not found
        return
    assert len(found) == 1
    assert {n: found[0].attribute(n) for n in attributes} == attributes


@pytest.mark.parametrize("name", ["a window, groups", "a cap and a window", "documents"])
def test_torch_compile(name: str) -> None:
    model, x, want = made(name)
    got = torch.compile(model, backend="accel", fullgraph=True)(x)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_compile() -> None:
    model, x, want = made("documents")
    got = accel.compile(model, inputs=[x])(x)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
