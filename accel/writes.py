"""Writing results back into a caller's tensors as if all were written at once.

A compiled function is pure: where the model writes to an argument, the new value is a result. Other
results may be (views of) that argument as it was, and would change with the write.
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
