"""accel beside eager PyTorch, Inductor and ONNX Runtime on the CPU.

    python -m benchmarks.cpu                        # everything; about 15 minutes on two cores
    python -m benchmarks.cpu --only bert-base       # one row; the others keep their figures
    python -m benchmarks.cpu --systems eager,accel  # fewer systems
    python -m benchmarks.cpu --resume               # only rows that have no figures yet

Each row is one process in which every system compiles with an empty cache, is checked against eager
PyTorch in float64, and is timed in turns with the others; a second process then compiles again
from the cache. Imports and one-time set-up are paid by compiling a small model first, and are
reported on their own (`setup_seconds`). Figures go to benchmarks/results/cpu.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from accel.cli.timing import interleaved_medians, relative_error
from benchmarks.measure import (
    THREADS,
    load_results,
    machine,
    run_worker,
    store_results,
)
from benchmarks.models import CASES, Case
from benchmarks.systems import SYSTEMS, Call, reference

# Systems that keep compiled code between processes.
CACHED = ("inductor", "inductor-freezing", "accel")
DEFAULT = ("eager", "inductor", "onnxruntime", "accel")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="accel beside its peers on the CPU")
    parser.add_argument("--only", help="comma separated rows: " + ", ".join(CASES))
    parser.add_argument("--systems", default=",".join(DEFAULT), help=", ".join(SYSTEMS))
    parser.add_argument("--resume", action="store_true", help="skip rows that have figures")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each system in each round")
    parser.add_argument("--worker", choices=("row", "cached"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker == "row":
        systems = options.systems.split(",")
        print(
            json.dumps(measure_row(CASES[options.only], systems, options.rounds, options.seconds))
        )
    elif options.worker == "cached":
        print(json.dumps(measure_cached(CASES[options.only], options.systems)))
    else:
        run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """Runs the rows one after the other, and stores after each."""
    names = options.only.split(",") if options.only else list(CASES)
    for name in names:
        if name not in CASES:
            sys.exit(f"no row named '{name}'; there are {', '.join(CASES)}")
    data = load_results("cpu") or {"rows": {}}
    data["machine"] = machine()
    for name in names:
        if options.resume and name in data["rows"]:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as cache:
            environment = clean_environment(cache)
            numbers = ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
            row = run_worker(
                "benchmarks.cpu", "--worker", "row", "--only", name, "--systems", options.systems,
                *numbers, environment=environment,
            )  # fmt: skip
            for system in set(CACHED) & set(options.systems.split(",")):
                again = run_worker(
                    "benchmarks.cpu", "--worker", "cached", "--only", name, "--systems", system,
                    environment=environment,
                )  # fmt: skip
                row["systems"][system].update(again)
        rows = {**data["rows"], name: row}
        data["rows"] = {n: rows[n] for n in CASES if n in rows}
        store_results("cpu", data)
        print(summary(row), file=sys.stderr, flush=True)


def clean_environment(cache: str) -> dict[str, str]:
    """This process's environment with empty caches and a fixed number of threads."""
    return {
        **os.environ,
        "ACCEL_CACHE_DIR": f"{cache}/accel",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "OMP_NUM_THREADS": str(THREADS),
        "TVM_NUM_THREADS": str(THREADS),
        "TRANSFORMERS_VERBOSITY": "error",
    }


def measure_row(case: Case, systems: Sequence[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Compiles, checks and times every system on one model. Raises if a result is wrong."""
    torch.set_num_threads(THREADS)
    model, inputs = case.build()
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for name in systems:
        setup = set_up(name)
        start = time.perf_counter()
        calls[name] = SYSTEMS[name](model, inputs)
        results[name] = {"compile_seconds": time.perf_counter() - start, "setup_seconds": setup}
        if name == "eager":
            results[name] = {}
    wanted, allowed = reference(model, inputs)
    for name, call in calls.items():
        error = relative_error(call(), wanted)
        if not error <= allowed:
            raise AssertionError(f"{name} is wrong on {case.name}: {error:.3g} > {allowed:.3g}")
        results[name]["error"] = error
    medians = interleaved_medians(calls, rounds=rounds, seconds=seconds)
    for name, median in medians.items():
        results[name]["seconds"] = median
    return {"title": case.title, "allowed_error": allowed, "systems": results}


def measure_cached(case: Case, system: str) -> dict[str, Any]:
    """Compile seconds in a process that finds the last one's cache."""
    torch.set_num_threads(THREADS)
    model, inputs = case.build()
    set_up(system)
    start = time.perf_counter()
    SYSTEMS[system](model, inputs)
    return {"cached_compile_seconds": time.perf_counter() - start}


def set_up(system: str) -> float:
    """Compiles a small model, so that imports and one-time set-up are not counted later.

    It has a norm, for which every compiler generates code. What imports leave to Python's garbage
    collector is collected here too, not in the middle of what is timed.
    """
    start = time.perf_counter()
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()).eval()
    SYSTEMS[system](model, (torch.randn(2, 8),))()
    seconds = time.perf_counter() - start
    gc.collect()
    return seconds


def summary(row: dict[str, Any]) -> str:
    parts = []
    for name, figures in row["systems"].items():
        compiled = figures.get("compile_seconds")
        extra = "" if compiled is None else f", compile {compiled:.1f} s"
        parts.append(f"  {name}: {figures['seconds'] * 1e3:.2f} ms{extra}")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
