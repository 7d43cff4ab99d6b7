"""Attention under sparse masks: blocks of keys that the mask hides are not walked over.

A mask that is computed (texts packed into one row, say: each query sees keys of its own text) costs
little to evaluate, and most of its blocks may be hidden. What is walked over is as the mask is,
whatever it is that makes it sparse, and needs no table that is made before.

`SeenWriter` writes a launch before the attention (`attention_overlapped`): a program looks at one
block, for all heads that the mask does not tell apart, and notes whether something is seen.
`ListedAttention` is one launch, for every architecture: a program evaluates the mask on all of its
blocks first and writes down where something is seen, in scratch memory that only it reads.
"""

from __future__ import annotations

from accel.backends.loops.merge import merged
from accel.backends.triton.addresses import decompose, size_text
from accel.backends.triton.attention_loop import AttentionWriter, Span, over, padded
from accel.backends.triton.attention_plan import Plan
from accel.backends.triton.attention_tiles import AttentionTile
from accel.backends.triton.emitter import Scope
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import parts_of
from accel.ir.types import Dim, product

_LOOKING_WARPS = 4


class ListedAttention(AttentionWriter):
    """Writes the one program. `listed` is scratch memory of `size` int32 numbers."""

    def __init__(
        self, plan: Plan, emitter: StoredOperands, target: str, tile: AttentionTile, listed: str
    ) -> None:
        super().__init__(plan, emitter, target, tile)
        self.listed = listed
        blocks = parts_of(self.queries, tile.rows)
        self.programs: Dim = product((blocks, *(a.extent for a in plan.outer)))
        self.most: Dim = parts_of(self.keys, tile.columns) + 1
        self.size: Dim = product((self.programs, self.most))

    def write(self) -> Program:
        top, tile = self.top.block, self.tile
        assert isinstance(tile, AttentionTile)
        self._place()
        self._start()
        spans = self._spans()
        whole = Span(spans[0].first, spans[-1].last, True)
        top.line(f"listed = {self.listed} + part * {size_text(self.most)}")
        top.line("count = 0")
        found = Block(top.names)
        self._look(found, whole)
        top.nest(f"for start in tl.range({whole.first}, {whole.last}, COLS):", found)
        top.line("tl.debug_barrier()")
        body = Block(top.names)
        body.line("start = tl.multiple_of(tl.load(listed + number), COLS)")
        self._step(body, whole)
        top.nest(f"for number in tl.range(0, count, num_stages={tile.stages}):", body)
        self._finish()
        constants = {"ROWS": tile.rows, "COLS": tile.columns, "DEPTH": padded(self.depth),
                     "WIDTH": padded(self.width)}  # fmt: skip
        return Program(top.source(), [], constants, self.programs, tile.warps,
                       list(self.emitter.used), self.emitter.checks)  # fmt: skip

    def _tail(self) -> int:
        return 0

    def _look(self, body: Block, span: Span) -> None:
        """Writes down a block of keys of which something is seen. A place is overwritten until it
        is taken."""
        emitter, plan = self.emitter, self.plan
        assert self.mask is not None
        bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
        past = over(self.keys, self.tile.columns)
        with emitter.inside(Scope(body, frozenset((*self.top.axes, *plan.key[2].axes)))):
            body.line("key = start + tl.arange(0, COLS)[None, :]")
            self._bind(plan.key[2], "key", COL, self.keys if past else 0, self.tile.columns)
            keep = [self._shown(self.mask).text]
            keep += self._cuts(body, span, "key_ok" if past else "")
        body.line(f"seen = tl.broadcast_to({' & '.join(keep)}, [ROWS, COLS]).to(tl.int32)")
        body.line("tl.store(listed + count, start)")
        body.line("count += tl.max(tl.max(seen, axis=1), axis=0)")
        emitter.addresses.groups, emitter.masks = bound, masks


class SeenWriter(AttentionWriter):
    """Writes the launch that notes in `noted`, an int32 for each block of queries and of keys,
    whether the mask shows something there."""

    def __init__(
        self, plan: Plan, emitter: StoredOperands, rows: int, columns: int, noted: str
    ) -> None:
        super().__init__(plan, emitter, noted, AttentionTile(rows, columns, _LOOKING_WARPS))
        assert self.mask is not None
        lead = (1,) * (4 - self.mask.type.rank) + tuple(self.mask.shape)
        told = [at.axes for d, at in zip(lead[:2], plan.place[:2]) if d != 1]
        self.heads = tuple(a for a in plan.outer if any(a in axes for axes in told))
        self.blocks = (parts_of(self.queries, rows), parts_of(self.keys, columns))
        self.size: Dim = product((*self.blocks, *(a.extent for a in self.heads)))

    def write(self) -> Program:
        emitter, block, plan = self.emitter, self.top.block, self.plan
        tile = self.tile
        queries, keys = (size_text(b) for b in self.blocks)
        wide = ".to(tl.int64)" if emitter.kind == "int64" else ""
        block.line(f"part = tl.program_id(0){wide}")
        block.line(f"first = part // {keys} % {queries} * ROWS")
        block.line(f"start = part % {keys} * COLS")
        if self.heads:
            block.line(f"head = part // {keys} // {queries}")
            groups = merged(self.heads, plan.reads, set(plan.fixed))
            decompose(Expr("head", emitter.kind), groups, block, emitter.addresses)
        block.line("row = first + tl.arange(0, ROWS)[:, None]")
        self._bind(plan.place[2], "row", ROW, self.queries, tile.rows)
        block.line("key = start + tl.arange(0, COLS)[None, :]")
        past = over(self.keys, tile.columns)
        self._bind(plan.key[2], "key", COL, self.keys if past else 0, tile.columns)
        self.top.axes = frozenset((*self.heads, *plan.place[2].axes, *plan.key[2].axes))
        assert self.mask is not None
        keep = [self._shown(self.mask).text]
        keep += ["row_ok"] if over(self.queries, tile.rows) else []
        keep += self._cuts(block, Span("", "", True), "key_ok" if past else "")
        block.line(f"seen = tl.broadcast_to({' & '.join(keep)}, [ROWS, COLS]).to(tl.int32)")
        block.line(f"tl.store({self.target} + part, tl.max(tl.max(seen, axis=1), axis=0))")
        return Program(block.source(), [], {"ROWS": tile.rows, "COLS": tile.columns}, self.size,
                       _LOOKING_WARPS, list(emitter.used), emitter.checks)  # fmt: skip
