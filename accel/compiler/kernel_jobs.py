"""Kernels that tuning wants to time, compiled into the compile cache by several processes.

    with Workers(8) as workers:
        workers.compile([Job.of(op, backend, tile), ...])

The processes are a pool's (`accel.backends.cubin.pool`); what they make is where the compiler looks
first anyway.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accel.backends.cubin.pool import Pool, most_workers
from accel.backends.triton import TritonBackend, kernel_fingerprint
from accel.compiler import gpu
from accel.compiler.cache import CompileCache
from accel.errors import AccelError
from accel.ir.builder import Builder
from accel.ir.module import Function, Module, Op, SymbolInfo, clone_op


@dataclass(frozen=True)
class Job:
    """One kernel with the generator that has its tile; `key` is the cache's."""

    key: str
    kernel: Op
    backend: TritonBackend

    @staticmethod
    def of(kernel: Op, backend: TritonBackend, tile: Any = None) -> Job:
        chosen = with_tile(backend, kernel, tile)
        return Job(gpu.kernel_key(kernel, chosen), kernel, chosen)


def with_tile(backend: TritonBackend, kernel: Op, tile: Any) -> TritonBackend:
    """The generator, with a tile for this kernel (None: the cost model's)."""
    tiles = {} if tile is None else {kernel_fingerprint(kernel): tile}
    return TritonBackend(backend.arch, backend.sms, tiles=tiles, tf32=backend.tf32)


def module_of(kernel: Op) -> Module:
    """A module whose only function is the kernel: its operands are arguments."""
    module = Module()
    function = module.add(Function("main", [v.type for v in kernel.operands]))
    around = kernel.parent.parent if kernel.parent is not None else None
    if isinstance(around, Function):
        function.symbols = {n: SymbolInfo(s.min, s.max) for n, s in around.symbols.items()}
    copy = clone_op(kernel, dict(zip(kernel.operands, function.args)))
    function.body.append(copy)
    Builder(function.body).op("return", list(copy.results))
    return module


class Workers:
    """Processes that compile kernels. Use it as a context manager, or `close` it.

    Args:
        count: by default one a core, at most 16; with less than 2 this process compiles.
    """

    def __init__(self, count: int | None = None) -> None:
        self._count = most_workers() if count is None else count
        self._pool: Pool | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> Pool:
        """Starts the processes, so that they are there when there is work."""
        if self._pool is None:
            self._pool = Pool(self._count)
        return self._pool

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
        if missing:
            pool = self.start()
            threads = [
                threading.Thread(target=_work, args=(pending, done, deadline, pool))
                for _ in range(min(max(self._count, 1), len(missing)))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return done

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()


def not_cached(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that the cache does not answer, each once."""
    cache = CompileCache()
    unique = {job.key: job for job in jobs}
    return [job for key, job in unique.items() if cache.get(key) is None]


def compile_job(job: Job, pool: Pool | None = None) -> AccelError | None:
    """Compiles one kernel into the cache. Returns why it does not compile."""
    try:
        entry = gpu.compile_kernel(job.kernel, job.backend, pool)
    except AccelError as error:
        return error
    CompileCache().put(job.key, entry.header, entry.payload)
    return None


def _work(
    pending: queue.SimpleQueue[Job],
    done: dict[str, AccelError | None],
    deadline: float | None,
    pool: Pool,
) -> None:
    """Takes jobs until there are none, or the time is up."""
    while deadline is None or time.monotonic() < deadline:
        try:
            job = pending.get_nowait()
        except queue.Empty:
            return
        done[job.key] = compile_job(job, pool)
