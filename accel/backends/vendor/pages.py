"""Paged caches by torch's operators: tokens into pages, attention over the pages of a table."""

from __future__ import annotations

from accel.backends.vendor.attention import CachedAttention, with_head_merge
from accel.ir.capability import LibraryMatch
from accel.ir.module import Op


class UpdatePages:
    """update_pages, in the memory of its pool where the plan donates that."""

    name = "update_pages"

    def match(self, op: Op) -> LibraryMatch | None:
        return LibraryMatch(self.name, [op], ()) if op.name == "update_pages" else None


class PagedAttention:
    """paged_attention without sinks, with the head merge."""

    name = "paged_attention"

    def match(self, op: Op) -> LibraryMatch | None:
        if op.name != "paged_attention" or op.result.dtype not in CachedAttention.dtypes:
            return None
        if op.operand("sinks") is not None:
            return None
        ops = with_head_merge(op)
        options = tuple((name, op.attribute(name)) for name in ("scale", "window", "softcap"))
        merge = ("none", "permute", "merge")[len(ops) - 1]
        return LibraryMatch(self.name, ops, (*options, ("heads", merge)))
