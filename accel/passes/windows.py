"""The two windows of `accel.passes.narrow`: the last token of a text, and tokens after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from accel.errors import CaptureError
from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.types import Dim, TensorType, same_dim, simplify_dim
from accel.passes import mixing, recurrent, routing, streaming
from accel.passes.narrow import WHOLE, Axes, Emit, Narrow, Plan, made_by, stored
from accel.passes.state import Held, Item, State
from accel.passes.token_wise import is_prefix_stable


def _rest(mask: Value | None, sinks: Value | None, given: Sequence[Value]) -> list[Value | None]:
    """An attention's mask and sinks, None where it has none, of the values of those it has."""
    left = iter(given)
    return [None if x is None else next(left) for x in (mask, sinks)]


class LastToken(Narrow):
    """The last of `length` tokens. `made` starts with whole values that are there already."""

    def cut(self, b: Builder, x: Value, axis: int, offset: Dim) -> Value:
        start = simplify_dim(self.length - 1 + offset)
        made: Value = b.slice(x, axis=axis, start=start, stop=simplify_dim(start + 1))
        return made

    def line(self, op: Op) -> Emit:
        start = simplify_dim(op.attribute("start") + op.attribute("step") * (self.length - 1))
        shape = self.shape(op.result.shape, self.sequence_axes(op.result))
        return self.clone(op, shape=shape, start=start)

    def band(self, op: Op) -> Emit:
        diagonal, lower = op.attribute("diagonal"), op.attribute("lower")
        moved: dict[str, Any] = {"diagonal": simplify_dim(self.size(diagonal) + self.length - 1)}
        if lower is not None:
            moved["lower"] = simplify_dim(self.size(lower) + self.length - 1)
        return self.clone(op, rows=1, **moved)

    def attend(self, op: Op) -> Plan:
        if op.name == "streaming_attention":
            return streaming.last_token(self, op)
        q, k, v, mask, sinks = op.arguments()
        needs = [(q, frozenset((2,))), (k, WHOLE), (v, WHOLE)]
        if mask is not None:
            needs.append((mask, self._aligned(mask, op.result, frozenset((2,)))))
        if sinks is not None:
            needs.append((sinks, WHOLE))
        window = op.attribute("window")
        if window is None:  # one query, and no token after it
            return Plan(needs, self.clone(op, causal=False))
        attributes = {n: op.attribute(n) for n in ("scale", "window", "softcap")}

        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            place = b.size_like(simplify_dim(self.length - 1), torch.int64)
            more = _rest(mask, sinks, values[3:])
            return b.op("cached_attention", [*values[:3], place, *more], attributes).results

        return Plan(needs, emit)

    def whole(self, value: Value) -> Plan:
        op = made_by(value)
        if op.name == "streaming_attention":
            return Plan([(v, WHOLE) for v in op.operands], streaming.parts(self, op))
        return Plan([(v, WHOLE) for v in op.operands], self.clone(op))

    def otherwise(self, value: Value, axes: Axes) -> Plan:
        if not self._is_plain(value, axes):
            raise self.refuse(value, "orders tokens in a way that has no last one")
        return self.cut_of(value, axes)

    def cut_of(self, value: Value, axes: Axes) -> Plan:
        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            made = values[0]
            for axis in sorted(axes):
                made = self.cut(b, made, axis, 0)
            return [made]

        return Plan([(value, WHOLE)], emit)

    def state(self, item: Item, before: Value, zero: Value) -> Value:
        """An item of the state after the text; its value is there, whole."""
        b, whole = self.b, self.made[item.value, WHOLE]
        made = whole
        if item.streams:
            made = streaming.kept(self, item)
        elif item.kind == "tokens":
            made = b.dynamic_update(before, whole, zero, axis=item.axis, ring=item.ring)
        elif item.kind == "window":
            kept, none = before.shape[item.axis], [0] * len(before.shape)
            low = [kept if i == item.axis else 0 for i in range(len(none))]
            padded = b.pad(whole, low=low, high=none)
            stop = simplify_dim(self.length + kept)
            made = b.slice(padded, axis=item.axis, start=self.length, stop=stop)
        elif item.kind == "sum":
            made = self.cut(b, whole, item.axis, 0)
        return made

    def _plan(self, value: Value, axes: Axes) -> Plan:
        there = (value, WHOLE) in self.made
        if axes and there and self._is_plain(value, axes):
            return self.cut_of(value, axes)
        plan = super()._plan(value, axes)
        if axes and self._is_plain(value, axes) and not self._goes_on(plan):
            return self.cut_of(value, axes)
        return plan

    def _is_plain(self, value: Value, axes: Axes) -> bool:
        """Whether the axes have a token a place, so that the last one can be cut off."""
        return all(same_dim(value.shape[a], self.length) for a in axes)

    def _goes_on(self, plan: Plan) -> bool:
        """Whether what the plan needs can be had, where tokens take several places of an axis."""
        for value, axes in plan.needs:
            if not axes or self._is_plain(value, axes):
                continue
            try:
                further = super()._plan(value, axes)
            except CaptureError:
                return False
            if not self._goes_on(further):
                return False
        return True


class NextTokens(Narrow):
    """`count` tokens from a run-time position on. Keys and values of attention are in `caches`."""

    position: Value
    held: Held
    items: State
    slots: Mapping[Value, int]

    def start(
        self, position: Value, ids: Value, held: Held, items: State, slots: Mapping[Value, int]
    ) -> None:
        """`slots`: how many tokens are kept of each value that attention reads."""
        self.position, self.held, self.items, self.slots = position, held, items, slots
        self._places: dict[tuple[str, Dim], Value] = {}
        self._firsts: dict[int, NextTokens] = {}
        self.streams: dict[tuple[int, int], streaming.Places] = {}
        self.unstable: list[Value] = []  # what changes with the length of the text
        self.unproven: list[Value] = []  # of attention that is not known to be causal
        self.made[self.ids, self.sequence_axes(self.ids)] = ids

    def place(self, b: Builder, dtype: torch.dtype, offset: Dim = 0) -> Value:
        at = b.cast_to(self.position, dtype)
        if same_dim(offset, 0):
            return at
        made: Value = b.add(at, b.size_like(offset, dtype))
        return made

    def cut(self, b: Builder, x: Value, axis: int, offset: Dim) -> Value:
        start = self.place(b, torch.int64, offset)
        made: Value = b.dynamic_slice(x, start, axis=axis, size=self.count)
        return made

    def line(self, op: Op) -> Emit:
        shape = self.shape(op.result.shape, self.sequence_axes(op.result))
        axis = op.attribute("axis") % len(shape)
        start, step, dtype = (op.attribute(n) for n in ("start", "step", "dtype"))

        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            at = self.place(b, dtype)
            if step != 1:
                at = b.mul(at, b.size_like(step, dtype))
            if not same_dim(self.size(start), 0):
                at = b.add(at, b.size_like(self.size(start), dtype))
            if same_dim(self.count, 1):
                return [b.broadcast_to(at, shape=shape)]
            return [b.add(b.iota(shape=shape, axis=axis, dtype=dtype, step=step), at)]

        return emit

    def band(self, op: Op) -> Emit:
        diagonal, lower = op.attribute("diagonal"), op.attribute("lower")
        columns = self.size(op.result.shape[1])

        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            column = b.iota(shape=(1, columns), axis=1, dtype=torch.int64)
            if not same_dim(self.count, 1):  # the distance from each row
                row = b.iota(shape=(self.count, 1), axis=0, dtype=torch.int64)
                column = b.sub(column, row)
            keep = b.le(column, self.place(b, torch.int64, self.size(diagonal)))
            if lower is not None:
                after = b.gt(column, self.place(b, torch.int64, self.size(lower)))
                keep = b.logical_and(keep, after)
            return [keep]

        return emit

    def first_tokens(self, value: Value, count: int) -> Value:
        """A value at positions 0 to count - 1; no token may have a say in it."""
        if count not in self._firsts:
            sizes, total = self.sizes, self.total
            first = NextTokens(self.main, self.ids, self.b, self.length, sizes, total, count)
            first.position = self.b.scalar(0, torch.int64)
            first._places, first.unstable = {}, []
            self._firsts[count] = first
        made = self._firsts[count](value)
        for changing in self._firsts[count].unstable:
            raise self.refuse(changing, "depends on the length of the text")
        return made

    def attend(self, op: Op) -> Plan:
        if op.name == "streaming_attention":
            return streaming.next_token(self, op)
        q, k, v, mask, sinks = op.arguments()
        row = frozenset((2,))
        rows = [(q, row)]
        masks = [] if mask is None else [(mask, self._aligned(mask, op.result, row))]
        masks += [] if sinks is None else [(sinks, WHOLE)]
        if not self.is_sequence(k.shape[2]):  # keys of something else, such as an encoder
            return Plan([*rows, (k, WHOLE), (v, WHOLE), *masks], self.clone(op))
        others = not same_dim(k.shape[2], self.length)  # besides those of the tokens
        if others or not op.attribute("causal"):
            self.unproven.append(op.result)
        if others:
            return Plan([*rows, (k, WHOLE), (v, WHOLE), *masks], self._attend_whole(op))
        leaves = list(dict.fromkeys((*stored(k), *stored(v))))
        axes = [row if self.is_sequence(leaf.shape[2]) else WHOLE for leaf in leaves]

        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            new = dict(zip(leaves, values[1:]))
            rings = [self.write(b, x, new[x], role) for role, x in self._roles(k, v)]
            ring = any(rings)
            attributes = {n: op.attribute(n) for n in ("scale", "window", "softcap")}
            keys, values_ = (self.read(b, x, new) for x in (k, v))
            place, slots = self.position, keys.shape[2]
            if ring and same_dim(self.count, 1) and same_dim(slots, op.attribute("window")):
                # All that is there is seen, in whatever order: no more than a full cache.
                place, attributes["window"] = self.slot(b, "newest", slots), None
            elif ring:
                attributes["ring"] = True
            more = _rest(mask, sinks, values[1 + len(leaves) :])
            operands = [values[0], keys, values_, place, *more]
            return b.op("cached_attention", operands, attributes).results

        return Plan([*rows, *zip(leaves, axes), *masks], emit)

    def _attend_whole(self, op: Op) -> Emit:
        """Attention to keys of which some are no token's: where it is causal, by a mask."""
        attributes = self.attributes(op, causal=False, offset=0)
        mask, sinks = op.arguments()[3:]
        columns = self.size(op.operands[1].shape[2])

        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            given, more = _rest(mask, sinks, values[3:])
            if op.attribute("causal"):
                column = b.iota(shape=(1, columns), axis=1, dtype=torch.int64)
                row = b.iota(shape=(self.count, 1), axis=0, dtype=torch.int64)
                last = self.place(b, torch.int64, self.size(op.attribute("offset")))
                seen = b.le(b.sub(column, row), last)
                if given is None:
                    given = seen
                elif given.dtype == torch.bool:
                    given = b.logical_and(given, seen)
                else:
                    given = b.where(seen, given, b.scalar(float("-inf"), given.dtype))
            return b.op("attention", [*values[:3], given, more], attributes).results

        return emit

    def _roles(self, k: Value, v: Value) -> Iterator[tuple[str, Value]]:
        """The values that are kept between tokens, and what for."""
        for role, value in (("keys", k), ("values", v)):
            for leaf in stored(value):
                if self.is_sequence(leaf.shape[2]):
                    yield role, leaf

    def write(self, b: Builder, value: Value, new: Value, role: str) -> bool:
        """Writes these tokens' into the cache, once; whether that is a ring."""
        item = self.items.find("tokens", value)
        if item is None:
            shape = list(self.shape(value.shape))
            shape[2] = self.slots[value]
            type_ = TensorType(tuple(shape), value.dtype)
            ring = not same_dim(shape[2], self.total)
            item = Item(self.items.name(role), "tokens", value, type_, 2, ring)
            self.items.add(item)
        if item not in self.held.results:
            cache = self.held.argument(item)
            if not item.ring:
                made = b.dynamic_update(cache, new, self.position, axis=2)
            elif same_dim(self.count, 1):
                place = self.slot(b, "next", cache.shape[2])
                made = b.dynamic_update(cache, new, place, axis=2)
            else:
                made = b.dynamic_update(cache, new, self.position, axis=2, ring=True)
            self.held.results[item] = made
        return item.ring

    def read(self, b: Builder, value: Value, new: Mapping[Value, Value]) -> Value:
        """Keys or values of all tokens, decoded from their caches."""
        item = self.items.find("tokens", value)
        if item is not None:
            return self.held.now(item)
        if value in new:
            return new[value]
        if (value, WHOLE) not in self.made:
            op = made_by(value)
            operands = [self.read(b, x, new) for x in op.operands]
            self.made[value, WHOLE] = b.op(op.name, operands, self.attributes(op)).result
        return self.made[value, WHOLE]

    def slot(self, b: Builder, which: str, slots: Dim) -> Value:
        """Of one token: the "next" slot of a ring to write, or its "newest", counting upwards."""
        if (which, slots) not in self._places:
            dtype = self.position.dtype
            if which == "next":
                made = b.remainder(self.position, b.size_like(slots, dtype))
            else:
                made = b.minimum(self.position, b.size_like(simplify_dim(slots - 1), dtype))
            self._places[which, slots] = made
        return self._places[which, slots]

    def whole(self, value: Value) -> Plan:
        """What no token has a say in, or what is kept of all tokens."""
        if value in self.from_tokens:
            kept = mixing.keep(self, value)
            if kept is None:
                raise self.refuse(value, "mixes tokens: it is needed for all of them at once")
            return kept
        if not is_prefix_stable(value, self.main, self.length):
            self.unstable.append(value)
        op = made_by(value)
        return Plan([(v, WHOLE) for v in op.operands], self.clone(op))

    def otherwise(self, value: Value, axes: Axes) -> Plan:
        kept = recurrent.plan(self, value, axes)
        if kept is not None:
            return kept
        if value in self.from_tokens:
            product = made_by(value).name == "matmul"  # what mixes tokens most often
            mixed = mixing.part(self, value, axes) if product else None
            mixed = mixed or routing.plan(self, value, axes) or mixing.part(self, value, axes)
            if mixed is not None:
                return mixed
            raise self.refuse(value, "mixes tokens")
        if any(not same_dim(value.shape[a], self.length) for a in axes):
            raise self.refuse(value, "orders positions in a way that is not understood")

        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            made = values[0]
            for axis in sorted(axes):
                made = self.cut(b, made, axis, 0)
            return [made]

        return Plan([(value, WHOLE)], emit)
