"""Attention of a few new queries over a key/value cache, as one launch (`cached_attention`).

The queries of one key/value head (a group's heads times the new tokens) are the rows of one tile.
The cache up to the position, which is data, is shared by SPLIT programs a head: each takes the same
number of blocks of KEYS keys with a running maximum and sum (Milakov & Gimelshein, 2018; "Flash-
Decoding", Dao et al., 2023) and leaves its part in scratch memory; the one that is done last adds
the parts up. The grid depends on the cache's size alone, so that a recorded launch serves every
position; how much each program reads follows from the position. What the cache holds behind the
position is never used.

Where the region also writes the new tokens' keys and values (`dynamic_update`), they are computed
on a tile of their own (rotary embedding included), stored over the cache, and attended to from
registers: no program reads what another one writes. Into a cache in pages (`update_pages`) one new
token is written so, through the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from accel.backends.triton import cached_streamed
from accel.backends.triton.cached_code import CachedWriter
from accel.backends.triton.cached_pages import pages_of
from accel.backends.triton.cached_plan import CachedTile, Plan, make_plan, updated_pool
from accel.backends.triton.cached_streamed import StreamedCachedTile, StreamedCachedWriter
from accel.backends.triton.cached_tiles import Tiles
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.overlapped import SHARED_BYTES
from accel.backends.triton.powers import quick_powers
from accel.backends.triton.tiles import next_power
from accel.ir.module import Op, Region, Value
from accel.ir.types import Dim, product

_MOST_ROWS = 64  # queries of one key/value head
_LEAST_TILE = 16  # of a matrix product
_LARGEST_HEAD = 256
_STREAMED_KEYS, _MOST_STAGES = 64, 6  # keys of a block; blocks in flight
_SOME_BLOCKS, _MANY_BLOCKS, _MANY_PARTS = 4, 16, 16  # of a program; programs of a head
_OTHER_BYTES = 8 << 10  # of shared memory: queries, weights, barriers

Tile = CachedTile | StreamedCachedTile


def reason(op: Op) -> str | None:
    """None if a kernel of kind "cached_attention" may be built around this op, else why not."""
    q, k, v, *_ = op.arguments()
    if any(x.dtype not in (torch.float32, torch.bfloat16, torch.float16) for x in (q, k, v)):
        return f"attention of {q.dtype} over a cache of {k.dtype}"
    if len({x.dtype for x in (q, k, v)}) > 1:
        return "queries and a cache of different dtypes"
    sizes = (*q.shape[1:], *k.shape[1:], v.shape[3])
    if not all(isinstance(d, int) and d > 0 for d in sizes):
        return "attention with symbolic or empty sizes"
    rows = int(q.shape[1]) // int(k.shape[1]) * int(q.shape[2])
    if rows > _MOST_ROWS:
        return f"{rows} queries of one key/value head"
    if any(int(d) > _LARGEST_HEAD for d in (q.shape[3], v.shape[3])):
        return f"attention heads of size {q.shape[3]} and {v.shape[3]}"
    return None


def neighbour_reason(op: Op, update: Op) -> str | None:
    """None if the kernel around `op` may also write its new keys or values, else why not."""
    if update.name in ("update_pages", "reshape", "permute", "gather"):
        return _pages_reason(op, update)
    if update.name != "dynamic_update":
        return f"accel.{update.name} does not ride along with attention"
    q, k, v, position, *_ = op.arguments()
    cache, source, start = update.operands
    if update.result is not k and update.result is not v:
        return "an update of something else"
    if int(update.attribute("axis")) % 4 != 2 or update.attribute("ring"):
        return "an update of another axis, or of a ring"
    both = [x.op for x in (k, v)]
    starts = {o.operands[2] for o in both if o is not None and o.name == "dynamic_update"}
    alone = int(q.shape[2]) == 1 and op.attribute("window") is None
    if len(starts) > 1 or op.attribute("ring") or not (start is position or alone):
        return "an update at another place than the queries'"
    if source.shape[2] != q.shape[2]:
        return f"an update of {source.shape[2]} positions for {q.shape[2]} queries"
    if cache.op is not None:
        return "an update of what is no argument"
    return None


def _pages_reason(op: Op, neighbour: Op) -> str | None:
    """None if the kernel around `op` writes the new token to its page, and this op is part of it:
    an update of a pool, or of what reads it through the table."""
    q, k, v, position, *_ = op.arguments()
    pools = [updated_pool(x) for x in (k, v)]
    updates = [x.op for x in pools if x is not None and x.op is not None]
    pages = [pages_of(x) for x in (k, v)]
    if len(set(updates)) < 2 or None in pages:
        return "pages that nothing is written to"
    chains = {o for x in (k, v) for o in _chain(x)}
    if neighbour not in chains:
        return f"accel.{neighbour.name} of something else"
    tables = {p.table for p in pages if p is not None} | {u.operands[2] for u in updates}
    starts = {u.operands[3] for u in updates}
    at_queries = starts == {position} or op.attribute("window") is None
    if len(tables) > 1 or len(starts) > 1 or not at_queries:
        return "an update at another place than the queries'"
    if int(q.shape[2]) != 1 or any(u.operands[1].shape[2] != 1 for u in updates):
        return f"{q.shape[2]} new tokens in pages"
    return None


def _chain(value: Value) -> Iterator[Op]:
    """From a cache in pages to the update of its pool."""
    made = value.op
    while made is not None:
        yield made
        made = None if made.name == "update_pages" else made.operands[0].op


def choose(pairs: Dim, capacity: int, size: int, itemsize: int, sms: int) -> CachedTile:
    """The tile for `pairs` key/value heads and heads of `size` elements.

    Few programs of long steps, since adding up their parts costs more than a few keys do; but one
    for each multiprocessor where a cache is long. A step of 128 keys of heads of 64 takes twice
    the time of one of 64, which two programs share. Measured on an H200.
    """
    keys = max(16, min(128, max(64, next_power(size)), 32768 // (size * itemsize)))
    known = pairs if isinstance(pairs, int) else 16
    if known >= sms:
        return CachedTile(max(16, min(64, 16384 // (size * itemsize))), 1, 4, 4)
    wanted = max(1, sms // max(known, 1))
    split = min(1 << (wanted.bit_length() - 1), next_power(max(1, capacity // keys)), 64)
    return CachedTile(keys, split)


def streamed(op: Op, sms: int) -> StreamedCachedTile | None:
    """The tile for TMA, or None where that writer does not take it or the ring does not fit.

    A program for each multiprocessor, if there is a block for each; two where several share a head
    anyway and have some blocks each. A ring takes half of the shared memory, so that the next
    programs come in early; all of it where a program is busy for long. By itself, on an H200, it
    is never slower than `choose`'s tile.
    """
    if cached_streamed.reason(op) is not None:
        return None
    _, k, v, *_ = op.arguments()
    pairs, capacity = product(k.shape[:2]), int(k.shape[2])
    width = (int(k.shape[3]) + int(v.shape[3])) * int(k.dtype.itemsize)
    known = pairs if isinstance(pairs, int) else 1
    split = 1
    blocks = capacity // _STREAMED_KEYS
    while 2 * split * known <= sms and 2 * split <= blocks:
        split *= 2
    if 1 < split < _MANY_PARTS and 2 * split * _SOME_BLOCKS <= blocks:
        split *= 2
    alone = split * known <= sms and blocks >= _MANY_BLOCKS * split
    room = SHARED_BYTES // (1 if alone else 2) - _OTHER_BYTES
    stages = min(_MOST_STAGES, room // (_STREAMED_KEYS * width), max(3, blocks // split + 1))
    if stages < cached_streamed.FEWEST_STAGES:
        return None
    return StreamedCachedTile(_STREAMED_KEYS, split, stages)


def choose_tile(kernel: Op, sms: int, capability: int) -> Tile | None:
    """The tile of a kernel that nobody has measured; None where `choose` has it.

    With heads for less than half of the multiprocessors a decoding step is made of short launches.
    There `choose`'s small programs leave shared memory to the product that follows, whose weights
    come meanwhile: 1B and 8B shapes, one text, lost 12 and 4 us a layer with a ring (H200), which
    timing the kernel by itself does not show.
    """
    op = next(op for op in kernel.regions[0].ops if op.name == "cached_attention")
    _, k, *_ = op.arguments()
    pairs = product(k.shape[:2])
    few = not isinstance(pairs, int) or 2 * pairs < sms
    if few or capability != StreamedCachedTile.capability:
        return None
    return streamed(op, sms)


def candidates(kernel: Op, sms: int) -> list[Tile]:
    """Tiles worth timing for a kernel."""
    op = next(op for op in kernel.regions[0].ops if op.name == "cached_attention")
    _, k, v, *_ = op.arguments()
    size, capacity = max(int(k.shape[3]), int(v.shape[3])), int(k.shape[2])
    best = choose(product(k.shape[:2]), capacity, size, k.dtype.itemsize, sms)
    found: list[Tile] = [best]
    large = streamed(op, sms)
    if large is not None:
        found += [large, replace(large, stages=2)]
    for split in (best.split // 2, best.split * 2):
        for keys in (best.keys // 2, best.keys, best.keys * 2):
            if keys >= _LEAST_TILE and 0 < split <= next_power(-(-capacity // keys)):
                found.append(CachedTile(keys, split))
    return found


def early(plan: Plan) -> list[Value]:
    """What a program reads before the kernels before it have ended: position and caches.

    They must be arguments of the function, which no kernel has written then (`LaunchCode.early`).
    """
    op = plan.op
    found: list[Value] = []
    pending = [op.operands[3]]
    for value in op.operands[1:3]:
        write = plan.writes.get(value)
        pending += [value] if write is None else [write.cache, write.start]
        pending += [write.table] if write is not None and write.table is not None else []
    while pending:
        value = pending.pop()
        if value.op is None:
            found.append(value)
        else:
            pending += value.op.operands
    return list(dict.fromkeys(found))


class CachedGenerator(Generator):
    """A cached attention kernel: one launch."""

    tile: Tile | None = None

    def run(self) -> KernelCode:
        plan = make_plan(self.planner)
        q, k, v, *_ = plan.op.arguments()
        self.kind = index_kind(self.region, [])
        pointers = {a: f"x{i}" for i, a in enumerate(self.region.args)}
        pointers |= {w.cache: f"y{w.result}" for w in plan.writes.values()}
        emitter = Tiles(self.planner.indexer, pointers, set(), self.kind)
        pairs = product((q.shape[0], k.shape[1]))
        size = max(int(q.shape[3]), int(v.shape[3]))
        tile = self.tile or choose(pairs, int(k.shape[2]), size, k.dtype.itemsize, self.sms)
        writer = (
            StreamedCachedWriter(self.planner, plan, emitter, tile, 0)
            if isinstance(tile, StreamedCachedTile)
            else CachedWriter(self.planner, plan, emitter, tile, 0)
        )
        program = writer.write()
        quick_powers(program)
        writes = [Slot("result", i) for i in range(len(self.region.results))]
        if tile.split > 1:
            rows = int(product(a.extent for a in plan.rows))
            parts = product((pairs, tile.split, rows, 4))
            sizes = (product((parts, int(v.shape[3]))), product((parts, 2)), product((pairs, 4)))
            self.scratch = [("float32", sizes[0]), ("float32", sizes[1]), ("int32", sizes[2])]
            writes += [Slot("scratch", i) for i in range(3)]
        reads = [Slot("input", self.region.args.index(a)) for a in program.reads]
        reads.sort(key=lambda s: s.number)
        updates = [
            (w.result, reads.index(Slot("input", self.region.args.index(w.cache))))
            for w in plan.writes.values()
        ]
        self._launch(program, reads, writes, updates)
        self.launches[0].updates = updates
        self.launches[0].early = [Slot("input", self.region.args.index(a)) for a in early(plan)]
        code = KernelCode(self.name, self.launches, [size for _, size in self.scratch])
        code.zeroed = [2] if tile.split > 1 else []
        return code


def generate(
    name: str, region: Region, comment: str, sms: int, tile: Tile | None = None
) -> KernelCode:
    """The source of a region with one cached attention. Raises BackendError for what has none."""
    generator = CachedGenerator(name, region, comment, sms)
    generator.tile = tile
    return generator.run()
