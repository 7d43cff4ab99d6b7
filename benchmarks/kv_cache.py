"""Bytes and perplexity of SmolLM2-135M with each kind of key/value cache.

    python -m benchmarks.kv_cache --windows 8
    python -m benchmarks.kv_cache --windows 2 --method int8

What attention reads is encoded and decoded on whole texts, which gives every token the logits that
decoding it from such a cache gives: `insert_kv_cache` keeps exactly what decoding reads, and its
contract is checked. Perplexity is on CPython's own `pydoc_data.topics`, in windows of 1024 tokens.
Results go to `benchmarks/results/kv_cache.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from accel.frontends.checkpoints import find_checkpoint, load_checkpoint
from accel.frontends.export import capture
from accel.ir import Module, Value
from accel.passes.base import Context
from accel.passes.manager import run_pipeline
from accel.passes.narrow import stored
from accel.passes.pipelines import CLEAN_PIPELINE
from benchmarks.compression import MODEL, WINDOW, perplexity, windows
from benchmarks.measure import THREADS, load_results, machine, store_results

METHODS: dict[str, str] = {
    "float32": "",
    "int8": "quantize_cache",
    "int8, not rotated": "quantize_cache{rotate=false}",
    "fp8": "quantize_cache{format=fp8}",
    "fp8, not rotated": "quantize_cache{format=fp8,rotate=false}",
    "int4-g32": "quantize_cache{format=int4,group=32}",
    "int4-g32, not rotated": "quantize_cache{format=int4,group=32,rotate=false}",
    "int4-g16": "quantize_cache{format=int4,group=16}",
}


def token_bytes(module: Module) -> int:
    """Bytes that the cache keeps of one token."""
    kept: dict[Value, None] = {}
    for op in module.main.ops:
        if op.name == "attention":
            kept |= dict.fromkeys((*stored(op.operands[1]), *stored(op.operands[2])))
    return sum(int(value.type.nbytes()) // int(value.shape[2]) for value in kept)


def measure(base: Module, method: str, tokens: Sequence[torch.Tensor]) -> dict[str, Any]:
    """One row: a copy of `base` with its keys and values encoded."""
    module = base.clone()
    context = Context(calibration=[[tokens[0]]])
    row = None
    if METHODS[method]:
        row = run_pipeline(module, METHODS[method], context).rows[0]
    return {
        "pipeline": METHODS[method],
        "bytes": token_bytes(module),
        "error": row.error if row is not None else 0.0,
        "promise": row.contract if row is not None else "exact",
        "perplexity": perplexity(module, tokens),
    }


def table_of(rows: dict[str, dict[str, Any]], count: int) -> Table:
    title = f"SmolLM2-135M, {count} windows of {WINDOW} tokens"
    table = Table("cache", "pipeline", title=title)
    for name in (
        "bytes a token",
        "of float32",
        "of 16 bits",
        "logits' error",
        "perplexity",
        "change",
    ):
        table.add_column(name, justify="right")
    full = rows["float32"]
    for name, row in rows.items():
        share = row["bytes"] / full["bytes"]
        change = row["perplexity"] / full["perplexity"] - 1
        table.add_row(
            name,
            row["pipeline"],
            str(row["bytes"]),
            f"{share:.3f}",
            f"{share * 2:.3f}",
            f"{row['error']:.1e}",
            f"{row['perplexity']:.3f}",
            f"{change:+.2%}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bytes and perplexity of caches.")
    parser.add_argument("--windows", type=int, default=8, help="windows of 1024 tokens")
    parser.add_argument("--method", action="append", choices=sorted(METHODS), help="repeatable")
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    tokens = windows(given.windows)
    model = load_checkpoint(find_checkpoint(MODEL))
    base = capture(model, (tokens[0],))
    run_pipeline(base, list(CLEAN_PIPELINE))
    before = load_results("kv_cache")
    rows = before.get("rows", {}) if before.get("windows") == given.windows else {}
    wanted = given.method or list(METHODS)
    # Every row is compared with the first.
    for name in wanted if "float32" in rows else dict.fromkeys(["float32", *wanted]):
        rows[name] = measure(base, name, tokens)
        ordered = {n: rows[n] for n in METHODS if n in rows}
        result = {"machine": machine(), "windows": given.windows, "window": WINDOW}
        store_results("kv_cache", {**result, "rows": ordered})
    Console().print(table_of({n: rows[n] for n in METHODS if n in rows}, given.windows))


if __name__ == "__main__":
    main()
