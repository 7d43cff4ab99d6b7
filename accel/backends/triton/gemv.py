"""Kernels of kind "gemv": linears over a few rows, which read their weight once.

Memory is the limit, so everything else is arranged around one stream of the weight [N, K], in the
order in which it is stored: a program takes some of its rows and all of K, keeps one sum a lane,
and adds the lanes up at the end. The rows of x share each element of the weight, decoding included
(the decoding ops are traced as any others). What follows (bias, activation, residual, gate times
up: the two halves of one merged weight, read side by side) is computed on the sums.

A norm before the linear costs no pass of its own: (r x g) W' = r ((x g) W'), so the sum of squares
that r needs runs along with the products, and r multiplies the sums. A linear is written out as
cast, mul and sum, so that loops, masks and addresses are those of the other kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product as combinations

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.merge import group_extent
from accel.backends.loops.phases import Phase, Place, Planner, Reduce, Store
from accel.backends.loops.survey import Survey
from accel.backends.triton import gemv_streamed
from accel.backends.triton.addresses import Group, size_text
from accel.backends.triton.emitter import Emitter
from accel.backends.triton.gemv_streamed import StreamedGemvTile, StreamedGemvWriter
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.maps import Matrix
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.packed import Packed, PackedSums, packed
from accel.backends.triton.product_plan import Plan
from accel.backends.triton.program import Pass, ProgramWriter
from accel.backends.triton.reductions import Reduction, Tile
from accel.backends.triton.text import Block, Expr
from accel.backends.triton.tiles import Columns, Shape, next_power
from accel.errors import BackendError
from accel.ir.builder import Builder
from accel.ir.module import Op, Region, Value
from accel.ir.types import Dim, is_float, product

MOST_ROWS = 4  # of x: each costs a multiplication for every element of the weight
_MOST_SUMS = 16  # of one program: they live in registers
_MAX_ROUNDS = 8
_MANY = 256  # results a multiprocessor: programs come and go, large ones in less order


@dataclass(frozen=True)
class GemvTile:
    """How a program streams: `rows` of the weight by `columns` of K at a time.

    `stages` blocks are in flight (1: as many as the multiprocessor's other programs bring), and
    `ahead` of them are loaded before the program waits for earlier kernels.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1
    ahead: int = 1


AnyTile = GemvTile | StreamedGemvTile


def reason(op: Op) -> str | None:
    """None if a kernel of kind "gemv" may be built around this op, else the reason why not."""
    if op.name != "linear":
        return f"accel.{op.name} has no generated code"
    x, weight, _ = op.arguments()
    rows = product(x.shape[:-1])
    if not isinstance(rows, int) or not 0 < rows <= MOST_ROWS:
        return f"a linear of {rows} rows"
    if not all(isinstance(d, int) and d > 0 for d in weight.shape):
        return "a weight of symbolic size, or none"
    return None


def choose(columns: int, depth: int, streams: int, rows: int, sms: int) -> GemvTile:
    """The tile for `columns` results, sums over `depth` of `streams` rows of the weight each.

    `rows` is x's. A thread has 64 to 128 elements of the weight on their way before it waits for
    earlier kernels, so that a few programs keep enough bytes in flight. Measured on an H200, in
    CUDA graphs of whole tokens (benchmarks/results/gpu_products.json).
    """
    if rows > 1:
        tile = GemvTile(2, 2048, 8) if depth <= 8192 and streams == 1 else GemvTile(2, 1024, 4)
    elif streams > 1:
        tile = GemvTile(8, 1024, 4) if depth == 2048 else GemvTile(4, 1024, 4, 1, 2)
    elif depth <= 2048 or columns > _MANY * sms:
        tile = GemvTile(2, 2048, 4)
    elif depth % 4096 == 0:
        tile = GemvTile(2, 4096, 8)
    else:
        tile = GemvTile(2, 1024, 4, 1, 4)
    span = min(tile.columns, next_power(depth))
    return replace(tile, columns=span, warps=max(1, min(tile.warps, span // 256)))


def choose_packed(depth: int) -> GemvTile:
    """The tile for a weight of codes: x is prepared once for several rows of it."""
    columns = min(depth & -depth, 4096)  # a power of two that divides the depth
    return GemvTile(8, columns if columns >= 1024 else min(next_power(depth), 4096), 4)


def choose_for(kernel: Op, sms: int, capability: int) -> StreamedGemvTile | None:
    """The tile of an `accel.kernel` op where TMA brings its weight; else `choose` does."""
    if capability != StreamedGemvTile.capability:
        return None
    return gemv_streamed.choose(kernel, sms)


def candidates(kernel: Op, sms: int) -> list[AnyTile]:
    """Tiles worth timing for a kernel: 8 to 128 elements of the weight a thread at once."""
    op = next(op for op in kernel.regions[0].ops if op.name == "linear")
    span = next_power(int(op.operands[0].shape[-1]))
    found = {
        GemvTile(rows, min(columns, span), warps, 1, ahead)
        for columns in (4096, 2048, 1024)
        for rows in (1, 2, 4, 8)
        for warps in (4, 8, 2)
        for ahead in (1, 2, 4)
        if 32 <= rows * min(columns, span) * ahead // (32 * warps) <= 128
        and (ahead == 1 or ahead * columns <= span)
    }
    ordered = sorted(found, key=lambda t: (t.ahead, -t.columns, t.rows, t.warps))
    best = gemv_streamed.choose(kernel, sms)
    if best is None:
        return list(ordered)
    return [*ordered, best, replace(best, stages=best.stages // 2)]


# -- the region ------------------------------------------------------------------------------


def expand(region: Region) -> dict[Op, Packed]:
    """Writes the region's linears out as products and sums, in float32 for small floats.

    Returns the sums over codes: what these stand for is left to `packed.PackedSums`.
    """
    found: dict[Op, Packed] = {}
    for op in list(region.ops):
        if op.name == "linear":
            op.replace_with([_expanded(op, found)])
    for op in list(region.ops):
        if op.name == "dequantize":
            op.replace_with(Builder(before=op).decompose(op))
    return found


def _expanded(op: Op, found: dict[Op, Packed]) -> Value:
    b = Builder(before=op)
    x, weight, bias = op.arguments()
    rows, depth, columns = product(x.shape[:-1]), x.shape[-1], weight.shape[0]
    x, scales = _without_scales(b, x)
    codes = packed(weight)
    factor = None
    if codes is not None:
        elements = b.cast(codes.codes, dtype=torch.float32)
    else:
        elements, factor = _without_factor(b, weight)
    left = b.reshape(b.cast_to(x, elements.dtype), shape=(rows, 1, depth))
    right = b.reshape(elements, shape=(1, columns, depth))
    total = b.sum(b.mul(left, right), axes=(2,))
    if codes is not None and total.op is not None:
        found[total.op] = codes
    if factor is not None:
        total = b.mul(total, b.cast_to(b.reshape(factor, shape=(1, columns)), total.dtype))
    for scale in scales:
        total = b.mul(total, b.cast_to(b.reshape(scale, shape=(rows, 1)), total.dtype))
    if bias is not None:
        total = b.add(total, b.widen(bias))
    return b.cast_to(b.reshape_to(total, op.result.shape), op.result.dtype)


def _without_factor(b: Builder, weight: Value) -> tuple[Value, Value | None]:
    """A weight [N, K] to multiply with, and what each of its rows has in common."""
    op = weight.op
    if op is None or op.name != "dequantize" or weight.dtype == torch.float64:
        return b.widen(weight), None
    codes, scale, zero = op.arguments()
    if zero is not None or scale.shape != (*weight.shape[:-1], 1) or weight.type.rank != 2:
        return b.widen(weight), None
    return b.cast(codes, dtype=torch.float32), scale


def _without_scales(b: Builder, value: Value) -> tuple[Value, list[Value]]:
    """A value [..., K] without the factors that each of its rows has in common, and those."""
    op = value.op
    if op is None or not is_float(value.dtype):
        return value, []
    if op.name == "cast" and is_float(op.operands[0].dtype):
        inner, scales = _without_scales(b, op.operands[0])
        return (inner, scales) if scales else (value, [])
    if op.name != "mul":
        return value, []
    parts: list[Value] = []
    found: list[Value] = []
    for operand in op.operands:
        if _is_scale(operand, value):
            found.append(operand)
        elif operand.shape == value.shape:
            inner, scales = _without_scales(b, operand)
            parts.append(inner)
            found += scales
        else:
            parts.append(operand)
    if not found or not any(p.shape == value.shape for p in parts):
        return value, []
    wide = [b.widen(p) for p in parts]
    return (wide[0] if len(wide) == 1 else b.mul(*wide)), found


def _is_scale(operand: Value, value: Value) -> bool:
    """Whether it has one element for each row."""
    return operand.shape == (*value.shape[:-1], 1) and value.shape[-1] != 1


# -- the plan --------------------------------------------------------------------------------


def plan(planner: Planner) -> Phase:
    """One phase whose rows are the results' columns; each row of x is a store of its own."""
    region, indexer = planner.region, planner.indexer
    sizes = {v.shape[-1] for v in region.results}
    if len(sizes) != 1:
        raise BackendError(f"a gemv kernel with results of {sorted(map(str, sizes))} columns")
    column = indexer.axis("n", sizes.pop())
    for _ in range(_MAX_ROUNDS):
        survey = Survey(indexer, {})
        stores: list[Store] = []
        last, axes = planner._as_index(column) if column.extent != 1 else (Affine(), ())
        for number, value in enumerate(region.results):
            lead = [range(int(d)) for d in value.shape[:-1]]
            for row in combinations(*lead):
                index = (*(Affine(i) for i in row), last)
                survey.element(value, index)
                stores.append(Store(value, Place("result", number), index, ()))
        reduces, _, blocked = planner._reduces(survey)
        if planner.apply_splits():
            continue
        if blocked or len(reduces) > _MOST_SUMS:
            raise BackendError(f"a gemv kernel with {len(reduces)} sums")
        return Phase(axes, stores, reduces)
    raise BackendError("a gemv kernel whose index does not come to rest")


class _Streaming(Emitter):
    """Marks loads of what is read once, so that it does not push x out of the caches."""

    def load_text(self, pointer: str, address: Expr, axes: frozenset[Axis]) -> Expr:
        made = super().load_text(pointer, address, axes)
        known = self.scopes[0].axes
        if axes & known and axes - known:
            text = made.text.removesuffix(")") + ', eviction_policy="evict_first")'
            return Expr(text, made.kind, made.dims)
        return made


class GemvWriter(ProgramWriter):
    """Writes the phase of a gemv kernel."""

    tile: GemvTile | None = None
    packed: Mapping[Op, Packed] = {}

    def _shape(self, groups: list[Group], columns: Mapping[frozenset[Axis], Columns]) -> Shape:
        count, depth = product(group_extent(g) for g in groups), max_extent(columns.values())
        if not isinstance(count, int):
            raise BackendError("a gemv kernel of symbolic size")
        if self.tile is None and self.packed:
            self.tile = choose_packed(depth)
        elif self.tile is None:
            self.tile = choose(count, depth, self._streams(), self._rows_of_x(), self.sms)
        for one in columns.values():
            extent = one.extent
            assert isinstance(extent, int)
            one.size = min(self.tile.columns, next_power(extent))
            one.held = extent <= one.size
        rows = min(max(self.tile.rows, 2) if self.packed else self.tile.rows, next_power(count))
        return Shape(rows, self.tile.columns, self.tile.warps)

    def _streams(self) -> int:
        """How many rows of the weight one result takes."""
        outer = set(self.phase.outer)
        found = {r.index[-1] for r in self.phase.reduces if r.index and r.index[-1].axes & outer}
        return max(1, len(found))

    def _rows_of_x(self) -> int:
        return max(1, len({s.index[:-1] for s in self.phase.stores}))

    def _tile(self, columns: Columns, reduce: Reduce) -> Tile:
        own = frozenset(axis for i in reduce.index for axis in i.axes)
        if self.tile_rows > 1 and not own & set(self.phase.outer):
            return Tile(f"[1, {columns.name}]", 1, True)  # the same for all rows of the weight
        return super()._tile(columns, reduce)

    def _pass(self, one: Pass, columns: Columns | None) -> None:
        """Sums over codes first; the rest (a norm's sum of squares) as ever."""
        mine = [r for r in one.reduces if r.op in self.packed]
        if not mine or columns is None:
            super()._pass(one, columns)
            return
        block = self.emitter.block
        products = [r.op.operands[0].op for r in mine]
        lefts = [p.operands[0] for p in products if p is not None]
        weights = [self.packed[r.op] for r in mine]
        sums = PackedSums(self.emitter, mine, lefts, weights, columns.name)
        sums.overruns = max_extent([columns]) % columns.size != 0
        sums.start(block)
        ahead = max(1, self._ahead(columns))
        for number in range(ahead):
            self._codes(sums, one, columns, str(number * columns.size), block)
        if ahead * columns.size < max_extent([columns]):
            start, body = block.names.fresh("start"), Block(block.names)
            self._codes(sums, one, columns, start, body)
            block.nest(f"for {start} in {self._steps(columns)}:", body)
        for reduce, made in zip(mine, sums.finish(block), strict=True):
            self.emitter.results[(reduce.op.result, reduce.index)] = made
        rest = [r for r in one.reduces if r not in mine]
        if rest or one.stores:
            super()._pass(replace(one, reduces=rest), columns)

    def _codes(self, sums: PackedSums, one: Pass, columns: Columns, base: str, body: Block) -> None:
        """One block of K."""
        emitter = self.emitter
        bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
        variable = body.names.fresh("col")
        with emitter.inside(emitter.column_scope(one.axes, body)):
            self._range(columns, variable, "" if base == "0" else base)
            mask = self._limit(one.axes, variable, columns.extent, columns.size)
            sums.step(base, mask, body)
        emitter.addresses.groups, emitter.masks = bound, masks

    def _loop(self, one: Pass, columns: Columns, reductions: Sequence[Reduction]) -> None:
        """The first blocks stand before the loop, so that they can be loaded ahead of the wait."""
        assert self.tile is not None
        for number in range(self._ahead(columns)):
            base = "" if number == 0 else str(number * columns.size)
            self._step(one, columns, reductions, base, self.emitter.block)
        if self._ahead(columns) * columns.size < max_extent([columns]):
            super()._loop(one, columns, reductions)

    def _ahead(self, columns: Columns) -> int:
        assert self.tile is not None
        return min(self.tile.ahead, max_extent([columns]) // columns.size)

    def _steps(self, columns: Columns) -> str:
        assert self.tile is not None
        stages = f", num_stages={self.tile.stages}" if self.tile.stages > 1 else ""
        first = self._ahead(columns) * columns.size
        return f"tl.range({first}, {size_text(columns.extent)}, {columns.name}{stages})"


def max_extent(columns: Iterable[Columns]) -> int:
    extents: list[Dim] = [one.extent for one in columns]
    return max(int(e) for e in extents)


class GemvGenerator(Generator):
    """A gemv kernel: one launch."""

    tile: AnyTile | None = None
    packed: Mapping[Op, Packed] = {}

    def run(self) -> KernelCode:
        if isinstance(self.tile, StreamedGemvTile):
            made = gemv_streamed.plan_of(self.planner)
            if made is not None:
                return self._streamed(made, self.tile)
            self.tile = None
        self.packed = expand(self.region)
        phase = plan(self.planner)
        self.kind = index_kind(self.region, [])
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        emitter = _Streaming(self.planner.indexer, pointers, set(), self.kind)
        targets = [Slot(s.place.kind, s.place.number) for s in phase.stores]
        writer = GemvWriter(phase, emitter, [t.name for t in targets], self.sms)
        writer.tile, writer.packed = self.tile, self.packed
        reads, program = self._finish(phase, writer.write())
        self._launch(program, reads, list(dict.fromkeys(targets)), [])
        return KernelCode(self.name, self.launches, [])

    def _streamed(self, made: tuple[Plan, list[Matrix]], tile: StreamedGemvTile) -> KernelCode:
        self.kind = index_kind(self.region, [])
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        emitter = StoredOperands(self.planner.indexer, pointers, set(), self.kind)
        writes = [Slot("result", i) for i in range(len(made[0].stores))]
        targets = [w.name for w in writes]
        program = StreamedGemvWriter(made, emitter, targets, tile, self.sms).write()
        reads = [Slot("input", self.region.args.index(v)) for v in program.reads]
        reads.sort(key=lambda s: s.number)
        self._launch(program, reads, writes, [])
        return KernelCode(self.name, self.launches, [])

    def _stored(self, slot: Slot) -> str:
        """Codes are read in words."""
        words = {w.codes for w in self.packed.values()}
        if slot.kind == "input" and self.region.args[slot.number] in words:
            return "int32"
        return super()._stored(slot)


def generate(
    name: str, region: Region, comment: str, sms: int, tile: AnyTile | None = None
) -> KernelCode:
    """The source of a region with linears of few rows, which `expand` rewrites.

    Raises BackendError for what has none.
    """
    generator = GemvGenerator(name, region, comment, sms)
    generator.tile = tile
    return generator.run()
