"""Compile time against depth: transformers of 8, 16, 32 and 64 equal layers.

    python -m benchmarks.compile_time
    python -m benchmarks.compile_time --layers 8,64 --inductor

Each depth compiles in a clean process with an empty cache, and a second time in another process
from the cache. Imports and one-time set-up are paid by compiling a small model first, and are
reported on their own (`setup_seconds`). Figures go to benchmarks/results/compile_time.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import accel
from benchmarks.cpu import clean_environment, set_up
from benchmarks.measure import (
    THREADS,
    load_results,
    machine,
    run_worker,
    store_results,
)
from benchmarks.systems import SYSTEMS

WIDTH, HEADS, LENGTH = 256, 4, 64


class Layer(nn.Module):
    """A pre-norm transformer layer with causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def build(layers: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """x [1, 64, 256] -> [1, 64, 256] through `layers` layers of random weights."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(layers)), nn.LayerNorm(WIDTH))
    return model.eval(), (torch.randn(1, LENGTH, WIDTH),)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="compile time against depth")
    parser.add_argument("--layers", default="8,16,32,64")
    parser.add_argument("--repeats", type=int, default=3, help="cold compiles; the median counts")
    parser.add_argument("--inductor", action="store_true", help="measure Inductor as well")
    parser.add_argument("--worker", choices=("accel", "inductor"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    depths = [int(n) for n in options.layers.split(",")]
    if options.worker:
        measure = measure_accel if options.worker == "accel" else measure_inductor
        print(json.dumps(measure(depths[0])))
        return
    data = load_results("compile_time") or {"rows": {}}
    data["machine"] = machine()
    for depth in depths:
        row = measure_depth(depth, options.repeats, options.inductor)
        data["rows"][str(depth)] = row
        store_results("compile_time", data)
        print(f"{depth} layers: {row['compile_seconds']:.2f} s", file=sys.stderr, flush=True)


def measure_depth(depth: int, repeats: int, with_inductor: bool) -> dict[str, Any]:
    """Median of several cold compiles, the second compile, and Inductor's if asked for."""

    def worker(system: str, cache: str) -> dict[str, Any]:
        arguments = ("--worker", system, "--layers", str(depth))
        return run_worker(
            "benchmarks.compile_time", *arguments, environment=clean_environment(cache)
        )

    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            runs.append(worker("accel", cache))
            cached = worker("accel", cache)
    runs.sort(key=lambda r: r["compile_seconds"])
    row = runs[len(runs) // 2]
    row["spread_seconds"] = [r["compile_seconds"] for r in runs]
    row["cached_compile_seconds"] = cached["compile_seconds"]
    if with_inductor:
        with tempfile.TemporaryDirectory() as cache:
            peer = worker("inductor", cache)
        row["inductor_compile_seconds"] = peer["compile_seconds"]
        row["inductor_setup_seconds"] = peer["setup_seconds"]
    return row


def measure_accel(depth: int) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    model, inputs = build(depth)
    setup = set_up("accel")
    start = time.perf_counter()
    compiled = accel.compile(model, inputs=inputs)
    with torch.no_grad():
        got = compiled(*inputs)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        torch.testing.assert_close(got, model(*inputs), rtol=1e-4, atol=1e-4)
    program = compiled.program
    return {
        "compile_seconds": seconds,
        "setup_seconds": setup,
        "ops": program.ledger.rows[0].ops_before,
        "verify_seconds": program.ledger.verify_seconds,
        "phase_seconds": program.seconds,
        "kernels": compiled.report()["kernels"],
    }


def measure_inductor(depth: int) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    model, inputs = build(depth)
    setup = set_up("inductor")
    start = time.perf_counter()
    SYSTEMS["inductor"](model, inputs)
    return {"compile_seconds": time.perf_counter() - start, "setup_seconds": setup}


if __name__ == "__main__":
    main()
