"""The last phase of cached attention whose keys several tasks share: what they left is added up."""

from __future__ import annotations

import math as pymath

from accel.backends.tvm import math, scalar, tir
from accel.backends.tvm.attention import AttentionPhase
from accel.backends.tvm.cached_nest import CachedNest, row_of_sums, split_row
from accel.backends.tvm.code import Emitter
from accel.backends.tvm.tir import Block, Buffer, Expr, select
from accel.ir.types import product


class MergeNest(CachedNest):
    """Emits a `MergePhase`: a row is the result of one query of one head."""

    def __init__(self, phase: AttentionPhase, emitter: Emitter, result: Buffer) -> None:
        super().__init__(phase, emitter, result)
        assert self.left is not None
        self.rows = product(self.left.shape[:3])
        self.cost = product((self.parts, self.width // 4))

    def emit(self, begin: Expr, end: Expr) -> Block:
        emitter, row = self.emitter, tir.var("row")
        places = [i.single_axis for i in (self.batch, self.head, self.query)]
        axes = [a for a in places if a is not None]
        with emitter.scope(axes, guarded=True) as body:
            rest: Expr = row
            for axis in reversed(axes):
                rest, place = split_row(body, rest, self.sizes.code(axis.extent))
                emitter.addresses.bind((axis,), place)
            self._merge(row)
        emitter.block.loop(row, end - begin, body, begin)
        return emitter.scopes[0].block

    def _merge(self, row: Expr) -> None:
        emitter, block, width = self.emitter, self.emitter.block, self.width
        assert self.left is not None
        source, size = emitter.buffers[self.left], row_of_sums(width)
        starts = [
            block.let((row * tir.i64(self.parts) + tir.i64(part)) * tir.i64(size), "start")
            for part in range(self.parts)
        ]
        tops = [block.let(tir.load(source, s + tir.i64(width)), "top") for s in starts]
        best = tops[0]
        for top in tops[1:]:
            best = block.let(scalar.maximum(best, top), "best")
        # Without any key the maximum is -inf, and -inf - -inf is NaN.
        origin = block.let(select(tir.eq(best, tir.f32(-pymath.inf)), tir.f32(0.0), best), "origin")
        shares = [
            block.let(math.exp(block.let(top - origin, "fall"), block), "share") for top in tops
        ]
        total: Expr = tir.f32(0.0)
        for start, share in zip(starts, shares):
            total = total + share * tir.load(source, start + tir.i64(width + 1))
        inverse = self._inverse(block.let(total, "total"))
        sums = tir.local_array("sums", width, "float32")
        block.allocate(sums)

        def add(inner: Block, lane: Expr) -> None:
            terms = [s * tir.load(source, a + lane) for a, s in zip(starts, shares)]
            inner.store(sums, _added(terms), lane)

        self._each(width, add)
        self._store_row(sums, inverse)


def _added(terms: list[Expr]) -> Expr:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
