"""Writes products of one row for Hopper in Gluon: programs that stay, and a stream that never ends.

    ring of STAGES slots: ROWS rows of the weight for each sum, DEPTH of K

There is one program a multiprocessor, which takes one tile of ROWS results after another. The
weight comes by TMA, so that what is on its way costs no registers, and a slot is filled again as
soon as it has been read; the ring is filled before the wait (a weight is no kernel's result). x, a
norm before the product included, is computed once for each program and stays in registers. The
weight [N, K] is read as lines of 64 elements; all warps share each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from accel.backends.loops.index import Affine
from accel.backends.loops.phases import Planner
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.backends.triton import dtypes
from accel.backends.triton.dependent import WAIT, WAIT_AFTER
from accel.backends.triton.emitter import Scope
from accel.backends.triton.maps import MapCode, Matrix, matrix
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.overlapped import _TMA_NAMES, SHARED_BYTES
from accel.backends.triton.product_loop import MatmulWriter
from accel.backends.triton.product_plan import Plan, plan
from accel.backends.triton.program import Program
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.types import product

_LINE = 64  # elements: 128 bytes, what TMA swizzles
_MOST_LINES = 256  # of one copy
_LEAST_DEPTH = 1024
_SLOT, _RING, _LARGE = 32 << 10, 192 << 10, 200e6  # bytes: of a slot, of all, of a weight
_LONG = 4096  # of sums
_BOTH = frozenset((ROW, COL))


@dataclass(frozen=True)
class StreamedGemvTile:
    """Rows of the weight of one slot and sum, the part of K in it, and slots."""

    capability: ClassVar[int] = 90

    rows: int
    depth: int
    stages: int
    warps: int = 4


def reason(kernel: Op) -> str | None:
    """None if this writer takes an `accel.kernel` op of kind "gemv", else why not."""
    ops = list(kernel.regions[0].ops)
    linears = [op for op in ops if op.name == "linear"]
    if len(linears) != 1:
        return f"{len(linears)} linears"
    (op,) = linears
    x, weight, _ = op.arguments()
    if product(x.shape[:-1]) != 1:
        return f"{product(x.shape[:-1])} rows"
    if weight.op is not None or weight.dtype not in (torch.bfloat16, torch.float16):
        return "a weight that is decoded, or no float of 16 bits"
    if x.dtype != weight.dtype or int(weight.shape[1]) % _LEAST_DEPTH:
        return f"sums over {weight.shape[1]} elements of {x.dtype}"
    shapes = {r.shape for r in (kernel.results)}
    if len(shapes) != 1 or next(iter(shapes))[:-1] != op.result.shape[:-1]:
        return "results of several shapes"
    before = [o for o in ops[: ops.index(op)] if not o.has(Trait.VIEW)]
    if any(o.name != "rms_norm" for o in before):
        return "other ops than a norm before the product"
    return None


def choose(kernel: Op, sms: int) -> StreamedGemvTile | None:
    """The tile of an `accel.kernel` op; None where plain loads do as well, or none fits.

    Measured on an H200: 235 MB of gate and up with sums over 4096 took 56 us instead of 77, a head
    of 1 GB 20 us less; weights of 70 MB gained nothing. A ring takes all of the shared memory: with
    half of it, and two kernels at once, large weights came 10 to 20 % slower.
    """
    if reason(kernel) is not None:
        return None
    op = next(o for o in kernel.regions[0].ops if o.name == "linear")
    weight = op.operands[1]
    sums = max(1, sum(user.name == "slice" for user in op.result.users))
    columns, depth = int(weight.shape[0]) // sums, int(weight.shape[1])
    rows = _SLOT // (depth * sums * 2)
    if not (_LONG <= depth <= _MOST_LINES * _LINE and depth & (depth - 1) == 0) or rows < 1:
        return None
    if columns * sums * depth * 2 < _LARGE or columns < rows * sms:
        return None
    return StreamedGemvTile(rows, depth, _RING // _SLOT)


def plan_of(planner: Planner) -> tuple[Plan, list[Matrix]] | None:
    """The plan and the weight's parts; None if they are no matrices that lie in one piece."""
    try:
        made = plan(planner)
    except BackendError:
        return None
    weight = made.op.operands[1]
    parts = [matrix(planner.indexer, weight, i, made.columns, made.right)
             for i in made.weight_indices]  # fmt: skip
    found = [p for p in parts if p is not None and not p.col0 and p.stride == weight.shape[1]]
    return (made, found) if len(found) == len(parts) else None


class StreamedGemvWriter(MatmulWriter):
    """Writes the one program."""

    def __init__(
        self,
        made: tuple[Plan, list[Matrix]],
        emitter: StoredOperands,
        targets: Sequence[str],
        tile: StreamedGemvTile,
        sms: int,
    ) -> None:
        super().__init__(made[0], emitter, targets, tile)
        self.parts, self.made = made[1], tile
        self.lines, self.all_lines = tile.depth // _LINE, self.depth // _LINE
        self.chunks = self.depth // tile.depth
        whole = self.chunks == 1 and tile.rows * self.lines <= _MOST_LINES
        self.box = tile.rows * self.lines if whole else self.lines
        self.count = -(-int(self.columns) // tile.rows)
        self.programs = min(self.count, sms)
        slot = len(self.parts) * tile.rows * tile.depth * 2
        if self.depth % tile.depth or self.lines > _MOST_LINES or tile.stages * slot > SHARED_BYTES:
            raise BackendError(f"{tile} does not fit sums over {self.depth} elements")

    def write(self) -> Program:
        emitter, block = self.emitter, self.emitter.scopes[0].block
        self._allocate(block)
        fill = Block(block.names)
        fill.nest("if i < steps:", self._bring("i", "i"))
        block.nest("for i in tl.static_range(STAGES):", fill)
        weight = self.parts[0].value
        pointer = emitter.pointers[weight]
        self._bind_parts(block)
        early = [pointer, *(emitter.pointers[v] for v in self._load_gains())]
        block.line(f"{WAIT}()  {WAIT_AFTER}{', '.join(early)}")
        left = self._row(block)
        body = Block(block.names)
        self._tile(left, body)
        block.nest("for number in range(0, tiles):", body)
        tile = self.made
        values = {"ROWS": tile.rows, "LINES": self.lines, "STAGES": tile.stages,
                  "PROGRAMS": self.programs}  # fmt: skip
        constants = "\n".join(f"{name} = tl.constexpr({value})" for name, value in values.items())
        rows = max(int(p.rows) for p in self.parts) * self.all_lines
        map_ = MapCode("m0", pointer, _TMA_NAMES[weight.dtype], rows, _LINE, _LINE,
                       (self.box, _LINE), shared=True)  # fmt: skip
        return Program(block.source(), [constants], {}, self.programs, tile.warps,
                       list(dict.fromkeys([weight, *emitter.used])), emitter.checks, (map_,),
                       gluon=True)  # fmt: skip

    def _allocate(self, block: Block) -> None:
        warps, sums = self.made.warps, len(self.parts)
        for line in (
            f"flat: tl.constexpr = tl.BlockedLayout([1, 8], [4, 8], [{warps}, 1], [1, 0])",
            f"deep: tl.constexpr = tl.BlockedLayout([1, 1, 8], [1, 4, 8], [1, {warps}, 1], "
            "[2, 1, 0])",
            "line: tl.constexpr = tl.SliceLayout(0, deep)",
            "each: tl.constexpr = tl.SliceLayout(1, tl.SliceLayout(2, deep))",
            "program = tl.program_id(0)",
            f"tiles = ({self.count} - program + PROGRAMS - 1) // PROGRAMS",
            f"steps = tiles * {self.chunks}",
            f"ring = tl.allocate_shared_memory(m0.dtype, [STAGES, {sums} * ROWS * LINES, "
            f"{_LINE}], m0.layout)",
            "ready = tl.allocate_shared_memory(tl.int64, [STAGES, 1], mbarrier.MBarrierLayout())",
            "for i in tl.static_range(STAGES):",
            "    mbarrier.init(ready.index(i), count=1)",
            "fence_async_shared()",
        ):
            block.line(line)

    def _bring(self, slot: str, step: str) -> Block:
        """Copies of a step's part of the weight."""
        block = Block(self.emitter.scopes[0].block.names)
        rows, sums = self.made.rows, len(self.parts)
        width = sums * rows * self.made.depth * 2
        place = f"(program + {step} * PROGRAMS)"
        chunk = ""
        if self.chunks > 1:
            place = f"(program + {step} // {self.chunks} * PROGRAMS)"
            chunk = f" + {step} % {self.chunks} * LINES"
        block.line(f"mbarrier.expect(ready.index({slot}), {width})")
        copies = rows * self.lines // self.box
        for number, part in enumerate(self.parts):
            for copy in range(copies):
                first = part.row0 + copy * (rows // copies)
                row = f"{place} * ROWS" + (f" + {first}" if first else "")
                target = f"ring.index({slot})"
                if sums * copies > 1:
                    begin = (number * copies + copy) * self.box
                    target += f".slice({begin}, {self.box}, dim=0)"
                block.line(f"bring_tile(m0, [({row}) * {self.all_lines}{chunk}, 0], "
                           f"ready.index({slot}), {target})")  # fmt: skip
        return block

    # -- x ---------------------------------------------------------------------------------

    def _bind_parts(self, block: Block) -> None:
        """A scope for each part of K, in which its elements are known."""
        emitter, axes = self.emitter, self.plan.left
        block.line(f"at = tl.arange(0, LINES, tl.SliceLayout(1, line))[:, None] * {_LINE} + "
                   f"tl.arange(0, {_LINE}, tl.SliceLayout(0, line))[None, :]")  # fmt: skip
        self.bound: list[tuple[Scope, list[Any]]] = []
        before = list(emitter.addresses.groups)
        for number in range(self.chunks):
            scope, name = Scope(block, frozenset(axes)), f"at_{number}" if number else "at"
            if number:
                block.line(f"{name} = at + {number * self.made.depth}")
            with emitter.inside(scope):
                self._bind(axes, name, COL, self.made.depth)
            self.bound.append((scope, list(emitter.addresses.groups)))
            emitter.addresses.groups = list(before)

    def _elements(self, value: Value, index: Index) -> list[Expr]:
        """A value's elements over K, for each part."""
        emitter, made = self.emitter, []
        before = list(emitter.addresses.groups)
        for scope, groups in self.bound:
            emitter.addresses.groups = list(groups)
            with emitter.inside(scope):
                made.append(emitter.element(value, index))
        emitter.addresses.groups = before
        return made

    def _load_gains(self) -> list[Value]:
        """Loads what x is computed from and has K alone: a norm's weight. No kernel makes it."""
        survey = Survey(self.emitter.indexer, {})
        survey.element(self.plan.op.operands[0], self.plan.x_index)
        gains = [(v, i) for v, i in survey.costly if v.op is None and v.type.rank == 1]
        for value, index in gains:
            self._elements(value, index)
        return list(dict.fromkeys(value for value, _ in gains))

    def _row(self, block: Block) -> list[str]:
        """x in float32, as it meets each part of K."""
        x, index = self.plan.op.operands[0], self.plan.x_index
        for op in _reductions(x):
            parts = [f"tl.sum(tl.sum({self._spread(e, block)}, 1), 0)"
                     for e in self._elements(op.operands[0], index)]  # fmt: skip
            made = block.let(" + ".join(parts), "float32", frozenset(), op.name)
            for place in (index[:-1], (*index[:-1], Affine())):
                self.emitter.results[(op.result, place)] = made
        return [str(block.let(str(e), "float32", _BOTH, "left")) for e in self._elements(x, index)]

    def _spread(self, value: Expr, block: Block) -> Expr:
        return value if value.dims else block.let(f"{value} + at * 0.0", "float32", _BOTH, "part")

    # -- a tile ----------------------------------------------------------------------------

    def _tile(self, left: Sequence[str], body: Block) -> None:
        emitter, plan_ = self.emitter, self.plan
        wide = ".to(tl.int64)" if emitter.kind == "int64" else ""
        body.line(f"col = (program + number * PROGRAMS){wide} * ROWS + tl.arange(0, ROWS, each)")
        bias = plan_.op.arguments()[2]
        with emitter.inside(Scope(body, frozenset(plan_.columns))):
            scope = emitter.scopes[-1]
            self._bind(plan_.columns, "col", COL, self.made.rows)
            added = [None if bias is None else emitter.element(bias, p[-1:])
                     for p in plan_.places]  # fmt: skip
            for chunk, x in enumerate(left):
                self._chunk(chunk, x, body)
            for number, (place, more) in enumerate(zip(plan_.places, added, strict=True)):
                value = Expr(f"acc_{number}", "float32", frozenset((COL,)))
                if more is not None:
                    value = body.let(f"{value} + {more}", "float32", value.dims, "add")
                value = dtypes.rounded(value, plan_.op.result.dtype, body)
                scope.known[(plan_.op.result, place)] = body.let(
                    str(value), "float32", value.dims, "linear"
                )
            for target, (value_, index) in zip(self.targets, plan_.stores, strict=True):
                self._store(target, value_, index)

    def _chunk(self, chunk: int, x: str, body: Block) -> None:
        """One slot: its products with a part of x."""
        body.line("step = number" if self.chunks == 1 else
                  f"step = number * {self.chunks} + {chunk}")  # fmt: skip
        body.line("slot = step % STAGES")
        body.line("mbarrier.wait(ready.index(slot), (step // STAGES) & 1)")
        size = self.made.rows * self.lines
        for number in range(len(self.parts)):
            slot = "ring.index(slot)"
            if len(self.parts) > 1:
                slot += f".slice({number * size}, {size}, dim=0)"
            body.line(f"lines_{number} = {slot}.load(flat)")
        body.line("meet()  # all have read the slot")
        body.nest("if step + STAGES < steps:", self._bring("slot", "(step + STAGES)"))
        for number in range(len(self.parts)):
            body.line(f"rows_{number} = tl.convert_layout(tl.reshape(lines_{number}, "
                      f"[ROWS, LINES, {_LINE}]), deep)")  # fmt: skip
            body.line(f"parts_{number} = tl.reshape(rows_{number}.to(tl.float32) * "
                      f"{x}[None, :, :], [ROWS, LINES * {_LINE}])")  # fmt: skip
            text = f"tl.convert_layout(tl.sum(parts_{number}, 1), each)"
            body.line(f"acc_{number} = {f'acc_{number} + ' if chunk else ''}{text}")


def _reductions(value: Value) -> list[Op]:
    """The reductions that a value needs, the first ones first."""
    found: dict[Op, None] = {}

    def visit(value: Value) -> None:
        if value.op is None or value.op in found:
            return
        for operand in value.op.operands:
            visit(operand)
        if value.op.has(Trait.REDUCTION):
            if value.op.name != "sum":
                raise BackendError(f"accel.{value.op.name} before a streamed product")
            found[value.op] = None

    visit(value)
    return list(found)
