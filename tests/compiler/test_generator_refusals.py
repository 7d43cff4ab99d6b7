"""Models that no generator can be derived from: with a cache of their own, or not causal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accel
from accel.errors import CaptureError
from tests.passes.causal_models import tiny

pytest.importorskip("transformers")


class _Wrapped(nn.Module):
    keys: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny("llama")
        self.register_buffer("keys", torch.zeros(1, 2, 16, 8))


class WritesItsCache(_Wrapped):
    def forward(self, ids: Tensor) -> Any:
        self.keys[:, :, :1] += 1
        return self.model(ids, use_cache=False).logits


class ReturnsItsCache(_Wrapped):
    def forward(self, ids: Tensor) -> Any:
        out = self.model(ids, use_cache=True)
        return out.logits, out.past_key_values


class WantsACache(_Wrapped):
    def forward(self, ids: Tensor, past: Any) -> Any:
        return self.model(ids, past_key_values=past).logits


class FillsAStaticCache(_Wrapped):
    def forward(self, ids: Tensor) -> Any:
        import transformers

        cache = transformers.StaticCache(config=self.model.config, max_cache_len=64)
        return self.model(ids, past_key_values=cache).logits


class SeesEverything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Any:
        x = self.table(ids)
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (WritesItsCache, r"token ids alone.*keys"),
        (ReturnsItsCache, r"returns a tuple.*logits alone"),
        (WantsACache, r"also wants past"),
        (FillsAStaticCache, r"no key/value cache can be inserted"),
        (SeesEverything, r"sees tokens after it"),
    ],
)
def test_the_reason_is_said(model: type[nn.Module], said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        accel.compile_generator(model().eval(), capacity=16)


class WorksInBlocks(nn.Module):
    """A loop over the tokens, after which those from the 33rd on are treated in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Any:
        state, made = torch.zeros(ids.shape[0], 16), []
        x = self.table(ids)
        for t in range(ids.shape[1]):
            state = torch.tanh(state + x[:, t])
            made.append(state)
        y = torch.stack(made, 1)
        if ids.shape[1] > 32:
            y = torch.cat([y[:, :32], y[:, 32:] * 3], 1)
        return self.head(y)


def test_short_texts_do_not_tell_everything() -> None:
    accel.compile_generator(WorksInBlocks().eval(), capacity=24)
    with pytest.raises(CaptureError, match="does not go on as 17 tokens do"):
        accel.compile_generator(WorksInBlocks().eval(), capacity=40)
