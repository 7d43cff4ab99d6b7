"""Rules for ops that move elements: compositions, identities, and what swaps with what.

Chains of reshapes and permutes go through their normal form (`accel.ir.viewmap`), so no rule needs
to know which chains cancel. Part of `canonicalize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.patterns import bind, op, splat_value, var
from accel.ir.rewrite import Made, Rewrite, RewriteContext, Rule
from accel.ir.types import Dim, Shape, broadcast_shapes, same_dim, same_shape, simplify_dim
from accel.ir.viewmap import ViewMap

_LONGEST_CHAIN = 12

x = var("x")


class ViewChain(Rule):
    """A chain of reshapes and permutes becomes its normal form, if that has fewer ops."""

    name, roots = "view_chain", ("reshape", "permute")

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        chain = [op]
        while len(chain) < _LONGEST_CHAIN:
            source = chain[-1].operands[0].op
            if source is None or source.name not in ("reshape", "permute"):
                break
            chain.append(source)
        # The longest tail of the chain that factors: sizes may hide how an axis was split.
        for length in range(len(chain), 0, -1):
            start = chain[length - 1].operands[0].shape
            steps = _normal_form(start, tuple([_step(each) for each in reversed(chain[:length])]))
            if steps is None:
                continue
            fewer = len(steps) < length
            permute_for_nothing = length == 1 and op.name == "permute" and _is_reshape(steps)
            if not fewer and not permute_for_nothing:
                return None
            value = chain[length - 1].operands[0]
            for kind, argument in steps:
                name = "shape" if kind == "reshape" else "axes"
                value = b.op(kind, (value,), {name: argument}).result
            return value
        return None


def _step(op: Op) -> tuple[str, tuple[Any, ...]]:
    return op.name, op.attribute("axes" if op.name == "permute" else "shape")


@lru_cache(4096)  # models repeat their layers
def _normal_form(
    start: Shape, chain: tuple[tuple[str, tuple[Any, ...]], ...]
) -> tuple[tuple[str, tuple[Any, ...]], ...] | None:
    """The fewest steps that do what the chain does to that shape; None if it does not factor."""
    view = ViewMap(start)
    for name, argument in chain:
        if any(d == 0 for d in view.shape):
            return None
        if name == "permute":
            view.permute(argument)
        elif not view.reshape(argument):
            return None
    return None if any(d == 0 for d in view.shape) else tuple(view.steps())


def _is_reshape(steps: Sequence[tuple[str, Any]]) -> bool:
    return len(steps) == 1 and steps[0][0] == "reshape"


class BroadcastTo(Rule):
    """Broadcasts that do nothing, follow each other, or only add axes of size 1."""

    name, roots = "broadcast_to", ("broadcast_to",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        value, shape = op.operands[0], op.result.shape
        if same_shape(value.shape, shape):
            return value
        extra = len(shape) - len(value.shape)
        if extra > 0 and same_shape((1,) * extra + value.shape, shape):
            return b.reshape(value, shape=shape)
        inner = value.op
        if inner is not None and inner.name == "broadcast_to":
            return b.broadcast_to(inner.operands[0], shape=shape)
        if inner is not None and inner.name == "reshape":
            source = inner.operands[0]
            ones = len(value.shape) - len(source.shape)
            if ones > 0 and same_shape((1,) * ones + source.shape, value.shape):
                return b.broadcast_to(source, shape=shape)
        return None


class FullView(Rule):
    """A view of a constant with one value everywhere is such a constant."""

    name, roots = "view_of_full", Trait.VIEW

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        number = splat_value(op.operands[0])
        if number is None:
            return None
        return b.full_of(op.result.shape, number, op.result.dtype)


class Slice(Rule):
    """Slices of everything, of slices, of broadcasts and of concatenations."""

    name, roots = "slice", ("slice",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        value, axis = op.operands[0], op.attribute("axis")
        start, stop, step = (op.attribute(n) for n in ("start", "stop", "step"))
        if start == 0 and step == 1 and same_dim(stop, value.shape[axis]):
            return value
        inner = value.op
        if inner is None:
            return None
        if inner.name == "slice" and inner.attribute("axis") == axis:
            return _slice_of_slice(b, inner, axis, start, stop, step)
        if inner.name == "broadcast_to":
            return _slice_of_broadcast(b, op, inner)
        if inner.name == "cat" and inner.attribute("axis") == axis and step == 1:
            return _slice_of_cat(b, inner, axis, start, stop)
        return None


def _slice_of_slice(b: Builder, inner: Op, axis: int, start: Dim, stop: Dim, step: int) -> Made:
    first, by = inner.attribute("start"), inner.attribute("step")
    if by != 1 and not all(isinstance(d, int) for d in (first, start, stop)):
        return None
    made: Value = b.slice(
        inner.operands[0],
        axis=axis,
        start=simplify_dim(first + start * by),
        stop=simplify_dim(first + stop * by if by == 1 else first + (stop - 1) * by + 1),
        step=step * by,
    )
    return made


def _slice_of_broadcast(b: Builder, op: Op, inner: Op) -> Made:
    source = inner.operands[0]
    at = op.attribute("axis") - (len(inner.result.shape) - len(source.shape))
    if at >= 0 and not (isinstance(source.shape[at], int) and source.shape[at] == 1):
        attributes = {k: op.attribute(k) for k in ("start", "stop", "step")}
        source = b.slice(source, axis=at, **attributes)
    widened: Value = b.broadcast_to(source, shape=op.result.shape)
    return widened


def _slice_of_cat(b: Builder, cat: Op, axis: int, start: Dim, stop: Dim) -> Made:
    """The operands that the range covers, the outer two sliced; None if sizes are symbolic."""
    if not all(isinstance(v.shape[axis], int) for v in cat.operands):
        return None
    if not (isinstance(start, int) and isinstance(stop, int)) or stop <= start:
        return None
    position = 0
    parts: list[Value] = []
    for value in cat.operands:
        size = value.shape[axis]
        assert isinstance(size, int)
        low, high = max(start - position, 0), min(stop - position, size)
        if low < high:
            whole = (low, high) == (0, size)
            parts.append(value if whole else b.slice(value, axis=axis, start=low, stop=high))
        position += size
    if len(parts) == len(cat.operands):
        return None
    joined: Value = b.cat(*parts, axis=axis) if len(parts) > 1 else parts[0]
    return joined


class Cat(Rule):
    """Concatenations of one, of nothing, of concatenations, and of neighbouring slices."""

    name, roots = "cat", ("cat",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        axis = op.attribute("axis")
        if len(op.operands) == 1:
            return op.operands[0]
        parts: list[Value] = []
        for value in op.operands:
            inner = value.op
            nested = inner is not None and inner.name == "cat" and inner.attribute("axis") == axis
            if nested and inner is not None and value.single_user is op:
                parts.extend(inner.operands)
            elif not (isinstance(value.shape[axis], int) and value.shape[axis] == 0):
                parts.append(value)
        joined = _join_slices(b, parts, axis)
        if not joined or list(op.operands) == joined:
            return None
        made: Value = b.cat(*joined, axis=axis) if len(joined) > 1 else joined[0]
        return made


def _join_slices(b: Builder, parts: list[Value], axis: int) -> list[Value]:
    """Neighbours x[a:b], x[b:c] become x[a:c]."""
    result: list[Value] = []
    for value in parts:
        before, this = (result[-1].op if result else None), value.op
        if before is not None and this is not None and _continues(before, this, axis):
            result[-1] = b.slice(
                before.operands[0],
                axis=axis,
                start=before.attribute("start"),
                stop=this.attribute("stop"),
            )
        else:
            result.append(value)
    return result


def _continues(before: Op, this: Op, axis: int) -> bool:
    return (
        before.name == this.name == "slice"
        and before.operands[0] is this.operands[0]
        and before.attribute("axis") == this.attribute("axis") == axis
        and before.attribute("step") == this.attribute("step") == 1
        and same_dim(before.attribute("stop"), this.attribute("start"))
    )


class PermuteBroadcast(Rule):
    """permute(broadcast_to(x)) is broadcast_to(permute(x)): broadcasts sink to where they end."""

    name, roots = "permute_of_broadcast", ("permute",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        inner = op.operands[0].op
        if inner is None or inner.name != "broadcast_to":
            return None
        source, rank = inner.operands[0], len(op.result.shape)
        full = b.reshape_to(source, (1,) * (rank - len(source.shape)) + source.shape)
        made: Value = b.broadcast_to(
            b.permute(full, axes=op.attribute("axes")), shape=op.result.shape
        )
        return made


class ReshapeBroadcast(Rule):
    """A reshape that only adds or removes axes of size 1 swaps with the broadcast before it."""

    name, roots = "reshape_of_broadcast", ("reshape",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        inner = op.operands[0].op
        if inner is None or inner.name != "broadcast_to":
            return None
        source, middle, shape = inner.operands[0], inner.result.shape, op.result.shape
        if not same_shape(_without_ones(middle), _without_ones(shape)):
            return None
        sizes = (1,) * (len(middle) - len(source.shape)) + source.shape
        left = iter([s for s, m in zip(sizes, middle) if not _is_one(m)])
        new = tuple(1 if _is_one(d) else next(left) for d in shape)
        made: Value = b.broadcast_to(b.reshape_to(source, new), shape=shape)
        return made


def _is_one(dim: Dim) -> bool:
    return isinstance(dim, int) and dim == 1


def _without_ones(shape: Sequence[Dim]) -> tuple[Dim, ...]:
    return tuple(d for d in shape if not _is_one(d))


class MatmulOperands(Rule):
    """A matmul broadcasts leading axes by itself."""

    name, roots = "broadcast_below_matmul", ("matmul",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        values = [_before_batch_broadcast(v) for v in op.operands]
        if all(a is v for a, v in zip(values, op.operands)):
            return None
        for candidate in (values, [values[0], op.operands[1]], [op.operands[0], values[1]]):
            lead = broadcast_shapes(*(v.shape[:-2] for v in candidate))
            same = all(a is v for a, v in zip(candidate, op.operands))
            if not same and same_shape(lead, op.result.shape[:-2]):
                return b.matmul(*candidate)
        return None


def _before_batch_broadcast(value: Value) -> Value:
    inner = value.op
    if inner is None or inner.name != "broadcast_to":
        return value
    source = inner.operands[0]
    whole = len(source.shape) >= 2 and same_shape(source.shape[-2:], value.shape[-2:])
    return source if whole else value


class BatchedMatmul(Rule):
    """matmul between reshapes that only collapse and restore the leading axes, as `bmm` has it."""

    name, roots = "matmul_keeps_its_axes", ("reshape",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        inner = op.operands[0].op
        if inner is None or inner.name not in ("matmul", "linear"):
            return None
        if len(inner.result.uses) != 1:
            return None  # it would be computed twice
        shape, result = op.result.shape, inner.result.shape
        rows = 2 if inner.name == "matmul" else 1
        if len(shape) <= len(result) or not same_shape(shape[-rows:], result[-rows:]):
            return None
        count = 2 if inner.name == "matmul" else 1
        values: list[Value] = []
        for value in inner.operands[:count]:
            source = value.op.operands[0] if value.op and value.op.name == "reshape" else None
            if source is None or not same_shape(source.shape[:-rows], shape[:-rows]):
                return None
            if not same_shape(source.shape[-rows:], value.shape[-rows:]):
                return None
            values.append(source)
        return b.op(inner.name, (*values, *inner.operands[count:]), inner.attributes).result


class NormalAxes(Rule):
    """Negative axes become positive ones, and the axes of a reduction ascend."""

    name, roots = "normal_axes", Trait.PURE

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        if not op.attributes or op.regions or not op.operands or op.definition.infer is None:
            return None
        rank = len(op.operands[0].shape)
        changed: dict[str, Any] = {}
        for name in ("axis", "axis1", "axis2"):
            axis = op.attributes.get(name)
            if type(axis) is int and axis < 0:
                changed[name] = axis + max(rank, 1)
        axes = op.attributes.get("axes")
        if isinstance(axes, tuple) and (op.has(Trait.REDUCTION) or op.name == "permute"):
            normal = tuple(a + rank if a < 0 else a for a in axes)
            if op.has(Trait.REDUCTION):
                normal = tuple(sorted(normal))
            if normal != axes:
                changed["axes"] = normal
        if not changed:
            return None
        return b.op(op.name, op.arguments(), {**op.attributes, **changed}).results


class EmptyReduction(Rule):
    """A reduction over no axes."""

    name, roots = "reduce_nothing", ("sum", "mean", "amax", "amin")

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        if op.attribute("axes"):
            return None
        return b.cast_to(op.operands[0], op.result.dtype)


class EmptyPad(Rule):
    """A pad by nothing."""

    name, roots = "pad_nothing", ("pad",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        amounts = (*op.attribute("low"), *op.attribute("high"))
        return op.operands[0] if all(same_dim(a, 0) for a in amounts) else None


class IotaCast(Rule):
    """A cast of counted integers counts in the other dtype, where every count fits it."""

    name, roots = "cast_of_iota", ("cast",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        inner, dtype = op.operands[0].op, op.attribute("dtype")
        if inner is None or inner.name not in ("iota", "arange") or dtype.is_complex:
            return None
        start, step = inner.attribute("start"), inner.attribute("step")
        size = (
            inner.attribute("length")
            if inner.name == "arange"
            else inner.attribute("shape")[inner.attribute("axis")]
        )
        counts = (start, size, step)
        if not all(isinstance(c, int) for c in counts) or not _counts_fit(*counts, dtype):
            return None
        return b.op(inner.name, (), {**inner.attributes, "dtype": dtype}).result


def _counts_fit(start: int, size: int, step: int, dtype: torch.dtype) -> bool:
    """Whether start + step * i is exact in the dtype for all i < size."""
    last = start + step * max(size - 1, 0)
    low, high = min(start, last), max(start, last)
    if dtype not in (torch.int64, torch.int32, torch.float64, torch.float32):
        return False
    if dtype.is_floating_point:
        limit = int(1 / torch.finfo(dtype).eps)
        return -limit <= low and high <= limit
    info = torch.iinfo(dtype)
    return bool(info.min <= low and high <= info.max)


def view_rules() -> list[Rule]:
    """All rules about views."""
    flips = op("flip", op("flip", x, axes=bind("a")), axes=bind("a"))
    return [
        NormalAxes(),
        FullView(),
        BroadcastTo(),
        PermuteBroadcast(),
        ReshapeBroadcast(),
        BatchedMatmul(),
        ViewChain(),
        Slice(),
        Cat(),
        EmptyPad(),
        EmptyReduction(),
        IotaCast(),
        MatmulOperands(),
        Rewrite("flip_flip", flips, x),
        Rewrite("flip_nothing", op("flip", x, axes=()), x),
    ]
