"""Keys and values move into pages of a pool, which a table of each text's pages leads to.

A contiguous cache takes memory for the longest text that may come. In pages a text takes what it
has, page by page, and texts that begin alike may share what they have in common: the table is an
argument of the functions, and `accel.runtime.pages` decides what is in it. The pass comes after
`insert_kv_cache`; keys and values that are kept encoded (`quantize_cache`) are paged as codes.
Where it gave @decode a position for each row, each row writes and reads its own pages there.

Paper: Kwon et al., 2023 (PagedAttention). Contract: exact, and decode equivalence for tables whose
pages lie in any order, which `check` measures. Before and after:

    %1 = "accel.dynamic_update"(%keys, %k, %position) {axis = 2} ...
    %2 = "accel.dynamic_update"(%values, %v, %position) {axis = 2} ...
    %3 = "accel.cached_attention"(%q, %1, %2, %position) {scale = 0.25} ...

    %1 = "accel.update_pages"(%keys, %k, %table, %position) ...    // %keys [pages, G, page, D]
    %2 = "accel.update_pages"(%values, %v, %table, %position) ...
    %3 = "accel.paged_attention"(%q, %1, %2, %table, %position) {scale = 0.25} ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from accel.errors import OptionError
from accel.ir.builder import Builder
from accel.ir.module import Function, Module, Op, SymbolInfo, Value
from accel.ir.types import TensorType
from accel.passes.base import Context, Contract, Pass, register_pass
from accel.passes.equivalence import check_decode

TABLE = "table"
_PAGES = sympy.Symbol("pages", integer=True, positive=True)
_FUNCTIONS = ("prefill", "decode", "extend")


@register_pass
@dataclass
class PageCache(Pass):
    """Keys and values in pages.

    Options:
        page: tokens of a page; the cache's capacity must be a multiple of it.
        pages: pages of the pool, for all texts together; 0: it grows with the texts.
        memory: bytes of the pool instead; 0: as `pages` says.
    """

    name: ClassVar[str] = "page_cache"
    contract: ClassVar[Contract] = Contract("exact", replaces=_FUNCTIONS)

    page: int = 16
    pages: int = 0
    memory: int = 0

    def __post_init__(self) -> None:
        if self.page < 1 or self.pages < 0 or self.memory < 0:
            raise OptionError(
                f"{self.name}: page = {self.page}, pages = {self.pages}, memory = {self.memory}"
            )
        if self.pages and self.memory:
            raise OptionError(
                f"{self.name}: pages = {self.pages} and memory = {self.memory} contradict each "
                "other",
                advice="pass one of them",
            )

    def run(self, module: Module, context: Context) -> None:
        facts = module.metadata.get("kv_cache")
        if facts is None:
            raise OptionError(
                f"{self.name}: there is no cache yet", advice="run insert_kv_cache before it"
            )
        capacity = int(facts["capacity"])
        if capacity % self.page:
            raise OptionError(
                f"{self.name}: {capacity} positions are no multiple of page = {self.page}"
            )
        for item in facts["state"]:
            _check_item(item)
        if "paged" in facts:
            raise OptionError(f"{self.name}: the cache has pages already")
        if not context.rewrite(self.name):
            return
        count = len(facts["state"])
        size = sum(_page_bytes(a, self.page) for a in module.functions["decode"].args[-count:])
        paged: dict[str, Any] = {"page": self.page, "bytes": size, "pages": self._pages(size)}
        facts = {**facts, "paged": paged}
        module.metadata["kv_cache"] = facts
        for name in _FUNCTIONS:
            if name in module.functions:
                function = module.functions[name]
                _Paging(function, count, capacity // self.page, self.page).run()
                function.metadata["kv_cache"] = facts
        context.notes |= paged

    def _pages(self, size: int) -> int:
        """Pages of the pool; 0 where it grows."""
        if self.memory and self.memory < size:
            raise OptionError(
                f"{self.name}: a page of {self.page} tokens takes {size} bytes, and memory = "
                f"{self.memory}"
            )
        return self.memory // size if self.memory else self.pages

    def check(self, module: Module, seed: int) -> float:
        """Decode equivalence, every table with pages of its own (`accel.passes.equivalence`)."""
        return check_decode(module, seed=seed) if "kv_cache" in module.metadata else 0.0


class _Paging:
    """Rewrites one function."""

    def __init__(self, function: Function, count: int, pages: int, page: int) -> None:
        self.function, self.page = function, page
        first = len(function.args) - count
        self.caches = function.args[first:]
        rows = self.caches[0].shape[0]
        self.table = function.body.add_arg(TensorType((rows, pages), torch.int32), TABLE, first)
        function.donates = {r: a + (a >= first) for r, a in function.donates.items()}
        function.metadata["arguments"].insert(first, {"name": TABLE, "kind": "input"})
        function.symbols[_PAGES.name] = SymbolInfo(1, None)
        self.whole: dict[Value, Value] = {}

    def run(self) -> None:
        for cache in self.caches:
            for op in cache.users:
                self._update(op, cache)
        for cache in self.caches:
            cache.type = self._pool(cache.type)
        for op in list(self.function.ops):
            self._rewrite(op)

    def _pool(self, type_: TensorType) -> TensorType:
        _, heads, _, *rest = type_.shape
        return TensorType((_PAGES, heads, self.page, *rest), type_.dtype)

    def _update(self, op: Op, cache: Value) -> None:
        """What comes with a cache is an update, or the return."""
        known = op.name == "dynamic_update" and op.operands[0] is cache
        if op.name == "return":
            return
        if known and op.attribute("axis") % len(cache.shape) == 2 and not op.attribute("ring"):
            return
        raise OptionError(
            f"{PageCache.name}: accel.{op.name} reads the cache '{cache.name}' as a whole",
            where=str(op.location or ""),
        )

    def _rewrite(self, op: Op) -> None:
        b = Builder(before=op, made_by=PageCache.name)
        b.location = op.location
        if op.name == "dynamic_update" and op.operands[0] in self.caches:
            pool, source, position = op.operands
            op.replace_with([b.update_pages(pool, source, self.table, position)])
        elif op.name == "cached_attention" and all(map(_is_pool, op.operands[1:3])):
            q, k, v, *rest = op.arguments()
            attributes = {n: op.attribute(n) for n in ("scale", "window", "softcap")}
            made = b.op("paged_attention", [q, k, v, self.table, *rest], attributes)
            op.replace_with(made.results)
        elif op.name not in ("update_pages", "return"):
            for place, value in enumerate(op.operands):
                if _is_pool(value):  # codes, say, which are decoded in front of attention
                    if value not in self.whole:
                        self.whole[value] = b.gather_pages(value, self.table)
                    op.set_operand(place, self.whole[value])


def _is_pool(value: Value) -> bool:
    return value.op is not None and value.op.name == "update_pages"


def _page_bytes(cache: Value, page: int) -> int:
    """Bytes of one page of a cache."""
    _, heads, _, *rest = cache.shape
    return int(cache.type.with_shape((heads, page, *rest)).nbytes())


def _check_item(item: dict[str, Any]) -> None:
    """Only what is kept of every token has pages."""
    name = item["name"]
    if item.get("ring") and "sinks" not in item:
        raise OptionError(
            f"{PageCache.name}: '{name}' is a ring, which is as small as its window already",
            advice="insert_kv_cache{rings=false} keeps whole texts, of which pages are made",
        )
    if item["kind"] != "tokens" or "sinks" in item:
        raise OptionError(
            f"{PageCache.name}: '{name}' ({item['kind']}) is not kept token by token",
            advice="models and caches with such state have no pages",
        )
