"""Timing, machine facts and result files: what every benchmark shares."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
THREADS = 2
TITLES = {
    "eager": "eager",
    "inductor": "Inductor",
    "inductor-freezing": "Inductor, frozen",
    "onnxruntime": "ONNX Runtime",
    "accel": "accel",
}
PACKAGES = ("torch", "apache-tvm", "onnxruntime", "transformers")


def time_calls(call: Callable[[], object], seconds: float = 0.6) -> float:
    """Median milliseconds of a call on the current GPU, between events on its stream.

    Short calls are timed many at a time, so that what the host does between two is part of it;
    rounds go on for about so many seconds.
    """
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    one = max((time.perf_counter() - start) / 3, 1e-6)
    calls = max(1, min(20, int(0.02 / one)))
    times = []
    for _ in range(max(9, min(50, int(seconds / (one * calls))))):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            call()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / calls)
    return statistics.median(times)


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)


def machine() -> dict[str, Any]:
    """What the figures hold for: processor, threads, versions."""
    return {
        "processor": processor_name(),
        "threads": THREADS,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def run_worker(module: str, *arguments: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs `python -m module arguments` in a clean process; the last line it prints is JSON.

    Raises RuntimeError with the end of its output if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=dict(environment),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{tail}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def load_results(name: str) -> dict[str, Any]:
    """The stored results of a benchmark; empty if it has not run."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return {}
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def merged(
    path: Path, facts: Mapping[str, Any], fresh: list[dict[str, Any]], order: Sequence[str]
) -> list[dict[str, Any]]:
    """The new rows, and those of other workloads that a file has from an equal machine."""
    if not path.is_file():
        return fresh
    before = json.loads(path.read_text())
    alike = before["machine"].get("gpu") == facts["gpu"] and (
        before["machine"]["packages"]["torch"] == facts["packages"]["torch"]
    )
    names = {r["workload"] for r in fresh}
    kept = [r for r in before["rows"] if r["workload"] not in names] if alike else []
    return sorted([*kept, *fresh], key=lambda r: order.index(r["workload"]))


def store_results(name: str, data: Mapping[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(data, indent=2) + "\n")
    return path
