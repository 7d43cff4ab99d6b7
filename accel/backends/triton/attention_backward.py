"""Writes the two programs of attention's gradients (see `attention_training`).

With weights p = exp(s - logsumexp), the gradient g of the output and d = sum(g * y) of each query:

    v' = p^T g        t = p * (g v^T - d)        q' = scale * t k        k' = scale * t^T q

and t is times 1 - tanh^2 where scores are capped.
"""

from __future__ import annotations

import math

from accel.backends.loops.index import Affine
from accel.backends.loops.merge import merged
from accel.backends.loops.trace import Index
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import decompose, size_text
from accel.backends.triton.attention_loop import AttentionWriter, Side, Span, over, padded
from accel.backends.triton.attention_plan import Plan
from accel.backends.triton.attention_tiles import AttentionTile
from accel.backends.triton.emitter import Scope
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import parts_of
from accel.ir.types import product

_LOG2E = math.log2(math.e)


class GradientWriter(AttentionWriter):
    """What both programs share. `sums` is where each query's sum(g * y) is kept."""

    def __init__(
        self, plan: Plan, emitter: StoredOperands, target: str, tile: AttentionTile, sums: str
    ) -> None:
        super().__init__(plan, emitter, target, tile)
        self.sums = sums
        self.grad, _, _, _, self.output, self.logsumexp, _ = plan.op.arguments()
        self.kind = dtypes.storage(self.q.dtype)
        self.bent = self.facts.softcap is not None

    def _capped(self, body: Block, cap: float) -> None:
        body.line(f"bent = score * {1 / cap!r}")
        body.line("bent = 1.0 - bent * bent")

    def _weigh(self, body: Block) -> None:
        """Weights from scores: a query without keys has a logsumexp of -inf, and weights of 0."""
        times = f" * {self.factor!r}" if self.factor != 1.0 else ""
        body.line(f"weight = tl.exp2(score{times} - total)")

    def _logsumexp(self, block: Block, index: Index) -> None:
        """`total`, the logsumexp in units of log 2."""
        self.emitter.raw = True
        total = self.emitter.element(self.logsumexp, index)
        self.emitter.raw = False
        block.line(f'total = tl.where({total} == float("-inf"), 0.0, {total}) * {_LOG2E!r}')

    def _slope(self, body: Block) -> None:
        body.line("slope = (slope - delta) * weight" + (" * bent" if self.bent else ""))


class QueryGradient(GradientWriter):
    """A program owns queries: `attention_loop`'s walk over keys."""

    def _sums(self, block: Block) -> None:
        emitter, plan = self.emitter, self.plan
        place = (*plan.place[:3], plan.column)
        with emitter.inside(Scope(block, self.top.axes | plan.column.axes)):
            for name, value in (("gradient", self.grad), ("output", self.output)):
                block.line(f"{name} = {self._operand(value, place, '[ROWS, WIDTH]')}")
        block.line("delta = gradient.to(tl.float32) * output.to(tl.float32)")
        block.line("delta = tl.sum(delta, axis=1, keep_dims=True)")
        flat = plan.indexer.flatten(plan.place[:3], self.q.shape[:3])
        self._store_rows("delta", self.sums, emitter.addresses.code(flat))
        self._logsumexp(block, plan.place[:3])
        block.line("acc = tl.zeros([ROWS, DEPTH], tl.float32)")

    def _softmax(self, body: Block, span: Span) -> None:
        self._weigh(body)

    def _add(self, body: Block, keys: Expr, values: Expr) -> None:
        body.line(f"slope = tl.dot(gradient, tl.trans({values}){self.precise})")
        self._slope(body)
        slope = f"slope.to(tl.{self.kind})"
        body.line(f"acc = tl.dot({slope}, tl.trans({keys}), acc{self.precise})")

    def _finish(self) -> None:
        self.emitter.block.line(f"acc = acc * {self.facts.scale!r}")
        row = Side("row", self.queries, self.tile.rows, self.plan.place[2])
        column = Side("across", self.depth, padded(self.depth), self.plan.query[3])
        self._store("acc", self.target, self.plan.address, row, column)


class KeyGradients(GradientWriter):
    """A program owns keys. Scores are keys down, queries across; `tile.rows` is its keys."""

    values_target: str
    values_address: Affine

    def write(self) -> Program:
        tile, plan, block = self.tile, self.plan, self.top.block
        assert isinstance(tile, AttentionTile)
        self._place()
        self._own()
        each = plan.place[1].axes - plan.key[1].axes
        body = block if not each else Block(block.names)
        with self.emitter.inside(Scope(body, self.top.axes | each)):
            if each:
                self.emitter.addresses.bind(tuple(each), Expr("each", self.emitter.kind))
            for span in self._spans():
                inner = Block(block.names)
                self._step(inner, span)
                steps = f"tl.range({span.first}, {span.last}, ROWS, num_stages={tile.stages})"
                body.nest(f"for start in {steps}:", inner)
        if each:
            share = next(iter(each)).extent
            block.nest(f"for each in range({size_text(share)}):", body)
        self._finish()
        programs = product((parts_of(self.keys, tile.rows), *(a.extent for a in plan.outer)))
        constants = {"ROWS": tile.columns, "COLS": tile.rows, "DEPTH": padded(self.depth),
                     "WIDTH": padded(self.width)}  # fmt: skip
        return Program(block.source(), [], constants, programs, tile.warps,
                       list(self.emitter.used), self.emitter.checks)  # fmt: skip

    def _place(self) -> None:
        """Which keys of which head. Under a causal mask the first ones have the most queries."""
        emitter, block, outer = self.emitter, self.emitter.block, self.plan.outer
        wide = ".to(tl.int64)" if emitter.kind == "int64" else ""
        blocks = size_text(parts_of(self.keys, self.tile.rows))
        block.line(f"part = tl.program_id(0){wide}")
        block.line(f"first = (part % {blocks}) * COLS")
        if outer:
            block.line(f"head = part // {blocks}")
            groups = merged(outer, self.plan.reads, set(self.plan.fixed))
            decompose(Expr("head", emitter.kind), groups, block, emitter.addresses)
        block.line("key = first + tl.arange(0, COLS)[:, None]")
        self._bind(self.plan.key[2], "key", ROW, self.keys, self.tile.rows)
        self.top.axes = frozenset((*outer, *self.plan.key[2].axes))

    def _own(self) -> None:
        """The keys and values, and what their gradients add up in."""
        emitter, plan, block = self.emitter, self.plan, self.emitter.block
        for name, size, extent, at in (
            ("across", "DEPTH", self.depth, plan.key[3]),
            ("col", "WIDTH", self.width, plan.column),
        ):
            block.line(f"{name} = tl.arange(0, {size})[None, :]")
            self._bind(at, name, COL, extent, padded(extent))
        for name, value, index, size in (
            ("keys", self.k, plan.key, "DEPTH"), ("values", self.v, plan.value, "WIDTH"),
        ):  # fmt: skip
            with emitter.inside(Scope(block, self.top.axes | index[3].axes)):
                block.line(f"{name} = {self._operand(value, index, f'[COLS, {size}]')}")
        block.line("acc = tl.zeros([COLS, DEPTH], tl.float32)")
        block.line("more = tl.zeros([COLS, WIDTH], tl.float32)")

    def _spans(self) -> list[Span]:
        """The loops over queries; their bounds are written before."""
        block, queries = self.emitter.scopes[0].block, size_text(self.queries)
        past = over(self.queries, self.tile.columns)
        low, high = "0", queries
        whole_low, whole_high = "0", f"{queries} // ROWS * ROWS"
        if self.causal:  # a key is seen from the queries at its place and after it
            low = "first // ROWS * ROWS"
            whole_low = "(first + COLS + ROWS - 2) // ROWS * ROWS"
        if self.window is not None:
            high = f"tl.minimum(first + COLS + {self.window - 1}, {queries})"
            whole_high = f"tl.minimum(first + {self.window}, {queries}) // ROWS * ROWS"
        block.line(f"low = {low}")
        block.line(f"high = {high}")
        block.line(f"whole = tl.minimum({whole_low}, high)")
        block.line(f"whole_high = tl.maximum({whole_high}, whole)")
        spans = [Span("whole", "whole_high", False)]
        if self.causal:
            spans.insert(0, Span("low", "whole", True))
        if past or self.window is not None:
            spans.append(Span("whole_high", "high", True))
        return spans

    def _step(self, body: Block, span: Span) -> None:
        """A block of queries."""
        emitter, plan = self.emitter, self.plan
        bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
        known = emitter.scopes[-1].axes
        extent, columns = self.queries if span.cut else 0, self.tile.columns
        past = span.cut and over(self.queries, columns)
        line, row = plan.query[2], plan.place[2]
        inner = line.axes | plan.query[3].axes | plan.column.axes
        with emitter.inside(Scope(body, known | inner)):
            body.line("line = start + tl.arange(0, ROWS)[:, None]")
            self._bind(line, "line", ROW, extent, columns)
            query = self._operand(self.q, plan.query, "[ROWS, DEPTH]")
            place = (*plan.query[:3], plan.column)
            gradient = self._operand(self.grad, place, "[ROWS, WIDTH]")
            body.line(f"score = tl.dot(keys, tl.trans({query}){self.precise})")
        with emitter.inside(Scope(body, known | row.axes)):
            body.line("row = start + tl.arange(0, ROWS)[None, :]")
            self._bind(row, "row", COL, extent, columns)
            self._scores(body, span, "row_ok" if past else "")
            self._logsumexp(body, plan.place[:3])
            flat = plan.indexer.flatten(plan.place[:3], self.q.shape[:3])
            code = emitter.addresses.code(flat)
            mask = ", mask=row_ok, other=0.0" if past and row.axes else ""
            body.line(f"delta = tl.load({self.sums} + {code}{mask})")
        self._weigh(body)
        body.line(f"more = tl.dot(weight.to(tl.{self.kind}), {gradient}, more{self.precise})")
        body.line(f"slope = tl.dot(values, tl.trans({gradient}){self.precise})")
        self._slope(body)
        body.line(f"acc = tl.dot(slope.to(tl.{self.kind}), {query}, acc{self.precise})")
        emitter.addresses.groups, emitter.masks = bound, masks

    def _finish(self) -> None:
        self.emitter.block.line(f"acc = acc * {self.facts.scale!r}")
        key = Side("key", self.keys, self.tile.rows, self.plan.key[2])
        across = Side("across", self.depth, padded(self.depth), self.plan.key[3])
        column = Side("col", self.width, padded(self.width), self.plan.column)
        self._store("acc", self.target, self.plan.address, key, across)
        self._store("more", self.values_target, self.values_address, key, column)
