"""Folds the parameters of a norm into the products that read it.

(n * w + b) W^T + c = n (W * w)^T + (W b + c): a norm before linears needs no parameters of its own.
That alone saves little; it is what `defer_norms` needs, and is done where the kernel generator says
that a norm is to be deferred. All functions of a module read the same weights, so all that read one
must have a norm with the same parameters before it: @decode then has a norm without weight, too.
A weight that anything else reads (a tied embedding), that is decoded from codes, or whose norm has
other readers, stays. Each product is computed once, with more digits than the weight has, and
rounded once.

16-bit floats of IEEE have few exponents: a product that overflows, or loses digits because it is
too small, stays as it was.

Contract: exact, with stored constants. Before and after:

    %n = "accel.rms_norm"(%x, %g) {eps = 1.0e-05 : f64}
    %y = "accel.linear"(%n, %w)

    %w = "accel.constant"() {name = "w.scaled"}
    %n = "accel.rms_norm"(%x) {eps = 1.0e-05 : f64}
    %y = "accel.linear"(%n, %w)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accel.ir.builder import Builder
from accel.ir.capability import KernelGenerator
from accel.ir.module import Module, Op, Value, constant_name
from accel.ir.storage import WeightStore
from accel.ir.types import TensorType
from accel.passes.base import EXACT_CONSTANTS, Context, Contract, Pass, register_pass
from accel.passes.defer_norms import NORMS, has_parameters, reads_norm, site_of
from accel.passes.norm_parts import NARROW
from accel.passes.weights import drop_unused

_LOST = 1.25  # times the error of rounding: more, and the product has lost digits


@dataclass(frozen=True)
class Parameters:
    """What a norm has besides x: names of constants, and what is added to the weight."""

    weight: str
    bias: str
    offset: float

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name)


@register_pass
@dataclass
class FoldNormWeights(Pass):
    """A norm's weight and bias go into the linears after it, in all functions at once."""

    name: ClassVar[str] = "fold_norm_weights"
    contract: ClassVar[Contract] = EXACT_CONSTANTS

    def run(self, module: Module, context: Context) -> None:
        if context.generator is None:
            return
        freed: list[str] = []
        for group in _groups(module, context):
            if not any(_pays(norm, context.generator) for norm in group):
                continue
            if not _keeps_digits(group, module):
                context.miss(self.name, group[0], "its weight times the product's lose digits")
            elif context.rewrite(self.name, group[0]):
                freed += _Folding(module, context).fold(group)
        drop_unused(module, freed)


def _pays(norm: Op, generator: KernelGenerator) -> bool:
    return not isinstance(site_of(norm, generator), str)


def _parameters(norm: Op) -> Parameters | None:
    """The parameters of a norm of 16-bit rows that only linears read; None if there are none."""
    given = [*norm.arguments(), None][1:3]
    names = ["" if v is None else constant_name(v) for v in given]
    if norm.result.dtype not in NARROW or not has_parameters(norm) or None in names:
        return None
    if not all(reads_norm(user, norm) for user in norm.result.users):
        return None
    offset = float(norm.attribute("offset")) if norm.name == "rms_norm" else 0.0
    return Parameters(str(names[0]), str(names[1]), offset)


def _groups(module: Module, context: Context) -> list[list[Op]]:
    """Norms that must lose their parameters together, since they share weights after them."""
    readers: dict[str, list[Op]] = {}
    norms: dict[Op, Parameters] = {}
    for op in module.walk():
        if op.name == "constant":
            users = readers.setdefault(str(op.attributes["name"]), [])
            users.extend(user for user, _ in op.result.uses)
        elif op.name in NORMS:
            found = _parameters(op)
            if found is not None:
                norms[op] = found
    left = dict(norms)
    while True:  # a norm that cannot change takes those with it that share a weight
        stay = [norm for norm in left if not all(
            _all_behind(name, readers[name], left[norm], left) for name in _weights_of([norm])
        )]  # fmt: skip
        if not stay:
            break
        for norm in stay:
            context.miss(FoldNormWeights.name, norm, "a weight after it has other readers")
            del left[norm]
    groups: list[list[Op]] = []
    while left:
        group = [next(iter(left))]
        for norm in group:
            left.pop(norm, None)
            shared = [r.operands[0].op for name in _weights_of([norm]) for r in readers[name]]
            group += [n for n in dict.fromkeys(shared) if n is not None and n not in group]
        groups.append(group)
    return groups


def _weights_of(norms: Iterable[Op]) -> list[str]:
    """The weights of the linears that read the norms."""
    linears = (user for norm in norms for user in norm.result.users)
    return list(dict.fromkeys(str(constant_name(linear.operands[1])) for linear in linears))


def _all_behind(
    name: str, readers: Iterable[Op], wanted: Parameters, norms: dict[Op, Parameters]
) -> bool:
    """Whether all that reads a weight are linears behind norms with the same parameters."""
    for op in readers:
        norm = op.operands[0].op if op.name == "linear" else None
        if norm is None or norms.get(norm) != wanted or constant_name(op.operands[1]) != name:
            return False
    return True


def _keeps_digits(group: list[Op], module: Module) -> bool:
    """Whether products in float16 are as exact as rounding leaves them."""
    parameters = _parameters(group[0])
    assert parameters is not None
    if group[0].result.dtype != torch.float16:
        return True  # as many exponents as float32
    for name in _weights_of(group):
        exact = scaled(module.weights, name, parameters).float()
        error = torch.linalg.vector_norm(exact - exact.half().float())
        allowed = _LOST * torch.finfo(torch.float16).eps / 2 * torch.linalg.vector_norm(exact)
        if not bool(error <= allowed):
            return False
    return True


def scaled(weights: WeightStore, name: str, parameters: Parameters) -> Tensor:
    """The weight [N, K] times the norm's [K], in a dtype that holds the product exactly (of numbers
    of 16 bits), or in float64."""
    weight = weights.in_place(name).detach()
    if not parameters.weight:
        return weight
    factor = weights.in_place(parameters.weight).detach().to(weight.device)
    exact = factor.dtype.itemsize == 2 and not parameters.offset
    wide = torch.float32 if exact else torch.float64
    return weight.to(wide) * (factor.to(wide) + parameters.offset)


def shifted(weights: WeightStore, name: str, bias: str, parameters: Parameters) -> Tensor:
    """W b + c, float64 [N]."""
    weight = weights.in_place(name).detach()
    total = weight.double() @ weights.in_place(parameters.bias).detach().to(weight.device).double()
    if bias:
        total = total + weights.in_place(bias).detach().to(weight.device).double()
    return total


class _Folding:
    """New weights by what they are made of: linears that share one still do."""

    def __init__(self, module: Module, context: Context) -> None:
        self.module, self.context = module, context
        self.made: dict[tuple[str, ...], str] = {}

    def fold(self, group: list[Op]) -> list[str]:
        """Folds the norms of a group; returns the constants that they and the linears read."""
        parameters = _parameters(group[0])
        assert parameters is not None
        freed = list(parameters.names)
        for norm in group:
            for linear in list(norm.result.users):
                freed += [str(constant_name(v)) for v in linear.operands[1:]]
                self._replace(linear, parameters)
            b = Builder(before=norm, made_by=FoldNormWeights.name)
            kept = {k: v for k, v in norm.attributes.items() if k in ("eps", "rank")}
            norm.replace_with(b.op(norm.name, norm.operands[:1], kept).results)
        return freed

    def _replace(self, linear: Op, parameters: Parameters) -> None:
        x, weight, bias = linear.arguments()
        name, added = str(constant_name(weight)), "" if bias is None else str(constant_name(bias))
        given = self.module.weights.pick(*filter(None, (name, added, *parameters.names)))
        b = Builder(before=linear, made_by=FoldNormWeights.name)
        new_weight, new_bias = weight, bias
        if parameters.weight:
            new_weight = self._constant(
                b, (name, "scaled"), weight.type, lambda: scaled(given, name, parameters)
            )
        if parameters.bias:
            type_ = weight.type.with_shape(weight.shape[:1])
            new_bias = self._constant(
                b, (added or name, "shifted", name), type_,
                lambda: shifted(given, name, added, parameters),
            )  # fmt: skip
        linear.replace_with(b.op("linear", (x, new_weight, new_bias)).results)

    def _constant(
        self, b: Builder, key: tuple[str, ...], type_: TensorType, compute: Callable[[], Tensor]
    ) -> Value:
        if key not in self.made:
            name = ".".join(key[:2])
            self.made[key] = self.context.store_lazily(self.module, name, type_, compute)
        made: Value = b.constant(self.made[key], type_)
        return made
