"""Writes attention for Hopper in Gluon: a warp brings tiles, groups of warps work on them.

The walk over keys is that of `attention`; what differs is who does what. One warp brings the
queries and then blocks of keys and values by TMA into a ring of buffers. Each group of four warps
has 64 queries, and multiplies the next block's keys while it computes the softmax of the last
block: the tensor cores and the exponentials of a group overlap, and so do the groups
(FlashAttention-3: Shah et al., 2024). Blocks go from the last to the first, so that the first one
is cut (by the diagonal, or by the end of the keys) and most of the others are not.

    key_ready[slot]  the block has arrived      key_free[slot]  all groups have multiplied it

Triton's Gluon is its lower level: layouts, barriers and copies are written out; what the tracer
emits for a mask is the same in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from accel.backends.triton import dtypes
from accel.backends.triton.addresses import size_text
from accel.backends.triton.attention_loop import over
from accel.backends.triton.attention_plan import Plan
from accel.backends.triton.attention_tiles import OverlappedTile
from accel.backends.triton.attention_turned import TurnedQueries
from accel.backends.triton.dependent import WAIT
from accel.backends.triton.emitter import Scope
from accel.backends.triton.head_tiles import Tiles, fits, operands_of, reason
from accel.backends.triton.maps import MapCode
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.backends.triton.tiles import parts_of
from accel.errors import BackendError
from accel.ir.module import Region, Value
from accel.ir.types import Dim, product

_ROWS = 64  # of a group: what one wgmma takes
_REGISTERS = {
    2: (240, 24),
    3: (160, 32),
    4: (112, 24),
}  # of a working thread, of the warp that brings
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_BARRIERS = ("query_ready", "query_free", "key_ready", "key_free", "value_ready", "value_free")


class OverlappedAttention(TurnedQueries):
    """Writes the one program. Raises BackendError for what `reason` refuses, or operands that are
    no matrices."""

    def __init__(
        self,
        plan: Plan,
        emitter: StoredOperands,
        region: Region,
        target: str,
        tile: OverlappedTile,
        sms: int,
        seen: str = "",
    ) -> None:
        why = reason(plan.op)
        if why is not None:
            raise BackendError(f"no overlapped attention: {why}")
        super().__init__(plan, emitter, region, target, tile)
        self.sms, self.seen = sms, seen
        self.barriers = (*_BARRIERS, "turn") if tile.turns else _BARRIERS
        found, why = operands_of(plan, emitter.indexer, tile)
        if why is not None:
            raise BackendError(f"no overlapped attention: {why}")
        self.tiles = found

    def write(self) -> Program:
        tile, emitter = self.overlapped, self.emitter
        place = self._place_function()
        self.sink = Block(self.top.block.names)
        self.before = self._first_sum(self.sink)
        weigh, loads = self._weigh_function()
        turning = self._turning()
        maps = [self._map(number, one) for number, one in enumerate(self.tiles)]
        parts = product((parts_of(self.queries, tile.rows), *(a.extent for a in self.plan.outer)))
        programs: Dim = parts
        if tile.persistent:
            programs = min(parts, self.sms) if isinstance(parts, int) else self.sms
        laps = self._laps_function(parts, programs)
        helpers = [self._constants(), *laps, place, self._bounds_function(), weigh, *turning,
                   self._bring_function(), self._step_function(loads),
                   self._attend_function(loads)]  # fmt: skip
        reads = [t.value for t in self.tiles] + list(emitter.used)
        return Program(self._main(loads), helpers, {}, programs, 4, list(dict.fromkeys(reads)),
                       emitter.checks, tuple(maps), gluon=True)  # fmt: skip

    # -- parts that functions share --------------------------------------------------------

    def _constants(self) -> str:
        tile = self.overlapped
        values = {"ROWS": tile.rows, "COLS": tile.columns, "DEPTH": self.depth,
                  "WIDTH": self.width, "STAGES": tile.stages, "GROUPS": tile.groups}  # fmt: skip
        lines = [f"{name} = tl.constexpr({value})" for name, value in values.items()]
        form = "tl.NVMMADistributedLayout([3, 0], [4, 1], [16, {}, 16])"
        across = self.width // 8
        lines += [
            f"SCORES = tl.constexpr({form.format(tile.columns)})",
            f"RESULT = tl.constexpr({form.format(self.width)})",
            f"WEIGHTS = tl.constexpr(tl.DotOperandLayout(0, {form.format(self.width)}, 2))",
            *(
                f"BLOCKS_{n} = tl.constexpr(tl.BlockedLayout([1], [32], [{n}], [0]))"
                for n in ((1, 4) if self.seen else ())
            ),
            f"STORED = tl.constexpr(tl.BlockedLayout([1, 8], [{32 // min(across, 32)}, "
            f"{min(across, 32)}], [4, 1], [1, 0]))",
        ]
        return "\n".join(lines)

    def _map(self, number: int, one: Tiles) -> MapCode:
        box = (_ROWS, self.depth) if number == 0 else (self.overlapped.columns, self._wide(number))
        pointer = self.emitter.pointers[one.value]
        return MapCode(f"m{number}", pointer, _NAMES[one.value.dtype], one.rows, one.stride,
                       one.stride, box, shared=True)  # fmt: skip

    def _wide(self, number: int) -> int:
        return self.width if number == 2 else self.depth

    # -- the softmax -----------------------------------------------------------------------

    def _weigh_function(self) -> tuple[str, list[str]]:
        """Scores become weights; and the pointers that the mask is read through."""
        emitter, body = self.emitter, Block(self.top.block.names)
        key_at, row_at = self.plan.key[2], self.plan.place[2]
        bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
        known = frozenset((*self.plan.outer, *row_at.axes, *key_at.axes))
        past = over(self.keys, self.tile.columns) and not self.shifts
        look = Block(body.names)
        with emitter.inside(Scope(look, known)):
            self._bind(row_at, "row", ROW, self.queries if self.mask is not None else 0,
                       self.tile.rows)  # fmt: skip
            self._bind(key_at, "key", COL, self.keys if past else 0, self.tile.columns)
            self.shown = None if self.mask is None else super()._shown(self.mask)
        emitter.addresses.groups, emitter.masks = bound, masks
        loads = [emitter.pointers[v] for v in emitter.used]
        self.look = ""
        if loads and self.shown is not None:  # else it is computed where it is needed
            head = self._arguments("row", "key", *self.names, *loads)
            self.look = self._function(f"look({head})", look, self.shown.text)
            self.shown = replace(self.shown, text="shown")
            look = Block(body.names)
            if past:
                look.line(f"key_ok = key < {size_text(self.keys)}")
        body.lines += look.lines
        keep = self._scale_and_bias(body)
        if keep:
            body.line(f'score = tl.where({keep}, score, float("-inf"))')
        cut = self._cut(past)
        if cut:
            inner = Block(body.names)
            inner.line(f'score = tl.where({cut}, score, float("-inf"))')
            body.nest("if CUT:", inner)
        times = f" * {self.factor!r}" if self.factor != 1.0 else ""
        body.line(f"top = tl.maximum(best, tl.max(score, axis=1){times})")
        # A row without any key so far has -inf as its maximum, and -inf - -inf is NaN.
        guard = 'tl.where(top == float("-inf"), 0.0, top)'
        body.line(f"origin = {guard}" if keep or self.mask is not None else
                  f"origin = {guard} if CUT else top")  # fmt: skip
        body.line(f"weight = tl.exp2(score{times} - origin[:, None])")
        body.line("shrink = tl.exp2(best - origin)")
        body.line("total = total * shrink + tl.sum(weight, axis=1)")
        head = self._arguments("score", "best", "total", "row", self._keys(), *self.names, *loads)
        made = self._function(f"weigh({head}, CUT: tl.constexpr)", body,
                              "weight, shrink, top, total")  # fmt: skip
        return self.look + made, loads

    def _shown(self, mask: Value) -> Expr:
        assert self.shown is not None
        return self.shown

    def _keys(self) -> str:
        """What `weigh` knows of a block of keys."""
        names = ["key", *(["unseen"] if self.shifts else []), *(["shown"] if self.look else [])]
        return ", ".join(names)

    def _block_of_keys(self, block: str, more: str) -> list[str]:
        """Binds those names. The mask is read while the products are under way."""
        return [
            f"key = {self._first_key(block)} + "
            "tl.arange(0, COLS, tl.SliceLayout(0, SCORES))[None, :]",
            *([f"unseen = {block} * COLS"] if self.shifts else []),
            *([f"shown = look(row, key, {more})"] if self.look else []),
        ]

    def _cut(self, past: bool) -> str:
        """What the ends of the keys, the diagonal and the window hide."""
        last = f"row + {self.offset}" if self.offset else "row"
        # No query that is stored sees a key behind the last one, if the last query does not.
        ends = self.causal and fits(self.queries, self.keys, self.offset)
        conditions = ["key_ok"] if past and not ends else []
        conditions += ["(key >= unseen)"] if self.shifts else []
        if self.causal:
            conditions.append(f"(key <= {last})")
        if self.window is not None:
            conditions.append(f"(key > {last} - {self.window})")
        return " & ".join(conditions)

    # -- bringing --------------------------------------------------------------------------

    def _bring_function(self) -> str:
        bytes_ = [rows * self._wide(n) * 2 for n, rows in
                  enumerate((_ROWS, self.tile.columns, self.tile.columns))]  # fmt: skip
        code = [self._coordinates(one) for one in self.tiles]
        loop = [
            *self._begin(1),
            *(f"row{n} = {row}" for n, (row, _) in enumerate(code)),
            *(f"col{n} = {column}" for n, (_, column) in enumerate(code)),
            "for which in tl.static_range(GROUPS):",
            "    mbarrier.wait(query_free.index(which), (visit & 1) ^ 1)",
            f"    mbarrier.expect(query_ready.index(which), {bytes_[0]})",
            f"    at = row0 + first.to(tl.int32) + which * {_ROWS}",
            "    bring_tile(m0, [at, col0], query_ready.index(which), queries.index(which))",
            "for block in range(0, stop - low):",
            f"    start = {self._first_key('(stop - 1 - block)')}",
            "    slot = taken % STAGES",
            "    phase = ((taken // STAGES) & 1) ^ 1",
        ]
        for number, name in ((1, "key"), (2, "value")):
            loop += [
                f"    mbarrier.wait({name}_free.index(slot), phase)",
                f"    mbarrier.expect({name}_ready.index(slot), {bytes_[number]})",
                f"    bring_tile(m{number}, [row{number} + start, col{number}], "
                f"{name}_ready.index(slot), {name}s.index(slot))",
            ]
        loop += ["    taken += 1", "visit += 1"]
        body = Block(self.top.block.names)
        body.line("taken = 0")
        body.line("visit = 0")
        inner = Block(body.names)
        inner.lines = loop
        body.nest(self.parts, inner)
        head = self._arguments("m0", "m1", "m2", "queries", "keys", "values", *self.barriers,
                               *self._noted())  # fmt: skip
        return self._function(f"bring({head})", body)

    def _noted(self) -> list[str]:
        return [self.seen] if self.seen else []

    def _coordinates(self, one: Tiles) -> tuple[str, str]:
        """Where a head starts."""
        codes = [self.emitter.addresses.code(place).text for place in (one.row, one.column)]
        row, column = (
            f"({code}).to(tl.int32)" if place.terms else code
            for code, place in zip(codes, (one.row, one.column), strict=True)
        )
        return row, column

    # -- working ---------------------------------------------------------------------------

    def _state(self, loads: Sequence[str]) -> tuple[str, str, str]:
        """Arguments of a step: what it multiplies, what it changes, and where it is."""
        rings = f"{self._queries()}, keys, values, " + ", ".join(self.barriers[2:])
        return rings, "acc, weight, best, total", ", ".join((*self.names, *loads, *self.symbols))

    def _turns(self) -> tuple[list[str], list[str]]:
        """A group waits for its turn at the tensor cores, and ends it. Every block of keys is one
        turn, so that `taken` counts them."""
        if not self.overlapped.turns:
            return [], []
        return (["mbarrier.wait(turn.index(which), taken & 1)"],
                ["mbarrier.arrive(turn.index((which + 1) % GROUPS), count=1)"])  # fmt: skip

    def _step_function(self, loads: Sequence[str]) -> str:
        """One block of keys, while the last one's values are added."""
        dtype = f"tl.{dtypes.storage(self.v.dtype)}"
        (rings, state, more), (begin, end) = self._state(loads), self._turns()
        step = Block(self.top.block.names)
        step.lines = [
            "slot = taken % STAGES",
            "last = (taken - 1) % STAGES",
            "mbarrier.wait(key_ready.index(slot), (taken // STAGES) & 1)",
            "zero = tl.zeros([64, COLS], tl.float32, SCORES)",
            *begin,
            *self._score_products(),
            "mbarrier.wait(value_ready.index(last), ((taken - 1) // STAGES) & 1)",
            "acc = warpgroup_mma(weight, values.index(last), acc, is_async=True)",
            *end,
            *self._block_of_keys("block", more),
            "score = warpgroup_mma_wait(num_outstanding=1, deps=[score])",
            "mbarrier.arrive(key_free.index(slot), count=1)",
            f"weight, shrink, best, total = weigh(score, best, total, row, {self._keys()}, "
            f"{more}, CUT)",
            "acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])",
            "mbarrier.arrive(value_free.index(last), count=1)",
            "acc = acc * tl.convert_layout(shrink, tl.SliceLayout(1, RESULT))[:, None]",
            f"return acc, tl.convert_layout(weight.to({dtype}), WEIGHTS), best, total",
        ]
        head = f"step(which: tl.constexpr, {rings}, {state}, taken, block, row, {more}, " \
               "CUT: tl.constexpr)"  # fmt: skip
        return self._function(head, step)

    def _walks(self, loads: Sequence[str]) -> list[str]:
        """The loops over all blocks but the last one."""
        rings, state, more = self._state(loads)

        def walk(count: str, block: str, cut: bool) -> list[str]:
            return [
                f"for i in range(0, {count}):",
                f"    {state} = step(which, {rings}, {state}, taken, {block}, row, {more}, {cut})",
                "    taken += 1",
            ]

        loop = walk("full - full_low", "full - 1 - i", False)
        if self._cuts_more():
            loop = walk("stop - 1 - full", "stop - 2 - i", True) + loop
        if self.window is not None:
            loop += walk("full_low - low", "full_low - 1 - i", True)
        return loop

    def _attend_function(self, loads: Sequence[str]) -> str:
        """One group of warps."""
        dtype = f"tl.{dtypes.storage(self.v.dtype)}"
        (_, _, more), (begin, end) = self._state(loads), self._turns()
        cut = self.causal or over(self.keys, self.tile.columns) or self.window is not None
        loop = [
            *self._begin(4),
            "row = first + which * 64 + tl.arange(0, 64, tl.SliceLayout(1, SCORES))[:, None]",
            *self._block_of_keys("(stop - 1)", more),
            *self.sink.lines,
            f"best = tl.full([64], {self.before[0]}, tl.float32, tl.SliceLayout(1, SCORES))",
            f"total = tl.full([64], {self.before[1]}, tl.float32, tl.SliceLayout(1, SCORES))",
            "acc = tl.zeros([64, WIDTH], tl.float32, RESULT)",
            "zero = tl.zeros([64, COLS], tl.float32, SCORES)",
            *self._before_queries(),
            "mbarrier.wait(query_ready.index(which), visit & 1)",
            *self._turned(),
            "slot = taken % STAGES",
            "mbarrier.wait(key_ready.index(slot), (taken // STAGES) & 1)",
            *begin,
            *self._score_products(),
            *end,
            "score = warpgroup_mma_wait(num_outstanding=0, deps=[score])",
            "mbarrier.arrive(key_free.index(slot), count=1)",
            f"weight, shrink, best, total = weigh(score, best, total, row, {self._keys()}, {more}, "
            f"{cut})",
            f"weight = tl.convert_layout(weight.to({dtype}), WEIGHTS)",
            "taken += 1",
        ]
        loop += [
            *self._walks(loads),
            *self._after_queries(),
            "visit += 1",
            "last = (taken - 1) % STAGES",
            "mbarrier.wait(value_ready.index(last), ((taken - 1) // STAGES) & 1)",
            "acc = warpgroup_mma(weight, values.index(last), acc, is_async=True)",
            "acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])",
            "mbarrier.arrive(value_free.index(last), count=1)",
            *self._stored(),
        ]
        body = Block(self.top.block.names)
        body.lines = ["query = queries.index(which)", "taken = 0", "visit = 0"]
        inner = Block(body.names)
        inner.lines = loop
        body.nest(self.parts, inner)
        head = self._arguments("queries", "keys", "values", *self.barriers, self.target,
                               *self._noted(), *self._all(loads))  # fmt: skip
        return self._function(f"attend(which: tl.constexpr, {head})", body)

    def _cuts_more(self) -> bool:
        """Whether the diagonal may cut more than the last block of a part."""
        tile = self.tile
        return self.causal and (tile.columns % tile.rows != 0 or self.offset % tile.columns != 0)

    def _stored(self) -> list[str]:
        """The result of a part, through the views that follow."""
        emitter = self.emitter
        bound = list(emitter.addresses.groups)
        row, column = self.plan.place[2].single_axis, self.plan.column.single_axis
        for axis, name, dim in ((row, "row", ROW), (column, "col", COL)):
            if axis is not None:
                emitter.addresses.bind((axis,), Expr(name, emitter.kind, frozenset((dim,))))
        address = emitter.addresses.code(self.plan.address)
        emitter.addresses.groups = bound
        empty = self.mask is not None and self.mask.dtype == torch.bool
        divisor = "tl.where(total == 0.0, 1.0, total)" if empty else "total"
        past = over(self.queries, self.tile.rows)
        mask = f", mask=row < {size_text(self.queries)}" if past else ""
        dtype = f"tl.{dtypes.storage(self.q.dtype)}"
        return [
            f"total = tl.convert_layout({divisor}, tl.SliceLayout(1, RESULT))",
            f"result = tl.convert_layout((acc * (1.0 / total)[:, None]).to({dtype}), STORED)",
            "row = first + which * 64 + tl.arange(0, 64, tl.SliceLayout(1, STORED))[:, None]",
            "col = tl.arange(0, WIDTH, tl.SliceLayout(0, STORED))[None, :]",
            f"tl.store({self.target} + {address}, result{mask})",
        ]

    # -- the program -----------------------------------------------------------------------

    def _main(self, loads: Sequence[str]) -> str:
        groups = self.overlapped.groups
        counts = dict.fromkeys(self.barriers, ("GROUPS", 1))
        for name in _BARRIERS[2:]:
            counts[name] = ("STAGES", groups if name.endswith("free") else 1)
        shared = "tl.allocate_shared_memory({}, [{}], {})"
        lines = [
            "queries = " + shared.format("m0.dtype", "GROUPS, 64, DEPTH", "m0.layout"),
            "keys = " + shared.format("m1.dtype", "STAGES, COLS, DEPTH", "m1.layout"),
            "values = " + shared.format("m2.dtype", "STAGES, COLS, WIDTH", "m2.layout"),
        ]
        for name, (many, count) in counts.items():
            made = shared.format("tl.int64", f"{many}, 1", "mbarrier.MBarrierLayout()")
            lines += [f"{name} = {made}", f"for i in tl.static_range({many}):",
                      f"    mbarrier.init({name}.index(i), count={count})"]  # fmt: skip
        if self.overlapped.turns:
            lines.append("mbarrier.arrive(turn.index(0), count=1)")  # the first group's turn
        barriers = ", ".join(self.barriers)
        work = self._arguments("queries, keys, values", barriers, self.target, *self._noted(),
                               *self._all(loads))  # fmt: skip
        bring = self._arguments("m0, m1, m2, queries, keys, values", barriers, *self._noted())
        working, bringing = _REGISTERS[groups]
        warps = [4] * (groups - 1) + [1]
        registers = [working] * (groups - 1) + [bringing]
        lines += [
            "fence_async_shared()",
            f"{WAIT}()",
            "tl.warp_specialize([",
            *(f"    (attend, ({which}, {work}))," for which in range(groups)),
            f"    (bring, ({bring})),",
            f"], {warps}, {registers})",
        ]
        return "\n".join(f"    {line}" for line in lines)
