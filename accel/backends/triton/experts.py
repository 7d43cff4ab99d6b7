"""Kernels of kind "experts": the products of a mixture of experts, one launch for all of them.

With few rows (a decoding step) a program multiplies all rows of one expert with some rows of its
weight, so that memory is the limit and only the experts that were chosen are read. With many, one
launch sorts the rows' numbers by expert, and the next multiplies tiles of an expert's rows, read
where they lie and written where they belong: no rows are copied. What follows on a row (gate times
up, the row's weight) rides along as with a linear. Nothing is added across rows: the sum over a
token's experts is a reduction like any other, in a fixed order.
"""

from __future__ import annotations

from dataclasses import replace

from accel.backends.triton.expert_loop import FewWriter, ManyWriter, bins, routing
from accel.backends.triton.expert_plan import ExpertPlan, plan, reason
from accel.backends.triton.kernel import Generator, KernelCode, Slot, index_kind
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.product_plan import MatmulTile
from accel.backends.triton.skinny_loop import SkinnyTile
from accel.backends.triton.tiles import next_power
from accel.errors import BackendError
from accel.ir.module import Op, Region, Value
from accel.ir.types import Dim, product

__all__ = ["candidates", "choose", "choose_for", "generate", "reason"]

Tile = SkinnyTile | MatmulTile
MOST_FEW = 64  # rows that are multiplied without being sorted
_SYMBOLIC_ROWS = 4096
_ROOMY = 90  # capability of GPUs whose multiprocessors have 227 KB of shared memory


def choose(rows: Dim, experts: int, columns: int, depth: int, sums: int, sms: int) -> Tile:
    """The tile for `rows` in all, `columns` results of `sums` sums over `depth` each."""
    if isinstance(rows, int) and rows <= MOST_FEW:
        return _choose_few(_asked_for(rows, experts), columns, depth, sums, sms)
    each = -(-(rows if isinstance(rows, int) else _SYMBOLIC_ROWS) // experts)
    height = max(16, min(128, next_power(each)))
    span = min(64 if height >= 64 else 128, max(16, next_power(depth)))
    width = 256 if height >= 128 else 128
    width = max(16, min(width, next_power(columns * sums)) // sums)
    warps = 8 if height * width * sums >= 128 * 256 else 4
    return MatmulTile(height, width, span, warps, 3 if height >= 64 else 4)


def choose_for(kernel: Op, sms: int, capability: int) -> Tile | None:
    """The tile of a kernel that nobody has measured; None leaves it to `choose`.

    From Hopper on there is room for one more step of a large tile on its way: 1 to 6 % on an H200
    with OLMoE's, Mixtral's and Qwen3-30B's prompts."""
    ops = list(kernel.regions[0].ops)
    op = next(o for o in ops if o.name == "expert_linear")
    x, weight, chosen, _ = op.arguments()
    rows, columns = product(chosen.shape), int(weight.shape[1])
    if capability < _ROOMY or x.dtype.itemsize != 2:
        return None
    sums = 1 + any(o.name == "slice" for o in ops)
    tile = choose(rows, int(weight.shape[0]), columns // sums, int(x.shape[-1]), sums, sms)
    wide = isinstance(tile, MatmulTile) and tile.rows >= 128
    return replace(tile, stages=4) if wide else None


def _asked_for(rows: int, experts: int) -> int:
    """How many experts some rows ask for, if all are equally likely."""
    return max(1, round(experts * (1 - (1 - 1 / experts) ** rows)))


def _choose_few(experts: int, columns: int, depth: int, sums: int, sms: int) -> SkinnyTile:
    """Tall tiles read x less often; with few programs a multiprocessor waits for the last ones, so
    that they had better be small. Measured on an H200 with OLMoE's and Mixtral's sizes."""

    def programs(height: int) -> int:
        return -(-columns // height) * experts

    if sums == 2 and programs(64) >= 2 * sms:
        height, span = 64, 64
    elif sums == 2 and programs(32) < 3 * sms:
        height, span = 16, 256
    else:
        height, span = 64 // sums, 128
    span = min(span, max(16, next_power(depth)))
    split = 1
    while programs(height) * split < sms and split < 8 and depth >= 4 * split * span:
        split *= 2
    return SkinnyTile(height, span, 4, 4, split)


def candidates(kernel: Op, sms: int) -> list[Tile]:
    """Tiles worth timing for a kernel."""
    ops = list(kernel.regions[0].ops)
    op = next(o for o in ops if o.name == "expert_linear")
    sums = 1 + any(o.name == "slice" for o in ops)
    rows = product(op.operands[2].shape)
    if isinstance(rows, int) and rows <= MOST_FEW:
        shapes = ((64, 128, 4, 1), (64, 128, 4, 2), (32, 256, 4, 1), (64, 256, 3, 1),
                  (128, 64, 5, 1), (32, 128, 6, 2))  # fmt: skip
        return [SkinnyTile(max(16, h // sums), k, 4, s, split) for h, k, s, split in shapes]
    tiles = ((128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (64, 256, 64, 4, 3),
             (64, 128, 64, 4, 4), (32, 128, 128, 4, 4), (16, 128, 128, 4, 4))  # fmt: skip
    return [MatmulTile(h, max(16, w // sums), k, n, s) for h, w, k, n, s in tiles]


class ExpertGenerator(Generator):
    """A kernel of experts: one launch, or two."""

    tile: Tile | None = None

    def run(self) -> KernelCode:
        made = plan(self.planner)
        self.kind = index_kind(self.region, [])
        rows, experts = product(made.op.operands[2].shape), int(made.op.operands[1].shape[0])
        depth, sums = int(made.op.operands[0].shape[-1]), len(made.places)
        columns = int(made.stores[0][0].shape[-1])
        tile = self.tile or choose(rows, experts, columns, depth, sums, self.sms)
        if self.tile is None and made.op.operands[0].dtype.itemsize == 4:
            tile = replace(tile, depth=max(16, tile.depth // 2))
        if isinstance(tile, SkinnyTile):
            return self._few(made, tile)
        return self._many(made, tile, rows, experts)

    def _emitter(self) -> StoredOperands:  # type: ignore[override]
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        return StoredOperands(self.planner.indexer, pointers, set(), self.kind)

    def _few(self, made: ExpertPlan, tile: SkinnyTile) -> KernelCode:
        writes = [Slot("result", i) for i in range(len(made.stores))]
        writer = FewWriter(made, self._emitter(), [w.name for w in writes], tile)
        if not isinstance(writer.rows, int):
            raise BackendError(f"a kernel of experts for {writer.rows} rows that are few")
        program = writer.write()
        if tile.split > 1:
            cells = tile.columns * writer.width * len(made.places) * tile.split * writer.tiles
            self.scratch = [("float32", 4 * cells), ("int32", 4 * writer.tiles)]
            writes += [Slot("scratch", 0), Slot("scratch", 1)]
        self._launch(program, self._slots(program.reads), writes, [])
        code = KernelCode(self.name, self.launches, [size for _, size in self.scratch])
        code.zeroed = [1] if tile.split > 1 else []
        return code

    def _many(self, made: ExpertPlan, tile: MatmulTile, rows: Dim, experts: int) -> KernelCode:
        self.scratch = [("int32", product((4, rows))), ("int32", 4 * bins(experts))]
        between = [Slot("scratch", 0), Slot("scratch", 1)]
        first = routing(made, self._emitter(), rows, experts)
        self._launch(first, self._slots(first.reads), between, [])
        writes = [Slot("result", i) for i in range(len(made.stores))]
        program = ManyWriter(made, self._emitter(), [w.name for w in writes], tile).write()
        self._launch(program, [*self._slots(program.reads), *between], writes, [])
        return KernelCode(self.name, self.launches, [size for _, size in self.scratch])

    def _slots(self, values: list[Value]) -> list[Slot]:
        found = [Slot("input", self.region.args.index(v)) for v in values]
        return sorted(found, key=lambda s: s.number)


def generate(
    name: str, region: Region, comment: str, sms: int, tile: Tile | None = None
) -> KernelCode:
    """The source of a region with one expert_linear. Raises BackendError for what has none."""
    generator = ExpertGenerator(name, region, comment, sms)
    generator.tile = tile
    return generator.run()
