"""Many functions compiled at once, by processes.

    with Pool() as pool:
        futures = [pool.submit(unit) for unit in units]
        binaries = [future.result() for future in futures]

Triton compiles one kernel in 0.1 to 1.3 s on one core. The pool's processes are copies of one
(`accel.backends.cubin.server`), which begins to import Triton when the pool is made: a compile
makes it first, and has captured the model by the time there are kernels. Only text passes between
the processes. One that dies costs the function that it was at.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

from accel.backends.cubin.compile import Binary, Unit, compile_unit, failure
from accel.backends.cubin.server import READY, binary_of
from accel.config import logger
from accel.errors import BackendError

_LOG = logger("backends")
_ROOT = Path(__file__).resolve().parents[3]
_START = """
import sys
sys.path.insert(0, sys.argv[1])
from accel.backends.cubin.server import serve
serve([int(n) for n in sys.argv[2:]])
"""
_MOST_WORKERS = 16


@dataclass(order=True)
class _Task:
    """A function that waits to be compiled, the largest first; None tells a thread to end."""

    order: int
    number: int
    unit: Unit | None = field(compare=False)
    made: Future[Binary] = field(compare=False)


class Pool:
    """Processes that compile; with fewer than two, this one does. Close it, or use it in `with`.

    Args:
        count: by default one a core, at most 16.
    """

    def __init__(self, count: int | None = None) -> None:
        count = most_workers() if count is None else count
        self._waiting: queue.PriorityQueue[_Task] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._server: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._workers, self._lock, self._closing = count, threading.Lock(), False
        if count > 1 and sys.executable and hasattr(os, "fork"):
            self._start(count)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(self, unit: Unit) -> Future[Binary]:
        """The function's machine code, when it is there; BackendError where there is none."""
        made: Future[Binary] = Future()
        if self._threads:
            self._waiting.put(_Task(-_size(unit), next(self._numbers), unit, made))
        else:
            _settle(made, partial(compile_unit, unit))
        return made

    def close(self) -> None:
        """Ends the processes; what they have not done is cancelled or fails."""
        self._closing = True
        with suppress(queue.Empty):
            while True:
                self._waiting.get_nowait().made.cancel()
        for own in self._sockets:
            with suppress(OSError):
                own.shutdown(socket.SHUT_RDWR)
        for _ in self._threads:
            self._waiting.put(_Task(0, next(self._numbers), None, Future()))
        for thread in self._threads:
            thread.join()
        self._threads = []
        server, self._server = self._server, None
        if server is not None:
            server.kill()
            server.wait()

    def _start(self, count: int) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        numbers = [theirs.fileno() for _, theirs in pairs]
        try:
            self._server = subprocess.Popen(
                [sys.executable, "-c", _START, str(_ROOT), *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=numbers,
            )
        except OSError as error:
            _LOG.warning("no processes to compile kernels (%s): they take turns in this one", error)
            for own, _ in pairs:
                own.close()
        else:
            self._sockets = [own for own, _ in pairs]
            for own in self._sockets:
                thread = threading.Thread(target=self._serve, args=(own,), daemon=True)
                self._threads.append(thread)
                thread.start()
        finally:
            for _, theirs in pairs:
                theirs.close()

    def _serve(self, own: socket.socket) -> None:
        """Gives one worker function after function, until it ends or is told to."""
        with own:
            lines = own.makefile("rw")
            alive = _read(lines) == READY
            while alive and (unit := (task := self._waiting.get()).unit) is not None:
                line = _ask(lines, unit)
                alive = bool(line)
                _settle(task.made, partial(_answer, unit, line))
        if not alive and not self._closing:
            self._lose_one()

    def _lose_one(self) -> None:
        """Without its last worker, this process compiles what is left."""
        with self._lock:
            self._workers -= 1
            if self._workers:
                return
        _LOG.warning("the processes that compile kernels ended: this one goes on by itself")
        while (unit := (task := self._waiting.get()).unit) is not None:
            _settle(task.made, partial(compile_unit, unit))


def _settle(made: Future[Binary], work: Callable[[], Binary]) -> None:
    """What the work returns or raises is what the future holds."""
    try:
        made.set_result(work())
    except BaseException as error:  # raised where the result is asked for
        made.set_exception(error)


def _ask(lines: TextIO, unit: Unit) -> str:
    """A worker's answer; empty if it has ended."""
    try:
        lines.write(json.dumps(asdict(unit)) + "\n")
        lines.flush()
    except OSError:
        return ""
    return _read(lines)


def _read(lines: TextIO) -> str:
    """The next line; empty if the other side has ended."""
    try:
        return lines.readline()
    except OSError:
        return ""


def _answer(unit: Unit, line: str) -> Binary:
    """What a worker has answered. Raises BackendError where there is no code, or it died of it."""
    if not line:
        raise failure(unit, "the process that compiled it ended")
    answer = json.loads(line)
    if "reason" in answer:
        raise failure(unit, answer["reason"]) from BackendError(answer["cause"])
    return binary_of(answer)


def _size(unit: Unit) -> int:
    """How long a function takes to compile, about: its lines; Gluon's take four times as long."""
    lines = sum(not line.startswith("#") for line in unit.source.splitlines())
    return lines * (4 if unit.gluon else 1)


def most_workers() -> int:
    """A process for each CPU core that this one may use, but no more than 16."""
    usable = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return min(len(usable), _MOST_WORKERS)
