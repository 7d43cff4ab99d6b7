"""Products of mixtures of experts, and the counting of rows before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.frontends.importer import Importer, lower
from accel.ir.module import Value
from accel.ir.types import is_integer


@lower("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(
    c: Importer, x: Tensor, weight: Tensor, ends: Tensor | None = None, bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """Rows of x [S, K], in groups, times weight [E, K, N]: group e ends before row ends[e].

    Rows behind the last group are unspecified in PyTorch; here they count as the last group's.
    """
    plain = x.dim() == 2 and weight.dim() == 3 and ends is not None and bias is None
    if not plain or x.dtype != weight.dtype or out_dtype not in (None, x.dtype):
        return c.fallback(c.call)
    assert ends is not None
    place = c.b.iota(shape=(c(x).shape[0], 1), axis=0, dtype=ends.dtype)
    passed = c.b.cast_to(c.b.le(c(ends), place), torch.int64)
    last = c.b.scalar(weight.shape[0] - 1, torch.int64)
    experts = c.b.minimum(c.b.sum(passed, axes=(1,)), last)
    return c.b.expert_linear(c(x), c.b.permute(c(weight), axes=(0, 2, 1)), experts)


@lower("histc")
def histc(c: Importer, x: Tensor, bins: int = 100, min: Any = 0, max: Any = 0) -> Any:
    """Whole numbers with a bin for each: how often each occurs. Others are left to PyTorch."""
    value = _whole(c(x)) if isinstance(min, int) and isinstance(max, int) else None
    if value is None or x.dim() != 1 or bins < 2 or (min, max) != (0, bins - 1):
        return c.fallback(c.call)
    numbers = c.b.iota(shape=(bins,), axis=0, dtype=value.dtype)
    equal = c.b.eq(c.b.reshape(value, shape=(*value.shape, 1)), numbers)
    return c.b.cast_to(c.b.sum(c.b.cast_to(equal, x.dtype), axes=(0,)), x.dtype)


def _whole(value: Value) -> Value | None:
    """The integers that a value holds, if it does."""
    if is_integer(value.dtype):
        return value
    op = value.op
    if op is not None and op.name == "cast" and is_integer(op.operands[0].dtype):
        return op.operands[0]
    return None
