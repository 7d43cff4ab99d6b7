"""Kernels that follow one another run as one call into their library.

A step of a language model is some three hundred kernels of a few microseconds each, and a call from
Python costs one. Where a kernel's words (addresses and sizes) do not depend on what earlier kernels
of the sequence leave behind, they are all set first, and then a loop in C runs the kernels. Words
that hold the addresses of arguments stay as they are where a call brings the arguments of the call
before: what a language model keeps between tokens does not move.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from accel.runtime.host import HostKernel
from accel.runtime.interfaces import KernelFunction
from accel.runtime.plan import Step
from accel.runtime.runs import Made, Run, TakeOver, Words, fill

_FEWEST = 2


@dataclass
class Part:
    """What is known about a step's closure when it is made.

    Attributes:
        function, words: of a kernel; None if the closure only frees slots.
        dynamic: places among the words of tensors that a call brings, with their slots.
        made: outputs that each call allocates.
        copies: memory that an earlier kernel may write is copied before the kernel runs: what an
            output starts as, or an operand that is a strided view.
        frees: slots that hold nothing from here on.
        weights: address and bytes of the largest weight that the kernel reads.
    """

    function: KernelFunction | None = None
    words: Words | None = None
    dynamic: Sequence[tuple[int, int]] = ()
    made: Made = field(default_factory=list)
    copies: bool = False
    frees: Sequence[int] = ()
    weights: tuple[int, int] = (0, 0)


@dataclass
class Unchanged:
    """Slots of arguments that are the tensors, in the same memory, of the call before this one.

    Equal sets are one object from call to call.
    """

    slots: frozenset[int] = frozenset()


def merge(
    runs: Sequence[tuple[Run, Step | None]], parts: Mapping[int, Part], unchanged: Unchanged
) -> list[tuple[Run, Step | None]]:
    """The closures, with one for each sequence of kernels. `parts` are by place in `runs`.

    `unchanged` is filled in before each call.
    """
    merged: list[tuple[Run, Step | None]] = []
    group: list[int] = []
    written: set[int] = set()

    def close() -> None:
        kernels = [parts[i] for i in group if parts[i].function is not None]
        if len(kernels) < _FEWEST:
            merged.extend(runs[i] for i in group)
        else:
            merged.append((_sequence([parts[i] for i in group], unchanged), runs[group[0]][1]))
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


def _sequence(parts: Sequence[Part], unchanged: Unchanged) -> Run:
    kernels = [p.function for p in parts if isinstance(p.function, HostKernel)]
    table = _table(parts)
    address, count = ctypes.addressof(table), len(kernels)
    run_sequence = kernels[0].library.run_sequence
    assert run_sequence is not None
    frees = [slot for part in parts for slot in part.frees]
    threads: Callable[[], int] = torch.get_num_threads
    hold = (table, parts)  # the memory behind the addresses
    slots: frozenset[int] | None = None
    settings: list[_Setting] = []
    kept: list[tuple[int, int]] = []

    def run(values: list[Any], hold: Any = hold) -> None:
        nonlocal slots, settings, kept
        if slots is not unchanged.slots:
            slots = unchanged.slots
            settings, kept = _settings(parts, slots)
        for target, source in kept:
            values[target] = values[source]
        copies = [fill(*setting, values) for setting in settings]
        code = run_sequence(address, count, threads())
        del copies
        if code >= 0:
            raise kernels[code // 4].failure(code % 4)
        for slot in frees:
            values[slot] = None

    return run


def _table(parts: Sequence[Part]) -> Words:
    """Of each kernel: its entry, its words, and the weights that the next one with any reads."""
    rows: list[list[int]] = []
    following = (0, 0)
    for part in reversed(parts):
        if isinstance(part.function, HostKernel) and part.words is not None:
            rows.append([part.function.entry, ctypes.addressof(part.words), *following])
            following = part.weights if part.weights[1] else following
    return (ctypes.c_int64 * (4 * len(rows)))(*(word for row in reversed(rows) for word in row))


_Setting: TypeAlias = tuple[Words, Sequence[tuple[int, int]], Made]


def _settings(
    parts: Sequence[Part], unchanged: Collection[int]
) -> tuple[list[_Setting], list[tuple[int, int]]]:
    """What is to be filled in, and outputs that are unchanged arguments (slot, argument's slot)."""
    settings: list[_Setting] = []
    kept: list[tuple[int, int]] = []
    for part in parts:
        made: Made = []
        for place, slot, make in part.made:
            if isinstance(make, TakeOver) and make.slot in unchanged:
                kept.append((slot, make.slot))
            else:
                made.append((place, slot, make))
        dynamic = [(place, slot) for place, slot in part.dynamic if slot not in unchanged]
        if part.words is not None and (dynamic or made):
            settings.append((part.words, dynamic, made))
    return settings, kept
