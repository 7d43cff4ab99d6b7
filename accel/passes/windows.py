"""The two windows of `accel.passes.narrow`: the last token of a text, and one token after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.types import Dim, same_dim, simplify_dim
from accel.passes.narrow import WHOLE, Axes, Emit, Narrow, Plan, made_by
from accel.passes.token_wise import is_prefix_stable


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
        q, k, v, mask = op.arguments()
        needs = [(q, frozenset((2,))), (k, WHOLE), (v, WHOLE)]
        if mask is not None:
            needs.append((mask, self._aligned(mask, op.result, frozenset((2,)))))
        window = op.attribute("window")
        if window is None:  # one query, and no token after it
            return Plan(needs, self.clone(op, causal=False))
        attributes = {n: op.attribute(n) for n in ("scale", "window", "softcap")}

        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            place = b.size_like(simplify_dim(self.length - 1), torch.int64)
            return b.op("cached_attention", [*values[:3], place, *values[3:]], attributes).results

        return Plan(needs, emit)

    def whole(self, value: Value) -> Plan:
        op = made_by(value)
        return Plan([(v, WHOLE) for v in op.operands], self.clone(op))

    def otherwise(self, value: Value, axes: Axes) -> Plan:
        if any(not same_dim(value.shape[a], self.length) for a in axes):
            raise self.refuse(value, "orders tokens in a way that has no last one")
        return self.cut_of(value, axes)

    def cut_of(self, value: Value, axes: Axes) -> Plan:
        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            made = values[0]
            for axis in sorted(axes):
                made = self.cut(b, made, axis, 0)
            return [made]

        return Plan([(value, WHOLE)], emit)

    def _plan(self, value: Value, axes: Axes) -> Plan:
        there = (value, WHOLE) in self.made
        if axes and there and all(same_dim(value.shape[a], self.length) for a in axes):
            return self.cut_of(value, axes)
        return super()._plan(value, axes)


class OneToken(Narrow):
    """One token at a run-time position. `caches` maps keys and values to their caches so far."""

    position: Value
    caches: dict[Value, Value]

    def start(self, position: Value, ids: Value, caches: Mapping[Value, Value]) -> None:
        self.position, self.caches = position, dict(caches)
        self.updated: dict[Value, Value] = {}
        source = self.main.args[0]
        self.made[source, self.sequence_axes(source)] = ids

    def place(self, b: Builder, dtype: torch.dtype, offset: Dim = 0) -> Value:
        at = b.cast_to(self.position, dtype)
        if same_dim(offset, 0):
            return at
        made: Value = b.add(at, b.size_like(offset, dtype))
        return made

    def cut(self, b: Builder, x: Value, axis: int, offset: Dim) -> Value:
        start = self.place(b, torch.int64, offset)
        made: Value = b.dynamic_slice(x, start, axis=axis, size=1)
        return made

    def line(self, op: Op) -> Emit:
        shape = self.shape(op.result.shape, self.sequence_axes(op.result))
        start, step, dtype = (op.attribute(n) for n in ("start", "step", "dtype"))

        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            at = self.place(b, dtype)
            if step != 1:
                at = b.mul(at, b.size_like(step, dtype))
            if not same_dim(self.size(start), 0):
                at = b.add(at, b.size_like(self.size(start), dtype))
            return [b.broadcast_to(at, shape=shape)]

        return emit

    def band(self, op: Op) -> Emit:
        diagonal, lower = op.attribute("diagonal"), op.attribute("lower")
        columns = self.size(op.result.shape[1])

        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            column = b.iota(shape=(1, columns), axis=1, dtype=torch.int64)
            keep = b.le(column, self.place(b, torch.int64, self.size(diagonal)))
            if lower is not None:
                after = b.gt(column, self.place(b, torch.int64, self.size(lower)))
                keep = b.logical_and(keep, after)
            return [keep]

        return emit

    def attend(self, op: Op) -> Plan:
        q, k, v, mask = op.arguments()
        row = frozenset((2,))
        needs = [(x, row) for x in (q, k, v)]
        if mask is not None:
            needs.append((mask, self._aligned(mask, op.result, row)))
        attributes = {n: op.attribute(n) for n in ("scale", "window", "softcap")}

        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            query, *new = values[:3]
            caches = [self.write(b, old, x) for old, x in zip((k, v), new)]
            operands = [query, *caches, self.position, *values[3:]]
            return b.op("cached_attention", operands, attributes).results

        return Plan(needs, emit)

    def write(self, b: Builder, value: Value, new: Value) -> Value:
        """The cache of keys or values with this token's, written once."""
        if value not in self.updated:
            cache = self.caches[value]
            self.updated[value] = b.dynamic_update(cache, new, self.position, axis=2)
        return self.updated[value]

    def whole(self, value: Value) -> Plan:
        """Only what no token has a say in, and what a longer text would not change."""
        if value in self.from_tokens:
            raise self.refuse(value, "mixes tokens: it is needed for all of them at once")
        if not is_prefix_stable(value, self.main, self.length):
            raise self.refuse(value, "depends on the length of the text")
        op = made_by(value)
        return Plan([(v, WHOLE) for v in op.operands], self.clone(op))

    def otherwise(self, value: Value, axes: Axes) -> Plan:
        if value in self.from_tokens:
            raise self.refuse(value, "mixes tokens")
        if any(not same_dim(value.shape[a], self.length) for a in axes):
            raise self.refuse(value, "orders positions in a way that is not understood")

        def emit(b: Builder, values: Sequence[Value]) -> Sequence[Value]:
            made = values[0]
            for axis in sorted(axes):
                made = self.cut(b, made, axis, 0)
            return [made]

        return Plan([(value, WHOLE)], emit)
