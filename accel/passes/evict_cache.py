"""Of the tokens before it a token sees the last ones, and those that others looked at most.

A cache of `heavy` + `recent` slots for each key/value head. Every slot has a sum of the attention
weights that its token got so far, over all queries of the head's group. Where no slot is free, the
token with the least sum among those that are not recent is gone. Which tokens that are follows from
the text, so that one token has to be done after the other: attention becomes a loop over the tokens
(`accel.scan`), and what the loop hands on (keys, values, sums, whose token a slot has) is the state
that `insert_kv_cache` finds. @decode runs the loop's body once; a prompt is walked through token by
token, which is exact and slow.

Paper: Zhang et al., 2023 (H2O). Contract: approximate (texts up to `heavy` + `recent` tokens are
unchanged), and decode equivalence of what it becomes. Before and after:

    %4 = "accel.attention"(%q, %k, %v) {scale = 0.25, causal = true} ...

    %4:6 = "accel.scan"(%keys, %values, %sums, %tokens, %count, %q, %k, %v) ({
      ...                                  // a slot for %k and %v, softmax over the slots
    }) {carries = 5, axes = [2, 2, 2], stacks = [2]} ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from accel.errors import CaptureError, OptionError
from accel.ir.builder import Builder
from accel.ir.module import Module, Op, Region, Value
from accel.ir.types import same_dim
from accel.passes.base import Context, Contract, Pass, approximate, register_pass

_LONG = torch.int64


@register_pass
@dataclass
class EvictCache(Pass):
    """Heavy hitters and recent tokens.

    Options:
        heavy: slots for tokens with large sums of attention weights.
        recent: how many of the last tokens are kept in any case, the newest included.
        bound: relative error of results to promise, on texts as long as those that are measured.
    """

    name: ClassVar[str] = "evict_cache"
    contract: ClassVar[Contract] = approximate("relative_error", 1.0)

    heavy: int = 128
    recent: int = 128
    bound: float = 1.0

    def __post_init__(self) -> None:
        if self.heavy < 1 or self.recent < 1 or self.bound <= 0:
            raise OptionError(
                f"{self.name}: heavy = {self.heavy}, recent = {self.recent}, bound = {self.bound}"
            )

    def promise(self) -> Contract:
        return approximate("relative_error", self.bound)

    def run(self, module: Module, context: Context) -> None:
        slots, done = self.heavy + self.recent, 0
        for op in list(module.main.ops):
            if op.name != "attention" or not op.attribute("causal"):
                continue
            window = op.attribute("window")
            if window is not None and window <= slots:
                context.miss(self.name, op, f"it has a window of {window} tokens already")
                continue
            _check(op)
            if context.rewrite(self.name, op):
                _Loop(op, slots, self.recent).replace()
                done += 1
        context.notes |= {"evicting": done, "slots": slots}


def _check(op: Op) -> None:
    q, k, _, *others = op.arguments()
    if any(o is not None for o in others):
        why = "it has a mask or sinks of its own"
    elif op.attribute("offset") != 0 or not same_dim(q.shape[2], k.shape[2]):
        why = "its tokens see tokens after them"
    elif not all(isinstance(x.shape[i], int) for x in (q, k) for i in (1, 3)):
        why = "its heads have no fixed size"
    else:
        return
    raise CaptureError(
        f"evict_cache: accel.attention cannot evict tokens: {why}",
        where=str(op.location or ""),
        advice="choose another kind of cache",
    )


class _Loop:
    """The loop that replaces one attention."""

    def __init__(self, op: Op, slots: int, recent: int) -> None:
        self.op, self.slots, self.recent = op, slots, recent
        self.q, self.k, self.v = op.operands[:3]
        self.batch, self.groups = self.k.shape[0], int(self.k.shape[1])
        self.heads = int(self.q.shape[1])
        self.wide = torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def replace(self) -> None:
        b = Builder(before=self.op, made_by=EvictCache.name)
        b.location = self.op.location
        rows = (self.batch, self.groups, self.slots)
        first = [
            b.full(shape=(*rows, self.k.shape[3]), value=0.0, dtype=self.k.dtype),
            b.full(shape=(*rows, self.v.shape[3]), value=0.0, dtype=self.v.dtype),
            b.full(shape=rows, value=0.0, dtype=self.wide),
            b.full(shape=rows, value=-1, dtype=_LONG),
            b.full(shape=(self.batch, 1, 1), value=0, dtype=_LONG),
        ]
        parts = [self.q, self.k, self.v]
        one = [x.type.with_shape((*x.shape[:2], 1, x.shape[3])) for x in parts]
        region = Region([*(x.type for x in first), *one])
        inner = Builder(region, made_by=EvictCache.name)
        inner.location = self.op.location
        inner.op("yield", self._body(inner, region.args))
        attributes = {"carries": len(first), "axes": (2, 2, 2), "stacks": (2,)}
        types = [*(x.type for x in first), self.op.result.type]
        made = b.op("scan", [*first, *parts], attributes, types=types, regions=[region])
        self.op.replace_with([made.results[-1]])

    def _body(self, b: Builder, args: Sequence[Value]) -> list[Value]:
        """One token: what the loop hands on, and the attention's result."""
        keys, values, sums, tokens, count, q, k, v = args
        slot = self._slot(b, sums, tokens, count)
        line = b.iota(shape=(1, 1, self.slots), axis=2, dtype=_LONG)
        hit = b.eq(line, slot)
        tokens = b.where(hit, count, tokens)
        sums = b.where(hit, b.scalar(0.0, self.wide), sums)
        whole = b.reshape(hit, shape=(*hit.shape, 1))
        keys, values = b.where(whole, k, keys), b.where(whole, v, values)
        weights = self._weights(b, q, keys, tokens)
        sums = b.add(sums, b.sum(weights, axes=(2,), keepdim=False))
        made = b.cast_to(b.matmul(weights, b.cast_to(values, self.wide)), self.v.dtype)
        made = b.reshape(made, shape=(self.batch, self.heads, 1, self.v.shape[3]))
        return [keys, values, sums, tokens, b.add(count, b.scalar(1, _LONG)), made]

    def _slot(self, b: Builder, sums: Value, tokens: Value, count: Value) -> Value:
        """Where the token goes, [B, G, 1]: a free slot, else that of the least sum."""
        line = b.iota(shape=(1, 1, self.slots), axis=2, dtype=_LONG)
        free = b.cast(b.sub(line, b.scalar(self.slots, _LONG)), dtype=self.wide)
        kept = b.gt(tokens, b.sub(count, b.scalar(self.recent, _LONG)))
        score = b.where(kept, b.scalar(float("inf"), self.wide), sums)
        score = b.where(b.lt(tokens, b.scalar(0, _LONG)), free, score)
        found: Value = b.argmin(score, axis=2, keepdim=True)
        return found

    def _weights(self, b: Builder, q: Value, keys: Value, tokens: Value) -> Value:
        """Attention weights of the token's queries, [B, G, H / G, slots]."""
        share = self.heads // self.groups
        queries = b.reshape(q, shape=(self.batch, self.groups, share, self.q.shape[3]))
        turned = b.permute(b.cast_to(keys, self.wide), axes=(0, 1, 3, 2))
        scores = b.matmul(b.cast_to(queries, self.wide), turned)
        scores = b.mul(scores, b.scalar(float(self.op.attribute("scale")), self.wide))
        cap = self.op.attribute("softcap")
        if cap is not None:
            most = b.scalar(float(cap), self.wide)
            scores = b.mul(most, b.tanh(b.div(scores, most)))
        held = b.reshape(tokens, shape=(self.batch, self.groups, 1, self.slots))
        seen = b.ge(held, b.scalar(0, _LONG))
        scores = b.where(seen, scores, b.scalar(float("-inf"), self.wide))
        made: Value = b.softmax(scores, axis=3)
        return made


__all__ = ["EvictCache"]
