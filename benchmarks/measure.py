"""Timing, machine facts and result files: what every benchmark shares."""

from __future__ import annotations

import json
import platform
import resource
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
PACKAGES = ("torch", "apache-tvm", "onnxruntime", "transformers")


def interleaved_medians(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 7, seconds: float = 0.5
) -> dict[str, float]:
    """Median seconds of each call, timed in turns so that drift of the machine hits all alike.

    In a round each system runs for at least `seconds` (or 3 calls); its first call, which finds
    another system's data in the cache, is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            until = time.perf_counter() + seconds
            done = 0
            while done < 3 or time.perf_counter() < until:
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
                done += 1
    return {name: statistics.median(t) for name, t in times.items()}


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)


def relative_error(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """max |got - wanted| / max |wanted| over all results, in float64; inf if shapes differ."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return float("inf")
    worst = 0.0
    for g, w in zip(got, wanted):
        scale = float(w.double().abs().max()) or 1.0
        worst = max(worst, float((g.double() - w.double()).abs().max()) / scale)
    return worst


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


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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


def store_results(name: str, data: Mapping[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    return path
