"""Products of float8 with scales, as `torch._scaled_mm` writes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.frontends.importer import Importer, lower
from accel.ir.module import Value

_CODES = (torch.float8_e4m3fn, torch.float8_e5m2)


@lower("_scaled_mm")
def scaled_mm(
    c: Importer, x: Tensor, y: Tensor, scale_x: Tensor, scale_y: Tensor, bias: Tensor | None = None,
    scale_result: Tensor | None = None, out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Any:  # fmt: skip
    """x [M, K] times y [K, N], added up in float32; then the scales, the bias, and one rounding.

    A scale is one number, or one for each row of x ([M, 1]) and column of y ([1, N]). What is
    scaled in blocks is left to PyTorch. Sums are float32's whatever `use_fast_accum` allows.
    """
    parts = (_scale(c, scale_x, 1, x.shape[0]), _scale(c, scale_y, 0, y.shape[1]))
    plain = x.dim() == 2 and y.dim() == 2 and x.dtype in _CODES and y.dtype in _CODES
    if not plain or None in parts or scale_result is not None:
        return c.fallback(c.call)
    wide = torch.float32
    weight = c.b.cast_to(c.b.permute(c(y), axes=(1, 0)), wide)
    made = c.b.linear(c.b.cast_to(c(x), wide), weight)
    for scale in parts:
        made = c.b.mul(made, scale)
    if bias is not None:
        made = c.b.add(made, c.b.cast_to(c(bias), wide))
    return c.b.cast_to(made, out_dtype or x.dtype)


def _scale(c: Importer, scale: Tensor, ones: int, count: Any) -> Value | None:
    """A scale that broadcasts over the product; None if it is one of blocks."""
    if scale.dtype != torch.float32:
        return None
    value = c(scale)
    if scale.dim() < 2 and scale.numel() == 1:
        return c.b.reshape_to(value, ())
    lengths = [1, 1]
    lengths[1 - ones] = count
    fits = scale.dim() == 2 and scale.shape[ones] == 1 and scale.shape[1 - ones] in (1, count)
    return value if fits else None
