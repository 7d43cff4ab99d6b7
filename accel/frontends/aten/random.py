"""Random draws, from torch's default generator in program order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.frontends.importer import Importer, lower
from accel.ir.module import Value
from accel.ir.types import FLOATS


def _draw(c: Importer, name: str, scale: Any = 1.0, shift: Any = 0.0) -> Value:
    if c.call.kwargs.get("generator") is not None:
        return NotImplemented
    dtype = c.out_dtype
    value: Value = getattr(c.b, name)(shape=c.out_shape, dtype=dtype)
    if scale != 1:
        value = c.b.mul(value, c.scalar(scale, dtype))
    return value if shift == 0 else c.b.add(value, c.scalar(shift, dtype))


@lower("rand", "rand_like")
def rand(c: Importer, *ignored: Any, **also_ignored: Any) -> Value:
    return _draw(c, "random_uniform")


@lower("randn", "randn_like")
def randn(c: Importer, *ignored: Any, **also_ignored: Any) -> Value:
    return _draw(c, "random_normal")


@lower("uniform")
def uniform(c: Importer, x: Tensor, low: float = 0.0, high: float = 1.0, **ignored: Any) -> Value:
    return _draw(c, "random_uniform", high - low, low)


@lower("normal_functional")
def normal(c: Importer, x: Tensor, mean: float = 0.0, std: float = 1.0, **ignored: Any) -> Value:
    return _draw(c, "random_normal", std, mean)


@lower("bernoulli", "bernoulli.p", "bernoulli.Tensor")
def bernoulli(c: Importer, x: Tensor, p: Any = None, **ignored: Any) -> Value:
    if c.call.kwargs.get("generator") is not None:
        return NotImplemented
    dtype = c.out_dtype if c.out_dtype in FLOATS else torch.float32
    if p is None:
        chance = c.b.cast_to(c(x), dtype)
    elif isinstance(p, Tensor):
        chance = c.b.broadcast_to(c.b.cast_to(c(p), dtype), shape=c.out_shape)
    else:
        chance = c.b.full(value=float(p), dtype=dtype, shape=c.out_shape)
    return c.b.cast_to(c.b.random_bernoulli(chance), c.out_dtype)


@lower("randint", "randint_like")
def randint(c: Importer, first: Any, *rest: Any, **ignored: Any) -> Value:
    high = rest[0] if isinstance(first, Tensor) else first
    return _integers(c, 0, high)


@lower("randint.low", "randint_like.low_dtype")
def randint_low(c: Importer, first: Any, second: Any, *rest: Any, **ignored: Any) -> Value:
    low, high = (second, rest[0]) if isinstance(first, Tensor) else (first, second)
    return _integers(c, low, high)


def _integers(c: Importer, low: Any, high: Any) -> Value:
    if not isinstance(low, int) or not isinstance(high, int):
        return NotImplemented
    result: Value = c.b.random_integer(low=low, high=high, shape=c.out_shape, dtype=c.out_dtype)
    return result


@lower("randperm")
def randperm(c: Importer, count: Any, **ignored: Any) -> Value:
    result: Value = c.b.random_permutation(length=c.dim(count), dtype=c.out_dtype)
    return result


@lower("native_dropout")
def native_dropout(c: Importer, x: Tensor, p: float, train: bool | None) -> Any:
    if train is False:
        mask = c.b.full(value=True, dtype=torch.bool, shape=c.out_shape)
        return [c(x), mask]
    return list(c.b.native_dropout(c(x), p=float(p)))
