"""Rotary embedding of an attention's queries, on their way from shared memory to registers.

Each group of warps takes its queries out of shared memory once, turns them, and multiplies them
from registers: what a program loads once anyway need not be turned, written and read by a launch of
its own. Nothing is written back, so that the copies need no fence. Cosines and sines come from
memory while the copy of the queries is under way; element i of a head pairs with i + D / 2 (style
"half"), so that both halves of a row are tiles of one layout, each multiplied with its half of the
keys.

    near = first half * cos - second half * sin      far = second half * cos + first half * sin
"""

from __future__ import annotations

from collections.abc import Sequence

from accel.backends.loops.trace import broadcast_index
from accel.backends.triton import dtypes
from accel.backends.triton.attention_parts import PartsWriter
from accel.backends.triton.emitter import Scope
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.ir.module import Value

TURNED_DEPTH = 128  # halves of 64 elements are the width of what TMA swizzles
_FREE = "mbarrier.arrive(query_free.index(which), count=1)"
_NAMES = ("cos_near", "sin_near", "cos_far", "sin_far")


class TurnedQueries(PartsWriter):
    """Writes the functions `angles` and `rotate`, where a region turns its queries."""

    angles: tuple[str, ...] = ()  # pointers that cosines and sines are read through

    def _turning(self) -> list[str]:
        if self.plan.turn is None:
            return []
        threads = self.depth // 2 // 8
        layout = f"[1, 8], [{32 // threads}, {threads}], [4, 1], [1, 0]"
        constants = f"HALF = tl.constexpr({self.depth // 2})\n" \
                    f"TURNED = tl.constexpr(tl.BlockedLayout({layout}))\n" \
                    "QUERIES = tl.constexpr(tl.DotOperandLayout(0, SCORES, 2))"  # fmt: skip
        return [constants, self._angles_function(), self._turn_function()]

    def _angles_function(self) -> str:
        emitter, plan = self.emitter, self.plan
        turn, across = plan.turn, plan.query[3].single_axis
        assert turn is not None and across is not None
        body = Block(self.top.block.names)
        bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
        known = frozenset((*plan.outer, *plan.query[2].axes, across))
        body.line("row = first + which * 64 + "
                  "tl.arange(0, 64, tl.SliceLayout(1, TURNED))[:, None]")  # fmt: skip
        with emitter.inside(Scope(body, known)):
            self._bind(plan.query[2], "row", ROW, self.queries, self.tile.rows)
        body.line("near = tl.arange(0, HALF, tl.SliceLayout(0, TURNED))[None, :]")
        body.line("far = near + HALF")
        made: list[str] = []
        rows = list(emitter.addresses.groups)
        emitter.raw = True
        for name in ("near", "far"):
            emitter.addresses.groups = list(rows)
            with emitter.inside(Scope(body, known)):
                emitter.addresses.bind((across,), Expr(name, emitter.kind, frozenset((COL,))))
                made += [
                    emitter.element(t, broadcast_index(plan.query, self.q.shape, t.shape)).text
                    for t in turn.operands[1:]
                ]
        emitter.raw = False
        emitter.addresses.groups, emitter.masks = bound, masks
        read = (emitter.pointers[_argument(t)] for t in turn.operands[1:])
        self.angles = tuple(dict.fromkeys(read))
        head = self._arguments("which: tl.constexpr", *self.names, *self.angles)
        return self._function(f"angles({head})", body, ", ".join(made))

    def _turn_function(self) -> str:
        dtype = f"tl.{dtypes.storage(self.q.dtype)}"
        body = Block(self.top.block.names)
        body.lines = [
            "one = query.slice(0, HALF, dim=1).load(TURNED).to(tl.float32)",
            "two = query.slice(HALF, HALF, dim=1).load(TURNED).to(tl.float32)",
            f"near = (one * cos_near.to(tl.float32) - two * sin_near.to(tl.float32)).to({dtype})",
            f"far = (two * cos_far.to(tl.float32) + one * sin_far.to(tl.float32)).to({dtype})",
            "return tl.convert_layout(near, QUERIES), tl.convert_layout(far, QUERIES)",
        ]
        return self._function(f"rotate(query, {', '.join(_NAMES)})", body)

    def _queries(self) -> str:
        """What the groups multiply keys with."""
        return "query" if self.plan.turn is None else "near, far"

    def _before_queries(self) -> list[str]:
        """What is read while the queries are on their way."""
        if self.plan.turn is None:
            return []
        where = self._arguments("which", *self.names, *self.angles)
        return [f"{', '.join(_NAMES)} = angles({where})"]

    def _turned(self) -> list[str]:
        """What is done to the queries when they have come; the next ones may come after that."""
        if self.plan.turn is None:
            return []
        return [f"near, far = rotate(query, {', '.join(_NAMES)})", _FREE]

    def _after_queries(self) -> list[str]:
        """When they have been multiplied for the last time."""
        return [_FREE] if self.plan.turn is None else []

    def _score_products(self) -> list[str]:
        """A block of keys is multiplied with the queries."""
        if self.plan.turn is None:
            return ["score = warpgroup_mma(query, keys.index(slot).permute([1, 0]), zero, "
                    "use_acc=False, is_async=True)"]  # fmt: skip
        half = "keys.index(slot).slice({}, HALF, dim=1).permute([1, 0])"
        return [
            f"score = warpgroup_mma(near, {half.format(0)}, zero, use_acc=False, is_async=True)",
            f"score = warpgroup_mma(far, {half.format('HALF')}, score, is_async=True)",
        ]

    def _all(self, loads: Sequence[str]) -> list[str]:
        """All pointers that the groups read through: those of the mask, cosines and sines."""
        return list(dict.fromkeys([*loads, *self.angles]))


def _argument(value: Value) -> Value:
    """What is behind the views."""
    while value.op is not None:
        value = value.op.operands[0]
    return value
