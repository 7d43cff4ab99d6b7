"""Rotary embedding of a projection's heads, moved in front of the views that separate them.

A model cuts the projection's columns into queries, keys and values, makes heads of them, and turns
those of queries and keys. The same elements can be turned where the product computes them, if one
kernel holds all: its result is the projection with its first columns turned.

    %q = slice(%y, 0, 4096)                        %a = slice(%y, 0, 5120)
    %1 = permute(reshape(%q, heads))               %b = rope(reshape(%a, heads), %cos, %sin)
    %2 = rope(%1, %cos, %sin)               ->     %z = cat(reshape(%b), slice(%y, 5120, 6144))
    %k = slice(%y, 4096, 5120) ...                 %2 = permute(reshape(slice(%z, 0, 4096), heads))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.types import Dim, same_shape

_MOST_DEPTH = 128  # of a head: a tile of results must hold both of its halves


@dataclass(frozen=True)
class _Heads:
    """A range of columns, as heads, turned."""

    slice: Op
    permute: Op
    rope: Op
    depth: int

    @property
    def start(self) -> int:
        return int(self.slice.attribute("start"))

    @property
    def stop(self) -> int:
        return int(self.slice.attribute("stop"))


@dataclass(frozen=True)
class Rotation:
    """The heads of one projection that are turned, which are its first columns.

    `first` is the first op that reads the projection; cosines and sines are known there.
    """

    linear: Op
    heads: tuple[_Heads, ...]
    first: Op

    @property
    def ropes(self) -> list[Op]:
        return [h.rope for h in self.heads]

    def join(self, made_by: str) -> list[Op]:
        """Builds the turned projection, points what reads the projection to it, and returns the
        ops that compute it from the projection, in order."""
        y, (some, *_) = self.linear.result, self.heads
        b = Builder(before=self.first, made_by=made_by)
        readers = list(y.users)
        batch, length, width = y.shape
        depth, end = some.depth, self.heads[-1].stop
        around = [b.reshape(t, shape=_beside(t, length, depth)) for t in some.rope.operands[1:]]
        part = b.slice(y, axis=2, start=0, stop=end)
        heads = b.reshape(part, shape=(batch, length, end // depth, depth))
        turned = b.rope(heads, *around, style="half")
        flat = b.reshape(turned, shape=(batch, length, end))
        made = [*(t.op for t in around), part.op, heads.op, turned.op, flat.op]
        if end != width:
            rest = b.slice(y, axis=2, start=end, stop=width)
            flat = b.cat(flat, rest, axis=2)
            made += [rest.op, flat.op]
        for reader in readers:
            reader.set_operand(0, flat)
        for one in self.heads:
            one.rope.result.replace_all_uses(one.permute.result)
            one.rope.erase()
        return [op for op in made if op is not None and op is not self.linear]


def rotation_of(linear: Op, order: Mapping[Op, int]) -> Rotation | None:
    """The rotary embeddings after a projection [B, S, H * D]; None if there are none, or the
    projection is read otherwise as well. `order` counts the ops of the function."""
    y = linear.result
    readers = list(y.users)
    if y.type.rank != 3 or not readers or not all(_is_columns(r, y) for r in readers):
        return None
    heads = [h for h in map(_turned, readers) if h is not None]
    heads.sort(key=lambda h: h.start)
    if not heads or any(r not in order for r in readers):
        return None
    some, end = heads[0], 0
    for one in heads:
        same = one.rope.operands[1:] == some.rope.operands[1:] and one.depth == some.depth
        if not same or one.start != end:
            return None
        end = one.stop
    first = min(readers, key=order.__getitem__)
    known = all(
        t.op is None or (t.op in order and order[t.op] < order[first])
        for t in some.rope.operands[1:]
    )
    return Rotation(linear, tuple(heads), first) if known else None


def _is_columns(op: Op, y: Value) -> bool:
    if op.name != "slice" or int(op.attribute("axis")) % 3 != 2 or op.attribute("step") != 1:
        return False
    return isinstance(op.attribute("start"), int) and isinstance(op.attribute("stop"), int)


def _turned(part: Op) -> _Heads | None:
    """slice, reshape to heads, permute, rope."""
    batch, length, _ = part.result.shape
    split = part.result.single_user
    if split is None or split.name != "reshape" or split.result.type.rank != 4:
        return None
    heads, depth = split.result.shape[2:]
    permute = split.result.single_user
    if not same_shape(split.result.shape, (batch, length, heads, depth)) or permute is None:
        return None
    if permute.name != "permute" or tuple(permute.attribute("axes")) != (0, 2, 1, 3):
        return None
    rope = permute.result.single_user
    if rope is None or rope.name != "rope" or rope.operands[0] is not permute.result:
        return None
    if rope.attribute("style") != "half" or not isinstance(depth, int) or not _is_power(depth):
        return None
    if not all(_beside(t, length, depth) for t in rope.operands[1:]):
        return None
    return _Heads(part, permute, rope, depth)


def _is_power(depth: int) -> bool:
    return 2 <= depth <= _MOST_DEPTH and depth & (depth - 1) == 0


def _beside(t: Value, length: Dim, depth: int) -> tuple[Dim, ...]:
    """The shape of cosines that are [.., S, D] beside [B, H, S, D] for [B, S, H, D]; empty if they
    differ from head to head."""
    shape = (1,) * (4 - t.type.rank) + tuple(t.shape)
    if t.type.rank > 4 or shape[1] != 1 or not same_shape(shape[2:], (length, depth)):
        return ()
    return (shape[0], length, 1, depth)
