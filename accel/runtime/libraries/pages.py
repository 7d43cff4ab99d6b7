"""Calls on paged caches: writing tokens into pages, and attention over what they hold.

A pool is [P, G, page, ...]; a table [B, N] names each text's pages in order (`accel.ir.ops.pages`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.errors import ArtifactError, InputError
from accel.runtime.interfaces import LibraryCall, Operand
from accel.runtime.libraries.cache import CachedAttention
from accel.runtime.libraries.options import without_sinks


class UpdatePages:
    """pool with source [B, G, S, ...] written from `position` ([] or [B]) on, by table."""

    name = "update_pages"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        if len(operands) != 4 or any(o is None or o.weight is not None for o in operands[:3]):
            raise ArtifactError("update_pages takes a pool, a source, a table and a position")
        last = operands[3]
        if last is None:
            raise ArtifactError("update_pages: there is no position")
        return _UpdatePages(last.weight)


class _UpdatePages:
    """The call. `in_place` writes into the pool itself, which the plan must donate."""

    def __init__(self, position: Tensor | None) -> None:
        self.position = position

    def __call__(
        self, pool: Tensor, source: Tensor, table: Tensor, position: Tensor | None = None
    ) -> Tensor:
        return self.in_place(pool.clone(), source, table, position)

    def in_place(
        self, pool: Tensor, source: Tensor, table: Tensor, position: Tensor | None = None
    ) -> Tensor:
        first = self.position if position is None else position
        assert first is not None
        page, count = pool.shape[2], source.shape[2]
        places = first.reshape(-1, 1) + torch.arange(count, device=pool.device)
        places = places.expand(table.shape[0], count)
        if not pool.is_cuda and places.numel():
            low, high = int(places.min()), int(places.max())
            if low < 0 or high >= table.shape[1] * page:
                raise InputError(
                    f"position {high if low >= 0 else low} does not fit {table.shape[1]} pages of "
                    f"{page} tokens",
                    advice="compile with a larger capacity",
                )
        pages = table.gather(1, places // page).long()
        pool[pages, :, places % page] = source.transpose(1, 2)
        return pool


class PagedAttention:
    """q [B, H, S, D], pools of keys and values, table, position, mask or none.

    Gathers the pages that the texts have reached, then attends as `cached_attention` does.
    """

    name = "paged_attention"

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        operands = without_sinks(operands, 6)
        if len(operands) != 6 or operands[3] is None or operands[3].weight is not None:
            raise ArtifactError(
                "paged_attention takes q, k, v, a table, a position and an optional mask"
            )
        attend = CachedAttention().prepare(options, [*operands[:3], *operands[4:]])

        def run(
            q: Tensor, k: Tensor, v: Tensor, table: Tensor, position: Tensor, *mask: Any
        ) -> Any:
            page, reached = k.shape[2], table
            if not k.is_cuda and position.numel():
                tokens = int(position.max()) + q.shape[2]
                reached = table[:, : -(-tokens // page)]
            keys, values = (x[reached.long()].transpose(1, 2).flatten(2, 3) for x in (k, v))
            return attend(q, keys, values, position, *mask)

        return run
