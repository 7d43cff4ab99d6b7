"""What large products of 16-bit floats cost: generated ones, and the library's.

Both compute tiles of results, as many at a time as there are multiprocessors. A wave of tiles takes
the time of its multiplications at the rate of a full device, and some time that does not depend on
K; the last wave takes as long as the others however few tiles it has. That and the start explain
the times of the products of a Llama of 8B and of ViT-B/16 (M, N and K from 2048, 768 and 768 to
12608, 28672 and 14336) within 10 %, so that no rule is made for one model.

Rates are those inside of models, where the H200 is at its limit of power: its clock falls from 1980
to about 1500 MHz, and every kernel multiplies at most 735 TFLOP/s, the library's as well. What
differs is what a tile costs besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accel.backends.loops.trace import COSTLY
from accel.backends.triton.cooperative import CooperativeTile
from accel.backends.triton.overlapped import OverlappedTile
from accel.backends.triton.paired import PAIR, PairedTile
from accel.ir.module import Op

_SMS = 132  # of the device that was measured: rates are those of all together
BANDWIDTH = 4.3e12  # bytes/s of a kernel that reads and writes
LAUNCH = 1.5e-6  # seconds from one kernel of a CUDA graph to the next


@dataclass(frozen=True)
class Rates:
    """One way to compute products.

    Attributes:
        flops: FLOP/s of a device that is full, in the middle of a long sum.
        start: seconds before the first multiplication and after the last.
        wave: seconds that a wave of tiles takes besides its multiplications and its epilogue.
        tiles: shapes of tiles, each with the share of `flops` that it reaches.
    """

    flops: float
    start: float
    wave: float
    tiles: tuple[tuple[int, int, float], ...]


# cuBLAS chooses among many shapes; these are those that show in its times.
_LIBRARY = Rates(735e12, 2e-6, 2e-6, (
    (128, 256, 1.0), (192, 192, 1.0), (128, 192, 0.97), (128, 128, 0.9), (64, 256, 0.9),
))  # fmt: skip
_OVERLAPPED = Rates(735e12, 1.5e-6, 0.9e-6, ((128, 128, 0.92), (64, 128, 0.74)))
_COOPERATIVE = Rates(735e12, 3.4e-6, 0.3e-6, ((128, 256, 1.0), (192, 128, 0.82)))
# Half as many bytes of the weight from the second-level cache take less power.
_PAIRED = Rates(770e12, 4.4e-6, 0.5e-6, ((128, 256, 1.0), (192, 128, 0.82)))
# Groups that share a tile do not hide their epilogue: with shorter sums that costs more than a
# larger tile saves (ViT's K = 768: 1 % of the model).
_SHARED_DEPTH = 1024
_NEAR = 20e6  # bytes of x that stay in the second-level cache beside the weight
_WIDTH = 2  # bytes of an element
# Seconds that four warps take for one element: to store it, for an op, for a costly one.
_STORE, _CHEAP, _COSTLY = 1.2e-10, 1e-11, 1.5e-10
MARGIN = 1.03  # what the model may be off by: a kernel must save more


def library_seconds(rows: int, columns: int, depth: int, sms: int) -> float:
    """cuBLAS's time for [rows, depth] x [depth, columns]."""
    return min(
        _LIBRARY.start + _waves(rows, columns, height, width, sms)
        * (_LIBRARY.wave + _multiplication(_LIBRARY.flops * share, height, width, depth))
        for height, width, share in _LIBRARY.tiles
    )  # fmt: skip


def overlapped_seconds(
    rows: int, columns: int, depth: int, tile: OverlappedTile, rest: Sequence[Op], sms: int,
    halves: int = 1,
) -> float:  # fmt: skip
    """The time of an overlapped kernel; `columns` are the weight's rows, of both halves.

    Two groups of warps take turns: while one multiplies, the other has its epilogue (`rest`). What
    takes longer than a multiplication is not hidden. Groups that share a tile hide none of it, but
    each has only half of the results.
    """
    together = isinstance(tile, CooperativeTile)
    pair = PAIR if isinstance(tile, PairedTile) else 1
    rates = _PAIRED if pair > 1 else _COOPERATIVE if together else _OVERLAPPED
    shares = {(height, width): share for height, width, share in rates.tiles}
    share = shares.get((tile.rows, tile.columns), rates.tiles[-1][2])
    multiply = _multiplication(rates.flops * share, tile.rows, tile.columns, depth)
    costs = [_COSTLY if op.name in COSTLY else _CHEAP for op in rest]
    finish = (_STORE + sum(costs)) * tile.rows * tile.columns / halves
    waves = _waves(rows, columns, pair * tile.rows, tile.columns, max(1, sms // pair))
    if together:
        return rates.start + waves * (rates.wave + multiply + finish / tile.groups)
    each = rates.wave + max(multiply, (multiply + finish) / 2)
    return rates.start + waves * each + finish


def choose_overlapped(
    rows: int, columns: int, depth: int, rest: Sequence[Op], sms: int, halves: int = 1
) -> OverlappedTile:
    """The tile that takes the least time."""
    group = 16 if rows <= 16 * 128 else 8  # x stays in the second-level cache if there is room
    tiles = [OverlappedTile(128, 128, 64, 5, group), OverlappedTile(64, 128, 64, 6, group)]
    if depth >= _SHARED_DEPTH:
        if 16 * 128 * depth * _WIDTH <= _NEAR:
            group = 16  # each reading of the weight from memory serves twice as many rows
        tiles += [CooperativeTile(128, 256, 64, 4, group), PairedTile(128, 256, 64, 4, group)]

    def seconds(tile: OverlappedTile) -> float:
        return overlapped_seconds(rows, columns, depth, tile, rest, sms, halves)

    return min(tiles, key=seconds)


def rest_seconds(rows: int, columns: int, halves: int, width: int, rest: Sequence[Op]) -> float:
    """What an epilogue costs in a kernel of its own: a launch, a read of the product, a write.

    A lone addition costs a read and a write: the next norm adds, but it has to read both operands,
    and to write their sum for the addition after it.
    """
    if not rest:
        return 0.0
    result = rows * columns // halves * width
    if all(op.name == "add" for op in rest):
        return 2 * result / BANDWIDTH
    return LAUNCH + (rows * columns * width + result) / BANDWIDTH


def fills(rows: int, columns: int, tile: OverlappedTile, sms: int) -> bool:
    """Whether there is a tile for every multiprocessor."""
    return -(-rows // tile.rows) * -(-columns // tile.columns) >= sms


def _waves(rows: int, columns: int, height: int, width: int, sms: int) -> int:
    return -(-(-(-rows // height) * -(-columns // width)) // sms)


def _multiplication(flops: float, height: int, width: int, depth: int) -> float:
    return 2 * height * width * depth / (flops / _SMS)
