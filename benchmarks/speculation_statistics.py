"""Whether speculation leaves the distribution of texts as it is, in figures.

    python -m benchmarks.speculation_statistics

Chi-square tests of what is drawn against the exact probabilities: a single checked token, whatever
was proposed, and whole texts of three tokens over four of a small model with attention, proposed by
prompt lookup or by another model. A p-value is how probable counts at least that far off are if the
distribution is right: small ones (under 0.01) would tell that it is not. For comparison, `planted`
accepts every proposal, which is wrong, and must be found out. Results go to
`benchmarks/results/speculation_statistics.json`.

Paper: Leviathan et al., 2023.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import accel
from accel.runtime.sampling import Sampling
from accel.runtime.speculation import _checked
from benchmarks.measure import THREADS, machine, store_results

TOKENS, NEW = 4, 3
TEXTS, SINGLE = 4000, 30000
_CHOICES = 7


def chi_square(found: Tensor, shares: Tensor) -> dict[str, float]:
    """The statistic of counts under probabilities, its degrees of freedom and its p-value (by
    Wilson and Hilferty's approximation). Raises ValueError for a count of what cannot come."""
    expected = shares.double() * found.sum()
    kept = expected > 0
    if int(found[~kept].sum()):
        raise ValueError("a text was drawn that has probability 0")
    degrees = int(kept.sum()) - 1
    statistic = float(((found - expected)[kept] ** 2 / expected[kept]).sum())
    spread = 2 / (9 * degrees)
    z = ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return {"statistic": statistic, "degrees": degrees, "p": 0.5 * math.erfc(z / math.sqrt(2))}


class Pairs(nn.Module):
    """Logits that depend on the last two tokens, through attention over the text."""

    def __init__(self, seed: int, tokens: int = TOKENS) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(tokens, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.out = nn.Linear(16, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part(x)[:, None] * 1.5 for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits: Tensor = self.out(mixed[:, 0] * 2 + x)
        return logits


def exact_shares(model: nn.Module, prompt: Tensor, sampling: Sampling, length: int) -> Tensor:
    """Probabilities of all continuations, in the order of their digits."""
    texts, shares = prompt, torch.ones(1)
    for _ in range(length):
        with torch.no_grad():
            logits = model(texts)[:, -1]
        step = sampling.scores(logits, texts).softmax(-1)
        shares = (shares[:, None] * step).reshape(-1)
        count, tokens = step.shape
        last = torch.arange(tokens).repeat(count)[:, None]
        texts = torch.cat([texts.repeat_interleave(tokens, 0), last], dim=1)
    return shares


def single_tokens(way: str) -> dict[str, Any]:
    """One checked token, drawn many times. `way`: proposals are "drawn" from another distribution,
    "certain" (one token always, as prompt lookup proposes), or "planted": drawn, and kept."""
    chance = torch.Generator().manual_seed(4)
    scores = torch.randn(1, _CHOICES, generator=chance)
    share = torch.randn(_CHOICES, generator=chance).mul(2).softmax(-1)
    sampling = Sampling(do_sample=True)
    found = torch.zeros(_CHOICES)
    accepted = 0
    for _ in range(SINGLE):
        certain = way == "certain"
        proposed = 3 if certain else int(torch.multinomial(share, 1, generator=chance))
        token = proposed
        if way != "planted":
            token = _checked(scores, proposed, None if certain else share, sampling, chance)
        found[token] += 1
        accepted += token == proposed
    tested = chi_square(found, scores.softmax(-1)[0])
    return {"draws": SINGLE, "outcomes": _CHOICES, "accepted": accepted, **tested}


def whole_texts(way: str) -> dict[str, Any]:
    """Texts of NEW tokens, TEXTS of fixed seeds, with "lookup", a "draft" model, or "none"."""
    model = Pairs(1).eval()
    fast = accel.compile_generator(model, capacity=12, extend=4)
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 3}
    extra: dict[str, Any] = {"prompt_lookup_num_tokens": 3} if way == "lookup" else {}
    if way == "draft":
        draft = accel.compile_generator(Pairs(2).eval(), capacity=12)
        extra = {"assistant_model": draft, "num_assistant_tokens": 3}
    prompt = torch.tensor([[0, 1, 2, 0, 1]])
    shares = exact_shares(model, prompt, Sampling(**options), NEW)
    found, accepted, proposed = torch.zeros(TOKENS**NEW), 0, 0
    for seed in range(TEXTS):
        made = fast.generate(
            prompt, max_new_tokens=NEW, seed=seed, return_dict_in_generate=True, **options, **extra
        )
        place = 0
        for token in made.sequences[0, prompt.shape[1] :].tolist():
            place = place * TOKENS + token
        found[place] += 1
        accepted += made.statistics.get("accepted", 0)
        proposed += made.statistics.get("proposed", 0)
    tested = chi_square(found, shares)
    outcomes = int((shares > 0).sum())
    return {
        "draws": TEXTS,
        "outcomes": outcomes,
        "accepted": accepted,
        "proposed": proposed,
        **tested,
    }


ROWS = {
    "one token, proposals drawn": (single_tokens, "drawn"),
    "one token, one proposal always": (single_tokens, "certain"),
    "one token, every proposal kept (planted)": (single_tokens, "planted"),
    "whole texts, no speculation": (whole_texts, "none"),
    "whole texts, prompt lookup": (whole_texts, "lookup"),
    "whole texts, draft model": (whole_texts, "draft"),
}


def main() -> None:
    torch.set_num_threads(THREADS)
    logging.disable(logging.WARNING)
    table = Table("draws of", title="Speculation: what is drawn against the exact distribution")
    for name in ("draws", "outcomes", "accepted", "chi-square", "degrees", "p"):
        table.add_column(name, justify="right")
    rows = {}
    for label, (measure, way) in ROWS.items():
        row = rows[label] = measure(way)
        counts = [str(row[n]) for n in ("draws", "outcomes", "accepted")]
        figures = [f"{row['statistic']:.1f}", str(row["degrees"]), f"{row['p']:.3g}"]
        table.add_row(label, *counts, *figures)
    store_results("speculation_statistics", {"machine": machine(), "rows": rows})
    Console().print(table)


if __name__ == "__main__":
    main()
