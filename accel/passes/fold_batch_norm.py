"""Folds what scales and shifts channels into the convolution or linear before it.

batch_norm(conv(x, w) + b) = conv(x, w * s) + (b - mean) * s + beta, where s is
gamma / sqrt(var + eps) of each output channel (Jacob et al., 2018, section 3.2). A batch norm
written as arithmetic is the same: multiplications by and additions of one constant per channel. All
of a run of them goes into the weights at once, computed in float64 and rounded once. A batch norm
that follows nothing it could go into, but has constant statistics, becomes a multiplication and an
addition. Of two convolutions that are added the first gets both biases.

Contract: exact, with stored constants. Before and after:

    %1 = "accel.conv"(%x, %w) {...} : (...) -> tensor<1x8x16x16xf32>
    %2 = "accel.batch_norm"(%1, %mean, %var, %gamma, %beta) {eps = 1.0e-05} : ...

    %w = "accel.constant"() {name = "w.folded"} : () -> tensor<8x4x3x3xf32>
    %b = "accel.constant"() {name = "w.folded.bias"} : () -> tensor<8xf32>
    %2 = "accel.conv"(%x, %w, %b) {...} : (...) -> tensor<1x8x16x16xf32>
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from accel.ir.builder import Builder
from accel.ir.module import Module, Op, Value, constant_name
from accel.ir.types import same_dim, same_shape
from accel.passes.base import EXACT_CONSTANTS, Context, Contract, Pass, register_pass
from accel.passes.weights import drop_unused, stored_constant

_CARRIERS = ("conv", "conv_transpose", "linear")
_ARITHMETIC = ("mul", "add", "sub", "div")


@register_pass
@dataclass
class FoldBatchNorm(Pass):
    """conv + batch_norm -> conv; the same for linears, and for scales and shifts of channels."""

    name: ClassVar[str] = "fold_batch_norm"
    contract: ClassVar[Contract] = EXACT_CONSTANTS

    def run(self, module: Module, context: Context) -> None:
        freed: list[str] = []
        exact: dict[str, Tensor] = {}  # new biases before they were rounded
        for function in module.functions.values():
            for op in function.ops:
                if op.name in _CARRIERS:
                    freed.extend(self._fold(op, module, context, exact))
            for op in function.ops:
                if op.name == "batch_norm":
                    freed.extend(self._spell_out(op, module, context))
                elif op.name == "conv":
                    freed.extend(self._join_biases(op, module, context, exact))
        drop_unused(module, freed)

    def _fold(
        self, carrier: Op, module: Module, context: Context, exact: dict[str, Tensor]
    ) -> list[str]:
        """Folds the run after one carrier; returns the weights that it no longer uses."""
        run = _run_after(carrier, module, context)
        if not run.ops:
            return []
        arguments = carrier.arguments()
        weight = stored_constant(arguments[1], module)
        bias = None if arguments[2] is None else stored_constant(arguments[2], module)
        if weight is None or (arguments[2] is not None and bias is None):
            context.miss(self.name, run.ops[0], "an operand is not a constant")
            return []
        if not context.rewrite(self.name, run.ops[-1]):
            return []
        shift = run.shift if bias is None else run.shift + bias.double() * run.scale
        b = Builder(before=run.ops[-1], location=carrier.location, made_by=self.name)
        name = f"{constant_name(arguments[1])}.folded"
        new_bias = None
        if bias is not None or bool(shift.any()):
            new_bias = _store(b, module, context, f"{name}.bias", shift, arguments[1].dtype)
            exact[str(constant_name(new_bias))] = shift
        new_weight = arguments[1]
        if not torch.equal(run.scale, torch.ones_like(run.scale)):
            wide = weight.double() * run.scale.reshape(_weight_shape(carrier, weight))
            new_weight = _store(b, module, context, name, wide, arguments[1].dtype)
        made = b.op(carrier.name, (arguments[0], new_weight, new_bias), carrier.attributes)
        freed = [str(constant_name(v)) for v in arguments[1:] if v is not None] + run.names
        run.ops[-1].replace_with(made.results)
        for op in (*reversed(run.ops[:-1]), carrier):
            op.erase()
        return freed

    def _join_biases(
        self, first: Op, module: Module, context: Context, exact: Mapping[str, Tensor]
    ) -> list[str]:
        """conv(x, w, b) + conv(y, v, c) is conv(x, w, b + c) + conv(y, v)."""
        user = first.result.single_user
        if user is None or user.name != "add":
            return []
        second = next((v.op for v in user.operands if v is not first.result), None)
        if second is None or second.name != "conv" or len(second.result.uses) != 1:
            return []
        if not same_shape(first.result.shape, second.result.shape):
            return []
        biases = [first.arguments()[2], second.arguments()[2]]
        stored = [None if v is None else stored_constant(v, module) for v in biases]
        if stored[0] is None or stored[1] is None or not context.rewrite("join_biases", user):
            return []
        names = [str(constant_name(v)) for v in biases if v is not None]
        terms = [exact.get(n, t).double() for n, t in zip(names, stored) if t is not None]
        b = Builder(before=first, location=first.location, made_by=self.name)
        bias = _store(b, module, context, f"{names[0]}.both", terms[0] + terms[1], stored[0].dtype)
        for op, own in ((first, bias), (second, None)):
            b = Builder(before=op, location=op.location, made_by=self.name)
            x, weight, _ = op.arguments()
            op.replace_with(b.op("conv", (x, weight, own), op.attributes).results)
        return names

    def _spell_out(self, norm: Op, module: Module, context: Context) -> list[str]:
        """batch_norm(x) as x * scale + shift, with constants."""
        dtype = norm.result.dtype
        parameters = [None if v is None else stored_constant(v, module) for v in norm.arguments()]
        given = [v for v in norm.arguments()[1:] if v is not None]
        if any(constant_name(v) is None for v in given) or dtype.itemsize < 4:
            return []
        if not context.rewrite("batch_norm_as_affine", norm):
            return []
        scale, shift = _affine(parameters[1:], float(norm.attribute("eps")))
        shape = (-1, *(1 for _ in norm.result.shape[2:]))
        b = Builder(before=norm, made_by=self.name)
        name = str(constant_name(given[0]))
        factor = _store(b, module, context, f"{name}.scale", scale.reshape(shape), dtype)
        offset = _store(b, module, context, f"{name}.shift", shift.reshape(shape), dtype)
        norm.replace_with([b.add(b.mul(norm.operands[0], factor), offset)])
        return [str(constant_name(v)) for v in given]


@dataclass
class _Run:
    """Ops after a carrier that compute x * scale + shift, one scale and shift per channel."""

    scale: Tensor
    shift: Tensor
    ops: list[Op] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def _run_after(carrier: Op, module: Module, context: Context) -> _Run:
    channels = _channels(carrier)
    run = _Run(torch.ones(channels, dtype=torch.float64), torch.zeros(channels).double())
    value = carrier.result
    while True:
        user = value.single_user
        if user is None or user.parent is not carrier.parent:
            for each in value.users:
                if each.name == "batch_norm":
                    context.miss(FoldBatchNorm.name, each, "the result before it has another user")
            return run
        step = _step(user, value, carrier, module, context)
        if step is None:
            return run
        scale, shift, names = step
        run.scale, run.shift = run.scale * scale, run.shift * scale + shift
        run.ops.append(user)
        run.names.extend(names)
        value = user.result


def _channels(carrier: Op) -> int:
    axis = _channel_axis(carrier)
    size = carrier.result.shape[axis]
    return size if isinstance(size, int) else 0


def _channel_axis(carrier: Op) -> int:
    """The axis of the carrier's result that its weight's outputs are on."""
    last = carrier.name == "linear" or (
        carrier.name == "conv" and carrier.attribute("layout") == "nhwc"
    )
    return len(carrier.result.shape) - 1 if last else 1


def _weight_shape(carrier: Op, weight: Tensor) -> tuple[int, ...]:
    """How one factor per output broadcasts to the weight."""
    if carrier.name == "conv_transpose":
        return (1, -1, *(1 for _ in weight.shape[2:]))
    return (-1, *(1 for _ in weight.shape[1:]))


def _step(
    op: Op, value: Value, carrier: Op, module: Module, context: Context
) -> tuple[Tensor, Tensor, list[str]] | None:
    """(scale, shift, weights read) if the op is affine in `value` with constants per channel."""
    if carrier.name == "conv_transpose" and carrier.attribute("groups") != 1:
        return None
    if op.name == "batch_norm":
        return _norm_step(op, value, carrier, module, context)
    if op.name not in _ARITHMETIC or not same_shape(op.result.shape, value.shape):
        return None
    other = op.operands[1] if op.operands[0] is value else op.operands[0]
    if other is value or (op.operands[1] is value and op.name in ("sub", "div")):
        return None
    constant = _per_channel(other, carrier, module)
    if constant is None:
        return None
    one, zero = torch.ones_like(constant), torch.zeros_like(constant)
    steps = {
        "mul": (constant, zero),
        "div": (1 / constant, zero),
        "add": (one, constant),
        "sub": (one, -constant),
    }
    scale, shift = steps[op.name]
    return scale, shift, [str(constant_name(other))]


def _norm_step(
    norm: Op, value: Value, carrier: Op, module: Module, context: Context
) -> tuple[Tensor, Tensor, list[str]] | None:
    if norm.operands[0] is not value:
        return None
    if _channel_axis(carrier) != 1:
        context.miss(FoldBatchNorm.name, norm, "channels of the result are not on axis 1")
        return None
    given = [v for v in norm.arguments()[1:] if v is not None]
    if any(constant_name(v) is None for v in given):
        context.miss(FoldBatchNorm.name, norm, "an operand is not a constant")
        return None
    parameters = [None if v is None else stored_constant(v, module) for v in norm.arguments()[1:]]
    scale, shift = _affine(parameters, float(norm.attribute("eps")))
    return scale, shift, [str(constant_name(v)) for v in given]


def _per_channel(value: Value, carrier: Op, module: Module) -> Tensor | None:
    """The constant as one float64 number per channel, if it broadcasts as that."""
    rank, axis = len(carrier.result.shape), _channel_axis(carrier)
    shape = (1,) * (rank - len(value.shape)) + value.shape
    if len(shape) != rank or not same_dim(shape[axis], carrier.result.shape[axis]):
        return None
    if any(i != axis and not same_dim(d, 1) for i, d in enumerate(shape)):
        return None
    stored = stored_constant(value, module)
    return None if stored is None else stored.double().reshape(-1)


def _affine(parameters: list[Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    """A batch norm as x * scale + shift, float64 [C]."""
    mean, variance, gamma, beta = parameters
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance.double() + eps)
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    return scale, shift if beta is None else shift + beta.double()


def _store(
    b: Builder, module: Module, context: Context, name: str, value: Tensor, dtype: torch.dtype
) -> Value:
    stored = context.store_constant(module, name, value, dtype)
    return b.constant(stored, module.weights.type(stored))
