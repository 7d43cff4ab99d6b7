"""Norms between two products disappear: the first adds up rows, the second scales its sums.

rms_norm(x) W^T = r (x W^T) with one number a row, r = 1 / sqrt(mean(x^2) + eps), and layer_norm(x)
W^T = r (x W^T - mean(x) colsum(W)). So the product that makes x (with the addition of the residual)
leaves sums of x and of x^2 over parts of its rows, which it has in registers; r is made of these
few numbers; the product that reads the norm reads x instead, and scales its float32 sums before
they are rounded. A norm's read and write of x, and its launch, are gone. (FlashNorm, Graef et al.,
2024, defers r in the same way.) The parameters of a norm must be in the weight already:
`fold_norm_weights`.

The variance is mean(x^2) - mean(x)^2 in float32. What cancellation costs there is less than what x
lost when it was rounded to 16 bits, unless the mean is thousands of standard deviations.

Only where the kernel generator says that it pays (`folds_norm`): large 16-bit products on GPUs with
the instructions for it. A norm whose result something else reads stays, as does one of a sum that
no product makes (after a norm, in post-norm models).

Contract: exact, with stored constants (sums of the weight's columns). Before and after:

    %y = "accel.linear"(%a, %v)                 %y = "accel.linear"(%a, %v)
    %x = "accel.add"(%h, %y)                    %x = "accel.add"(%h, %y)
    %n = "accel.rms_norm"(%x) {eps = ..}  ->    %p = sums of %x * %x                [.., T]
    %z = "accel.linear"(%n, %w)                 %r = rsqrt(sum(%p) / N + eps)       [.., 1]
                                                %t = "accel.linear"(cast(%x), cast(%w))   in f32
                                                %z = cast(%t * %r)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from accel.ir.builder import Builder
from accel.ir.capability import KernelGenerator
from accel.ir.module import Module, Op, Value, constant_name
from accel.ir.types import TensorType, same_shape
from accel.passes.base import EXACT_CONSTANTS, Context, Contract, Pass, register_pass
from accel.passes.norm_parts import NARROW, PART, emit_parts
from accel.passes.outline import elementwise_epilogue
from accel.passes.select_products import halves_of

NORMS = ("rms_norm", "layer_norm")
_MOST_EPILOGUE = 6
Rows = tuple[Value, Value | None]  # r [.., 1] and, of a layer norm, the mean [.., 1]


@dataclass(frozen=True)
class NormSite:
    """A norm between products: the linear and the addition that make x, and the linears that read
    the norm, each with what its kernel takes along."""

    norm: Op
    maker: tuple[Op, Op]
    readers: list[list[Op]]


@register_pass
@dataclass
class DeferNorms(Pass):
    """Norms without parameters become sums in one product, and a factor in the next."""

    name: ClassVar[str] = "defer_norms"
    contract: ClassVar[Contract] = EXACT_CONSTANTS

    def run(self, module: Module, context: Context) -> None:
        if context.generator is None:
            return
        sums = _ColumnSums(module, context)
        for function in module.functions.values():
            rows: dict[tuple[Value, str, float], Rows] = {}
            for op in function.ops:
                if op.name not in NORMS:
                    continue
                site = site_of(op, context.generator)
                if isinstance(site, str):
                    context.miss(self.name, op, site)
                elif has_parameters(op):
                    context.miss(self.name, op, "its parameters are not in the weights after it")
                elif context.rewrite(self.name, op):
                    _defer(site, rows, sums)


def has_parameters(norm: Op) -> bool:
    return len(norm.operands) > 1 or bool(norm.attributes.get("offset", 0.0))


def site_of(norm: Op, generator: KernelGenerator) -> NormSite | str:
    """The norm with its products, if it pays to defer it once its parameters are gone; else why it
    does not."""
    x = norm.operands[0]
    if norm.name == "layer_norm" and norm.attribute("rank") != 1:
        return "a norm of several axes"
    if x.dtype not in NARROW or x.type.rank < 2:
        return f"a norm of {x.dtype}"
    columns = x.shape[-1]
    if not isinstance(columns, int) or columns % PART:
        return f"rows of {columns} numbers, which are no parts of {PART}"
    maker = _maker(x)
    if maker is None:
        return "what it normalizes is not the sum of a product and something else"
    other = next((u for u in norm.result.users if not reads_norm(u, norm)), None)
    if not norm.result.uses:
        return "nothing reads it"
    if other is not None:
        return f"accel.{other.name} reads its result, or a product of no stored weight"
    readers: list[list[Op]] = []
    for linear in norm.result.users:
        halves = halves_of(linear, generator)
        last = halves[-1] if halves else linear
        epilogue = elementwise_epilogue(last, generator, _MOST_EPILOGUE)
        readers.append([linear, *halves, *epilogue])
    reason = generator.folds_norm(norm, maker, readers)
    return NormSite(norm, maker, readers) if reason is None else reason


def reads_norm(op: Op, norm: Op) -> bool:
    """Whether an op is a linear of the norm's result with a plain stored weight, and bias."""
    x = norm.result
    if op.name != "linear" or [i for i, v in enumerate(op.operands) if v is x] != [0]:
        return False
    return all(constant_name(v) is not None and v.dtype == x.dtype for v in op.operands[1:])


def _maker(x: Value) -> tuple[Op, Op] | None:
    """The linear and the addition that make x."""
    add = x.op
    if add is None or add.name != "add":
        return None
    if not all(same_shape(v.shape, x.shape) and v.dtype == x.dtype for v in add.operands):
        return None
    for value in add.operands:
        linear = value.op
        if linear is None or linear.name != "linear" or len(value.uses) != 1:
            continue
        if constant_name(linear.operands[1]) is not None:
            return linear, add
    return None


def _defer(site: NormSite, known: dict[tuple[Value, str, float], Rows], sums: _ColumnSums) -> None:
    """`known`: what other norms of the same x have for its rows."""
    norm, x, made_by = site.norm, site.norm.operands[0], DeferNorms.name
    key = (x, norm.name, float(norm.attribute("eps")))
    if key not in known:
        _, add = site.maker
        assert add.next is not None
        b = Builder(before=add.next, location=norm.location, made_by=made_by)
        parts = emit_parts(b, x, sums=norm.name == "layer_norm")
        b = Builder(before=norm, made_by=made_by)
        known[key] = _statistics(b, parts, int(x.shape[-1]), key[-1])
    scale, mean = known[key]
    for linear, *_ in site.readers:
        b = Builder(before=linear, made_by=made_by)
        _, weight, bias = linear.arguments()
        wide = torch.float32
        y = b.linear(b.cast(x, dtype=wide), b.cast(weight, dtype=wide))
        if mean is not None:
            y = b.sub(y, b.mul(mean, sums.of(b, weight)))
        y = b.mul(y, scale)
        if bias is not None:
            y = b.add(y, b.cast(bias, dtype=wide))
        linear.replace_with([b.cast(y, dtype=x.dtype)])
    norm.erase()


def _statistics(b: Builder, parts: list[Value], columns: int, eps: float) -> Rows:
    """What the rows are scaled with, from sums over their parts."""
    axis, wide = parts[0].type.rank - 1, torch.float32

    def mean_of(part: Value) -> Value:
        total = b.sum(part, axes=(axis,), keepdim=True)
        found: Value = b.div(total, b.scalar(float(columns), wide))
        return found

    square, mean = mean_of(parts[-1]), None
    if len(parts) > 1:
        mean = mean_of(parts[0])
        square = b.sub(square, b.mul(mean, mean))
        square = b.maximum(square, b.scalar(0.0, wide))  # rounding can make it negative
    return b.rsqrt(b.add(square, b.scalar(eps, wide))), mean


@dataclass
class _ColumnSums:
    """Sums of the columns of weights, float32 [N]: one of each, however often it is read."""

    module: Module
    context: Context
    made: dict[str, str] = field(default_factory=dict)

    def of(self, b: Builder, weight: Value) -> Value:
        """Of the weight as it is stored: mean(x) cancels as exactly as the product has it."""
        name = str(constant_name(weight))
        type_ = TensorType((weight.shape[0],), torch.float32)
        if name not in self.made:
            store = self.module.weights.pick(name)
            self.made[name] = self.context.store_lazily(
                self.module,
                f"{name}.sums",
                type_,
                lambda: store.in_place(name).detach().sum(1, dtype=torch.float64),
            )
        found: Value = b.constant(self.made[name], type_)
        return found
