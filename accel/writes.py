"""Writing results back into a caller's tensors as if all were written at once.

A compiled function is pure: where the model writes to an argument, the new value is a result. Other
results may be (views of) that argument as it was, and would change with the write. Other arguments
that share elements with a written one would have to change in the middle of the function: such a
call is not what was compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def write_back(
    inputs: Sequence[Tensor], results: Sequence[Tensor], writes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Writes result r over input i for each (i, r), and returns the results as they were before.

    Results that share memory with a written input are copied first, new values of other inputs
    among them (as in a swap). A new value that lies in its input's own place is left there.
    """
    found = list(results)
    moved = [(i, r) for i, r in writes if not same_place(inputs[i], found[r])]
    if not moved:
        return found
    written = {storage_of(inputs[i]) for i, _ in moved} - {0}
    with torch.no_grad():
        for r, value in enumerate(found):
            if storage_of(value) in written:
                found[r] = value.clone()
        for i, r in moved:
            inputs[i].copy_(found[r])
    return found


def same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are the same elements in memory."""
    return one is other or (one.data_ptr() == other.data_ptr() and one.stride() == other.stride())


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's memory, equal for all that share it; 0 if there is none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def first_overlap(inputs: Sequence[object], written: Sequence[int]) -> tuple[int, int] | None:
    """The first written input that has elements in common with another input, and that one."""
    for i in written:
        one = inputs[i]
        assert isinstance(one, Tensor)
        for j, other in enumerate(inputs):
            if j != i and isinstance(other, Tensor) and overlap(one, other):
                return i, j
    return None


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have an element's memory in common."""
    if one.layout is not torch.strided or storage_of(one) != storage_of(other):
        return False
    (start, stop), (first, last) = _extent(one), _extent(other)
    if max(start, first) >= min(stop, last):
        return False
    low = min(start, first)
    seen = torch.zeros(max(stop, last) - low, dtype=torch.bool)  # a mark for each byte
    _bytes(seen, one, start - low).fill_(True)
    return bool(_bytes(seen, other, first - low).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage between which a tensor lies."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.numel() == 0:
        return start, start
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return start, start + (steps + 1) * tensor.element_size()


def _bytes(memory: Tensor, tensor: Tensor, start: int) -> Tensor:
    """The bytes of a tensor's elements in a copy of its memory that has them from `start` on."""
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    return memory.as_strided((*tensor.shape, size), (*strides, 1), start)
