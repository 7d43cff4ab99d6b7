"""Greedy tokens of accel's generator against `transformers.generate`, model by model.

    python -m benchmarks.generation_equality
    python -m benchmarks.generation_equality --model smollm2 --model mamba

128 new tokens, float32, on the CPU. Small models are random, made from a configuration, with larger
weights than usual, so that their texts vary; every one is given as a plain forward without a
cache. Where texts differ, the row has the first place, and how far apart the two best logits of
the plain forward in float64 are there: equal ones are a tie, and neither text is wrong.
`transformers` runs with its own cache or state. Results go to
`benchmarks/results/generation_equality.json`.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import accel
from accel.compiler.capture_text import plain_forward
from accel.frontends.checkpoints import load_checkpoint, load_tokenizer
from benchmarks.language_models import CHECKPOINTS, PROMPT, checkpoint, tiny_model, tiny_names
from benchmarks.measure import THREADS, load_results, machine, store_results

NEW = 128
PROMPT_TOKENS = 16
CAPACITY = 160


def measure(name: str) -> dict[str, Any]:
    """One row."""
    if name in CHECKPOINTS:
        path = checkpoint(name)
        model: Any = load_checkpoint(path).model
        ids = load_tokenizer(path)(PROMPT, return_tensors="pt").input_ids
    else:
        model = tiny_model(name)
        ids = torch.randint(3, 120, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.generate(
            ids,
            max_new_tokens=NEW,
            do_sample=False,
            num_beams=1,  # greedy, whatever the configuration says
            eos_token_id=None,
            pad_token_id=0,
            attention_mask=torch.ones_like(ids),
            use_cache=True,
        )
    start = time.perf_counter()
    fast = accel.compile_generator(model, capacity=CAPACITY)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    made = fast.generate(ids, max_new_tokens=NEW)
    spent = time.perf_counter() - start
    new = expected[0, -NEW:].tolist()
    row: dict[str, Any] = {
        "equal": torch.equal(made, expected),
        "tokens": NEW,
        "different_tokens": len(set(new)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "compile_seconds": seconds,
        "seconds": spent,
        "state": sorted({item["kind"] for item in _state(fast)}),
    }
    if not row["equal"]:
        row |= _difference(model, ids, expected, made)
    return row


def _state(fast: Any) -> list[dict[str, Any]]:
    plan = fast.entry_points["prefill"].function.plan
    items: list[dict[str, Any]] = plan.metadata["kv_cache"]["state"]
    return items


def _difference(model: Any, ids: Tensor, expected: Tensor, made: Tensor) -> dict[str, Any]:
    """Where two texts part, and the two best logits there."""
    first = int((expected[0] != made[0]).nonzero()[0])
    plain = plain_forward(model.double())
    text = expected[:, :first]
    source = (ids, text) if model.config.is_encoder_decoder else (text,)
    with torch.no_grad():
        best = plain(*source)[0, -1].topk(2).values
    model.float()
    return {
        "first_difference": first - (expected.shape[1] - NEW),
        "gap": float(best[0] - best[1]),
        "logit": float(best[0]),
    }


def table_of(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table("model", title=f"Greedy text of {NEW} tokens beside transformers.generate")
    for name in ("tokens", "state", "different tokens", "first difference", "gap", "compile s"):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            "equal" if row["equal"] else "differ",
            ", ".join(row["state"]),
            str(row["different_tokens"]),
            str(row.get("first_difference", "")),
            f"{row['gap']:.1e}" if "gap" in row else "",
            f"{row['compile_seconds']:.1f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    names = [*CHECKPOINTS, *tiny_names()]
    parser = argparse.ArgumentParser(description="Greedy tokens beside transformers.generate.")
    parser.add_argument("--model", action="append", choices=names, help="repeatable")
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    logging.disable(logging.WARNING)
    rows: dict[str, dict[str, Any]] = load_results("generation_equality").get("rows", {})
    console = Console()
    for name in given.model or names:
        rows[name] = measure(name)
        console.print(name, "equal" if rows[name]["equal"] else rows[name])
        ordered = {n: rows[n] for n in names if n in rows}
        store_results("generation_equality", {"machine": machine(), "rows": ordered})
    console.print(table_of({n: rows[n] for n in names if n in rows}))


if __name__ == "__main__":
    main()
