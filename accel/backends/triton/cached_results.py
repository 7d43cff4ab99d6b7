"""The end of a cached attention kernel (see `cached`): results, and sums of what parts leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from accel.backends.loops.phases import Planner
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import decompose
from accel.backends.triton.cached_plan import Plan, through_views
from accel.backends.triton.cached_tiles import Span, Tiles
from accel.backends.triton.emitter import Scope
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import next_power
from accel.ir.module import Op, Value

_COMBINED = 4096  # elements a warp of a tile that adds up parts
_BOTH = frozenset((ROW, COL))


class Results:
    """What is stored once the keys are walked through: the base of the writers."""

    planner: Planner
    plan: Plan
    emitter: Tiles
    tile: Any
    op: Op
    top: Scope
    mask: Value | None
    parts: list[str]
    count: Any
    width: int
    rows: Span
    columns: dict[str, Span]
    constants: dict[str, int]

    @contextmanager
    def _bound(self, *spans: Span, block: Block | None = None) -> Iterator[None]:
        """Binds the axes of the spans, in a scope of their own."""
        emitter = self.emitter
        bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
        known = emitter.scopes[-1].axes.union(*(s.axes for s in spans))
        with emitter.inside(Scope(block or emitter.block, known)):
            for span in spans:
                if span.axes:
                    flat = Expr(span.variable, emitter.kind, frozenset((span.dim,)))
                    groups = [(axis,) for axis in span.axes]
                    decompose(flat, groups, emitter.block, emitter.addresses)
                if span.mask:
                    emitter.masks.update(dict.fromkeys(span.axes, span.mask))
            yield
        emitter.addresses.groups, emitter.masks = bound, masks

    def _finish(self) -> None:
        """The result; if several programs share a head, by the one that is done last."""
        block = self.top.block
        if self.tile.split == 1:
            value = self._quotient("sums", "total", block)
            self._store(value, self.rows, self.columns["WIDTH"], block)
            return
        sums, tops, done = self.parts
        block.line(f"own = (pair * SPLIT + part) * {self.count}")
        mask = " & ".join(s.mask for s in (self.rows, self.columns["WIDTH"]) if s.mask)
        tail = f", mask={mask}" if mask else ""
        block.line(f"tl.store({sums} + (own + row) * {self.width} + e, sums{tail})")
        tail = f", mask={self.rows.mask}" if self.rows.mask else ""
        block.line(f"tl.store({tops} + (own + row) * 2, top{tail})")
        block.line(f"tl.store({tops} + (own + row) * 2 + 1, total{tail})")
        block.line("tl.debug_barrier()")
        block.line(f'arrived = tl.atomic_add({done} + pair, 1, sem="acq_rel")')
        body = Block(block.names)
        body.line(f"tl.store({done} + pair, 0)")
        self._combine(body)
        block.nest("if arrived == SPLIT - 1:", body)

    def _combine(self, body: Block) -> None:
        """Adds up the parts of a head, some columns of all rows at a time."""
        sums, tops, _ = self.parts
        emitter, line, count = self.emitter, body.line, int(self.count)
        lines, width = next_power(count), self.constants["WIDTH"]
        room = _COMBINED * self.tile.warps // (self.tile.split * lines)
        self.constants |= {"LINES": lines, "SPAN": max(1, min(width, room))}
        line("each = (pair * SPLIT + tl.arange(0, SPLIT)[:, None, None]) * " + str(count))
        line("lines = each + tl.arange(0, LINES)[None, :, None]")
        tail = f", mask=lines < each + {count}, other=0.0" if lines > count else ""
        line(f"tops = tl.load({tops} + lines * 2{tail})")
        line(f"totals = tl.load({tops} + lines * 2 + 1{tail})")
        line("highest = tl.max(tops, 0, keep_dims=True)")
        line('highest = tl.where(highest == float("-inf"), 0.0, highest)')
        line("shares = tl.exp2(tops - highest)")
        line("divisor = tl.sum(totals * shares, 0)")
        line("line = tl.arange(0, LINES)[:, None]")
        inner = Block(body.names)
        inner.line("cells = begin + tl.arange(0, SPAN)[None, None, :]")
        masks = [f"(lines < each + {count})"] if lines > count else []
        masks += [f"(cells < {self.width})"] if self.width % self.constants["SPAN"] else []
        tail = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
        inner.line(f"parts = tl.load({sums} + lines * {self.width} + cells{tail})")
        inner.line("whole = tl.sum(parts * shares, 0)")
        inner.line("cell = begin + tl.arange(0, SPAN)[None, :]")
        value = self._quotient("whole", "divisor", inner)
        rows = Span(
            self.plan.rows, "line", ROW, "LINES", f"(line < {count})" if lines > count else ""
        )
        last = emitter.indexer.axis("e", self.width)
        cells = f"(cell < {self.width})" if self.width % self.constants["SPAN"] else ""
        self._store(value, rows, Span((last,), "cell", COL, "SPAN", cells), inner)
        body.nest(f"for begin in range(0, {self.width}, SPAN):", inner)

    def _quotient(self, sums: str, total: str, block: Block) -> Expr:
        """A row that sees no key is zero where a boolean mask hid them all."""
        text = f"{sums} / {total}"
        if self.mask is not None and self.mask.dtype == torch.bool:
            text = f"tl.where({total} > 0.0, {text}, 0.0)"
        return block.let(text, "float32", _BOTH, "result")

    def _store(self, value: Expr, rows: Span, columns: Span, block: Block) -> None:
        emitter, plan = self.emitter, self.plan
        axes = (*rows.axes, *columns.axes)
        index = (plan.lead[0], *plan.query, emitter.indexer.of(axes[-1]))
        result = plan.views[-1].result if plan.views else self.op.result
        place = through_views(self.planner, plan.views, index)
        made = dtypes.to_storage(value, self.op.result.dtype, block)
        with self._bound(rows, columns, block=block):
            code = emitter.addresses.code(emitter.indexer.flatten(place, result.shape))
        mask = " & ".join(s.mask for s in (rows, columns) if s.mask)
        tail = f", mask={mask}" if mask else ""
        spread = "" if rows.axes else f" + {rows.variable} * 0"  # a pointer for every lane
        block.line(f"tl.store(y{plan.result} + {code}{spread}, {made}{tail})")
