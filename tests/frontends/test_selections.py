"""Experts that see their own tokens only, as people write mixtures of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import accel
from accel.compiler.language import derive_generator
from accel.errors import CaptureError
from accel.passes.equivalence import check_decode

WIDTH, EXPERTS, BEST, VOCABULARY = 16, 4, 2, 32


class Mixture(nn.Module):
    """`mix(x [N, D], weights [N, 2], chosen [N, 2])` is what mixtures differ in."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(EXPERTS)]
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        weights, chosen = torch.topk(self.gate(rows).softmax(-1), BEST)
        return self.mix(rows, weights, chosen).view_as(x)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        raise NotImplementedError


class ByWhere(Mixture):
    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(chosen == i)
            out[row] += weights[row, place, None] * expert(x[row])
        return out


class ByMask(Mixture):
    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = (chosen == i).any(-1)
            if mine.any():
                share = (weights * (chosen == i)).sum(-1)
                out[mine] += expert(x[mine]) * share[mine].unsqueeze(1)
        return out


class ByExpertsThatAreHit(Mixture):
    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        masks = nn.functional.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for i in (masks.sum((-1, -2)) > 0).nonzero():
            place, row = torch.where(masks[i].squeeze(0))
            made = self.experts[i](x[None, row].reshape(-1, WIDTH)) * weights[row, place, None]
            out.index_add_(0, row, made)
        return out


class ByCounts(Mixture):
    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
        for i, expert in enumerate(self.experts):
            if counts[i] == 0:
                continue
            row, place = torch.where(chosen == i)
            out[row] += expert(x[row]) * weights[row, place, None]
        return out


class BySorting(Mixture):
    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.view(-1).argsort()
        x = x[order // BEST]
        parts, start = [], 0
        for i, count in enumerate(torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()):
            if count == 0:
                continue
            parts.append(self.experts[i](x[start : start + count]))
            start = start + count
        done = torch.cat(parts)
        back = torch.empty_like(done)
        back[order] = done
        return (back.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)


class BySplitting(Mixture):
    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().sort(0)[1]
        row = order.div(BEST, rounding_mode="trunc")
        hits = x.new_zeros(x.shape[0], EXPERTS).scatter(1, chosen, 1).long().sum(0)
        parts = x[row].split(hits.tolist(), dim=0)
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        done = done * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, row, done)


class Model(nn.Module):
    def __init__(self, mixture: type[Mixture]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.qkv, self.mixture = nn.Linear(WIDTH, 3 * WIDTH), mixture()
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(2.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + made.transpose(1, 2).flatten(2)
        return self.head(x + self.mixture(x))


MIXTURES = [ByWhere, ByMask, ByExpertsThatAreHit, ByCounts, BySorting, BySplitting]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("batch", [1, 0])
def test_decoding_is_equivalent(mixture: type[Mixture], batch: int) -> None:
    module = derive_generator(Model(mixture).eval(), 16, batch)
    assert check_decode(module, steps=2, prompts=(1, 5), batches=(2,)) < 1e-9


@pytest.mark.parametrize("mixture", MIXTURES)
def test_texts_are_the_models(mixture: type[Mixture]) -> None:
    pytest.importorskip("tvm")
    model = Model(mixture).eval()
    text = prompt = torch.tensor([[3, 7, 5]])
    with torch.no_grad():
        for _ in range(10):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    fast = accel.compile_generator(model, capacity=16)
    assert torch.equal(fast.generate(prompt, max_new_tokens=10), text)


class Centred(Mixture):
    """An expert's tokens look at each other."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, _ = torch.where(chosen == i)
            mine = x[row]
            out[row] += expert(mine - mine.mean(0, keepdim=True))
        return out


class CountsExperts(Mixture):
    """What is added says how many experts have tokens."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        for i in (nn.functional.one_hot(chosen, EXPERTS).sum((0, 1)) > 0).nonzero():
            x = x + self.gate.weight[i]
        return x


class KeepsOnlyOnes(Mixture):
    """A size that depends on data, and no mask for it."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return x + x[: int((chosen == 0).sum())].sum(0)


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        (Centred, "look at each other"),
        (CountsExperts, "something else happens where there are none"),
        (KeepsOnlyOnes, "values of a tensor|value of a tensor"),
    ],
)
def test_what_needs_the_selection_is_refused(mixture: type[Mixture], said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        derive_generator(Model(mixture).eval(), 16)
