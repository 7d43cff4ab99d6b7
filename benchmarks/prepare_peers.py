"""Peers that compile for minutes are compiled before a run, and timed in it from their caches.

    python -m benchmarks.prepare_peers FOLDER [--rows bert_b1,8b_decode] [--systems ...]
    python -m benchmarks.gpu --caches FOLDER
    python -m benchmarks.gpu_decode --caches FOLDER

The first command compiles each row's peers in a process of its own, as many processes at once as
`--jobs`, and keeps what `torch.compiler.save_cache_artifacts` gives in FOLDER (`peer_caches`). All
processors compile, but only one process at a time times a candidate kernel on the GPU, so that
Inductor's choices are not those of a crowded device. A peer that is not ready within `--limit`
seconds, or when the command is told to end (SIGTERM), leaves a note that says so, and gets no time
in the table.

The processes are new ones, not forks: importing transformers asks for the accelerator, after which
a fork cannot use the GPU.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.runtime.benchmarking import benchmarker

from benchmarks import gpu, gpu_decode, peer_caches
from benchmarks.bounded import OutOfTime, at_most

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
    folder: Path,
    rows: Sequence[str],
    systems: Sequence[str],
    limit: float,
    jobs: int,
) -> list[str]:
    """A process for each row, at most `jobs` at once; each writes FOLDER/row.log. Returns the rows
    whose process failed. Where it is ended early, what is missing is noted as late."""
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    waiting, failed = list(rows), []
    running: dict[str, BaseProcess] = {}
    threads = max(4, 2 * (os.cpu_count() or 2) // max(min(jobs, len(rows)), 1))
    processes: Any = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    row = waiting.pop(0)
                    own = {
                        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/{row}/inductor",
                        "TRITON_CACHE_DIR": f"{scratch}/{row}/triton",
                    }
                    arguments = (folder, row, systems, limit, threads, own)
                    running[row] = processes.Process(target=_in_child, args=arguments)
                    running[row].start()
                time.sleep(0.2)
                for row, process in list(running.items()):
                    if process.exitcode is not None:
                        del running[row]
                        failed += [row] if process.exitcode else []
                        print(_outcome(folder, row, process.exitcode), flush=True)
        finally:
            for process in running.values():
                process.kill()
                process.join()
            for row in [*running, *waiting]:
                for system in systems:
                    peer_caches.save_late(folder, row, system, time.perf_counter() - began)
    return failed


def _in_child(
    folder: Path,
    row: str,
    systems: Sequence[str],
    limit: float,
    threads: int,
    own: Mapping[str, str],
) -> None:
    """`prepare` in a process, which ends with exit code 1 where that fails."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with (folder / f"{row}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(own)
    inductor_config.compile_threads = threads
    code = 1
    try:
        prepare(folder, row, systems, limit)
        code = 0
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for Inductor's processes, which end by themselves


def _outcome(folder: Path, row: str, code: int) -> str:
    """What a process said of its systems, or how it ended."""
    log = folder / f"{row}.log"
    if code:
        return f"{row}: ended with {code}, see {log}"
    said = (line for line in log.read_text().splitlines() if line.startswith(f"{row} "))
    return "\n".join(said)


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
    chosen = parser.parse_args()
    systems = chosen.systems.split(",")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    start = time.perf_counter()
    rows, limit, jobs = chosen.rows.split(","), chosen.limit, chosen.jobs
    failed = prepare_all(chosen.folder, rows, systems, limit, jobs)
    print(f"{time.perf_counter() - start:.0f} s", *(f"{row} failed" for row in failed))
    sys.exit(int(bool(failed)))


if __name__ == "__main__":
    main()
