"""Which tile an attention kernel takes, and whether a library is faster."""

from __future__ import annotations

from dataclasses import dataclass

from accel.backends.triton.tiles import next_power
from accel.ir.module import Op

_SYMBOLIC_LENGTH = 2048


@dataclass(frozen=True)
class AttentionTile:
    """Queries of one program, keys of one step, and how it is run."""

    rows: int
    columns: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class OverlappedTile:
    """A tile of `attention_overlapped`: groups of warps with 64 queries each, keys of one step,
    how many steps are in flight, and whether programs stay for all of the work."""

    groups: int = 2
    columns: int = 128
    stages: int = 2
    persistent: bool = True

    @property
    def rows(self) -> int:
        """Queries of one program."""
        return 64 * self.groups


Tile = AttentionTile | OverlappedTile


def choose(op: Op, sms: int) -> AttentionTile:
    """The tile of an attention kernel."""
    q, k, v, _ = op.arguments()
    size = max(int(q.shape[3]), int(v.shape[3]))
    queries = q.shape[2] if isinstance(q.shape[2], int) else _SYMBOLIC_LENGTH
    keys = k.shape[2] if isinstance(k.shape[2], int) else _SYMBOLIC_LENGTH
    wide = q.dtype.itemsize > 2
    if wide:
        best = AttentionTile(32, 32, 4, 2) if size <= 128 else AttentionTile(16, 32, 4, 2)
    elif size <= 64:
        best = AttentionTile(128, 64, 4, 3)
    elif size <= 128:
        best = AttentionTile(128, 64, 8, 3)
    else:
        best = AttentionTile(64, 64, 8, 2)
    rows = min(best.rows, max(16, next_power(queries)))
    columns = min(best.columns, max(16, next_power(keys)))
    warps = min(best.warps, 4) if rows < best.rows else best.warps
    return AttentionTile(rows, columns, warps, best.stages)


def candidates(kernel: Op, sms: int) -> list[AttentionTile]:
    """Tiles worth timing for a kernel."""
    op = next(op for op in kernel.regions[0].ops if op.name == "attention")
    q, k, v, _ = op.arguments()
    size = max(int(q.shape[3]), int(v.shape[3]))
    tallest = next_power(q.shape[2]) if isinstance(q.shape[2], int) else _SYMBOLIC_LENGTH
    widest = next_power(k.shape[2]) if isinstance(k.shape[2], int) else _SYMBOLIC_LENGTH
    held = 224 << 10
    return [
        AttentionTile(rows, columns, warps, stages)
        for rows, columns, warps, stages in _WORTH_TIMING
        if rows <= max(16, tallest)
        and columns <= max(16, widest)
        and next_power(size) * q.dtype.itemsize * (rows + 2 * stages * columns) <= held
        and rows * (next_power(size) + columns) <= warps * 32 * 160
    ]


# rows, columns, warps, stages
_WORTH_TIMING = (
    (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2),
    (128, 64, 8, 2), (128, 128, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 4, 3),
    (32, 64, 4, 3), (32, 64, 2, 2), (64, 128, 4, 3), (16, 64, 2, 3), (128, 128, 4, 2),
)  # fmt: skip
