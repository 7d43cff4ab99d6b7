"""The state of `accel.streaming_attention`: the first tokens, and a ring of the others.

Slots 0 to sinks - 1 hold the first tokens, the others a ring of the last `window`. Keys are kept as
they are before the rotary embedding, and turned by their place among the kept tokens whenever they
are read, all of them: the angles of these places are one table for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from accel.errors import CaptureError, OptionError
from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.ops.streaming import StreamingAttention
from accel.ir.types import TensorType, same_dim
from accel.passes.narrow import WHOLE, Emit, Plan
from accel.passes.state import Item

if TYPE_CHECKING:
    from accel.passes.windows import LastToken, NextTokens

_ROW = frozenset((2,))


def last_token(last: LastToken, op: Op) -> Plan:
    """One query over the keys of a prompt."""
    q, *others = op.operands
    return Plan([(q, _ROW), *((v, WHOLE) for v in others)], parts(last, op))


def parts(last: LastToken, op: Op) -> Emit:
    """The op in ops that kernels are made of, before any of them is chosen."""
    attributes = last.attributes(op)

    def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
        return [StreamingAttention.decompose(b, *values, **attributes)]

    return emit


def next_token(tokens: NextTokens, op: Op) -> Plan:
    """One query over the cache."""
    if not same_dim(tokens.count, 1):
        raise OptionError(
            "a cache with attention sinks takes one token at a time",
            where=str(op.location or ""),
            advice="compile with extend=0: no speculation, and prompts in one piece",
        )
    q, k, v, cos, sin = op.operands
    sinks, window = int(op.attribute("sinks")), int(op.attribute("window"))
    slots = sinks + window
    if isinstance(tokens.total, int) and slots >= tokens.total:
        raise OptionError(
            f"stream_cache: {sinks} sinks and a window of {window} are no less than the capacity, "
            f"{tokens.total}",
            advice="choose a larger capacity or a smaller window",
        )

    def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
        places = Places.of(tokens, b, sinks, window)
        caches = [
            _write(tokens, b, value, new, role, places, sinks)
            for role, value, new in (("keys", k, values[1]), ("values", v, values[2]))
        ]
        style = op.attribute("style")
        tables = [places.angles(x) for x in (cos, sin)]
        query = b.rope(values[0], *(x for x, _ in tables), style=style)
        keys = b.rope(caches[0], *(x for _, x in tables), style=style)
        attributes = {n: op.attribute(n) for n in ("scale", "softcap")}
        operands = [query, keys, caches[1], places.newest]
        return b.op("cached_attention", operands, attributes).results

    return Plan([(q, _ROW), (k, _ROW), (v, _ROW)], emit)


def kept(last: LastToken, item: Item) -> Value:
    """The slots after a prompt: in each the newest token that belongs there."""
    b, length = last.b, torch.int64
    slots, sinks = int(item.type.shape[2]), item.sinks
    newest = b.size_like(last.length - 1, length)
    slot = b.iota(shape=(slots,), axis=0, dtype=length)
    back = b.remainder(b.sub(newest, slot), b.scalar(slots - sinks, length))
    token = b.where(b.lt(slot, b.scalar(sinks, length)), slot, b.sub(newest, back))
    # Slots that no token has reached hold any of them, and are not read.
    token = b.minimum(b.maximum(token, b.scalar(0, length)), newest)
    made: Value = b.gather(last.made[item.value, WHOLE], token, axis=item.axis)
    return made


class Places:
    """Of a function: the slot of the new token, and which place among the kept ones slots have."""

    def __init__(self, tokens: NextTokens, b: Builder, sinks: int, window: int) -> None:
        self.tokens, self.b = tokens, b
        self.count = sinks + window
        at, dtype = tokens.position, tokens.position.dtype
        first, size = b.scalar(sinks, dtype), b.scalar(window, dtype)
        around = b.add(b.remainder(b.sub(at, first), size), first)
        self.next = b.where(b.lt(at, first), at, around)
        full = b.scalar(self.count - 1, dtype)
        self.newest = b.minimum(at, full)
        slot = b.iota(shape=(self.count,), axis=0, dtype=dtype)
        turned = b.sub(b.sub(slot, first), b.sub(at, self.newest))
        place = b.add(b.remainder(turned, size), first)
        self.place = b.where(b.lt(slot, first), slot, place)
        self.tables: dict[Value, tuple[Value, Value]] = {}

    @classmethod
    def of(cls, tokens: NextTokens, b: Builder, sinks: int, window: int) -> Places:
        known = tokens.streams.get((sinks, window))
        if known is None:
            known = tokens.streams[sinks, window] = cls(tokens, b, sinks, window)
        return known

    def angles(self, table: Value) -> tuple[Value, Value]:
        """Cosines or sines for the new query, and for every slot."""
        if table not in self.tables:
            axis = table.type.rank - 2
            whole = self.tokens.first_tokens(table, self.count)
            if not same_dim(whole.shape[axis], self.count):
                raise CaptureError(
                    "stream_cache: the angles of a rotary embedding do not lie along its tokens",
                    where=str(table.op.location or "") if table.op is not None else "",
                )
            query = self.b.dynamic_slice(whole, self.newest, axis=axis, size=1)
            self.tables[table] = query, self.b.gather(whole, self.place, axis=axis)
        return self.tables[table]


def _write(
    tokens: NextTokens, b: Builder, value: Value, new: Value, role: str, places: Places, sinks: int
) -> Value:
    """The cache of a value with the new token in it."""
    item = tokens.items.find("tokens", value, places.count)
    if item is None:
        shape = list(tokens.shape(value.shape))
        shape[2] = places.count
        type_ = TensorType(tuple(shape), value.dtype)
        item = Item(tokens.items.name(role), "tokens", value, type_, 2, True, True, sinks)
        tokens.items.add(item, places.count)
    if item not in tokens.held.results:
        cache = tokens.held.argument(item)
        tokens.held.results[item] = b.dynamic_update(cache, new, places.next, axis=2)
    return tokens.held.results[item]
