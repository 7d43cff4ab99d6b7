"""What runs in the processes that compile: Triton, imported once, then copied by fork.

    python -c "...; serve([fd, fd, ...])"

The process imports Triton, which takes 0.2 s and neither torch nor a GPU, and forks one worker for
each socket. A worker reads a function to compile as a JSON line, and answers with one. It ends when
its socket is closed, so that no process outlives the one that wanted it.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any

from accel.backends.cubin.compile import Binary, MapLayout, Unit, compile_unit, prepare
from accel.errors import AccelError

READY = "ready\n"


def serve(descriptors: Sequence[int]) -> None:
    """Forks a worker for each socket, and waits for them."""
    os.dup2(2, 1)  # what a compiler prints goes where it is read by people
    prepare()
    workers = []
    for number, descriptor in enumerate(descriptors):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for other in (*descriptors[:number], *descriptors[number + 1 :]):
                    os.close(other)
                answer(descriptor)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        workers.append(child)
    for descriptor in descriptors:
        os.close(descriptor)
    for child in workers:
        os.waitpid(child, 0)


def answer(descriptor: int) -> None:
    """A worker's loop: a function a line, an answer a line; first one that it is there."""
    lines = socket.socket(fileno=descriptor).makefile("rw")
    with suppress(OSError):  # the other side has gone
        lines.write(READY)
        lines.flush()
        for line in lines:
            lines.write(json.dumps(_compiled(json.loads(line))) + "\n")
            lines.flush()


def _compiled(described: dict[str, Any]) -> dict[str, Any]:
    """A binary as JSON, or why there is none: what is said first, and what was raised first."""
    try:
        binary = compile_unit(Unit(**described))
    except AccelError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(error.__cause__ or error.what)
        return {"reason": reason, "cause": str(cause)}
    made = asdict(binary)
    made["cubin"] = base64.b64encode(binary.cubin).decode()
    return made


def binary_of(answered: dict[str, Any]) -> Binary:
    """From a worker's answer."""
    made = {field.name: answered[field.name] for field in fields(Binary)}
    made["cubin"] = base64.b64decode(made["cubin"])
    made["maps"] = tuple(MapLayout(**{**m, "box": tuple(m["box"])}) for m in made["maps"])
    return Binary(**made)
