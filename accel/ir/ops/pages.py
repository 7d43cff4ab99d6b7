"""Paged caches: tokens in pages of a pool, found through a table of each text's pages.

A pool [P, G, page, ...] holds pages of `page` tokens each. A text's row of the table [B, N], int32
or int64, names its pages in order: token j lies in slot j mod page of page table[b, j // page], so
that a text has up to N * page tokens. Texts may share pages, which costs no copy. Entries of pages
that a text has not reached may be anything in range; what they hold is not read.

Kwon et al., 2023 (PagedAttention). Writing and reading through a table, and the contiguous form:

    %1 = "accel.update_pages"(%pool, %k, %table, %at)      dynamic_update(cache, k, at) {axis = 2}
    %2 = "accel.gather_pages"(%1, %table)                  the cache [B, G, N * page, ...]
    %3 = "accel.paged_attention"(%q, %1, %v, %table, %at)  cached_attention(q, cache, values, at)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Trait, define
from accel.ir.ops.attention import CachedAttention
from accel.ir.ops.contract import CONTRACTION
from accel.ir.ops.elementwise import MOVABLE, check_dtype
from accel.ir.types import TensorType, same_dim, simplify_dim

if TYPE_CHECKING:
    from accel.ir.builder import Builder
    from accel.ir.module import Value

_STORED = MOVABLE + "e"  # float8 as well
_PLACES = (torch.int64, torch.int32)


def _check(name: str, pool: TensorType, table: TensorType) -> None:
    if pool.rank < 3 or table.rank != 2 or table.dtype not in _PLACES:
        raise TypeInferenceError(f"accel.{name}: a pool {pool} and a table {table}")


@define("gather_pages", Trait.PURE)
class GatherPages:
    """pool [P, G, page, ...] by table [B, N]: the texts' tokens in order, [B, G, N * page, ...]."""

    @staticmethod
    def infer(pool: TensorType, table: TensorType) -> TensorType:
        check_dtype("gather_pages", _STORED, pool)
        _check("gather_pages", pool, table)
        rows, pages = table.shape
        slots = simplify_dim(pages * pool.shape[2])
        return pool.with_shape((rows, pool.shape[1], slots, *pool.shape[3:]))

    @staticmethod
    def evaluate(pool: Tensor, table: Tensor) -> Tensor:
        return pool[table.long()].transpose(1, 2).flatten(2, 3)

    @staticmethod
    def decompose(b: Builder, pool: Value, table: Value) -> Value:
        rows, pages = table.shape
        found = b.gather(pool, table, axis=0)
        moved = b.permute(found, axes=(0, 2, 1, *range(3, found.type.rank)))
        slots = simplify_dim(pages * pool.shape[2])
        made: Value = b.reshape(moved, shape=(rows, pool.shape[1], slots, *pool.shape[3:]))
        return made


@define("update_pages", Trait.PURE | Trait.UPDATE)
class UpdatePages:
    """pool [P, G, page, ...] with source [B, G, S, ...] written from `position` on.

    Token i of row b goes to slot (position + i) mod page of page table[b, (position + i) // page];
    `position` is 0-d, or [B] where texts of unequal length run together, int64 or int32. Tokens
    must fit the table, and rows that write to one page must write the same there.
    """

    @staticmethod
    def infer(
        pool: TensorType, source: TensorType, table: TensorType, position: TensorType
    ) -> TensorType:
        check_dtype("update_pages", _STORED, pool)
        _check("update_pages", pool, table)
        each = position.rank == 1 and same_dim(position.shape[0], table.shape[0])
        if not (each or position.rank == 0) or position.dtype not in _PLACES:
            raise TypeInferenceError(f"accel.update_pages: the position is {position}")
        ok = source.dtype == pool.dtype and source.rank == pool.rank
        ok = ok and same_dim(source.shape[0], table.shape[0])
        ok = ok and same_dim(source.shape[1], pool.shape[1])
        if not ok or not all(map(same_dim, source.shape[3:], pool.shape[3:])):
            raise TypeInferenceError(f"accel.update_pages: {source} into {pool} by {table}")
        return pool

    @staticmethod
    def evaluate(pool: Tensor, source: Tensor, table: Tensor, position: Tensor) -> Tensor:
        result, page = pool.clone(), pool.shape[2]
        for row in range(source.shape[0]):
            first = int(position[row] if position.dim() else position)
            for i in range(source.shape[2]):
                place = int(table[row, (first + i) // page])
                result[place, :, (first + i) % page] = source[row, :, i]
        return result

    @staticmethod
    def decompose(b: Builder, pool: Value, source: Value, table: Value, position: Value) -> Value:
        rows, count = source.shape[0], source.shape[2]
        dtype, page = position.dtype, b.size_like(pool.shape[2], position.dtype)
        start = b.reshape(position, shape=(rows if position.shape else 1, 1))
        line = b.add(b.iota(shape=(1, count), axis=1, dtype=dtype), start)
        line = b.broadcast_to(line, shape=(rows, count))
        row = b.iota(shape=(rows, count), axis=0, dtype=torch.int64)
        pages = b.index(table, row, b.cast_to(b.floor_div(line, page), torch.int64), axes=(0, 1))
        # The indices stand apart, so that their axes come first: [B, S, G, ...].
        moved = b.permute(source, axes=(0, 2, 1, *range(3, source.type.rank)))
        slots = b.cast_to(b.remainder(line, page), torch.int64)
        made: Value = b.index_put(pool, moved, b.cast_to(pages, torch.int64), slots, axes=(0, 2))
        return made


@define("paged_attention", CONTRACTION)
class PagedAttention:
    """`cached_attention` over keys and values in pages.

    q [B, H, S, D], k [P, G, page, D], v [P, G, page, E], table [B, N]; `position`, `mask` (which
    broadcasts to [B, H, S, N * page]), `sinks` and the attributes as there.
    """

    @staticmethod
    def infer(
        q: TensorType,
        k: TensorType,
        v: TensorType,
        table: TensorType,
        position: TensorType,
        mask: TensorType | None = None,
        sinks: TensorType | None = None,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> TensorType:
        keys, values = (GatherPages.infer(x, table) for x in (k, v))
        if not same_dim(k.shape[0], v.shape[0]) or not same_dim(k.shape[2], v.shape[2]):
            raise TypeInferenceError(f"accel.paged_attention: keys {k}, values {v}")
        return CachedAttention.infer(q, keys, values, position, mask, sinks, scale=scale)

    @staticmethod
    def evaluate(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        position: Tensor,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        keys, values = (GatherPages.evaluate(x, table) for x in (k, v))
        return CachedAttention.evaluate(
            q, keys, values, position, mask, sinks, scale=scale, window=window, softcap=softcap
        )

    @staticmethod
    def decompose(
        b: Builder,
        q: Value,
        k: Value,
        v: Value,
        table: Value,
        position: Value,
        mask: Value | None = None,
        sinks: Value | None = None,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Value:
        keys, values = (b.gather_pages(x, table) for x in (k, v))
        made: Value = b.cached_attention(
            q, keys, values, position, mask, sinks, scale=scale, window=window, softcap=softcap
        )
        return made
