"""What lies between a product of queries and keys and its softmax (see `eager_attention`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from accel.ir.module import Op, Value
from accel.ir.patterns import splat_value
from accel.ir.types import Shape, same_dim, same_shape, simplify_dim
from accel.passes.algebra import without_leading_ones
from accel.passes.masks import ABSORBS, HIDDEN

_LONGEST = 24


@dataclass
class Bias:
    """Added to the scores, times `factor`."""

    value: Value
    factor: float
    lead: Shape


@dataclass
class Hidden:
    """Scores are `fill` except where the condition is `seen`."""

    condition: Value
    seen: bool
    fill: float
    lead: Shape


@dataclass
class Scores:
    """What lies between q k^T and the softmax, read from the softmax down.

    `shape` and `factor` are the scores' shape and what multiplies them where the walk is. Biases
    and hidden parts broadcast to scores with the leading axes `lead`. `sinks` [..., H, S, 1] is the
    column beside the scores, if there is one: the softmax's last weight is not used then.
    """

    shape: Shape
    leads: list[Shape]
    factor: float = 1.0
    softcap: float | None = None
    biases: list[Bias] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    sinks: Value | None = None
    product: Op | None = None
    reason: str = ""
    at: Op | None = None


def find_softmax(value: Value) -> Op | None:
    """The softmax under casts, reshapes of leading axes, a slice that drops its last weight, and a
    choice of 0 for rows that see nothing."""
    op = value.op
    while op is not None and (
        _is_float_cast(op) or _keeps_rows(op) or _drops_last(op) or seen_rows(op) is not None
    ):
        op = op.operands[1 if op.name == "where" else 0].op
    return op if op is not None and op.name == "softmax" else None


def _is_float_cast(op: Op) -> bool:
    return op.name == "cast" and bool(op.operands[0].dtype.is_floating_point)


def _keeps_rows(op: Op) -> bool:
    """A reshape that changes leading axes only."""
    if op.name != "reshape" or len(op.operands[0].shape) < 2:
        return False
    return same_shape(op.operands[0].shape[-2:], op.result.shape[-2:])


def seen_rows(op: Op | None) -> Value | None:
    """The condition of which some element of each row must hold, where weights are 0 else:
    where(any(condition), weights, 0)."""
    if op is None or op.name != "where" or splat_value(op.operands[2]) != 0:
        return None
    made = op.operands[0].op
    while made is not None and made.name in ("broadcast_to", "cast"):
        made = made.operands[0].op
    if made is None or made.name != "any" or not made.attribute("keepdim"):
        return None
    source = made.operands[0]
    while source.op is not None and source.op.name == "broadcast_to":
        source = source.op.operands[0]
    rank = made.operands[0].type.rank
    return source if [a % rank for a in made.attribute("axes")] == [rank - 1] else None


def guard_of(value: Value) -> Value | None:
    """That condition of the weights `value`, whatever lies between it and the softmax."""
    op = value.op
    while op is not None and op.name != "softmax":
        found = seen_rows(op)
        if found is not None:
            return found
        op = op.operands[0].op
    return None


def _drops_last(op: Op) -> bool:
    """A slice without the last element of rows."""
    if op.name != "slice" or op.attribute("start") != 0 or op.attribute("step") != 1:
        return False
    shape = op.operands[0].shape
    last = op.attribute("axis") % len(shape) == len(shape) - 1
    return last and same_dim(op.attribute("stop"), simplify_dim(shape[-1] - 1))


def second_user(weights: Value, softmax: Op) -> Op | None:
    """An op between the weights and the softmax whose result others read too."""
    op = weights.op
    while op is not None:
        if len(op.result.uses) != 1:
            return op
        if op is softmax:
            return None
        op = op.operands[1 if op.name == "where" else 0].op
    return None


def read_scores(softmax: Op, lead: Shape) -> Scores:
    scores = Scores(softmax.result.shape, [lead, softmax.result.shape[:-2]])
    value = softmax.operands[0]
    user = softmax.result.single_user
    if user is not None and _drops_last(user):
        beside = _beside_sinks(scores, value)
        if beside is None:
            return _stop(scores, softmax, "the weights are a part of a softmax")
        value = beside
    whole, users = _before_maximum(value)
    centred = whole if whole is not value and set(whole.users) <= users else None
    if centred is not None:  # less the largest of each row is the same to a softmax
        value = centred
    for _ in range(_LONGEST):
        op = value.op
        if op is None:
            return _stop(scores, softmax, "the scores are an argument")
        if len(op.result.uses) != 1 and value is not centred:
            return _stop(scores, op, "the scores have another user")
        if op.name == "matmul":
            return _finish(scores, op)
        following = _step(scores, op)
        if following is None:
            reason = scores.reason or f"accel.{op.name} is between the product and the softmax"
            return _stop(scores, op, reason)
        value = following
    return _stop(scores, softmax, "no product of queries and keys was found")


def _beside_sinks(scores: Scores, value: Value) -> Value | None:
    """The scores that a column of sinks was put beside; None if that is not what was done."""
    whole, users = _before_maximum(value)
    op = whole.op
    if op is None or op.name != "cat" or not set(whole.users) <= users or len(op.operands) != 2:
        return None
    product, column = op.operands
    rank = whole.type.rank
    last = op.attribute("axis") % rank == rank - 1 and same_dim(column.shape[-1], 1)
    if not last:
        return None
    scores.sinks, scores.shape = column, product.shape
    return product


def _before_maximum(value: Value) -> tuple[Value, set[Op]]:
    """x and who reads it, where the value is x minus the largest of each row: to a softmax that is
    x. Else the value and its users."""
    op = value.op
    while op is not None and _is_float_cast(op) and len(op.result.uses) == 1:
        op = op.operands[0].op
    if op is None or op.name != "sub" or len(op.result.uses) != 1:
        return value, set(value.users)
    x, top = op.operands
    made = top.op
    if made is None or made.name != "amax" or made.operands[0] is not x:
        return value, set(value.users)
    rows = [a % x.type.rank for a in made.attribute("axes")] == [x.type.rank - 1]
    alone = made.attribute("keepdim") and len(made.result.uses) == 1
    return (x, {op, made}) if rows and alone else (value, set(value.users))


def _stop(scores: Scores, op: Op, reason: str) -> Scores:
    scores.reason, scores.at = reason, op
    return scores


def _finish(scores: Scores, product: Op) -> Scores:
    if scores.softcap is not None:
        scores.factor *= scores.softcap
    scores.product = product
    return scores


def _step(scores: Scores, op: Op) -> Value | None:
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


def _bias(scores: Scores, op: Op) -> Value | None:
    sign = 1.0 if op.name == "add" else -1.0
    for k in (0, 1) if op.name == "add" else (0,):
        if same_shape(op.operands[k].shape, scores.shape) and _leads(op.operands[k]):
            bias = Bias(op.operands[1 - k], sign * scores.factor, scores.shape[:-2])
            scores.biases.append(bias)
            return op.operands[k]
    scores.reason = "neither side of the sum leads to a product"
    return None


def _hidden(scores: Scores, op: Op) -> Value | None:
    condition = op.operands[0]
    for k, wanted in ((1, True), (2, False)):
        fill = splat_value(op.operands[3 - k])
        if isinstance(fill, (int, float)) and not isinstance(fill, bool):
            if fill * scores.factor > HIDDEN:
                scores.reason = f"masked scores become {fill}, which is not minus infinity"
                return None
            hidden = Hidden(condition, wanted, fill * scores.factor, scores.shape[:-2])
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


def same_mask(a: Value, b: Value) -> bool:
    """Whether two masks are one value, broadcasts and leading axes of size 1 aside."""
    sources = []
    for value in (a, b):
        while value.op is not None and value.op.name == "broadcast_to":
            value = value.op.operands[0]
        sources.append(without_leading_ones(value))
    return sources[0] is sources[1]
