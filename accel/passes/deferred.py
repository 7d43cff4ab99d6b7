"""Constants that are computed when first read: nothing is copied while passes run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.ir.interpret import interpret
from accel.ir.module import Function
from accel.ir.storage import WeightStore
from accel.large_pages import empty_on_large_pages


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
    """The named tensors, none of a sub-byte dtype, one after the other along the first axis.

    Made on the device where they are, if that is one device.
    """

    def compute() -> Tensor:
        parts = [weights.in_place(n).detach() for n in names]
        if len({p.device for p in parts}) > 1:
            parts = [p.cpu() for p in parts]
        return torch.cat(parts)

    return Deferred(compute)


def deferred_blocks(
    weights: WeightStore, name: str, lanes: int, *, streamed: bool = False
) -> Deferred:
    """A weight in blocks of `lanes` outputs, the last filled up with zeros.

    [N, K] becomes [N / lanes, K, lanes]; [N, C, KH, KW] becomes [N / lanes, KH, KW, C, lanes].
    `streamed`: a call reads it once, as fast as memory gives it.
    """

    def compute() -> Tensor:
        weight = weights.tensor(name).detach()
        blocks = -(-len(weight) // lanes)
        missing = blocks * lanes - len(weight)
        wide = F.pad(weight, (*(0,) * (2 * weight.dim() - 1), missing)) if missing else weight
        split = wide.reshape(blocks, lanes, *weight.shape[1:])
        turned = split.permute(0, *range(3, split.dim()), 2, 1)
        if not streamed:
            return turned.contiguous()
        return empty_on_large_pages(turned.shape, turned.dtype).copy_(turned)

    return Deferred(compute)


def deferred_reshape(weights: WeightStore, name: str, shape: Sequence[int]) -> Deferred:
    """The named tensor in another shape."""
    return Deferred(lambda: weights.tensor(name).detach().reshape(tuple(shape)))


def deferred_channels(weights: WeightStore, name: str, missing: int) -> Deferred:
    """The named weight [O, C, ...] with `missing` more channels of zeros."""

    def compute() -> Tensor:
        weight = weights.tensor(name).detach()
        return F.pad(weight, (*(0,) * (2 * weight.dim() - 4), 0, missing))

    return Deferred(compute)


def deferred_permute(
    weights: WeightStore, name: str, axes: Sequence[int], shape: Sequence[int]
) -> Deferred:
    """The named tensor with its axes in another order, then in another shape."""
    return Deferred(
        lambda: weights.tensor(name).detach().permute(tuple(axes)).reshape(tuple(shape))
    )
