"""Which tensors a function was called with last time, so that they are not looked at again.

A step of a language model gets the same tensors as the step before, but for a token, and looking at
sixty of them (sizes, strides, storages, addresses) costs tenths of a millisecond where the caches
are full of weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor


class Seen:
    """Arguments by place: objects, and addresses of their elements. Nothing is kept alive."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.forget()

    def forget(self) -> None:
        """Every argument is new to the next call."""
        self._ids = [0] * self._count
        self._addresses = [0] * self._count
        self._references: list[weakref.ref[Tensor] | None] = [None] * self._count

    def note(self, place: int, tensor: Tensor | None) -> None:
        """`tensor` was used as it is; None: it was not."""
        if tensor is None:
            self._ids[place], self._references[place] = 0, None
            return
        ids, references = self._ids, self._references

        def gone(reference: weakref.ref[Tensor]) -> None:
            if references[place] is reference:  # else another tensor may have this id by now
                ids[place] = 0

        self._references[place] = weakref.ref(tensor, gone)
        self._ids[place], self._addresses[place] = id(tensor), tensor.data_ptr()

    def others(self, inputs: Sequence[Tensor]) -> list[int]:
        """Places of other objects than last time."""
        pairs = zip(map(id, inputs), self._ids)
        return [i for i, (new, old) in enumerate(pairs) if new != old]

    def moved(self, inputs: Sequence[Tensor]) -> list[int]:
        """Places of other objects, and of those with their elements elsewhere or not dense."""
        return [
            i
            for i, (tensor, old, address) in enumerate(zip(inputs, self._ids, self._addresses))
            if id(tensor) != old or tensor.data_ptr() != address or not tensor.is_contiguous()
        ]
