"""Attention under sparse masks: a program lists the blocks of keys that it sees, and walks those.

A mask that is computed (texts packed into one row, say: each query sees keys of its own text) costs
little to evaluate, and most of its blocks may be hidden. So a program evaluates it on all blocks
first, and writes down where something is seen; what it walks over then is as the mask is, whatever
it is that makes it sparse, and needs no table that is made before. The list lies in scratch memory,
where only its own program reads it.
"""

from __future__ import annotations

from accel.backends.loops.trace import broadcast_index
from accel.backends.triton.addresses import size_text
from accel.backends.triton.attention_loop import AttentionWriter, Plan, Span, over, padded
from accel.backends.triton.attention_tiles import AttentionTile
from accel.backends.triton.emitter import Scope
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, Block
from accel.backends.triton.tiles import parts_of
from accel.ir.types import Dim, product


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
            index = broadcast_index(plan.place, (0, 0, 0, 0), self.mask.shape)
            keep = [emitter.element(self.mask, index).text]
            keep += self._cuts(body, span, "key_ok" if past else "")
        body.line(f"seen = tl.broadcast_to({' & '.join(keep)}, [ROWS, COLS]).to(tl.int32)")
        body.line("tl.store(listed + count, start)")
        body.line("count += tl.max(tl.max(seen, axis=1), axis=0)")
        emitter.addresses.groups, emitter.masks = bound, masks
