"""What forwards take and return besides ids and logits, as people write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accel
from accel.compiler.language import derive_generator
from accel.errors import CaptureError, InputError
from accel.passes.equivalence import check_decode

WIDTH, HEADS, VOCABULARY, LARGEST = 16, 2, 32, 24


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        causal = seen is None and x.shape[1] > 1  # one token has nothing to hide
        made = nn.functional.scaled_dot_product_attention(q, k, v, seen, is_causal=causal)
        return x + self.out(made.transpose(1, 2).flatten(2))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LARGEST, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(2.0)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.place(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.hidden(ids))


class NanoGPT(Body):
    """The head runs for the last token where there is no loss to compute."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        return self.head(self.hidden(ids)[:, [-1], :]), None


class LastSlice(Body):
    def forward(self, ids: Tensor) -> Any:
        return {"logits": 30 * torch.tanh(self.head(self.hidden(ids)[:, -1:]) / 30), "loss": None}


class LastRow(Body):
    def forward(self, ids: Tensor) -> Any:
        return self.head(self.norm(self.hidden(ids)[:, -1]))


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class Record(Body):
    def forward(self, ids: Tensor) -> Any:
        return Output(super().forward(ids))


class WithAuxiliaryLoss(Body):
    def forward(self, ids: Tensor) -> Any:
        logits = super().forward(ids)
        return logits, logits.square().mean()


class WantsMaskAndPositions(Body):
    def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        length = ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen = (seen & attention_mask[:, None].bool())[:, None]
        x = self.table(ids) + self.place(position_ids)
        for layer in self.layers:
            x = layer(x, seen)
        return self.head(self.norm(x))


FORMS = [NanoGPT, LastSlice, LastRow, Record, WithAuxiliaryLoss, WantsMaskAndPositions]


def last_logits(form: type[Body], model: Body, ids: Tensor) -> Tensor:
    more = (torch.ones_like(ids), torch.arange(ids.shape[1])[None])
    out: Any = model(ids, *more) if form is WantsMaskAndPositions else model(ids)
    if isinstance(out, tuple):
        out = out[0]
    logits: Tensor = out["logits"] if isinstance(out, dict) else getattr(out, "logits", out)
    return logits if logits.dim() == 2 else logits[:, -1]


@pytest.mark.parametrize("form", FORMS)
def test_texts_are_the_models(form: type[Body]) -> None:
    pytest.importorskip("tvm")
    model = form().eval()
    text = prompt = torch.tensor([[3, 7, 5]])
    with torch.no_grad():
        for _ in range(12):
            text = torch.cat([text, last_logits(form, model, text).argmax(-1, True)], 1)
    fast = accel.compile_generator(model, capacity=20)
    assert torch.equal(fast.generate(prompt, max_new_tokens=12), text)


@pytest.mark.parametrize("form", [NanoGPT, LastRow, WantsMaskAndPositions])
@pytest.mark.parametrize("batch", [1, 0])
def test_decoding_is_equivalent(form: type[Body], batch: int) -> None:
    """Of several tokens at once, too: a model of last tokens says something of each of them."""
    module = derive_generator(form().eval(), 20, batch, extend=3)
    assert module.functions["extend"].results[0].shape[-1] == VOCABULARY
    assert check_decode(module, steps=2, prompts=(1, 5), batches=(2,)) < 1e-9


class Centred(Body):
    """What comes after the last token knows the others."""

    def forward(self, ids: Tensor) -> Any:
        x = self.hidden(ids)
        return self.head(x[:, -1:] - x.mean(1, keepdim=True))


class OtherToken(Body):
    def forward(self, ids: Tensor) -> Any:
        return self.head(self.hidden(ids)[:, -2:-1])


@pytest.mark.parametrize("form", [Centred, OtherToken])
def test_what_is_not_of_the_last_token_is_refused(form: type[Body]) -> None:
    with pytest.raises(CaptureError, match="one result, logits"):
        derive_generator(form().eval(), 20)


class Translator(Body):
    """An encoder-decoder of one's own, with a loop of attention over the source."""

    def forward(self, src: Tensor, tgt: Tensor) -> Any:
        source = self.table(src) + self.place(torch.arange(src.shape[1]))
        x = self.hidden(tgt)
        weights = (x @ source.mT / WIDTH**0.5).softmax(-1)
        return self.head(x + weights @ source)


def test_an_encoder_decoder_of_ones_own() -> None:
    pytest.importorskip("tvm")
    model = Translator().eval()
    source, text = torch.tensor([[3, 7, 5, 9]]), torch.tensor([[1]])
    with torch.no_grad():
        for _ in range(12):
            text = torch.cat([text, model(source, text)[:, -1:].argmax(-1)], 1)
    fast = accel.compile_generator(model, capacity=20)
    made = fast.generate(source, decoder_start_token_id=1, max_new_tokens=12)
    assert torch.equal(made, text)


class InBlocks(Translator):
    """A source of one block is read in another way."""

    def forward(self, src: Tensor, tgt: Tensor) -> Any:
        one_block = (src.shape[1] + 7) // 8 == 1
        return super().forward(src + 1 if one_block else src, tgt)


def test_conditions_on_the_source_are_said_before_it_is_read() -> None:
    pytest.importorskip("tvm")
    fast = accel.compile_generator(InBlocks().eval(), capacity=20)
    fast.generate(torch.ones(1, 12, dtype=torch.int64), decoder_start_token_id=1, max_new_tokens=2)
    with pytest.raises(InputError, match="'encode' was compiled for"):
        fast.generate(
            torch.ones(1, 5, dtype=torch.int64), decoder_start_token_id=1, max_new_tokens=2
        )


class PadsToBlocks(Translator):
    """The source is padded to blocks of four, whose tokens know their block's sum."""

    def forward(self, src: Tensor, tgt: Tensor) -> Any:
        length = src.shape[1]
        tokens = x = self.table(src)
        if length % 4 != 0:
            x = nn.functional.pad(x, (0, 0, 0, -length % 4))
        blocks = x.reshape(x.shape[0], x.shape[1] // 4, 4, WIDTH)
        sums = blocks.sum(2, keepdim=True).expand_as(blocks)
        source = tokens + sums.flatten(1, 2)[:, :length]
        x = self.hidden(tgt)
        return self.head(x + (x @ source.mT / WIDTH**0.5).softmax(-1) @ source)


def test_sources_of_any_number_of_blocks() -> None:
    pytest.importorskip("tvm")
    model = PadsToBlocks().eval()
    fast = accel.compile_generator(model, capacity=20)
    for length in (2, 4, 5, 8, 30):
        source, text = torch.randint(0, VOCABULARY, (1, length)), torch.tensor([[1]])
        with torch.no_grad():
            for _ in range(4):
                text = torch.cat([text, model(source, text)[:, -1:].argmax(-1)], 1)
        made = fast.generate(source, decoder_start_token_id=1, max_new_tokens=4)
        assert torch.equal(made, text), length
