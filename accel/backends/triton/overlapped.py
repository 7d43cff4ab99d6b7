"""Writes products for Hopper in Gluon: two groups of warps take turns at the tensor cores.

A program stays on its multiprocessor and takes one tile of results after another. One warp brings
tiles of x and of the weight by TMA into a ring of buffers; the tiles of results go in turn to two
groups of four warps. While one multiplies, the other has the epilogue of its last tile to compute
and to store, so that even a costly activation takes no time of its own. (CUTLASS calls such a
schedule ping-pong.)

    ready[slot]   the slot's two tiles have arrived        free[slot]   they have been multiplied
    turn[group]   the other group has begun its last multiplication: everything that arrived before
                  is its own. (A barrier knows only whether its phase is odd or even, so a group
                  must not wait for data before that.)

Gate and up halves lie one above the other in the weight's buffer: one multiplication, whose result
is cut in two, without moving anything between threads. Triton's Gluon is its lower level: layouts,
barriers and copies are written out; what the tracer emits for a tile is the same in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from accel.backends.loops.index import Axis, Indexer
from accel.backends.loops.phases import region_symbols
from accel.backends.loops.trace import Index
from accel.backends.triton import dtypes
from accel.backends.triton.addresses import size_name
from accel.backends.triton.bringing import BringingWriter
from accel.backends.triton.dependent import WAIT, WAIT_AFTER
from accel.backends.triton.emitter import Scope
from accel.backends.triton.inverses import quick_inverses
from accel.backends.triton.maps import MapCode, Matrix, matrix
from accel.backends.triton.operands import TileEmitter
from accel.backends.triton.pairs import pairwise
from accel.backends.triton.powers import quick_powers
from accel.backends.triton.product_plan import Plan
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block
from accel.backends.triton.tiles import next_power
from accel.errors import BackendError
from accel.ir.module import Region, Value
from accel.ir.types import Dim

_WARPS = 4  # of a group
_REGISTERS = {2: 232, 3: 152}  # of a thread of each group but the first one, which gets the rest
_FEW_REGISTERS = 40  # of a thread of the warp that copies
SHARED_BYTES = 227 << 10  # of a multiprocessor, for one program
_BARRIER_BYTES = 1 << 10
_FEWEST_STAGES = 3  # with fewer, a result goes to memory without TMA
_TMA_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class OverlappedTile:
    """Results of one group of warps, the part of K of one step, and how many steps are in flight
    (as many as there is room for, at most).

    `columns` are shared by the accumulators of gate and up. `capability`: the instructions are
    those of one architecture, Hopper's. `early`: the weight's first tiles come before the kernel
    waits for its predecessor. `groups` of four warps multiply.
    """

    capability: ClassVar[int] = 90

    rows: int = 128
    columns: int = 128
    depth: int = 64
    stages: int = 4
    group: int = 8
    early: bool = False
    groups: int = 2


def operands_of(plan: Plan, indexer: Indexer) -> tuple[Matrix, list[Matrix]] | None:
    """x and the weight (once for each accumulator) as matrices; None if they are not."""
    x, weight, _ = plan.op.arguments()
    left = matrix(indexer, x, plan.x_index, plan.rows, plan.left)
    right = [matrix(indexer, weight, i, plan.columns, plan.right) for i in plan.weight_indices]
    if left is None or left.value.dtype not in (torch.float16, torch.bfloat16):
        return None
    found = [r for r in right if r is not None and r.value.dtype == left.value.dtype]
    return (left, found) if len(found) == len(right) else None


class OverlappedWriter(BringingWriter):
    """Writes the one program of a product in Gluon. Raises BackendError for other operands than
    matrices in 16-bit floats."""

    row0, col0 = "row0", "col0"  # of what a group stores at once, and where it lies before
    place = "out"
    bring_warps = 1

    def __init__(
        self,
        plan: Plan,
        emitter: TileEmitter,
        region: Region,
        targets: Sequence[str],
        tile: OverlappedTile,
        sms: int,
    ) -> None:
        self.count = len(plan.places)
        super().__init__(plan, emitter, targets, tile)
        self.traced = emitter
        self.region, self.overlapped, self.sms = region, tile, sms
        self.symbols = [size_name(s) for s in region_symbols(region)]
        self.width = tile.columns // self.count
        self.groups = tile.groups
        self.pieces_of_x = 1 if next_power(tile.rows) == tile.rows else tile.groups
        self.height, self.piece = self._stored_at_once()
        made = operands_of(plan, emitter.indexer)
        if made is None:
            raise BackendError("a product whose operands are no matrices that TMA can copy")
        self.left, self.right = made
        self.maps: list[MapCode] = []
        self.stages = tile.stages
        self.out = self._result_map()
        self._find_resident(emitter)

    def write(self) -> Program:
        emitter = self.emitter
        self._make_maps()
        body = Block(emitter.scopes[0].block.names)
        with emitter.inside(Scope(body, frozenset())):
            self._start_tile(body)
            self.multiplied_from = len(body.lines)
            self._multiply(body)
            self._epilogue(body)
            body.line("number += 1")
        head = f"for tile in range({self._first()}, {self._tiles()}, {self._stride()}):"
        before = emitter.scopes[0].block
        for line in (*self._before_parts(), f"{WAIT}()"):
            before.line(line)
        before.line(f"step = {self._first_step()}")
        before.line("number = 0")
        before.nest(head, body)
        if self.out is not None:
            before.line("tma.store_wait(0)")
        programs = self._programs()
        used = list(emitter.used)
        reads = [self.left.value, *(m.value for m in self.right), *used]
        shared = self._shared(used)
        roundings, code = pairwise(before.source())
        helpers = [self._constants(programs), *roundings, *self._helpers(), self._place_source(),
                   self._bring_source(),
                   f"@gluon.jit\ndef multiply(which: tl.constexpr, left, right, out, ready, free, "
                   f"turn, arrived, {shared}):\n{self._layouts()}\n{code}\n",
                  ]  # fmt: skip
        program = Program(self._main(shared), helpers, {}, programs, _WARPS,
                          list(dict.fromkeys(reads)), emitter.checks, tuple(self.maps),
                          gluon=True)  # fmt: skip
        if "tl.exp2(" in code:
            quick_powers(program)
            quick_inverses(program)
        return program

    def _stored_at_once(self) -> tuple[int, int]:
        """Rows and columns of results that a group of warps stores at once."""
        return self.overlapped.rows, self.width

    # -- matrices --------------------------------------------------------------------------

    def _result_map(self) -> tuple[str, Value] | None:
        """The first result, if a tile of it can be stored by TMA."""
        value, index = self.plan.stores[0]
        made = matrix(self.emitter.indexer, value, index, self.plan.rows, self.plan.columns,
                      stored=True)  # fmt: skip
        if made is None or value.dtype not in _TMA_NAMES:
            return None
        tile = self.tile
        out = self._buffers() * self.height * self.piece * value.dtype.itemsize
        step = (tile.rows + tile.columns) * tile.depth * self.left.value.dtype.itemsize
        room = (SHARED_BYTES - _BARRIER_BYTES - out) // step
        if room < min(_FEWEST_STAGES, tile.stages):
            return None
        self.stages = min(self.stages, room)
        return "out", value

    def _find_resident(self, emitter: TileEmitter) -> None:
        """An operand of the epilogue that TMA can bring to where the result will lie."""
        if self.out is None:
            return
        value, index = self.plan.stores[0]
        written = emitter.indexer.flatten(index, value.shape)
        operands = (self.left.value, *(m.value for m in self.right))
        for arg in self.region.args:
            places = {emitter.indexer.flatten(at, arg.shape)
                      for other, at in self.plan.survey.costly if other is arg}  # fmt: skip
            if arg.dtype == value.dtype and arg not in operands and places == {written}:
                emitter.resident = arg
                return

    def _make_maps(self) -> None:
        tile = self.tile
        operands = [
            (self.left, tile.rows // self.pieces_of_x),
            *((m, self._brought()) for m in self.right[:1]),
        ]
        for number, (one, rows) in enumerate(operands):
            pointer = self.emitter.pointers[one.value]
            self.maps.append(self._map(number, pointer, one, (rows, tile.depth)))
        targets = [] if self.out is None else [(self.targets[0], self.out[1])]
        resident = self.traced.resident
        if resident is not None:
            targets.append((self.emitter.pointers[resident], resident))
        for number, (pointer, value) in enumerate(targets, 2):
            whole = Matrix(value, self.rows, int(self.columns), int(self.columns), 0, 0)
            self.maps.append(self._map(number, pointer, whole, (self.height, self.piece)))

    def _map(self, number: int, pointer: str, one: Matrix, box: tuple[int, int]) -> MapCode:
        element = _TMA_NAMES[one.value.dtype]
        rows = max((m.rows for m in self.right), key=int) if number == 1 else one.rows
        return MapCode(f"m{number}", pointer, element, rows, one.columns, one.stride, box,
                       shared=True)  # fmt: skip

    def _buffers(self) -> int:
        """Places in shared memory that hold `height` x `piece` results."""
        return self.groups

    def _out(self, group: int) -> str:
        """The place of a group of warps; something else where nothing is stored by TMA."""
        return "left" if self.out is None else f"out.index({group})"

    # -- a tile ----------------------------------------------------------------------------

    def _helpers(self) -> list[str]:
        return []

    def _start_tile(self, body: Block) -> None:
        body.line("row0, col0 = place(tile)" if not self._sizes() else
                  f"row0, col0 = place(tile, {', '.join(self._sizes())})")  # fmt: skip
        if self.traced.resident is None:
            return
        body.line("tma.store_wait(0)")  # the last tile has left the buffer
        body.line(f"mbarrier.expect(arrived, {self._result_bytes()})")
        self._bring_resident(body)

    def _bring_resident(self, body: Block) -> None:
        body.line("bring_tile(m3, [row0, col0], arrived, out)")

    def _result_bytes(self) -> int:
        assert self.out is not None
        return self.height * self.width * self.out[1].dtype.itemsize

    def _multiply(self, body: Block) -> None:
        product_ = (f"warpgroup_mma({self._left()}, right.index(slot).permute([1, 0]), total, "
                    "is_async=True)")  # fmt: skip
        body.line("total = warpgroup_mma_init(tl.zeros([ROWS, COLS], tl.float32, wide))")
        if self.turns:
            body.line("mbarrier.wait(turn.index(which), (number & 1) ^ (1 - which))")
        body.line("slot = step % STAGES")
        body.line("mbarrier.wait(ready.index(slot), (step // STAGES) & 1)")
        body.line(f"total = {product_}")
        loop = Block(body.names)
        for line in (
            "last = slot",
            "step += 1",
            "slot = step % STAGES",
            "mbarrier.wait(ready.index(slot), (step // STAGES) & 1)",
            f"total = {product_}",
            "total = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=[total]))",
        ):
            loop.line(line)
        self._release(loop, "last")
        body.nest(f"for _ in range(1, {self._steps()}):", loop)
        if self.turns:
            body.line("mbarrier.arrive(turn.index(1 - which), count=1)")
        body.line("sums = warpgroup_mma_wait(num_outstanding=0, deps=[total])")
        self._release(body, "slot")
        others = (self.groups - 1) * self._steps() if self.turns else 0
        body.line(f"step += {1 + others}")
        if self.count == 1 and self.piece == self.width:
            body.line("acc_0 = sums")
            return
        body.line("halves = sums.reshape([ROWS, 2, COLS // 2]).permute([0, 2, 1])")
        body.line("first, second = halves.split()")
        if self.count > 1:
            body.line("acc_0 = tl.convert_layout(first, layout)")
            body.line("acc_1 = tl.convert_layout(second, layout)")

    def _release(self, body: Block, slot: str) -> None:
        """A slot that has been multiplied."""
        body.line(f"mbarrier.arrive(free.index({slot}), count=1)")

    def _releases(self) -> int:
        """How many of these make a slot free."""
        return 1 if self.turns else self.groups

    def _left(self) -> str:
        """A group's rows of x."""
        return "left.index(slot)"

    def _epilogue(self, body: Block) -> None:
        self._positions(body)
        self._finish([f"acc_{i}" for i in range(self.count)])

    def _positions(self, body: Block) -> None:
        wide = ".to(tl.int64)" if self.emitter.kind == "int64" else ""
        rows, columns = "tl.SliceLayout(1, layout)", "tl.SliceLayout(0, layout)"
        body.line(f"row = {self.row0}{wide} + tl.arange(0, ROWS, {rows})[:, None]")
        body.line(f"col = {self.col0}{wide} + tl.arange(0, {self.piece}, {columns})[None, :]")
        if self.traced.resident is not None:
            body.line("mbarrier.wait(arrived, number & 1)")
            body.line(f"resident = {self.place}.load(layout)")

    def _tile_columns(self) -> int:
        return self.piece

    def _laid_out(self, value: str) -> str:
        return f"tl.convert_layout({value}, layout)"

    def _bind(self, axes: Sequence[Axis], variable: str, dim: str, size: int) -> None:
        super()._bind(axes, variable, dim, self.width if variable == "col" else size)

    def _store(self, target: str, value: Value, index: Index) -> None:
        emitter = self.emitter
        first = self.out is not None and target == self.targets[0]
        made = emitter.element(value, index)
        if not first or made.dims != frozenset((ROW, COL)):
            super()._store(target, value, index)
            return
        made = dtypes.to_storage(made, value.dtype, emitter.block)
        if self.traced.resident is None:
            emitter.block.line("tma.store_wait(0)")  # the last tile has left the buffer
        emitter.block.line(f"{self.place}.store({made})")
        emitter.block.line("fence_async_shared()")
        emitter.block.line(f"store_tile(m2, [{self.row0}, {self.col0}], {self.place})")

    # -- the functions ---------------------------------------------------------------------

    def _shared(self, used: Sequence[Value]) -> str:
        """Parameters that all parts of the program have in common."""
        names = [m.name for m in self.maps]
        mapped = {m.pointer for m in self.maps}
        names += [p for v in used if (p := self.emitter.pointers[v]) not in mapped]
        names += [t for t in self.targets if t not in mapped]
        names += self.symbols
        return ", ".join([*names, "status"] if self.emitter.checks else names)

    def _constants(self, programs: Dim) -> str:
        tile = self.overlapped
        values = {"ROWS": self.height, "COLS": tile.columns, "DEPTH": tile.depth,
                  "STAGES": self.stages, "EARLY": min(self.stages, self._steps()),
                  "GROUP": self._group(), "PROGRAMS": programs}  # fmt: skip
        lines = [f"{name} = tl.constexpr({value})" for name, value in values.items()]
        return "\n".join(lines)

    def _layouts(self) -> str:
        bits = 256 // (8 * self.left.value.dtype.itemsize)
        form = "tl.NVMMADistributedLayout([3, 0], [4, 1], [16, {}, {}])"
        return (f"    wide: tl.constexpr = {form.format('COLS', bits)}\n"
                f"    layout: tl.constexpr = {form.format(self.piece, bits)}")  # fmt: skip

    def _registers(self) -> list[int]:
        return [*(self.groups - 1) * [_REGISTERS[self.groups]], _FEW_REGISTERS]

    def _main(self, shared: str) -> str:
        sizes = "".join(f", {s}" for s in self._sizes())
        barrier = "tl.allocate_shared_memory(tl.int64, [{}, 1], mbarrier.MBarrierLayout())"
        pieces, own = self.pieces_of_x, self.tile.rows // self.pieces_of_x
        left = f"[{'STAGES' if pieces == 1 else f'STAGES * {pieces}'}, {own}, DEPTH]"
        multiplying = f"{_WARPS}, " * (self.groups - 1)
        weights = ", ".join(dict.fromkeys(self.emitter.pointers[m.value] for m in self.right))
        lines = [
            f"left = tl.allocate_shared_memory(m0.dtype, {left}, m0.layout)",
            "right = tl.allocate_shared_memory(m1.dtype, [STAGES, COLS, DEPTH], m1.layout)",
            f"ready = {barrier.format('STAGES')}",
            f"free = {barrier.format('STAGES')}",
            f"turn = {barrier.format(self.groups)}",
            f"arrived = {barrier.format(self.groups)}",
        ]
        if self.out is not None:
            lines.append(f"out = tl.allocate_shared_memory(m2.dtype, [{self._buffers()}, ROWS, "
                         f"{self.piece}], m2.layout)")  # fmt: skip
        lines += [
            "for i in tl.static_range(STAGES):",
            "    mbarrier.init(ready.index(i), count=1)",
            f"    mbarrier.init(free.index(i), count={self._releases()})",
            f"for i in tl.static_range({self.groups}):",
            "    mbarrier.init(turn.index(i), count=1)",
            "    mbarrier.init(arrived.index(i), count=1)",
            "fence_async_shared()",
            *([] if self.overlapped.early else [f"{WAIT}()"]),
            f"tl.warp_specialize([  {WAIT_AFTER}{weights}",
            *(f"    (multiply, ({i}, left, right, {self._out(i)}, ready, free, turn, "
              f"arrived.index({i}), {shared}))," for i in range(self.groups)),
            f"    (bring, (left, right, ready, free, m0, m1{sizes})),",
            f"], [{multiplying}{self.bring_warps}], {self._registers()})",
        ]  # fmt: skip
        return "\n".join(f"    {line}" for line in lines)
