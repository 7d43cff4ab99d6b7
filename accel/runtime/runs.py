"""The closures themselves: what a call does for each kind of step.

Each takes the call's slots and is made for its number of operands, since a call of a small model
is little else than these lines: about a microsecond a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from accel.runtime.interfaces import KernelFunction, LibraryCall

# Runs one step on the slots of a call.
Run = Callable[[list[Any]], None]

# Outputs of a kernel that are not in the arena: place among the words, slot, allocation.
Made = list[tuple[int, int, Callable[[list[Any]], Tensor]]]
Words = ctypes.Array[ctypes.c_int64]


@dataclass(frozen=True, slots=True)
class TakeOver:
    """An output in the memory of an operand of the same dtype."""

    slot: int

    def __call__(self, values: list[Any]) -> Tensor:
        tensor: Tensor = values[self.slot].contiguous()
        return tensor


def fill(
    words: Words, dynamic: Sequence[tuple[int, int]], made: Made, values: list[Any]
) -> list[Tensor]:
    """Sets the addresses among a kernel's words. Returns the copies, which the kernel reads."""
    copies = []
    for place, slot in dynamic:
        tensor = values[slot]
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            copies.append(tensor)
        words[place] = tensor.data_ptr()
    for place, slot, make in made:
        values[slot] = tensor = make(values)
        words[place] = tensor.data_ptr()
    return copies


def free(slots: list[int]) -> Run:
    def run(values: list[Any]) -> None:
        for slot in slots:
            values[slot] = None

    if len(slots) == 1:
        (slot,) = slots

        def run_one(values: list[Any]) -> None:
            values[slot] = None

        return run_one
    return run


def kernel_without_work(made: Made) -> Run:
    def run(values: list[Any]) -> None:
        for _, slot, make in made:
            values[slot] = make(values)

    return run


def kernel_run(
    function: KernelFunction,
    words: Words,
    dynamic: list[tuple[int, int]],
    made: Made,
) -> Run:
    address = ctypes.addressof(words)

    def run_static(values: list[Any]) -> None:
        function(address)

    def run_one(values: list[Any]) -> None:
        tensor = values[slot]
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        words[place] = tensor.data_ptr()
        function(address)

    def run(values: list[Any]) -> None:
        copies = fill(words, dynamic, made, values)
        function(address)
        del copies

    if made or len(dynamic) > 1:
        return run
    if dynamic:
        place, slot = dynamic[0]
        return run_one
    return run_static


def library_run(
    call: LibraryCall,
    operands: list[int],
    fixed: Sequence[tuple[int, Tensor]],
    outputs: list[int],
) -> Run:
    if len(outputs) == 1 and len(operands) == 1:
        (read,), (write,) = operands, outputs
        if fixed:
            tensor = fixed[0][1]

            def run_fixed(values: list[Any]) -> None:
                values[write] = call(tensor)

            return run_fixed

        def run_one(values: list[Any]) -> None:
            values[write] = call(values[read])

        return run_one
    constants = dict(fixed)
    pattern = [constants.get(i) for i in range(len(operands))]
    reads = [(i, slot) for i, slot in enumerate(operands) if i not in constants]

    def run(values: list[Any]) -> None:
        args = pattern.copy()
        for i, slot in reads:
            args[i] = values[slot]
        _store(values, call(*args), outputs)

    return run


def _store(values: list[Any], results: Any, outputs: list[int]) -> None:
    """Results that ATen returns as None, because an output mask said so, are no outputs, nor are
    sizes, which were known before.

    An operator that only checks (`_linalg_check_errors`) returns nothing at all.
    """
    if results is None and not outputs:
        return
    several = () if isinstance(results, Tensor) else results
    made = [r for r in several if isinstance(r, Tensor)] or [results]
    if len(outputs) == 1:
        values[outputs[0]] = made[0]
        return
    for slot, result in zip(outputs, made, strict=True):
        values[slot] = result


def aten_run(
    operator: Callable[..., Any],
    args: list[tuple[bool, Any]],
    kwargs: Mapping[str, tuple[bool, Any]],
    outputs: list[int],
    *,
    sequence: bool,
) -> Run:
    pattern = [value if static else None for static, value in args]
    reads = [(i, value) for i, (static, value) in enumerate(args) if not static]
    named = {name: value for name, (static, value) in kwargs.items() if static}
    named_reads = [(name, value) for name, (static, value) in kwargs.items() if not static]
    write = outputs[0] if outputs else -1

    def call(values: list[Any]) -> Any:
        filled = pattern.copy()
        for i, get in reads:
            filled[i] = get(values)
        if not named_reads:
            return operator(*filled, **named)
        return operator(*filled, **named, **{name: get(values) for name, get in named_reads})

    def run_one(values: list[Any]) -> None:
        values[write] = call(values)

    def run(values: list[Any]) -> None:
        _store(values, call(values), outputs)

    return run if sequence else run_one
