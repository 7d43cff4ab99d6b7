"""Tokens that look at each other other than by attention: what is kept, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import accel
from accel.compiler.language import derive_generator
from accel.errors import CaptureError, OptionError
from accel.passes.equivalence import check_decode

WIDTH, HEADS, LARGEST, VOCABULARY = 32, 2, 40, 64


class Layer(nn.Module):
    """Queries, keys and values of the tokens [B, H, S, D]; `mix` is what layers differ in."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(LARGEST, LARGEST))[None, None])

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.mix(*parts).transpose(1, 2).flatten(2))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


class StoredMask(Layer):
    """Positions of a mask that the model keeps, as nanoGPT has it."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        hidden = self.bias[:, :, :length, :length] == 0
        return scores(q, k).masked_fill(hidden, float("-inf")).softmax(-1) @ v


class OwnSoftmax(Layer):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        seen = self.bias[:, :, :length, :length]
        kept = scores(q, k) * seen - 1e4 * (1 - seen)
        e = (kept - kept.amax(-1, keepdim=True)).exp()
        return (e / e.sum(-1, keepdim=True)) @ v


class Linear(Layer):
    """Attention without a softmax."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)
        weights = weights.tril()
        return weights @ v / weights.sum(-1, keepdim=True)


class HeadsLast(Layer):
    """Scores [B, queries, keys, H]."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        seen = (place[:, None] >= place)[None, :, :, None]
        weights = torch.einsum("bhid,bhjd->bijh", q, k).masked_fill(~seen, -1e30).softmax(2)
        return torch.einsum("bijh,bhjd->bhid", weights, v)


class FromTheEnd(Layer):
    """A bias of distances from the end of the text, which a softmax does not tell from others."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        bias = torch.arange(1 - LARGEST, 1)[LARGEST - length :] * 0.1
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.masked_fill(torch.ones(length, length).triu(1) > 0, -1e30)
        )


class TokensHaveASay(Layer):
    """A mask that follows from what the keys' tokens are."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        own = v.mean(-1)[:, :, None, :]
        own = torch.where(self.bias[:, :, :length, :length] > 0, own, torch.tensor(-1e30))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=own)


class BestTwo(Layer):
    """Every token looks at two others: sparse attention by top-k."""

    most = 2

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        hidden = self.bias[:, :, :length, :length] == 0
        each = scores(q, k).masked_fill(hidden, -1e30)
        top = each.topk(min(self.most, length), -1).indices
        chosen = torch.ones_like(hidden).expand_as(each).scatter(-1, top, False)
        return each.masked_fill(chosen, -1e30).softmax(-1) @ v


class HeadsInGroups(Layer):
    """Products whose rows are heads times tokens."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        k, v = k[:, 0], v[:, 0]  # one for all heads
        seen = torch.arange(length)[:, None] >= torch.arange(length)
        weights = torch.einsum("bhid,bjd->bhij", q, k)
        weights = torch.where(seen, weights, torch.tensor(float("-inf"))).softmax(-1)
        return torch.einsum("bhij,bjd->bhid", weights, v)


class KeysOfNoToken(Layer):
    """Every token sees some keys besides those of the tokens."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, more = q.shape[2], self.out.weight[:3, : q.shape[3]].expand(*k.shape[:2], -1, -1)
        seen = torch.ones(length, length + 3, dtype=torch.bool).tril(3)
        k, v = torch.cat([more, k], 2), torch.cat([more, v], 2)
        return nn.functional.scaled_dot_product_attention(q, k, v, seen)


class Ahead(Layer):
    """One token sees the next one."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).tril(1) @ v


class ByLength(Layer):
    """A token's value is another in a longer text."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).tril() @ v / q.shape[2]


class Model(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(LARGEST, WIDTH)
        self.layers = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(WIDTH, VOCABULARY)
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(2.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.place(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


LAYERS = [StoredMask, OwnSoftmax, Linear, HeadsLast, FromTheEnd, TokensHaveASay, BestTwo]
LAYERS += [HeadsInGroups, KeysOfNoToken]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("batch", [1, 0])
def test_decoding_is_equivalent(layer, batch):
    """Also of several tokens at once, and of rows of unequal length beside each other."""
    module = derive_generator(Model(layer).eval(), 20, batch, extend=3)
    assert module.functions["prefill"].symbols["length"].min == 1 + (layer is BestTwo)
    assert check_decode(module, steps=2, prompts=(1, 5), batches=(2,)) < 1e-9


def test_what_is_kept():
    """Keys and values, once a layer; views of them are made anew."""
    module = derive_generator(Model(Linear).eval(), 20)
    items: list[dict[str, Any]] = module.metadata["kv_cache"]["state"]
    assert [i["name"] for i in items] == ["kept.0", "kept.1", "kept.2", "kept.3"]
    assert all(i["finite"] and i["kind"] == "tokens" for i in items)
    attention = derive_generator(Model(StoredMask).eval(), 20).metadata["kv_cache"]["state"]
    assert [i["name"] for i in attention][:2] == ["keys.0", "values.0"]


def test_texts_are_the_models():
    pytest.importorskip("tvm")
    model = Model(Linear).eval()
    text = prompt = torch.tensor([[3, 7, 5]])
    for _ in range(12):
        with torch.no_grad():
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    fast = accel.compile_generator(model, capacity=20)
    assert torch.equal(fast.generate(prompt, max_new_tokens=12), text)


@pytest.mark.parametrize("batch", [1, 0])
def test_prompts_of_fewer_tokens_than_are_chosen(batch):
    """@prefill takes two tokens or more; one token is decoded from nothing."""
    pytest.importorskip("tvm")
    model = Model(BestTwo).eval()
    fast = accel.compile_generator(model, capacity=20, batch=batch)
    for prompt in ([7], [3, 7], [9, 4, 1]):
        text = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(8):
                text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
        assert torch.equal(fast.generate([prompt], max_new_tokens=8), text)
    together = fast.generate([[7], [9, 4, 1]], max_new_tokens=8)
    assert torch.equal(together[1], text[0])
    assert torch.equal(together[0, 2:], fast.generate([[7]], max_new_tokens=8)[0])


class BestTwelve(BestTwo):
    """Captured for texts of which every token is chosen: longer ones are another computation."""

    most = 12


def test_a_cache_is_no_longer_than_the_capture_holds():
    with pytest.raises(OptionError, match="a cache of 20 positions, and the model takes 11"):
        derive_generator(Model(BestTwelve).eval(), 20)


@pytest.mark.parametrize(
    ("layer", "said"),
    [(Ahead, "sees those after it"), (ByLength, "depends on the length of the text")],
)
def test_what_is_not_causal_is_refused(layer, said):
    with pytest.raises(CaptureError, match=said) as caught:
        derive_generator(Model(layer).eval(), 20)
    assert "test_mixing.py" in caught.value.where
