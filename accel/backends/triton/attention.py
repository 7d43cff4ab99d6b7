"""Kernels of kind "attention": which attentions have one, and what writes it.

`attention_loop` writes Triton code for all of them, `attention_overlapped` code for Hopper's own
instructions where heads have 64 elements or more and lie so that TMA can copy them.
"""

from __future__ import annotations

import torch

from accel.backends.loops.phases import Planner
from accel.backends.triton import head_tiles
from accel.backends.triton.attention_listed import ListedAttention, SeenWriter
from accel.backends.triton.attention_loop import AttentionWriter
from accel.backends.triton.attention_overlapped import OverlappedAttention
from accel.backends.triton.attention_plan import Plan, plan
from accel.backends.triton.attention_tiles import (
    OverlappedTile,
    Tile,
    candidates,
    choose_loop,
    choose_overlapped,
    library_is_faster,
)
from accel.backends.triton.attention_turned import TURNED_DEPTH
from accel.backends.triton.kernel import Generator, KernelCode, Slot, kind_of
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.powers import quick_powers
from accel.backends.triton.program import Program
from accel.ir.builder import Builder
from accel.ir.module import Op, Region
from accel.ir.types import product

__all__ = ["candidates", "choose", "generate", "library_reason", "neighbour_reason", "reason"]

_LARGEST_HEAD = 256

_OVERLAPPED_CAPABILITY = 90  # wgmma is Hopper's own
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reason(op: Op) -> str | None:
    """None if a kernel of kind "attention" may be built around this op, else the reason why not."""
    q, k, v, mask, _ = op.arguments()
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"attention of {q.dtype}, {k.dtype} and {v.dtype}"
    sizes = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    if not all(isinstance(d, int) and d > 0 for d in sizes):
        return "attention with symbolic heads, or none"
    if q.shape[3] > _LARGEST_HEAD or v.shape[3] > _LARGEST_HEAD:
        return f"attention heads of size {q.shape[3]} and {v.shape[3]}"
    if k.shape[2] == 0:
        return "attention without keys"
    if mask is not None and mask.type.rank > 4:
        return f"attention with a mask of rank {mask.type.rank}"
    return None


def choose(kernel: Op, sms: int, capability: int) -> Tile:
    """The tile of an attention kernel that nobody has measured: overlapped where possible."""
    region = kernel.regions[0]
    op = next(op for op in region.ops if op.name == "attention")
    tile = choose_overlapped(op, sms) if capability == _OVERLAPPED_CAPABILITY else None
    if tile is None or head_tiles.reason(op) is not None:
        return choose_loop(op)
    made = plan(Planner(region))
    return tile if head_tiles.operands_reason(made, tile) is None else choose_loop(op)


def library_reason(op: Op, capability: int) -> str | None:
    """Why a library computes an attention faster than a kernel; None if it does not."""
    tile = choose_overlapped(op) if capability == _OVERLAPPED_CAPABILITY else None
    batch, keys = op.operands[0].shape[0], op.operands[1].shape[2]
    whole = batch == 1 or (isinstance(keys, int) and tile is not None and keys >= tile.columns)
    overlapped = whole and tile is not None and head_tiles.reason(op) is None
    return library_is_faster(op, overlapped)


def neighbour_reason(op: Op, neighbour: Op) -> str | None:
    """None if the kernel around `op` may also turn its queries, else why not."""
    if neighbour.name != "rope" or op.operands[0] is not neighbour.result:
        return f"accel.{neighbour.name} does not ride along with attention"
    if neighbour.attribute("style") != "half" or int(op.operands[0].shape[3]) % TURNED_DEPTH:
        return "a rotary embedding whose pairs are not half of a head apart, or of short heads"
    return None


def _decompose_turn(op: Op) -> None:
    """The rotary embedding of the queries as the ops that it is made of."""
    turn = op.operands[0].op
    if turn is not None and turn.name == "rope":
        turn.replace_with(Builder(before=turn).decompose(turn))


def _kind(region: Region) -> str:
    """The type of positions. A mask that is computed has no memory, however large it is."""
    return kind_of(region, (*region.args, *region.results))


class AttentionGenerator(Generator):
    """An attention kernel: one launch, and one before it where a mask hides blocks."""

    tile: Tile | None = None

    def run(self) -> KernelCode:
        op = next(op for op in self.region.ops if op.name == "attention")
        tile = self.tile or choose_loop(op)
        if not isinstance(tile, OverlappedTile):
            _decompose_turn(op)
        made = plan(self.planner)
        self.kind = _kind(self.region)
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        emitter = StoredOperands(self.planner.indexer, pointers, set(), self.kind)
        write = Slot("result", 0)
        writer: AttentionWriter
        if isinstance(tile, OverlappedTile):
            noted = self._look(made, tile) if tile.listed else []
            name = noted[0].name if noted else ""
            writer = OverlappedAttention(
                made, emitter, self.region, write.name, tile, self.sms, name
            )
            self._go(writer.write(), noted, [write])
        elif tile.listed:
            list_ = Slot("scratch", 0)
            listed = ListedAttention(made, emitter, write.name, tile, list_.name)
            self.scratch = [("int32", product((listed.size, 4)))]
            self._go(listed.write(), [], [write, list_])
        else:
            writer = AttentionWriter(made, emitter, write.name, tile)
            self._go(writer.write(), [], [write])
        return KernelCode(self.name, self.launches, [size for _, size in self.scratch])

    def _look(self, made: Plan, tile: OverlappedTile) -> list[Slot]:
        """The launch before, which notes what the mask shows."""
        noted = Slot("scratch", 0)
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        emitter = StoredOperands(self.planner.indexer, pointers, set(), self.kind)
        writer = SeenWriter(made, emitter, tile.rows, tile.columns, noted.name)
        self.scratch = [("int32", product((writer.size, 4)))]
        self._go(writer.write(), [], [noted])
        return [noted]

    def _go(self, program: Program, more: list[Slot], writes: list[Slot]) -> None:
        quick_powers(program)
        reads = [Slot("input", self.region.args.index(v)) for v in program.reads]
        reads.sort(key=lambda s: (s.kind, s.number))
        self._launch(program, [*reads, *more], writes, [])


def generate(
    name: str, region: Region, comment: str, sms: int, tile: Tile | None = None
) -> KernelCode:
    """The source of a region with one attention. Raises BackendError for what has none."""
    generator = AttentionGenerator(name, region, comment, sms)
    generator.tile = tile
    return generator.run()
