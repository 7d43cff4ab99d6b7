"""Kernels that follow one another run as one call into their library.

A step of a language model is some three hundred kernels of a few microseconds each, and a call from
Python costs one. Where a kernel's words (addresses and sizes) do not depend on what earlier kernels
of the sequence leave behind, they are all set first, and then a loop in C runs the kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from accel.runtime.host import HostKernel
from accel.runtime.interfaces import KernelFunction
from accel.runtime.plan import Step
from accel.runtime.runs import Made, Run

_FEWEST = 2


@dataclass
class Part:
    """What is known about a step's closure when it is made.

    Attributes:
        function, words: of a kernel; None if the closure only frees slots.
        dynamic: places among the words of tensors that a call brings, with their slots.
        made: outputs that each call allocates.
        copies: an output starts as a copy of memory that an earlier kernel may write.
        frees: slots that hold nothing from here on.
    """

    function: KernelFunction | None = None
    words: ctypes.Array[ctypes.c_int64] | None = None
    dynamic: Sequence[tuple[int, int]] = ()
    made: Made = field(default_factory=list)
    copies: bool = False
    frees: Sequence[int] = ()


def merge(
    runs: Sequence[tuple[Run, Step | None]], parts: Mapping[int, Part]
) -> list[tuple[Run, Step | None]]:
    """The closures, with one for each sequence of kernels. `parts` are by place in `runs`."""
    merged: list[tuple[Run, Step | None]] = []
    group: list[int] = []
    written: set[int] = set()

    def close() -> None:
        kernels = [parts[i] for i in group if parts[i].function is not None]
        if len(kernels) < _FEWEST:
            merged.extend(runs[i] for i in group)
        else:
            merged.append((_sequence([parts[i] for i in group]), runs[group[0]][1]))
        group.clear()
        written.clear()

    for i, pair in enumerate(runs):
        part = parts.get(i)
        if part is None or not _fits(part, group, written, parts):
            close()
        if part is None or (part.function is not None and not _runs_in_c(part)):
            merged.append(pair)
            continue
        group.append(i)
        written.update(slot for _, slot, _ in part.made)
    close()
    return merged


def _runs_in_c(part: Part) -> bool:
    kernel = part.function
    return isinstance(kernel, HostKernel) and kernel.library.run_sequence is not None


def _fits(part: Part, group: Sequence[int], written: set[int], parts: Mapping[int, Part]) -> bool:
    """Whether a kernel's words are known before the group's kernels run."""
    if not group or part.function is None:
        return True
    if not _runs_in_c(part) or part.copies:
        return False
    assert isinstance(part.function, HostKernel)
    first = next((parts[i].function for i in group if parts[i].function is not None), None)
    same = first is None or (
        isinstance(first, HostKernel) and first.library is part.function.library
    )
    return same and written.isdisjoint(slot for _, slot in part.dynamic)


def _sequence(parts: Sequence[Part]) -> Run:
    kernels: list[HostKernel] = []
    pairs: list[int] = []
    for part in parts:
        if isinstance(part.function, HostKernel) and part.words is not None:
            kernels.append(part.function)
            pairs += [part.function.entry, ctypes.addressof(part.words)]
    table = (ctypes.c_int64 * len(pairs))(*pairs)
    address, count = ctypes.addressof(table), len(kernels)
    run_sequence = kernels[0].library.run_sequence
    assert run_sequence is not None
    changing = [
        (p.words, p.dynamic, p.made) for p in parts if p.words is not None and (p.dynamic or p.made)
    ]
    frees = [slot for part in parts for slot in part.frees]
    threads: Callable[[], int] = torch.get_num_threads
    hold = (table, parts)  # the memory behind the addresses

    def run(values: list[Any], hold: Any = hold) -> None:
        keep = []
        for words, dynamic, made in changing:
            for i, source in dynamic:
                tensor = values[source]
                if not tensor.is_contiguous():
                    tensor = tensor.contiguous()
                    keep.append(tensor)
                words[i] = tensor.data_ptr()
            for i, target, make in made:
                values[target] = tensor = make(values)
                words[i] = tensor.data_ptr()
        code = run_sequence(address, count, threads())
        if code >= 0:
            raise kernels[code // 4].failure(code % 4)
        for slot in frees:
            values[slot] = None

    return run
