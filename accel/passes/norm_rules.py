"""Rules that raise rms_norm and layer_norm written as arithmetic. Part of `raise_composites`.

The core (x / sqrt(mean(x^2) + eps), or the same of x - mean(x)) is raised without parameters first;
weight, bias and the casts around them are then taken in one by one. So the many orders in which
models cast and scale need no rules of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.patterns import splat_value
from accel.ir.rewrite import Made, RewriteContext, Rule
from accel.ir.types import Shape, product, same_dim, same_shape
from accel.passes.arithmetic import close

_HALF = (torch.float16, torch.bfloat16)


def _made_by(value: Value, name: str) -> Op | None:
    """The op of this name that makes the value, or None."""
    op = value.op
    return op if op is not None and op.name == name else None


class RaiseMean(Rule):
    """sum(x) / count is mean(x)."""

    name, roots = "raise_mean", ("mul", "div")

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        total = _made_by(op.operands[0], "sum")
        number = splat_value(op.operands[1])
        if total is None or not isinstance(number, float) or not number:
            return None
        x = total.operands[0]
        count = product(x.shape[a] for a in total.attribute("axes"))
        share = number if op.name == "mul" else 1 / number
        if not isinstance(count, int) or not count or not close(share * count, 1.0):
            return None
        if not x.dtype.is_floating_point or not same_shape(op.result.shape, total.result.shape):
            return None
        mean: Value = b.mean(x, axes=total.attribute("axes"), keepdim=total.attribute("keepdim"))
        return mean


class KeepReducedAxes(Rule):
    """A reshape that only puts reduced axes back: the reduction keeps them."""

    name, roots = "keep_reduced_axes", ("reshape",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        inner = op.operands[0].op
        if inner is None or inner.name not in ("mean", "sum", "var", "amax", "amin"):
            return None
        if inner.attribute("keepdim") or len(inner.result.uses) != 1:
            return None
        x = inner.operands[0]
        axes = inner.attribute("axes")
        kept = tuple(1 if i in axes else d for i, d in enumerate(x.shape))
        if not same_shape(kept, op.result.shape):
            return None
        return b.op(inner.name, (x,), {**inner.attributes, "keepdim": True}).result


def _trailing(axes: tuple[int, ...], rank: int) -> bool:
    return sorted(a % rank for a in axes) == list(range(rank - len(axes), rank))


def _mean_over(value: Value) -> tuple[Value, tuple[int, ...]] | None:
    """(x, axes) of a mean over trailing axes that are kept."""
    op = _made_by(value, "mean")
    if op is None or not op.attribute("keepdim"):
        return None
    x, axes = op.operands[0], op.attribute("axes")
    return (x, axes) if axes and _trailing(axes, len(x.shape)) else None


def _inverse_root(value: Value) -> tuple[Value, float] | None:
    """(m, eps) of 1 / sqrt(m + eps)."""
    root = _made_by(value, "rsqrt")
    total = _made_by(root.operands[0], "add") if root is not None else None
    eps = splat_value(total.operands[1]) if total is not None else None
    if total is None or not isinstance(eps, float) or eps < 0:
        return None
    return total.operands[0], eps


def _square_of(value: Value) -> Value | None:
    op = _made_by(value, "mul")
    if op is not None and op.operands[0] is op.operands[1]:
        return op.operands[0]
    return None


class RaiseNorm(Rule):
    """x * rsqrt(mean(x * x) + eps), and the same of x - mean(x)."""

    name, roots = "raise_norm", ("mul",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        for x, scale in (op.operands, op.operands[::-1]):
            found = _inverse_root(scale)
            if found is None or not same_shape(x.shape, op.result.shape):
                continue
            squares, eps = found
            made = _layer_norm(b, x, squares, eps) or self.rms_norm(b, x, squares, eps, context)
            if made is not None:
                return made
        return None

    def rms_norm(
        self, b: Builder, x: Value, squares: Value, eps: float, context: RewriteContext
    ) -> Value | None:
        mean = _mean_over(squares)
        squared = _square_of(mean[0]) if mean is not None else None
        if mean is None or squared is None:
            return None
        if squared is not x:
            context.miss(self.name, squares.users[0], "squares another value than it scales")
            return None
        if len(mean[1]) != 1:
            context.miss(self.name, squares.users[0], f"the mean is over {len(mean[1])} axes")
            return None
        made: Value = b.rms_norm(x, eps=eps)
        return made


def _layer_norm(b: Builder, centered: Value, squares: Value, eps: float) -> Value | None:
    """layer_norm without parameters, if `centered` is x - mean(x) and `squares` its variance."""
    difference = _made_by(centered, "sub")
    mean = _mean_over(difference.operands[1]) if difference is not None else None
    if difference is None or mean is None or mean[0] is not difference.operands[0]:
        return None
    x, axes = mean
    variance = _made_by(squares, "var")
    if variance is not None:
        same_axes = sorted(variance.attribute("axes")) == sorted(axes)
        whole = variance.attribute("correction") == 0 and variance.attribute("keepdim")
        fits = variance.operands[0] in (x, centered) and same_axes and whole
    else:
        second = _mean_over(squares)
        fits = second is not None and sorted(second[1]) == sorted(axes)
        fits = fits and second is not None and _square_of(second[0]) is centered
    if not fits:
        return None
    made: Value = b.layer_norm(x, rank=len(axes), eps=eps)
    return made


class NormWeight(Rule):
    """A norm times a weight over the normalized axes: the norm takes the weight."""

    name, roots = "norm_weight", ("mul",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        for norm_value, weight in (op.operands, op.operands[::-1]):
            norm = norm_value.op
            if norm is None or norm.name not in ("rms_norm", "layer_norm"):
                continue
            x, *parameters = norm.arguments()
            if any(p is not None for p in parameters) or weight is norm_value:
                continue
            if len(norm_value.uses) != 1:
                context.miss(self.name, norm, "the normalized value has another user")
                continue
            shape = _normalized_shape(norm)
            fitted = _parameter(b, weight, shape)
            if fitted is None:
                continue
            attributes = dict(norm.attributes)
            if norm.name == "rms_norm":
                attributes["cast_before_weight"] = x.dtype in _HALF
            return b.op(norm.name, (x, fitted), attributes).result
        return None


def _normalized_shape(norm: Op) -> Shape:
    x = norm.operands[0]
    count = norm.attribute("rank") if norm.name == "layer_norm" else 1
    return x.shape[len(x.shape) - count :]


def _parameter(b: Builder, value: Value, shape: Shape) -> Value | None:
    """The value with exactly this shape, if it is that with axes of size 1 in front."""
    if same_shape(value.shape, shape):
        return value
    extra = len(value.shape) - len(shape)
    ones = extra > 0 and all(same_dim(d, 1) for d in value.shape[:extra])
    fits = ones and same_shape(value.shape[extra:], shape)
    return b.reshape_to(value, shape) if fits else None


class NormBias(Rule):
    """A layer_norm plus a bias over the normalized axes."""

    name, roots = "norm_bias", ("add",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        for norm_value, bias in (op.operands, op.operands[::-1]):
            norm = _made_by(norm_value, "layer_norm")
            if norm is None or norm.arguments()[2] is not None or len(norm_value.uses) != 1:
                continue
            fitted = _parameter(b, bias, _normalized_shape(norm))
            if fitted is None or bias is norm_value:
                continue
            x, weight, _ = norm.arguments()
            return b.op("layer_norm", (x, weight, fitted), norm.attributes).result
        return None


class NormCasts(Rule):
    """A norm of 16-bit floats widened for it and rounded after it: norms do that themselves."""

    name, roots = "norm_casts", ("cast",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        norm = op.operands[0].op
        dtype = op.result.dtype
        if norm is None or norm.name not in ("rms_norm", "layer_norm") or dtype not in _HALF:
            return None
        x, *parameters = norm.arguments()
        source = _narrow(x, dtype)
        if source is None or len(norm.result.uses) != 1:
            return None
        changes: dict[str, Any] = {}
        narrow: list[Value | None] = []
        for parameter in parameters:
            found = None if parameter is None else _narrow(parameter, dtype)
            if parameter is not None and found is None:
                shifted = _offset_weight(parameter, dtype) if norm.name == "rms_norm" else None
                if shifted is None:
                    context.miss(self.name, norm, f"its parameters are no widened {dtype}")
                    return None
                found, changes["offset"] = shifted
            narrow.append(found)
        return b.op(norm.name, (source, *narrow), {**norm.attributes, **changes}).result


def _narrow(value: Value, dtype: torch.dtype) -> Value | None:
    """What a cast from this dtype read."""
    cast = _made_by(value, "cast")
    return cast.operands[0] if cast is not None and cast.operands[0].dtype == dtype else None


def _offset_weight(value: Value, dtype: torch.dtype) -> tuple[Value, float] | None:
    """(w, c) of cast(w) + c."""
    total = _made_by(value, "add")
    number = splat_value(total.operands[1]) if total is not None else None
    weight = _narrow(total.operands[0], dtype) if total is not None else None
    return (weight, number) if weight is not None and isinstance(number, float) else None


class UnusedStatistics(Rule):
    """The native_ norms without a reader of their statistics are the plain ones."""

    name, roots = "unused_statistics", ("native_layer_norm", "native_group_norm")

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        if any(r.uses for r in op.results[1:]):
            return None
        plain = op.name.removeprefix("native_")
        made = b.op(plain, op.arguments(), op.attributes).result
        # The statistics have no reader; any value of their types may stand for them.
        return [made, *(b.full_of(r.shape, 0.0, r.dtype) for r in op.results[1:])]


def norm_rules() -> list[Rule]:
    """All rules about normalization."""
    return [
        RaiseMean(),
        KeepReducedAxes(),
        RaiseNorm(),
        NormWeight(),
        NormBias(),
        NormCasts(),
        UnusedStatistics(),
    ]
