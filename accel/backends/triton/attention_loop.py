"""Writes attention: scores, softmax and the weighted sum of values in one pass.

FlashAttention-2's structure (Dao, 2023): a program holds ROWS queries of one head and walks over
the keys in blocks of COLS, with a running maximum and sum (Milakov & Gimelshein, 2018), so that
scores never leave the registers. They are in units of log 2, so that a weight is one `exp2`.

Blocks of keys that a causal or sliding mask hides from all of a program's queries are not visited.
Of the others most are seen whole and compare no positions: the walk is up to three loops, over
blocks that the window cuts, whole ones, and blocks that the diagonal or the end of the keys cuts.
Queries, keys and values are read through their views (the head split, a fused projection), the mask
is traced like any elementwise region (a bias of positions costs no memory), and the result is
written through the views that follow (the head merge). Programs with the most keys start first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from accel.backends.loops.index import Affine
from accel.backends.loops.merge import merged
from accel.backends.loops.trace import Index, broadcast_index
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import decompose, size_text
from accel.backends.triton.attention_op import facts_of
from accel.backends.triton.attention_plan import Plan
from accel.backends.triton.attention_tiles import AttentionTile, Tile
from accel.backends.triton.emitter import Scope
from accel.backends.triton.operands import StoredOperands, is_stored
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import next_power, parts_of
from accel.ir.module import Value
from accel.ir.types import Dim, product

_LOG2E = math.log2(math.e)
_BOTH = frozenset((ROW, COL))


# -- the code --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """One loop over blocks of keys: its bounds as source, and what it compares.

    `tail` is the size of the only block, where keys are left that fill no whole one: 197 keys are
    3 blocks of 64 and one of 16.
    """

    first: str
    last: str
    cut: bool  # the diagonal, the window or the end of the keys may cut its blocks
    tail: int = 0


@dataclass(frozen=True)
class Side:
    """One side of a tile in memory: its variable, how many there are, its size and its index."""

    name: str
    extent: Dim
    size: int
    at: Affine


class AttentionWriter:
    """Writes the one program of an attention kernel."""

    def __init__(self, plan: Plan, emitter: StoredOperands, target: str, tile: Tile):
        self.plan, self.emitter, self.target, self.tile = plan, emitter, target, tile
        self.op = plan.op
        self.facts = facts = facts_of(plan.op)
        self.q, self.k, self.v, self.mask = facts.q, facts.k, facts.v, facts.mask
        self.queries, self.keys = self.q.shape[2], self.k.shape[2]
        self.depth, self.width = int(self.q.shape[3]), int(self.v.shape[3])
        self.causal, self.window, self.offset = facts.causal, facts.window, facts.offset
        self.factor = self._lazy_factor()
        self.precise = ', input_precision="ieee"' if self.q.dtype == torch.float32 else ""
        self.top = emitter.scopes[0]

    def write(self) -> Program:
        top, tile = self.top, self.tile
        assert isinstance(tile, AttentionTile)
        self._place()
        self._start()
        spans = self._spans()
        for span in spans:
            body = Block(top.block.names)
            self._step(body, span)
            if span.tail:
                top.block.lines += [f"start = {span.first}", *body.lines]
                continue
            steps = f"tl.range({span.first}, {span.last}, COLS, num_stages={tile.stages})"
            top.block.nest(f"for start in {steps}:", body)
        self._finish()
        blocks = parts_of(self.queries, tile.rows)
        programs = product((blocks, *(a.extent for a in self.plan.outer)))
        constants = {"ROWS": tile.rows, "COLS": tile.columns, "DEPTH": padded(self.depth),
                     "WIDTH": padded(self.width)}  # fmt: skip
        if spans[-1].tail:
            constants["TAIL"] = spans[-1].tail
        return Program(top.block.source(), [], constants, programs, tile.warps,
                       list(self.emitter.used), self.emitter.checks)  # fmt: skip

    # -- what a program has ----------------------------------------------------------------

    def _place(self) -> None:
        """Which queries of which head this program computes."""
        emitter, block = self.emitter, self.emitter.block
        wide = ".to(tl.int64)" if emitter.kind == "int64" else ""
        block.line(f"part = tl.program_id(0){wide}")
        self._part(block)
        block.line("row = first + tl.arange(0, ROWS)[:, None]")
        self._bind(self.plan.place[2], "row", ROW, self.queries, self.tile.rows)
        self.top.axes = frozenset((*self.plan.outer, *self.plan.place[2].axes))

    def _part(self, block: Block) -> None:
        """The first query and the head of a part of the work; the longest parts come first."""
        emitter, outer = self.emitter, self.plan.outer
        blocks = size_text(parts_of(self.queries, self.tile.rows))
        heads = size_text(product(a.extent for a in outer))
        inner, number = (f"part // {blocks}", f"part % {blocks}")
        if self.tile.across:
            inner, number = (f"part % {heads}", f"part // {heads}")
        turned = f"{blocks} - 1 - {number}" if self.causal else number
        block.line(f"first = ({turned}) * ROWS")
        if outer:
            block.line(f"head = {inner}")
            groups = merged(outer, self.plan.reads, set(self.plan.fixed))
            decompose(Expr("head", emitter.kind), groups, block, emitter.addresses)

    def _bind(self, at: Affine, variable: str, dim: str, extent: Dim, size: int) -> None:
        """An axis as the range `variable`, and its mask where blocks of `size` overrun it."""
        axis = at.single_axis
        if over(extent, size):
            self.emitter.block.line(f"{variable}_ok = {variable} < {size_text(extent)}")
            if axis is not None:
                self.emitter.masks[axis] = f"{variable}_ok"
        if axis is not None:
            self.emitter.addresses.bind(
                (axis,), Expr(variable, self.emitter.kind, frozenset((dim,)))
            )

    def _start(self) -> None:
        """The queries, and the axes of heads."""
        emitter, block = self.emitter, self.emitter.block
        block.line("across = tl.arange(0, DEPTH)[None, :]")
        self._bind(self.plan.query[3], "across", COL, self.depth, padded(self.depth))
        with emitter.inside(Scope(block, self.top.axes | self.plan.query[3].axes)):
            read = self._operand if is_stored(self.q) else self._computed
            query = read(self.q, self.plan.query, "[ROWS, DEPTH]")
            block.line(f"query = {query}")
        block.line("depth = tl.arange(0, DEPTH)[:, None]")
        self._bind(self.plan.key[3], "depth", ROW, self.depth, padded(self.depth))
        block.line("col = tl.arange(0, WIDTH)[None, :]")
        self._bind(self.plan.column, "col", COL, self.width, padded(self.width))
        self._sums(block)

    def _sums(self, block: Block) -> None:
        """The state of the softmax: nothing seen yet."""
        best, total = self._first_sum(block)
        block.line(f"best = tl.full([ROWS, 1], {best}, tl.float32)")
        block.line(f"total = tl.full([ROWS, 1], {total}, tl.float32)")
        block.line("acc = tl.zeros([ROWS, WIDTH], tl.float32)")

    def _first_sum(self, block: Block) -> tuple[str, str]:
        """The maximum and the sum before any key: none, or those of the sink."""
        if self.facts.sinks is None:
            return 'float("-inf")', "0.0"
        with self.emitter.inside(Scope(block, frozenset(self.plan.outer))):
            sink = self.emitter.element(self.facts.sinks, (self.plan.place[1],))
            block.line(f"sink = {sink} * {_LOG2E!r}")
        return "sink", "1.0"

    def _spans(self) -> list[Span]:
        """The loops over keys; their bounds are written to the program."""
        block, keys = self.emitter.block, size_text(self.keys)
        whole = not over(self.keys, self.tile.columns)
        stop = "stop" if self.causal else keys
        offset = size_text(self.offset)
        high = f"{keys} // COLS * COLS"
        if self.causal:
            # Query i sees keys up to i + offset.
            block.line(f"stop = tl.minimum(tl.maximum(first + ROWS + {offset}, 0), {keys})")
            block.line(f"full = tl.minimum(tl.maximum(first + 1 + {offset}, 0), {keys})")
            high = "full // COLS * COLS"
        elif whole:
            high = keys
        if self.window is None:
            block.line(f"full_stop = {high}")
            spans = [Span("0", "full_stop", False)]
        else:
            # Query i sees keys after i + offset - window.
            behind = f"{offset} - {self.window}"
            block.line(f"low = tl.maximum(first + 1 + {behind}, 0) // COLS * COLS")
            block.line(
                f"full_low = (tl.maximum(first + ROWS + {behind}, 0) + COLS - 1) // COLS * COLS"
            )
            block.line(f"full_stop = tl.maximum({high}, low)")
            block.line("full_low = tl.minimum(full_low, full_stop)")
            spans = [Span("low", "full_low", True), Span("full_low", "full_stop", False)]
        if self.causal or not whole:
            spans.append(Span("full_stop", stop, True, self._tail()))
        return spans

    def _tail(self) -> int:
        """The size of a last block for the keys that fill no whole one; 0 where that is no gain."""
        if self.causal or self.window is not None or not isinstance(self.keys, int):
            return 0
        size = max(16, next_power(self.keys % self.tile.columns))
        return size if size < self.tile.columns else 0

    # -- one block of keys -----------------------------------------------------------------

    def _step(self, body: Block, span: Span) -> None:
        emitter, plan = self.emitter, self.plan
        bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
        known = frozenset((*self.top.axes, *plan.key[2].axes))
        size, columns = ("TAIL", span.tail) if span.tail else ("COLS", self.tile.columns)
        past = span.cut and over(self.keys, columns)
        extent = self.keys if past else 0
        with emitter.inside(Scope(body, known | plan.key[3].axes)):
            body.line(f"key = start + tl.arange(0, {size})[None, :]")
            self._bind(plan.key[2], "key", COL, extent, columns)
            keys = self._operand(self.k, plan.key, f"[DEPTH, {size}]")
            body.line(f"score = tl.dot(query, {keys}{self.precise})")
        with emitter.inside(Scope(body, known)):
            self._scores(body, span, "key_ok" if past else "")
        self._softmax(body, span)
        inner = plan.value[2].axes | plan.column.axes
        with emitter.inside(Scope(body, frozenset((*plan.outer, *inner)))):
            body.line(f"place = start + tl.arange(0, {size})[:, None]")
            self._bind(plan.value[2], "place", ROW, extent, columns)
            values = self._operand(self.v, plan.value, f"[{size}, WIDTH]")
            self._add(body, keys, values)
        emitter.addresses.groups, emitter.masks = bound, masks

    def _add(self, body: Block, keys: Expr, values: Expr) -> None:
        """The weighted values of a block."""
        kind = dtypes.storage(self.v.dtype)
        body.line(f"acc = tl.dot(weight.to(tl.{kind}), {values}, acc{self.precise})")

    def _operand(self, value: Value, index: Index, shape: str) -> Expr:
        """A tile as it is stored, 0 beyond the ends."""
        emitter = self.emitter
        emitter.raw = True
        made = emitter.element(value, index)
        emitter.raw = False
        if made.dims != _BOTH:
            text = f"tl.broadcast_to({made}, {shape})"
            made = emitter.block.let(text, "stored", _BOTH, "operand")
        return made

    def _computed(self, value: Value, index: Index, shape: str) -> Expr:
        """As `_operand`, of what is computed in the kernel: turned queries."""
        emitter, block = self.emitter, self.emitter.block
        made = dtypes.to_storage(emitter.element(value, index), value.dtype, block)
        inside = emitter.mask(frozenset(a for one in index for a in one.axes))
        return Expr(f"tl.where({inside}, {made}, 0.0)" if inside else made.text, "stored", _BOTH)

    def _lazy_factor(self) -> float:
        """What scores are multiplied with on their way into `exp2`: one operation with the
        subtraction of the maximum. 1 where they are scaled before."""
        scale = self.facts.scale
        biased = self.mask is not None and self.mask.dtype != torch.bool
        if biased or self.facts.softcap is not None or scale <= 0:
            return 1.0
        return scale * _LOG2E

    def _scale_and_bias(self, body: Block) -> str:
        """Scale (in units of log 2), cap, bias; and the condition of a boolean mask, or ""."""
        scale, cap = self.facts.scale, self.facts.softcap
        if cap is not None:
            # cap * tanh(x) with tanh(x) = 1 - 2 / (1 + exp(2 x)).
            body.line(f"score = tl.exp2(score * {2 * scale / cap * _LOG2E!r})")
            body.line(f"score = {cap * _LOG2E!r} - {2 * cap * _LOG2E!r} / (1.0 + score)")
            self._capped(body, cap * _LOG2E)
        elif self.factor == 1.0:
            body.line(f"score = score * {scale * _LOG2E!r}")
        if self.mask is None:
            return ""
        made = self._shown(self.mask)
        if self.mask.dtype == torch.bool:
            return made.text
        body.line(f"score = score + {made} * {_LOG2E!r}")
        return ""

    def _shown(self, mask: Value) -> Expr:
        """The mask of a block."""
        return self.emitter.element(
            mask, broadcast_index(self.plan.place, (0, 0, 0, 0), mask.shape)
        )

    def _capped(self, body: Block, cap: float) -> None:
        """After capped scores: what a gradient needs of them."""

    def _scores(self, body: Block, span: Span, inside: str) -> None:
        """Scale, cap, mask; `inside` is a condition of its own, or ""."""
        keep = [k for k in (self._scale_and_bias(body), *self._cuts(body, span, inside)) if k]
        if keep:
            body.line(f'score = tl.where({" & ".join(keep)}, score, float("-inf"))')

    def _cuts(self, body: Block, span: Span, inside: str) -> list[str]:
        """What the ends, the diagonal and the window leave of a block."""
        keep = [inside] if inside else []
        if span.cut and (self.causal or self.window is not None):
            body.line(f"distance = key - row - {size_text(self.offset)}")
        if span.cut and self.causal:
            keep.append("(distance <= 0)")
        if span.cut and self.window is not None:
            keep.append(f"(distance > -{self.window})")
        return keep

    def _softmax(self, body: Block, span: Span) -> None:
        """Moves the running maximum; scores become weights, sums and results are rescaled."""
        times = f" * {self.factor!r}" if self.factor != 1.0 else ""
        body.line(f"top = tl.maximum(best, tl.max(score, axis=1, keep_dims=True){times})")
        origin = "top"
        if span.cut or self.mask is not None:
            # A row without any key so far has -inf as its maximum, and -inf - -inf is NaN.
            body.line('origin = tl.where(top == float("-inf"), 0.0, top)')
            origin = "origin"
        body.line(f"weight = tl.exp2(score{times} - {origin})")
        body.line(f"shrink = tl.exp2(best - {origin})")
        body.line("total = total * shrink + tl.sum(weight, axis=1, keep_dims=True)")
        body.line("acc = acc * shrink")
        body.line("best = top")

    # -- the result ------------------------------------------------------------------------

    def _finish(self) -> None:
        block = self.emitter.block
        if self._may_be_empty():
            block.line("acc = acc * (1.0 / tl.where(total == 0.0, 1.0, total))")
        else:
            block.line("acc = acc * (1.0 / total)")
        row = Side("row", self.queries, self.tile.rows, self.plan.place[2])
        column = Side("col", self.width, padded(self.width), self.plan.column)
        self._store("acc", self.target, self.plan.address, row, column)

    def _store(self, tile: str, target: str, address: Affine, row: Side, column: Side) -> None:
        """A tile of the result's dtype, over a variable down and one across."""
        emitter, block = self.emitter, self.emitter.block
        with emitter.inside(Scope(block, self.top.axes | row.at.axes | column.at.axes)):
            made = dtypes.to_storage(Expr(tile, "float32", _BOTH), self.q.dtype, block)
            mask = " & ".join(f"{s.name}_ok" for s in (row, column) if over(s.extent, s.size))
            code = emitter.addresses.code(address)
            place = f"{target} + {code}"
            for dim, side in ((ROW, row), (COL, column)):
                if dim not in code.dims:
                    place = f"{place} + {side.name} * 0"
            tail = f", mask={mask}" if mask else ""
            block.line(f"tl.store({place}, {made}{tail})")

    def _store_rows(self, rows: str, target: str, address: Expr) -> None:
        """One number a query, in float32."""
        mask = ", mask=row_ok" if over(self.queries, self.tile.rows) else ""
        spread = "" if ROW in address.dims else " + row * 0"
        self.emitter.block.line(f"tl.store({target} + {address}{spread}, {rows}{mask})")

    def _may_be_empty(self) -> bool:
        """Whether a query without keys gives 0 (else 0 / 0, as softmax of -inf)."""
        limited = self.causal or self.window is not None
        return limited or (self.mask is not None and self.mask.dtype == torch.bool)


def over(extent: Dim, size: int) -> bool:
    """Whether blocks of `size` may overrun the extent."""
    return not isinstance(extent, int) or extent % size != 0


def padded(size: int) -> int:
    """A head's size as tiles have it: a power of two that tensor cores take.

    None is filled up to 32: with values of 24 elements, masked so, Triton 3.6's assembler has been
    seen to read a register that nothing writes, and the result was wrong on the device.
    """
    return 64 if 16 < size < 32 else max(16, next_power(size))
