"""The rule that finds attention written as products and a softmax (see `raise_attention`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.patterns import splat_value
from accel.ir.rewrite import Made, RewriteContext, Rule
from accel.ir.types import Dim, Shape, product, same_dim, same_shape
from accel.passes.masks import ABSORBS, HIDDEN, Mask, MaskReader

_LONGEST = 24


@dataclass
class _Bias:
    """Added to the scores, times `factor`."""

    value: Value
    factor: float
    lead: Shape


@dataclass
class _Hidden:
    """Scores are `fill` except where the condition is `seen`."""

    condition: Value
    seen: bool
    fill: float
    lead: Shape


@dataclass
class _Scores:
    """What lies between q k^T and the softmax, read from the softmax down.

    `shape` and `factor` are the scores' shape and what multiplies them where the walk is. Biases
    and hidden parts broadcast to scores with the leading axes `lead`.
    """

    shape: Shape
    leads: list[Shape]
    factor: float = 1.0
    softcap: float | None = None
    biases: list[_Bias] = field(default_factory=list)
    hidden: list[_Hidden] = field(default_factory=list)
    product: Op | None = None
    reason: str = ""
    at: Op | None = None


class EagerAttention(Rule):
    """matmul(softmax(scores of q and k), v) on two to five axes."""

    name, roots = "attention", ("matmul",)

    def __init__(self, reader: MaskReader) -> None:
        self.reader = reader

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        softmax = _find_softmax(op.operands[0])
        if softmax is None:
            return None
        if softmax.attribute("axis") % len(softmax.result.shape) != len(softmax.result.shape) - 1:
            context.miss(self.name, softmax, "softmax is not over the last axis")
            return None
        second = _second_user(op.operands[0], softmax)
        if second is not None:
            context.miss(self.name, second, "the weights have another user")
            return None
        scores = _read_scores(softmax, op.operands[0].shape[:-2])
        if scores.product is None:
            context.miss(self.name, scores.at or softmax, scores.reason)
            return None
        parts = self._mask(b, scores, op, context)
        if parts is None:
            return None
        return _Emit(b, op, scores, parts, context).value()

    def _mask(
        self, b: Builder, scores: _Scores, op: Op, context: RewriteContext
    ) -> list[tuple[Value, Shape]] | None:
        """Additive masks with the leading axes they broadcast to; None if that is not exact."""
        rows, columns = scores.shape[-2:]
        dtype = op.result.dtype
        total = Mask()
        for each in scores.hidden:
            read = self.reader.boolean(each.condition, rows, columns, each.seen)
            total = total.also(read) or Mask(rest=((each.condition, each.seen),))
        safe = not total.rest and total.band.every_row_sees_something(rows, columns)
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


def _find_softmax(value: Value) -> Op | None:
    """The softmax under casts and reshapes of leading axes."""
    op = value.op
    while op is not None and (_is_float_cast(op) or _keeps_rows(op)):
        op = op.operands[0].op
    return op if op is not None and op.name == "softmax" else None


def _is_float_cast(op: Op) -> bool:
    return op.name == "cast" and bool(op.operands[0].dtype.is_floating_point)


def _keeps_rows(op: Op) -> bool:
    """A reshape that changes leading axes only."""
    if op.name != "reshape" or len(op.operands[0].shape) < 2:
        return False
    return same_shape(op.operands[0].shape[-2:], op.result.shape[-2:])


def _second_user(weights: Value, softmax: Op) -> Op | None:
    """An op between the weights and the softmax whose result others read too."""
    op = weights.op
    while op is not None:
        if len(op.result.uses) != 1:
            return op
        if op is softmax:
            return None
        op = op.operands[0].op
    return None


def _read_scores(softmax: Op, lead: Shape) -> _Scores:
    scores = _Scores(softmax.result.shape, [lead, softmax.result.shape[:-2]])
    value = softmax.operands[0]
    for _ in range(_LONGEST):
        op = value.op
        if op is None:
            return _stop(scores, softmax, "the scores are an argument")
        if len(op.result.uses) != 1:
            return _stop(scores, op, "the scores have another user")
        if op.name == "matmul":
            return _finish(scores, op)
        following = _step(scores, op)
        if following is None:
            reason = scores.reason or f"accel.{op.name} is between the product and the softmax"
            return _stop(scores, op, reason)
        value = following
    return _stop(scores, softmax, "no product of queries and keys was found")


def _stop(scores: _Scores, op: Op, reason: str) -> _Scores:
    scores.reason, scores.at = reason, op
    return scores


def _finish(scores: _Scores, product: Op) -> _Scores:
    if scores.softcap is not None:
        scores.factor *= scores.softcap
    scores.product = product
    return scores


def _step(scores: _Scores, op: Op) -> Value | None:
    """One op down towards the product; None if it is no part of attention."""
    if _is_float_cast(op):
        return op.operands[0]
    if _keeps_rows(op):
        scores.shape = op.operands[0].shape
        scores.leads.append(scores.shape[:-2])
        return op.operands[0]
    if op.name == "mul" or op.name == "div":
        number = splat_value(op.operands[1])
        if not isinstance(number, float) or number <= 0:
            scores.reason = f"the scale of accel.{op.name} is no positive number"
            return None
        scores.factor *= number if op.name == "mul" else 1 / number
        return op.operands[0]
    if op.name == "tanh" and scores.softcap is None and not scores.reason:
        scores.softcap, scores.factor = scores.factor, 1.0
        return op.operands[0]
    if scores.softcap is not None:
        return None
    if op.name in ("add", "sub"):
        return _bias(scores, op)
    if op.name == "where":
        return _hidden(scores, op)
    if op.name == "maximum":
        low = splat_value(op.operands[1])
        return op.operands[0] if isinstance(low, float) and low <= ABSORBS else None
    return None


def _bias(scores: _Scores, op: Op) -> Value | None:
    sign = 1.0 if op.name == "add" else -1.0
    for k in (0, 1) if op.name == "add" else (0,):
        if same_shape(op.operands[k].shape, scores.shape) and _leads(op.operands[k]):
            bias = _Bias(op.operands[1 - k], sign * scores.factor, scores.shape[:-2])
            scores.biases.append(bias)
            return op.operands[k]
    scores.reason = "neither side of the sum leads to a product"
    return None


def _hidden(scores: _Scores, op: Op) -> Value | None:
    condition = op.operands[0]
    for k, wanted in ((1, True), (2, False)):
        fill = splat_value(op.operands[3 - k])
        if isinstance(fill, (int, float)) and not isinstance(fill, bool):
            if fill * scores.factor > HIDDEN:
                scores.reason = f"masked scores become {fill}, which is not minus infinity"
                return None
            hidden = _Hidden(condition, wanted, fill * scores.factor, scores.shape[:-2])
            scores.hidden.append(hidden)
            return op.operands[k]
    return None


def _leads(value: Value) -> bool:
    """Whether a product lies under the value, through the ops that `_step` knows."""
    op = value.op
    for _ in range(_LONGEST):
        if op is None or len(op.result.uses) != 1:
            return False
        if op.name == "matmul":
            return True
        if op.name in ("mul", "div", "sub", "cast", "tanh", "maximum") or _keeps_rows(op):
            op = op.operands[0].op
        elif op.name == "add":
            return any(_leads(v) for v in op.operands)
        elif op.name == "where":
            return any(_leads(v) for v in op.operands[1:])
        else:
            return False
    return False


@dataclass
class _Emit:
    """Builds the attention: q, k, v and masks on four axes, and the result's own shape again."""

    b: Builder
    op: Op
    scores: _Scores
    masks: list[tuple[Value, Shape]]
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
        made = self.b.attention(
            q4, k4, v4, mask, scale=self.scores.factor, softcap=self.scores.softcap
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
