"""Conversion of multi-head to grouped-query attention, and what healing recovers.

    python -m benchmarks.gqa                    # trains first, for about a minute
    python -m benchmarks.gqa --train-steps 500 --heal-steps 40

A small model over bytes with 8 key/value heads is trained on CPython's own `pydoc_data.topics`,
converted to fewer heads (`convert_gqa`) by averaging neighbours and by the better of that and
clusters, and healed by distillation from the original (`accel.passes.heal`). Perplexity a byte is
on text that no training saw. Results go to `benchmarks/results/gqa.json`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pydoc_data import topics
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from accel.frontends.export import capture
from accel.ir import Module, interpret
from accel.passes.base import Context
from accel.passes.heal import heal
from accel.passes.manager import run_pipeline
from accel.passes.pipelines import CLEAN_PIPELINE
from benchmarks.measure import THREADS, machine, store_results

HEADS = 8
WIDTH = 64
LAYERS = 2
TOKENS = 64
ROWS = 8
HELD_OUT = 8
METHODS = ("mean", "best")


class Block(nn.Module):
    """Attention with learned positions before it, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.middle = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        made: Tensor = x + self.down(F.gelu(self.up(self.middle(x))))
        return made


class Bytes(nn.Module):
    """ids [B, S] of bytes -> logits [B, S, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(256, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.after, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.places.weight[: ids.shape[1]]
        made: Tensor = self.head(self.after(self.blocks(x)))
        return made


def text() -> Tensor:
    joined = "\n\n".join(topics.topics[key] for key in sorted(topics.topics))
    return torch.tensor(list(joined.encode()))


def batch(data: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(data) - TOKENS, (ROWS,), generator=generator)
    return torch.stack([data[s : s + TOKENS] for s in starts])


def train(model: nn.Module, data: Tensor, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        ids = batch(data, generator)
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def perplexity(module: Module, held_out: Sequence[Tensor]) -> float:
    total = [
        float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        for ids in held_out
        for logits in interpret(module.main, [ids], module.weights)
    ]
    return math.exp(sum(total) / len(total))


def measure(base: Module, heads: int, method: str, data: Tensor, steps: int) -> dict[str, Any]:
    """One row: a copy of `base` with fewer heads, before and after healing."""
    held_out = _held_out(data)
    module = base.clone()
    context = Context(calibration=[[batch(data[: -len(data) // HELD_OUT], _chance(1))]])
    passes = f"convert_gqa{{heads={heads},method={method},bound=10.0}}"
    row = run_pipeline(module, passes, context).rows[0]
    run_pipeline(module, list(CLEAN_PIPELINE))
    before = perplexity(module, held_out)
    chance = _chance(2)
    seen = data[: -len(data) // HELD_OUT]
    start = time.perf_counter()
    losses = heal(module, base, ([batch(seen, chance)] for _ in range(steps)), learning_rate=1e-3)
    used = [entry["method"] for entry in row.notes["attention"]]
    return {
        "pipeline": passes,
        "heads": heads,
        "method": method,
        "clustered": used.count("cluster"),
        "attentions": len(used),
        "cache_share": heads / HEADS,
        "error": row.error,
        "perplexity": before,
        "healed_perplexity": perplexity(module, held_out),
        "divergence": [losses[0], losses[-1]],
        "heal_seconds": time.perf_counter() - start,
    }


def _chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _held_out(data: Tensor) -> list[Tensor]:
    rest = data[-len(data) // HELD_OUT :]
    return [batch(rest, _chance(seed)) for seed in range(100, 110)]


def table_of(result: dict[str, Any]) -> Table:
    title = f"MHA of {HEADS} heads: perplexity a byte {result['perplexity']:.3f}"
    table = Table("heads", title=title)
    for name in ("method", "KV bytes", "logits' error", "perplexity", "healed"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["heads"]),
            f"{row['method']} ({row['clustered']} of {row['attentions']} clustered)",
            f"1/{round(1 / row['cache_share'])}",
            f"{row['error']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['healed_perplexity']:.3f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fewer key/value heads, before and after healing.")
    parser.add_argument("--train-steps", type=int, default=2000)
    parser.add_argument("--heal-steps", type=int, default=100)
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    data = text()
    model = Bytes()
    train(model, data[: -len(data) // HELD_OUT], given.train_steps)
    base = capture(model.eval(), (batch(data, _chance(0)),))
    run_pipeline(base, list(CLEAN_PIPELINE))
    result: dict[str, Any] = {
        "machine": machine(),
        "train_steps": given.train_steps,
        "heal_steps": given.heal_steps,
        "full_heads": HEADS,
        "perplexity": perplexity(base, _held_out(data)),
        "rows": [],
    }
    for heads in (4, 2, 1):
        for method in METHODS:
            if heads > 1 or method == "mean":  # one group is one group
                result["rows"].append(measure(base, heads, method, data, given.heal_steps))
                store_results("gqa", result)
    Console().print(table_of(result))


if __name__ == "__main__":
    main()
