"""Which tile an attention kernel takes, and where a library is faster.

Figures are those of an H200 (benchmarks/results/gpu_attention.json).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from accel.backends.triton.tiles import next_power, parts_of
from accel.ir.module import Op, Value
from accel.ir.types import Dim, product, same_dim

_SYMBOLIC_LENGTH = 2048
_SMS = 132  # multiprocessors, where nobody says
_SHARED_BYTES = 227 << 10  # of a multiprocessor, for one program
_CACHE_BYTES = 28e6  # half of the second-level cache, and a bit
_CAUSAL_BYTES = 150e6  # up to which even work is worth more than reading one head after another
_NARROW_HEAD, _SHORT = 64, 2048
_TURNS = 1024  # queries from which turns at the tensor cores gain more than they cost
_FEW_MORE = 1.05  # queries that parts may be filled up to
_LONG, _MOST_OPS = 1024, 40  # keys from which sparse masks pay, and ops of a mask
_LEAST_OVERLAPPED = 256  # queries: with fewer, setting the warps up costs more than it gains
_LEAST_OF_MANY = 128  # queries, where there are parts enough to set them up once for several


@dataclass(frozen=True)
class AttentionTile:
    """Queries of one program, keys of one step, and how it is run.

    `across`: the last queries of all heads come first, then those before, so that programs end
    together under a causal mask; else one head comes after the other, which reads less memory.
    `listed`: blocks that a boolean mask hides are left out (`attention_listed`).
    """

    rows: int
    columns: int
    warps: int
    stages: int = 2
    across: bool = False
    listed: bool = False


@dataclass(frozen=True)
class OverlappedTile:
    """A tile of `attention_overlapped`: groups of warps with 64 queries each, keys of one step,
    how many steps are in flight, and whether programs stay for all of the work.

    `turns`: groups take turns at the tensor cores. `across` as in `AttentionTile`. `listed`: blocks
    before the first and behind the last one of which a boolean mask shows something are left out.
    """

    groups: int = 2
    columns: int = 128
    stages: int = 2
    persistent: bool = False
    across: bool = False
    turns: bool = False
    listed: bool = False

    @property
    def rows(self) -> int:
        """Queries of one program."""
        return 64 * self.groups

    def shared_bytes(self, depth: int, width: int) -> int:
        """Of queries, keys and values, and of the result on its way to memory."""
        tiles = self.rows * depth + self.stages * self.columns * (depth + width)
        return 2 * tiles + self.rows * width


@dataclass(frozen=True)
class BackwardTile:
    """Gradients: queries (then keys) that a program owns, and those of one step of its walk."""

    owned: int
    step: int
    warps: int
    stages: int = 2

    def own(self) -> AttentionTile:
        """The tile of either program."""
        return AttentionTile(self.owned, self.step, self.warps, self.stages)


Tile = AttentionTile | OverlappedTile


def choose_loop(op: Op) -> AttentionTile:
    """The tile of a kernel by `attention_loop`."""
    q, k, v, *_ = op.arguments()
    size = max(int(q.shape[3]), int(v.shape[3]))
    queries, keys = _known(q.shape[2]), _known(k.shape[2])
    if q.dtype.itemsize > 2:
        best = AttentionTile(32, 32, 4, 2) if size <= 128 else AttentionTile(16, 32, 4, 2)
    elif size <= 64:
        best = AttentionTile(64, 128 if keys <= 128 else 64, 4, 3)
    elif size <= 128:
        short = queries <= 512 or op.attribute("softcap") is not None
        best = AttentionTile(64, 64, 4, 3) if short else AttentionTile(128, 128, 8, 3)
    else:
        best = AttentionTile(128, 64, 8, 2)
    rows = min(best.rows, max(16, next_power(queries)))
    columns = min(best.columns, max(16, next_power(keys)))
    warps = min(best.warps, 4) if rows < best.rows else best.warps
    across = size <= _NARROW_HEAD and bool(op.attribute("causal")) and _fits_cache(op)
    return AttentionTile(rows, columns, warps, best.stages, across, compares_texts(op))


def choose_overlapped(op: Op, sms: int = _SMS) -> OverlappedTile | None:
    """The tile of a kernel by `attention_overlapped`; None where the loop is faster."""
    q, k, v, *_ = op.arguments()
    shortest, widest = min(_known(q.shape[2]), _known(k.shape[2])), max(q.shape[3], v.shape[3])
    many = _parts(op, 128) >= 2 * sms and len(op.operands) == 3
    least = _LEAST_OF_MANY if many else _LEAST_OVERLAPPED
    if shortest < least or _loop_is_faster(op):
        return None
    if compares_texts(op):
        known = all(isinstance(x.shape[2], int) for x in (q, k))
        whole = known and op.attribute("window") is None and int(widest) <= 128
        return OverlappedTile(listed=True) if whole else None
    causal = bool(op.attribute("causal"))
    # A cap takes registers: with 128 columns, scores and results do not fit them.
    columns = 64 if int(widest) > 128 or op.attribute("softcap") is not None else 128
    if causal and not _fits_cache(op, _CAUSAL_BYTES):
        return OverlappedTile(columns=columns)
    tile = OverlappedTile(columns=columns, persistent=True, across=causal)
    if causal:
        return replace(tile, turns=columns == 128 and shortest >= _TURNS)
    if int(widest) > _NARROW_HEAD:
        return tile
    # Three groups share what one brings, where they leave few queries of a part empty.
    rows = 64 * 3 * parts_of(_known(q.shape[2]), 64 * 3)
    return replace(tile, stages=3, groups=3 if rows <= _FEW_MORE * _known(q.shape[2]) else 2)


def _parts(op: Op, rows: int) -> int:
    """How many tiles of so many queries there are, as far as it is known."""
    q = op.operands[0]
    heads = [d if isinstance(d, int) else 1 for d in q.shape[:2]]
    return heads[0] * heads[1] * (-(-_known(q.shape[2]) // rows))


def _loop_is_faster(op: Op) -> bool:
    """Whether the loop beats cuDNN's kernel and the overlapped one: a causal mask, heads of 64 and
    few queries, so that many small programs that end together do best."""
    q, _, v, *_ = op.arguments()
    narrow = max(int(q.shape[3]), int(v.shape[3])) <= _NARROW_HEAD and q.dtype.itemsize == 2
    short = isinstance(q.shape[2], int) and q.shape[2] <= _SHORT
    return narrow and short and bool(op.attribute("causal")) and _fits_cache(op)


def _fits_cache(op: Op, most: float = _CACHE_BYTES) -> bool:
    """Whether the keys and values of all heads stay in the second-level cache, or are few enough
    to be read over and over."""
    _, k, v, *_ = op.arguments()
    rows = product((*k.shape[:2], _known(k.shape[2])))
    bytes_ = product((rows, k.shape[3] + v.shape[3], k.dtype.itemsize))
    return isinstance(bytes_, int) and bytes_ <= most


def compares_texts(op: Op) -> bool:
    """Whether a boolean mask compares what it reads of queries with what it reads of keys (texts in
    one row, say), so that most blocks are hidden; where there are blocks enough to gain."""
    mask = op.arguments()[3] if op.name == "attention" else None
    if mask is None or mask.dtype != torch.bool or _known(op.operands[1].shape[2]) < _LONG:
        return False
    pending: list[Value] = [mask]
    found: set[Op] = set()
    while pending:
        made = pending.pop().op
        if made is None or made in found or len(found) > _MOST_OPS:
            continue
        found.add(made)
        if made.name == "eq" and made.result.type.rank >= 2:
            sides = [_along(v, made.result.type.rank) for v in made.operands if _is_read(v)]
            if sorted(sides) == ["columns", "rows"]:
                return True
        pending.extend(made.operands)
    return False


def _along(value: Value, rank: int) -> str:
    """Whether a side of a comparison varies along the rows or the columns of pairs."""
    shape = (1,) * (rank - value.type.rank) + value.shape
    return {(False, True): "rows", (True, False): "columns"}.get(
        (same_dim(shape[-2], 1), same_dim(shape[-1], 1)), "both"
    )


def _is_read(value: Value) -> bool:
    """Whether a value is read from memory, and no mere position."""
    pending, count = [value], 0
    while pending and count < _MOST_OPS:
        made, count = pending.pop().op, count + 1
        if made is None or made.name in ("constant", "gather", "index", "embedding"):
            return True
        pending.extend(made.operands)
    return False


def candidates(kernel: Op, sms: int) -> list[Tile]:
    """Tiles worth timing for a kernel."""
    op = next(op for op in kernel.regions[0].ops if op.name == "attention")
    q, k, v, *_ = op.arguments()
    depth, width = next_power(int(q.shape[3])), next_power(int(v.shape[3]))
    tallest, widest = next_power(_known(q.shape[2])), next_power(_known(k.shape[2]))
    overlapped = [
        tile
        for tile in _OVERLAPPED
        if q.dtype.itemsize == 2
        and (tile.groups == 2 or width <= 64)
        and tile.rows <= tallest
        and tile.columns <= widest
        and tile.shared_bytes(depth, width) <= _SHARED_BYTES
    ]
    size = max(depth, width)
    causal = bool(op.attribute("causal"))
    return [tile for tile in overlapped if causal or not tile.across] + [
        AttentionTile(rows, columns, warps, stages, across)
        for rows, columns, warps, stages in _WORTH_TIMING
        for across in ((False, True) if causal else (False,))
        if rows <= max(16, tallest)
        and columns <= max(16, widest)
        and size * q.dtype.itemsize * (rows + 2 * stages * columns) <= _SHARED_BYTES
        and rows * (size + columns) <= warps * 32 * 160
    ]


# rows, columns, warps, stages
_WORTH_TIMING = (
    (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3),
    (64, 64, 4, 2), (64, 32, 4, 3), (32, 64, 4, 3), (32, 64, 2, 2), (16, 64, 2, 3),
)  # fmt: skip
_OVERLAPPED = (
    OverlappedTile(),
    OverlappedTile(across=True),
    OverlappedTile(persistent=True),
    OverlappedTile(persistent=True, across=True),
    OverlappedTile(turns=True, across=True),
    OverlappedTile(stages=4, turns=True),
    OverlappedTile(stages=3, persistent=True),
    OverlappedTile(persistent=True, across=True, turns=True),
    OverlappedTile(groups=3, stages=3, persistent=True),
    OverlappedTile(columns=64),
    OverlappedTile(columns=64, across=True),
    OverlappedTile(groups=3, columns=64, stages=3, across=True),
    OverlappedTile(groups=3, columns=64, stages=3, across=True, turns=True),
)


def _known(length: Dim) -> int:
    return length if isinstance(length, int) else _SYMBOLIC_LENGTH


# -- whether it pays -------------------------------------------------------------------------

_LIBRARY_RATE, _LOOP_RATE = 500e12, 300e12  # FLOP/s of 16-bit attention: cuDNN's, the loop's
_LIBRARY_START = 3.5e-6  # seconds that a call of cuDNN takes longer than a kernel, if both are tiny
_FEW_KEYS, _SMALL_HEAD = 256, 128  # up to these a kernel is never slower than cuDNN


def library_is_faster(op: Op, overlapped: bool) -> str | None:
    """Why cuDNN's kernel is the better one; None if it is not.

    `overlapped` says that `attention_overlapped` takes this, which is as fast. A mask, a window or
    a cap means a mask of all pairs for the library, or that it has no kernel; where heads share
    keys, torch does not reach cuDNN's.
    """
    q, k, v, mask, sinks = op.arguments()
    special = mask is not None or sinks is not None or op.attribute("window") is not None
    special = special or op.attribute("softcap") is not None or op.attribute("offset") != 0
    if special or _loop_is_faster(op):
        return None
    if overlapped:
        return None
    if q.dtype.itemsize > 2:
        return "a library multiplies float32 on its own path"
    flops = product((2, *q.shape[:3], k.shape[2], q.shape[3] + v.shape[3]))
    if not isinstance(flops, int):
        return "an unknown number of queries or keys"
    if k.shape[2] <= _FEW_KEYS and max(q.shape[3], v.shape[3]) <= _SMALL_HEAD:
        return None
    share = 0.5 if op.attribute("causal") else 1.0
    lost = share * flops * (1 / _LOOP_RATE - 1 / _LIBRARY_RATE)
    return None if lost < _LIBRARY_START else f"cuDNN saves {1e6 * (lost - _LIBRARY_START):.1f} us"
