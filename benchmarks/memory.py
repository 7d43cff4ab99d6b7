"""Load time and memory of an artifact in a fresh process that never imports the compiler.

    python -m benchmarks.memory                   # compiles smollm2.accel into a temporary folder
    python -m benchmarks.memory --artifact smollm2.accel

Figures go to benchmarks/results/memory.json. The bound that they are read against is the bytes of
the weights, plus the planned arena, plus 150 MB, beyond what `import torch` takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.export import Dim

import accel
from benchmarks.cpu import clean_environment
from benchmarks.measure import machine, run_worker, store_results
from benchmarks.models import smollm2

LENGTH = 256
REPEATS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="load time and peak memory of an artifact")
    parser.add_argument("--artifact", type=Path, help="default: SmolLM2, compiled now")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = options.artifact
        if path is None:
            path = package_smollm2(Path(folder) / "smollm2.accel")
        row = measure(path)
    store_results("memory", {"machine": machine(), "rows": {path.stem: row}})
    print(json.dumps(row, indent=2), file=sys.stderr)


def package_smollm2(path: Path) -> Path:
    """SmolLM2 for any length up to 1024 tokens."""
    model, inputs = smollm2(LENGTH)
    length = Dim("length", min=2, max=1024)
    accel.package(model, inputs, path=path, dynamic_shapes={"input_ids": {1: length}})
    return path


def measure(path: Path) -> dict[str, Any]:
    """Medians over several fresh processes; the first warms the file cache and is not counted."""
    runs = []
    with tempfile.TemporaryDirectory() as cache:
        # The user's key must be known: the artifact's host code is signed with it.
        environment = clean_environment(cache)
        environment.pop("ACCEL_CACHE_DIR")
        for _ in range(REPEATS + 1):
            runs.append(
                run_worker(
                    "benchmarks.load_worker", str(path), str(LENGTH), environment=environment
                )
            )
    runs = runs[1:]
    medians = {
        key: statistics.median(r[key] for r in runs)
        for key in runs[0]
        if key.endswith(("seconds", "bytes"))
    }
    return {**medians, "file_bytes": path.stat().st_size, "tokens": LENGTH}


if __name__ == "__main__":
    main()
