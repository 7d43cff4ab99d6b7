"""Loads an artifact of a language model, runs it once, and prints what that took, as JSON.

Run by `benchmarks.memory` in a fresh process. Figures are beyond `import torch`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import accel
from accel.runtime.model import CompiledModel


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS (now) or VmHWM (the most so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the system does not report {field}")


def arena_bytes(program: CompiledModel, length: int) -> int:
    """The planned arena of the main entry point for texts of this length."""
    function = next(iter(program.entry_points.values())).function
    sizes = dict.fromkeys(function.plan.symbols, length)
    return function.arena_bytes(sizes)[0]


def main() -> None:
    path, length = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(2)
    base = resident_bytes("VmRSS")
    start = time.perf_counter()
    program = accel.load(path)
    load_seconds = time.perf_counter() - start
    loaded = resident_bytes("VmHWM") - base
    ids = torch.arange(length).unsqueeze(0) % 1000
    start = time.perf_counter()
    program(ids)
    first_call_seconds = time.perf_counter() - start
    peak = resident_bytes("VmHWM") - base
    compiler = ("accel.ir", "accel.passes", "accel.frontends", "accel.backends", "accel.compiler")
    imported = [m for m in sys.modules if m.startswith(compiler)]
    if imported:
        raise AssertionError(f"loading imported the compiler: {imported}")
    print(
        json.dumps(
            {
                "load_seconds": load_seconds,
                "first_call_seconds": first_call_seconds,
                "after_import_torch_bytes": base,
                "after_load_bytes": loaded,
                "peak_bytes": peak,
                "weight_bytes": program.report()["weight_bytes"],
                "arena_bytes": arena_bytes(program, length),
            }
        )
    )


if __name__ == "__main__":
    main()
