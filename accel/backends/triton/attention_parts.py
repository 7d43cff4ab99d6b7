"""What part of the work a program of `attention_overlapped` has, and its blocks of keys.

A part is the queries of one program in one head. Where programs stay for all of the work and a
causal mask makes parts unequal, the parts lie sorted by length, and programs take them in laps, one
from left to right, the next from right to left: what a program has too much of in one lap it has
too little of in the next.
"""

from __future__ import annotations

from accel.backends.loops.phases import region_symbols
from accel.backends.triton.addresses import size_name, size_text
from accel.backends.triton.attention_loop import AttentionWriter
from accel.backends.triton.attention_plan import Plan, seen_head
from accel.backends.triton.attention_tiles import OverlappedTile
from accel.backends.triton.head_tiles import shifts
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.text import Block
from accel.backends.triton.tiles import next_power, parts_of
from accel.ir.module import Region
from accel.ir.types import Dim


class PartsWriter(AttentionWriter):
    """Writes the functions that every group of warps calls for a part."""

    def __init__(
        self, plan: Plan, emitter: StoredOperands, region: Region, target: str, tile: OverlappedTile
    ) -> None:
        super().__init__(plan, emitter, target, tile)
        self.overlapped = tile
        self.symbols = [size_name(s) for s in region_symbols(region)]
        self.names = ["first"]  # where a part of the work lies
        self.parts = ""  # the loop over a program's parts
        self.part = ""  # the part of a lap
        self.shifts = shifts(self.keys, tile.columns)
        self.seen = ""  # which blocks of keys are seen: the parameter, where a launch has noted it

    def _line(self) -> str:
        """Where the blocks of a part begin in what a launch has noted (`attention_listed`)."""
        emitter = self.emitter
        head = emitter.addresses.code(seen_head(self.plan, emitter.indexer)).text
        queries = parts_of(self.queries, self.tile.rows)
        blocks = parts_of(self.keys, self.tile.columns)
        return f"(({head}) * {size_text(queries)} + first // ROWS) * {size_text(blocks)}"

    def _arguments(self, *names: str) -> str:
        return ", ".join([*names, *self.symbols])

    def _function(self, head: str, body: Block, result: str = "") -> str:
        if result:
            body.line(f"return {result}")
        return f"@gluon.jit\ndef {head}:\n{body.source()}\n"

    def _laps_function(self, parts: Dim, programs: Dim) -> list[str]:
        """Which parts of the work a program takes: sorted ones in laps to and fro."""
        count, step = size_text(parts), size_text(programs)
        if not (self.overlapped.persistent and self.overlapped.across and self.causal):
            self.parts = f"for part in range(tl.program_id(0), {count}, {step}):"
            return []
        self.parts = f"for lap in range(0, {self._call('laps')}):"
        self.part = f"part = lap * {step} + position(lap{self._more()})"
        position, laps = Block(self.top.block.names), Block(self.top.block.names)
        position.line("at = tl.program_id(0)")
        laps.line(f"whole = {count} // {step}")
        laps.line(f"at = position(whole{self._more()})")
        left = f"tl.minimum(tl.maximum({count} - whole * {step} - at, 0), 1)"
        return [
            self._function(f"position(lap{self._more()})", position,
                           f"at + (lap % 2) * ({step} - 1 - 2 * at)"),
            self._function(self._call("laps"), laps, f"whole + {left}"),
        ]  # fmt: skip

    def _call(self, name: str) -> str:
        return f"{name}({', '.join(self.symbols)})"

    def _more(self) -> str:
        return "".join(f", {s}" for s in self.symbols)

    def _place_function(self) -> str:
        """Which queries of which head a part of the work is; binds the names for addresses."""
        emitter, body = self.emitter, Block(self.top.block.names)
        if emitter.kind == "int64":
            body.line("part = part.to(tl.int64)")
        self._part(body)
        if self.plan.outer:
            bound = (variable.text for _, variable in emitter.addresses.groups)
            self.names += dict.fromkeys(("head", *bound))
        return self._function(f"place({self._arguments('part')})", body, ", ".join(self.names))

    def _bounds_function(self) -> str:
        """Blocks of keys of a part: the first, the first and last whole ones, the end."""
        body, keys, offset = Block(self.top.block.names), size_text(self.keys), self.offset
        names = {"low": "0", "full_low": "0", "full": "full", "stop": "stop"}
        if self.causal:
            body.line(f"end = tl.minimum(first + {_plus('ROWS', offset)}, {keys}).to(tl.int32)")
            body.line("stop = (end + COLS - 1) // COLS")
            body.line(f"full = tl.minimum(first + {_plus('1', offset)}, {keys}).to(tl.int32)")
            body.line("full = tl.minimum(full // COLS, stop - 1)")
        elif isinstance(self.keys, int):
            stop = parts_of(self.keys, self.tile.columns)
            names |= {"full": f"{stop} - 1", "stop": str(stop)}
        else:
            body.line(f"stop = (({keys} + COLS - 1) // COLS).to(tl.int32)")
            names["full"] = "stop - 1"
        if self.window is not None:
            behind = f"{_plus('first', offset)} - {self.window}"
            body.line(f"low = tl.maximum({behind} + 1, 0).to(tl.int32) // COLS")
            body.line(f"full_low = tl.maximum({behind} + ROWS, 0).to(tl.int32) + COLS - 1")
            body.line("full = tl.maximum(full, low)")
            body.line("full_low = tl.minimum(full_low // COLS, full)")
            names |= {"low": "low", "full_low": "full_low"}
        if not self.seen:
            head = f"bounds({self._arguments('first')})"
            return self._function(head, body, ", ".join(names.values()))
        blocks = int(parts_of(self.keys, self.tile.columns))
        body.line(f"block = tl.arange(0, {next_power(blocks)}, LAYOUT)")
        body.line(f"seen = tl.load({self.seen} + line + block, mask=block < {blocks}, other=0)")
        body.line("last = tl.max(tl.where(seen > 0, block + 1, 0), axis=0)")
        body.line(f"low = tl.min(tl.where(seen > 0, block, {blocks}), axis=0)")
        body.line("last = tl.maximum(last, 1)  # one block, where nothing is seen")
        body.line("low = tl.minimum(low, last - 1)")
        full = f"tl.maximum(tl.minimum({names['full']}, last - 1), low)"
        head = f"bounds({self._arguments('first', 'line', self.seen)}, LAYOUT: tl.constexpr)"
        return self._function(head, body, f"low, low, {full}, last")

    def _begin(self, warps: int) -> list[str]:
        """Where a part lies, and its blocks of keys."""
        lines = [
            *([self.part] if self.part else []),
            f"{', '.join(self.names)} = place({self._arguments('part')})",
        ]
        where = ["first"]
        if self.seen:
            lines.append(f"line = {self._line()}")
            where = ["first", "line", self.seen, f"BLOCKS_{warps}"]
        bounds = ", ".join([*where[:3], *self.symbols, *where[3:]])
        return [*lines, f"low, full_low, full, stop = bounds({bounds})"]

    def _first_key(self, block: str) -> str:
        """Where a block of keys starts. The last one ends with the keys, and has some of them
        twice."""
        if not self.shifts:
            return f"{block} * COLS"
        return f"tl.minimum({block} * COLS, {self.keys} - COLS)"


def _plus(name: str, offset: Dim) -> str:
    return name if offset == 0 else f"{name} + {size_text(offset)}"
