"""Peers that compile for minutes are compiled before a run, and timed in it from their caches.

    python -m benchmarks.prepare_peers FOLDER [--rows bert_b1,8b_decode] [--systems ...]
    python -m benchmarks.gpu --caches FOLDER
    python -m benchmarks.gpu_decode --caches FOLDER

The first command compiles each row's peers in a process of its own, as many processes at once as
`--jobs`, and keeps what `torch.compiler.save_cache_artifacts` gives in FOLDER (`peer_caches`). All
processors compile, but only one process at a time times a candidate kernel on the GPU, so that
Inductor's choices are not those of a crowded device. A peer that is not ready within `--limit`
seconds leaves a note that says so, and gets no time in the table.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._inductor.runtime.benchmarking import benchmarker

from benchmarks import gpu, gpu_decode, peer_caches
from benchmarks.bounded import OutOfTime, at_most
from benchmarks.measure import ROOT

SLOW = "inductor-max-autotune"  # compiles for minutes; the other modes share their kernels
_LOCK = "gpu.lock"


def prepare(folder: Path, row: str, systems: Sequence[str], limit: float) -> None:
    """Compiles a row's peers, one after the other, in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    _time_in_turns(folder / _LOCK)
    compile_one = gpu.ready(row) if row in gpu.WORKLOADS else gpu_decode.ready(row)
    for system in systems:
        start = time.perf_counter()
        try:
            with at_most(limit):
                compile_one(system)
        except OutOfTime:
            peer_caches.save_late(folder, row, system, limit)
            print(f"{row} {system}: not ready in {limit:g} s", flush=True)
            continue
        seconds, size = time.perf_counter() - start, peer_caches.save(folder, row, system)
        print(f"{row} {system}: {seconds:.0f} s, {size >> 10} kB", flush=True)


def prepare_all(
    folder: Path, rows: Sequence[str], systems: Sequence[str], limit: float, jobs: int
) -> list[str]:
    """A process for each row, at most `jobs` at once; each writes FOLDER/row.log. Returns the rows
    whose process failed."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting, failed = list(rows), []
    running: dict[str, subprocess.Popen[bytes]] = {}
    threads = max(4, 2 * (os.cpu_count() or 2) // max(min(jobs, len(rows)), 1))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    row = waiting.pop(0)
                    environment = {
                        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/{row}/inductor",
                        "TRITON_CACHE_DIR": f"{scratch}/{row}/triton",
                        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
                    }
                    running[row] = _process(folder, row, systems, limit, environment)
                time.sleep(0.2)
                for row, process in list(running.items()):
                    if process.poll() is not None:
                        del running[row]
                        failed += [row] if process.returncode else []
                        print(_outcome(folder, row, process.returncode), flush=True)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
    return failed


def _outcome(folder: Path, row: str, code: int) -> str:
    """What a process said of its systems, or how it ended."""
    log = folder / f"{row}.log"
    if code:
        return f"{row}: ended with {code}, see {log}"
    said = (line for line in log.read_text().splitlines() if line.startswith(f"{row} "))
    return "\n".join(said)


def _process(
    folder: Path, row: str, systems: Sequence[str], limit: float, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "benchmarks.prepare_peers", str(folder.resolve()),
        "--one", row, "--systems", ",".join(systems), "--limit", str(limit),
    ]  # fmt: skip
    with (folder / f"{row}.log").open("w") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=log
        )


def _time_in_turns(path: Path) -> None:
    """From here on Inductor holds a lock, common to all processes, while it times a candidate."""
    own: Any = type(benchmarker)
    alone = alone_with(path)
    for name in ("benchmark_gpu", "benchmark_gpu_with_cuda_graph"):
        if callable(getattr(own, name, None)):
            setattr(own, name, _within(alone, getattr(own, name)))


def _within(alone: Callable[[], Any], method: Callable[..., Any]) -> Callable[..., Any]:
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with alone():
            return method(self, *args, **kwargs)

    return timed


def alone_with(path: Path) -> Callable[[], Any]:
    """A lock between processes, as a block; a thread that has it may enter again."""
    file, own = path.open("w"), threading.RLock()
    depth = 0

    @contextmanager
    def block() -> Iterator[None]:
        nonlocal depth
        with own:
            if not depth:
                fcntl.flock(file, fcntl.LOCK_EX)
            depth += 1
            try:
                yield
            finally:
                depth -= 1
                if not depth:
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    fcntl.flock(file, fcntl.LOCK_UN)

    return block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default=",".join([*gpu_decode.ROWS, *gpu.WORKLOADS]))
    parser.add_argument("--systems", default=SLOW)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of each system")
    parser.add_argument("--jobs", type=int, default=8, help="processes at once")
    parser.add_argument("--one", default="", help="prepare this row, in this process")
    chosen = parser.parse_args()
    systems = chosen.systems.split(",")
    if chosen.one:
        prepare(chosen.folder, chosen.one, systems, chosen.limit)
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    start = time.perf_counter()
    failed = prepare_all(chosen.folder, chosen.rows.split(","), systems, chosen.limit, chosen.jobs)
    print(f"{time.perf_counter() - start:.0f} s", *(f"{row} failed" for row in failed))
    sys.exit(int(bool(failed)))


if __name__ == "__main__":
    main()
