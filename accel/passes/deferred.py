"""Constants that are computed when first read: nothing is copied while passes run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from accel.ir.interpret import interpret
from accel.ir.module import Function
from accel.ir.storage import WeightStore


class Deferred:
    """Makes a tensor once; lets go of what it needed for that."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._value: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._make is not None:
            self._value, self._make = self._make().contiguous(), None
        assert self._value is not None
        return self._value


def deferred_function(function: Function, weights: WeightStore) -> Deferred:
    """The only result of a function without arguments, in its own dtypes."""
    return Deferred(lambda: interpret(function, (), weights)[0])


def deferred_stack(weights: WeightStore, names: Sequence[str]) -> Deferred:
    """The named tensors, one after the other along the first axis."""
    return Deferred(lambda: torch.cat([weights.tensor(n).detach() for n in names]))
