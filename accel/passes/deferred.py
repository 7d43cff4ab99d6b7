"""Constants that are computed when first read: nothing is copied while passes run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
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


def deferred_blocks(weights: WeightStore, name: str, lanes: int) -> Deferred:
    """A matrix [N, K] as blocks of rows, each transposed: [ceil(N / lanes), K, lanes], 0 beyond."""

    def compute() -> Tensor:
        matrix = weights.tensor(name).detach()
        rows, depth = matrix.shape
        blocks = -(-rows // lanes)
        if rows % lanes:
            matrix = F.pad(matrix, (0, 0, 0, blocks * lanes - rows))
        return matrix.reshape(blocks, lanes, depth).transpose(1, 2).contiguous()

    return Deferred(compute)


def deferred_reshape(weights: WeightStore, name: str, shape: Sequence[int]) -> Deferred:
    """The named tensor in another shape."""
    return Deferred(lambda: weights.tensor(name).detach().reshape(tuple(shape)))
