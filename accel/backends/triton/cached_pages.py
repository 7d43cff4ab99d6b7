"""A cache in pages, for copies by TMA: a block of keys is some pages, or a part of one.

    value = reshape(permute(gather(pool, table)))          (`passes/open_pages`)

The pool [P, G, page, D] is a matrix whose rows are tokens. Page numbers are read one step ahead of
the copies that need them, so that no copy waits for a read.
"""

from __future__ import annotations

from dataclasses import dataclass

from accel.backends.triton.addresses import size_text
from accel.backends.triton.cached_plan import Write
from accel.backends.triton.emitter import Emitter
from accel.ir.module import Op, Value
from accel.ir.types import Dim, same_dim

_LEAST_PAGE = 8  # rows of a pattern in shared memory
_KEYS = 64  # of a block


@dataclass(frozen=True)
class Pages:
    """Where a cache's tokens are: `size` a page, `count` pages a text."""

    pool: Value
    table: Value
    size: int
    count: int

    def of_block(self, keys: int) -> tuple[int, int]:
        """Copies of a block of keys, and the rows of one."""
        rows = min(self.size, keys)
        return keys // rows, rows


def pages_of(value: Value) -> Pages | None:
    """The pages behind a cache [B, G, tokens, D]; None if it is no such view of a pool."""
    moved = _operand(value, "reshape")
    found = None if moved is None else _operand(moved, "permute")
    if moved is None or found is None or found.op is None or found.op.name != "gather":
        return None
    pool, table = found.op.operands[:2]
    if pool.op is not None and pool.op.name == "update_pages" and pool.op.operands[2] is table:
        pool = pool.op.operands[0]  # with new tokens
    straight = tuple(_op(moved).attribute("axes")) == (0, 2, 1, 3, 4)
    if not straight or pool.type.rank != 4 or table.type.rank != 2:
        return None
    if int(found.op.attribute("axis")) != 0 or pool.op is not None or table.op is not None:
        return None
    size, count = pool.shape[2], table.shape[1]
    if not (isinstance(size, int) and isinstance(count, int)):
        return None
    expected: tuple[Dim, ...] = (table.shape[0], pool.shape[1], size * count, pool.shape[3])
    fits = all(same_dim(a, b) for a, b in zip(value.shape, expected, strict=True))
    return Pages(pool, table, size, count) if fits else None


def paged_reason(op: Op) -> str | None:
    """Why TMA does not bring the pages of an attention; None if it does."""
    keys, values = (pages_of(v) for v in op.operands[1:3])
    if keys is None or values is None or keys.table is not values.table:
        return "pages that are no rows of a pool"
    if keys.size != values.size or keys.size < _LEAST_PAGE:
        return f"pages of {keys.size} and {values.size} tokens"
    if keys.size % _KEYS and _KEYS % keys.size:
        return f"pages of {keys.size} tokens, which fill no block of {_KEYS}"
    return "a window over pages" if op.attribute("window") is not None else None


def page_function(pages: Pages, keys: int, table: str, symbols: str) -> str:
    """`page(key, high, text, head, bad)`: the row of the pool at which `key` of a text begins, and
    whether a page before `high` was none."""
    most, groups = size_text(pages.pool.shape[0]), size_text(pages.pool.shape[1])
    return (
        f"@gluon.jit\ndef page({table}, key, high, text, head, bad{symbols}):\n"
        f"    place = text * {pages.count} + tl.minimum(key // {pages.size}, {pages.count - 1})\n"
        f"    found = tl.load({table} + place).to(tl.int32)\n"
        f"    found = found + (found < 0).to(tl.int32) * {most}\n"
        f"    wrong = (found < 0) | (found >= {most})\n"
        "    bad = tl.maximum(bad, (wrong & (key < high)).to(tl.int32))\n"
        "    found = found * (1 - wrong.to(tl.int32))\n"
        f"    row = (found * {groups} + head) * {pages.size} + key % {pages.size}\n"
        "    return row.to(tl.int32), bad\n"
    )


def find_page(emitter: Emitter, write: Write, slot: str, report: str) -> str:
    """Finds the page, `own_page`, of a text's new token in `slot`. `report` says where that is none
    (`own_wrong`), and what is returned, where it is one."""
    assert write.table is not None
    emitter.used.setdefault(write.table)
    emitter.checks = True
    table, columns = emitter.pointers[write.table], size_text(write.table.shape[1])
    line, most = emitter.block.line, size_text(write.cache.shape[0])
    place = f"text * {columns} + {slot} // {write.cache.shape[2]}"
    line(f"own_page = tl.load({table} + {place}).to(tl.{emitter.kind})")
    line(f"own_wrong = (own_page < 0) | (own_page >= {most})")
    line(report)
    return "(own_wrong == 0)"


def row_of_page(write: Write, slot: str) -> str:
    """The row of the pool where the new token goes."""
    page, groups = write.cache.shape[2], size_text(write.cache.shape[1])
    return f"((own_page * {groups} + head) * {page} + {slot} % {page})"


def _operand(value: Value, name: str) -> Value | None:
    return value.op.operands[0] if value.op is not None and value.op.name == name else None


def _op(value: Value) -> Op:
    assert value.op is not None
    return value.op
