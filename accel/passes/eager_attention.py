"""The rule that finds attention written as products and a softmax (see `raise_attention`).

A sink (gpt-oss) is one more column that is put beside the scores and whose weight is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.rewrite import Made, RewriteContext, Rule
from accel.ir.types import Dim, Shape, product, same_dim, same_shape
from accel.passes.attention_scores import (
    Scores,
    find_softmax,
    guard_of,
    read_scores,
    same_mask,
    second_user,
)
from accel.passes.masks import ABSORBS, Mask, MaskReader


class EagerAttention(Rule):
    """matmul(softmax(scores of q and k), v) on two to five axes."""

    name, roots = "attention", ("matmul",)

    def __init__(self, reader: MaskReader) -> None:
        self.reader = reader

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        softmax = find_softmax(op.operands[0])
        if softmax is None:
            return None
        if softmax.attribute("axis") % len(softmax.result.shape) != len(softmax.result.shape) - 1:
            context.miss(self.name, softmax, "softmax is not over the last axis")
            return None
        second = second_user(op.operands[0], softmax)
        if second is not None:
            context.miss(self.name, second, "the weights have another user")
            return None
        scores = read_scores(softmax, op.operands[0].shape[:-2])
        if scores.product is None:
            context.miss(self.name, scores.at or softmax, scores.reason)
            return None
        guard = guard_of(op.operands[0])
        parts = self._mask(b, scores, op, guard, context)
        if parts is None:
            return None
        return _Emit(b, op, scores, parts, self.reader, context).value()

    def _mask(
        self, b: Builder, scores: Scores, op: Op, guard: Value | None, context: RewriteContext
    ) -> list[tuple[Value, Shape]] | None:
        """Masks with the leading axes they broadcast to; None if that is not exact."""
        rows, columns = scores.shape[-2:]
        dtype = op.result.dtype
        total = Mask()
        for each in scores.hidden:
            read = self.reader.boolean(each.condition, rows, columns, each.seen)
            total = total.also(read) or Mask(rest=((each.condition, each.seen),))
        safe = not total.rest and total.band.every_row_sees_something(rows, columns)
        if guard is not None and not safe:
            # Rows that see nothing are 0: what attention does with a boolean mask.
            hidden = scores.hidden
            alone = len(hidden) == 1 and not scores.biases and hidden[0].fill == float("-inf")
            if not alone or not hidden[0].seen or not same_mask(hidden[0].condition, guard):
                context.miss(self.name, op, "rows that see nothing are 0, by another condition")
                return None
            return [(hidden[0].condition, hidden[0].lead)]
        made: list[tuple[Value, Shape]] = []
        for each in scores.hidden:
            if not safe and not (each.fill <= ABSORBS and _holds(dtype, each.fill)):
                reason = f"a row that sees nothing would average ({each.fill})"
                context.miss(self.name, op, reason)
                return None
            low = b.scalar(float("-inf") if safe else each.fill, dtype)
            zero = b.scalar(0.0, dtype)
            pair = (zero, low) if each.seen else (low, zero)
            made.append((b.where(each.condition, *pair), each.lead))
        for bias in scores.biases:
            if bias.value.dtype != dtype and dtype == torch.float16:
                context.miss(self.name, op, "float16 does not hold the mask's range")
                return None
            value = b.cast_to(bias.value, dtype)
            if bias.factor != 1:
                value = b.mul(value, b.scalar(bias.factor, dtype))
            made.append((value, bias.lead))
        return made


def _holds(dtype: torch.dtype, number: float) -> bool:
    """Whether the number is infinite or in the dtype's range."""
    return number == float("-inf") or number >= torch.finfo(dtype).min


@dataclass
class _Emit:
    """Builds the attention: q, k, v and masks on four axes, and the result's own shape again."""

    b: Builder
    op: Op
    scores: Scores
    masks: list[tuple[Value, Shape]]
    reader: MaskReader
    context: RewriteContext

    def value(self) -> Value | None:
        assert self.scores.product is not None
        dtype = self.op.result.dtype
        values = [_of_dtype(x, dtype) for x in (*self.scores.product.operands, self.op.operands[1])]
        if any(x is None for x in values):
            self.context.miss("attention", self.op, "queries, keys and values differ in dtype")
            return None
        q, keys, v = (x for x in values if x is not None)
        heads = self.heads(keys, v)
        if heads is None:
            return None
        batch, count, groups = heads
        rank = len(keys.shape)
        k = self.b.permute(keys, axes=(*range(rank - 2), rank - 1, rank - 2))
        lead = self.scores.product.result.shape[:-2]
        q4 = self.shaped(q, lead, (batch, count))
        k4 = self.shaped(k, self.key_lead(lead, groups, count), (batch, groups))
        v_lead = self.key_lead(self.op.result.shape[:-2], groups, count)
        v4 = self.shaped(v, v_lead, (batch, groups))
        mask = self.mask((batch, count))
        sinks = None
        if self.scores.sinks is not None:
            sinks = self.sinks(self.scores.sinks, (batch, count))
            if sinks is None:
                self.context.miss("attention", self.op, "the sinks are not one number a head")
                return None
        made = self.b.attention(
            q4, k4, v4, mask, sinks, scale=self.scores.factor, softcap=self.scores.softcap
        )
        return self.b.reshape_to(made, self.op.result.shape)

    def heads(self, k: Value, v: Value) -> tuple[Dim, Dim, Dim] | None:
        """(batch, query heads, key heads): from where the scores have two leading axes, if ever."""
        assert self.scores.product is not None
        lead = self.scores.product.result.shape[:-2]
        if len(lead) == 2:
            single = all(len(x.shape) >= 3 and same_dim(x.shape[-3], 1) for x in (k, v))
            return lead[0], lead[1], 1 if single else lead[1]
        pairs = [each for each in self.scores.leads if len(each) == 2]
        if pairs:
            return pairs[0][0], pairs[0][1], pairs[0][1]
        if len(lead) == 3:
            if all(len(x.shape) == 5 and same_dim(x.shape[-3], 1) for x in (k, v)):
                return lead[0], product(lead[1:]), lead[1]
            return product(lead[:2]), lead[2], lead[2]
        if len(lead) > 3:
            self.context.miss("attention", self.op, f"{len(lead)} leading axes")
            return None
        batch, count = self.split(lead)
        return batch, count, count

    def split(self, lead: Shape) -> tuple[Dim, Dim]:
        """Batch and heads of one leading axis: as they were before they were joined."""
        assert self.scores.product is not None
        q = self.scores.product.operands[0]
        source = q.op.operands[0] if q.op is not None and q.op.name == "reshape" else None
        if source is not None and len(source.shape) == 4 and len(lead) == 1:
            joined = same_dim(product(source.shape[:2]), lead[0])
            if joined and same_shape(source.shape[2:], q.shape[1:]):
                return source.shape[0], source.shape[1]
        return (lead[0], 1) if lead else (1, 1)

    def key_lead(self, lead: Shape, groups: Dim, count: Dim) -> Shape:
        """The leading axes of keys and values: the query heads of a group share one."""
        return (*lead[:-1], 1) if len(lead) > 1 and not same_dim(groups, count) else lead

    def shaped(self, x: Value, lead: Shape, heads: tuple[Dim, Dim]) -> Value:
        """x [lead..., M, N] as [batch, heads, M, N]; it is broadcast where it must be."""
        tail = x.shape[-2:]
        if not same_dim(product(x.shape[:-2]), product(heads)):
            x = self.b.broadcast_to(x, shape=(*lead, *tail))
        return self.b.reshape_to(x, (*heads, *tail))

    def sinks(self, column: Value, heads: tuple[Dim, Dim]) -> Value | None:
        """The column [B, H, S, 1] as one number for each head; None if it has more."""
        b, rank = self.b, 4
        made = column.op
        if made is not None and made.name == "broadcast_to":
            column = made.operands[0]
        shape = (1,) * (rank - column.type.rank) + column.shape
        if column.type.rank > rank or not same_shape(self.scores.shape[:-2], heads):
            return None
        wide = [axis for axis in (0, 2) if not same_dim(shape[axis], 1)]
        if not all(self.reader.is_repeated(column, axis) for axis in wide):
            return None
        column = b.reshape_to(column, shape)
        for axis in wide:
            column = b.slice(column, axis=axis, start=0, stop=1)
        column = b.broadcast_to(b.reshape_to(column, column.shape[1:2]), shape=heads[1:])
        narrow = column.dtype in (self.op.result.dtype, torch.float32)
        return column if narrow else b.cast_to(column, self.op.result.dtype)

    def mask(self, heads: tuple[Dim, Dim]) -> Value | None:
        total: Value | None = None
        for mask, lead in self.masks:
            four = self.mask_shaped(mask, lead, heads)
            total = four if total is None else self.b.add(total, four)
        return total

    def mask_shaped(self, mask: Value, lead: Shape, heads: tuple[Dim, Dim]) -> Value:
        """A mask that broadcasts to [lead..., S, T] as one that does to [batch, heads, S, T]."""
        if same_shape(lead, heads):
            return mask
        if all(same_dim(d, 1) for d in mask.shape[:-2]):
            return self.b.reshape_to(mask, mask.shape[-2:])
        tail = mask.shape[-2:]
        own = (1,) * (len(lead) + 2 - len(mask.shape)) + mask.shape[:-2]
        groups = _regroup(lead, heads)
        if groups is not None:
            # Axes that become one are all of size 1 in the mask, or are broadcast together.
            wide = tuple(
                dim
                for part in groups
                for dim in (
                    own[part[0] : part[1]]
                    if all(same_dim(d, 1) for d in own[part[0] : part[1]])
                    else lead[part[0] : part[1]]
                )
            )
            full = self.b.broadcast_to(mask, shape=(*wide, *tail))
            new = tuple(product(wide[part[0] : part[1]]) for part in groups)
            return self.b.reshape_to(full, (*new, *tail))
        full = self.b.broadcast_to(mask, shape=(*lead, *tail))
        return self.b.reshape_to(full, (*heads, *tail))


def _regroup(lead: Shape, heads: tuple[Dim, Dim]) -> list[tuple[int, int]] | None:
    """Where `lead` is cut in two so that each part is one of `heads`; None if it is not."""
    for cut in range(len(lead) + 1):
        if same_dim(product(lead[:cut]), heads[0]) and same_dim(product(lead[cut:]), heads[1]):
            return [(0, cut), (cut, len(lead))]
    return None


def _of_dtype(value: Value, dtype: torch.dtype) -> Value | None:
    """The value in this dtype: itself, or what a widening cast read."""
    if value.dtype == dtype:
        return value
    op = value.op
    if op is not None and op.name == "cast" and op.operands[0].dtype == dtype:
        return op.operands[0]
    return None
