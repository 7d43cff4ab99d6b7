"""Calls on key/value caches: writing into one, and attention over what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accel.errors import ArtifactError, InputError
from accel.runtime.interfaces import LibraryCall, Operand
from accel.runtime.libraries.options import choice, without_sinks


class Update:
    """x with `source` written at position `start` along `axis` (`accel.dynamic_update`)."""

    name = "update"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        axis = options.get("axis")
        if type(axis) is not int or len(operands) != 3 or any(o is None for o in operands):
            raise ArtifactError("update takes x, source, a position and an axis")
        fixed = [o.weight if o is not None else None for o in operands]
        if fixed[0] is not None or fixed[1] is not None:
            raise ArtifactError("update: x and source are no weights")
        return _Update(axis, fixed[2], options.get("ring") is True)


class _Update:
    """The call. `in_place` writes into x itself, which the plan must donate."""

    def __init__(self, axis: int, start: Tensor | None, ring: bool) -> None:
        self.axis, self.start = axis, None if start is None else int(start)
        self.ring = ring

    def __call__(self, x: Tensor, source: Tensor, start: Tensor | None = None) -> Tensor:
        return self.in_place(x.clone(), source, start)

    def in_place(self, x: Tensor, source: Tensor, start: Tensor | None = None) -> Tensor:
        if start is not None and start.dim():  # a position for each row
            for row in range(start.shape[0]):
                self.in_place(x[row : row + 1], source[row : row + 1], start[row])
            return x
        first = int(start) if start is not None else self.start
        assert first is not None
        count = source.shape[self.axis]
        if self.ring:
            return self._around(x, source, first, count)
        if not 0 <= first <= x.shape[self.axis] - count:
            raise InputError(
                f"{count} positions from {first} on do not fit a cache of {x.shape[self.axis]}",
                advice="compile with a larger capacity",
            )
        x.narrow(self.axis, first, count).copy_(source)
        return x

    def _around(self, x: Tensor, source: Tensor, first: int, count: int) -> Tensor:
        """Writes the last elements of the source, as many as x has, in one or two pieces."""
        size = x.shape[self.axis]
        if first < 0:
            raise InputError(f"position {first} of a ring")
        skipped = max(count - size, 0)
        place, left = (first + skipped) % size, count - skipped
        piece = min(left, size - place)
        x.narrow(self.axis, place, piece).copy_(source.narrow(self.axis, skipped, piece))
        if left > piece:
            rest = source.narrow(self.axis, skipped + piece, left - piece)
            x.narrow(self.axis, 0, left - piece).copy_(rest)
        return x


class CachedAttention:
    """q [B, H, S, D], k [B, G, C, D], v [B, G, C, E], position, mask or none.

    Reads only what the cache holds at that position (see `accel.cached_attention`).
    """

    name = "cached_attention"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        operands = without_sinks(operands, 5)
        if len(operands) != 5 or any(o is None or o.weight is not None for o in operands[:4]):
            raise ArtifactError("cached_attention takes q, k, v, a position and an optional mask")
        scale, window, cap = (options.get(n) for n in ("scale", "window", "softcap"))
        if not isinstance(scale, float) or not (window is None or type(window) is int):
            raise ArtifactError(f"cached_attention: scale {scale!r}, window {window!r}")
        if not (cap is None or isinstance(cap, float)):
            raise ArtifactError(f"cached_attention: softcap is {cap!r}")
        heads = choice(options, "heads", ("none", "permute", "merge"))
        ring = options.get("ring") is True
        if ring and (window is None or operands[4] is not None):
            raise ArtifactError("cached_attention: a ring takes a window and no mask")
        stored = operands[4].weight if operands[4] is not None else None

        def run(
            q: Tensor, k: Tensor, v: Tensor, position: Tensor, mask: Tensor | None = None
        ) -> Tensor:
            mask = mask if stored is None else stored
            attend = _attend_ring if ring else _attend
            if position.dim():  # a position for each row
                out = torch.cat(
                    [
                        attend(*texts, first, own, scale, window, cap)
                        for first, texts, own in _rows(position, (q, k, v), mask)
                    ]
                )
            else:
                out = attend(q, k, v, int(position), mask, scale, window, cap)
            if heads == "none":
                return out
            out = out.transpose(1, 2)
            return out if heads == "permute" else out.flatten(2)

        return run


def _rows(
    positions: Tensor, given: tuple[Tensor, Tensor, Tensor], mask: Tensor | None
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor], Tensor | None]]:
    """Each row alone: its position, its queries, keys and values, its mask."""
    q, k, v = given
    for row, first in enumerate(positions.tolist()):
        own = mask
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            own = mask[row : row + 1]
        here = slice(row, row + 1)
        yield first, (q[here], k[here], v[here]), own


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    cap: float | None,
) -> Tensor:
    rows = q.shape[2]
    begin = 0 if window is None else max(first - window + 1, 0)
    end = first + rows
    if not 0 < end <= k.shape[2]:
        raise InputError(f"position {end - 1} is not in a cache of {k.shape[2]}")
    if mask is not None and mask.shape[-1] != 1:
        mask = mask[..., begin:end]
    if rows > 1:
        mask = _banded(mask, rows, begin, end, first, window, q)
    return _grouped(q, k[:, :, begin:end], v[:, :, begin:end], mask, scale, cap)


def _attend_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """Slot s holds the last position that is s modulo the number of slots."""
    rows, slots = q.shape[2], k.shape[2]
    last = first + rows - 1
    if first < 0 or window is None or window + rows - 1 > slots:
        raise InputError(f"{rows} queries from {first} on, a window of {window}, {slots} slots")
    seen = min(last + 1, slots)
    row = torch.arange(first, last + 1, device=q.device)[:, None]
    column = last - (last - torch.arange(seen, device=q.device)) % slots
    keep = (column <= row) & (column > row - window)
    return _grouped(q, k[:, :, :seen], v[:, :, :seen], keep, scale, cap)


def _grouped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None
) -> Tensor:
    """Attention over keys that are all there; a mask broadcasts to [B, H, S, T]."""
    batch, heads, rows, _ = q.shape
    groups, seen = k.shape[1], k.shape[2]
    share = heads // groups
    # Heads that read the same keys are queries of one head, so that no key is repeated.
    q = q.reshape(batch, groups, share * rows, q.shape[3])
    if mask is not None:
        mask = mask.expand(batch, heads, rows, seen)
        mask = mask.reshape(batch, groups, share * rows, seen)
    if cap is None:
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    else:
        out = _capped(q, k, v, mask, scale, cap)
    return out.reshape(batch, heads, rows, v.shape[3])


def _banded(
    mask: Tensor | None, rows: int, begin: int, end: int, first: int, window: int | None, q: Tensor
) -> Tensor:
    """The mask of several queries: causal, and the window."""
    column = torch.arange(begin, end, device=q.device)[None, :]
    row = torch.arange(first, first + rows, device=q.device)[:, None]
    keep = column <= row
    if window is not None:
        keep &= column > row - window
    if mask is None:
        return keep
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, float("-inf"))


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * (scale / cap)
    scores = torch.tanh(scores) * cap
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    return (torch.softmax(scores, -1) @ v.to(wide)).to(q.dtype)
