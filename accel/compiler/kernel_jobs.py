"""Kernels compiled by several processes at once, into the compile cache.

    with Workers(8) as workers:
        workers.compile([Job.of(op, backend, tile), ...])

Triton compiles one kernel in 0.2 to 2 s on one core. A worker is a Python process of its own that
reads jobs as JSON lines (a kernel's IR text, the architecture, a tile by how it prints) and answers
each with a line; what it compiles it leaves in the cache, where the compiler looks first anyway. So
nothing but text passes between the processes, and one that dies costs the job that it was at.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accel.backends.triton import TritonBackend, kernel_fingerprint
from accel.compiler import gpu
from accel.compiler.cache import CompileCache
from accel.errors import AccelError, BackendError
from accel.ir.builder import Builder
from accel.ir.module import Function, Module, Op, SymbolInfo, clone_op
from accel.ir.parser import parse_module
from accel.ir.printer import print_module

_ROOT = Path(__file__).resolve().parents[2]
_START = """
import sys
sys.path.insert(0, sys.argv[1])
from accel.compiler.kernel_jobs import serve
serve()
"""
_MOST_WORKERS = 16
_WORTH_A_WORKER = 3  # jobs: a worker takes seconds to import Triton


@dataclass(frozen=True)
class Job:
    """One kernel with one tile. `tile` is how it prints; "" leaves it to the cost model."""

    key: str
    kernel: str
    arch: str
    sms: int
    tf32: bool
    tile: str

    @staticmethod
    def of(kernel: Op, backend: TritonBackend, tile: Any = None) -> Job:
        chosen = with_tile(backend, kernel, tile)
        text = print_module(module_of(kernel, alike=True))
        key = gpu.kernel_key(kernel, chosen)
        return Job(
            key, text, backend.arch, backend.sms, backend.tf32, "" if tile is None else str(tile)
        )


def with_tile(backend: TritonBackend, kernel: Op, tile: Any) -> TritonBackend:
    """The generator, with a tile for this kernel (None: the cost model's)."""
    tiles = {} if tile is None else {kernel_fingerprint(kernel): tile}
    return TritonBackend(backend.arch, backend.sms, tiles=tiles, tf32=backend.tf32)


def module_of(kernel: Op, *, alike: bool = False) -> Module:
    """A module whose only function is the kernel: its operands are arguments.

    A kernel's code depends on which operands are constants and which are arguments of its function
    (`kernel_fingerprint`). If the module is to be `alike`, they are here what they are there, and
    what other ops computed is the reshape of an argument.
    """
    module = Module()
    function = module.add(Function("main", [v.type for v in kernel.operands]))
    around = kernel.parent.parent if kernel.parent is not None else None
    if isinstance(around, Function):
        function.symbols = {n: SymbolInfo(s.min, s.max) for n, s in around.symbols.items()}
    b, inside = Builder(function.body), dict(zip(kernel.operands, function.args))
    for number, operand in enumerate(kernel.operands if alike else ()):
        if operand.op is not None and operand.op.name == "constant":
            inside[operand] = b.constant(f"constant.{number}", operand.type)
        elif operand.op is not None:
            inside[operand] = b.reshape(inside[operand], shape=operand.shape)
    copy = clone_op(kernel, inside)
    function.body.append(copy)
    b.op("return", list(copy.results))
    return module


class Workers:
    """Processes that compile kernels. Use it as a context manager, or `close` it.

    Args:
        count: by default one a core, at most 16; with less than 2 this process compiles.
    """

    def __init__(self, count: int | None = None) -> None:
        count = min(_cores(), _MOST_WORKERS) if count is None else count
        self._workers = [_Worker() for _ in range(count if count > 1 else 0)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the processes now, so that they are there when there is work."""
        for worker in self._workers:
            worker.start()

    def compile(
        self, jobs: Sequence[Job], deadline: float | None = None
    ) -> dict[str, AccelError | None]:
        """By key of each job that was done: None, or why it failed.

        Args:
            deadline: `time.monotonic()` after which no further job is started.
        """
        missing = not_cached(jobs)
        done: dict[str, AccelError | None] = {job.key: None for job in jobs}
        pending: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in missing:
            del done[job.key]
            pending.put(job)
        if not self._workers:
            _work(pending, done, deadline, compile_job)
            return done
        threads = [
            threading.Thread(target=_work, args=(pending, done, deadline, worker.run))
            for worker in self._workers[: len(missing)]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return done

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


def not_cached(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that the cache does not answer, each once."""
    cache = CompileCache()
    unique = {job.key: job for job in jobs}
    return [job for key, job in unique.items() if cache.get(key) is None]


def compile_many(jobs: Sequence[Job], least: int) -> None:
    """Fills the cache by several processes, if there are `least` kernels that it does not know and
    cores to share them."""
    missing = not_cached(jobs)
    count = min(_cores(), _MOST_WORKERS, len(missing) // _WORTH_A_WORKER)
    if len(missing) >= least and count > 2:
        with Workers(count) as workers:
            workers.compile(missing)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _work(
    pending: queue.SimpleQueue[Job],
    done: dict[str, AccelError | None],
    deadline: float | None,
    run: Callable[[Job], AccelError | None],
) -> None:
    """Takes jobs until there are none, or the time is up."""
    while deadline is None or time.monotonic() < deadline:
        try:
            job = pending.get_nowait()
        except queue.Empty:
            return
        done[job.key] = run(job)


class _Worker:
    """A process that compiles."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        """The process; a new one if it is not running."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(_ROOT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._process

    def run(self, job: Job) -> AccelError | None:
        process = self.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(job)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            code = process.wait()
            return BackendError(f"the process that compiles kernels ended (code {code})")
        failure = json.loads(answer)
        return BackendError(**failure) if failure else None

    def close(self) -> None:
        """Ends the process, which is idle: what it compiled is in the cache."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def compile_job(job: Job) -> AccelError | None:
    """Compiles one kernel into the cache. Returns why it does not compile."""
    try:
        module = parse_module(job.kernel)
        (kernel,) = (op for op in module.main.ops if op.name == "kernel")
        backend = TritonBackend(job.arch, job.sms, tf32=job.tf32)
        tile = next((t for t in backend.candidates(kernel) if str(t) == job.tile), None)
        if job.tile and tile is None:
            return BackendError(f"no candidate prints as {job.tile}")
        header, payload = gpu.compile_kernel(kernel, with_tile(backend, kernel, tile))
        CompileCache().put(job.key, header, payload)
    except AccelError as error:
        return error
    return None


def serve() -> None:
    """The worker's loop: a job a line, an answer a line ({} if it went well)."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints goes where it is read by people
    for line in sys.stdin:
        error = compile_job(Job(**json.loads(line)))
        failure = {} if error is None else {"what": error.what, "where": error.where}
        answers.write(json.dumps(failure) + "\n")
        answers.flush()
