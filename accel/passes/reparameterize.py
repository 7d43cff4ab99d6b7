"""Reparameterization: parallel convolution branches become one convolution.

Networks of the RepVGG family train with several branches over one input (3x3, 1x1 and identity,
each with a batch norm) whose outputs are summed. All of it is linear in the input, so one kernel
does the same: batch norms become factors and biases, a small kernel is a large one with zeros
around it, and the identity is a 1x1 kernel with ones on its diagonal.

Paper: Ding et al., 2021 ("RepVGG: Making VGG-style ConvNets Great Again"); 1x3 and 3x1 branches:
Ding et al., 2019 (ACNet).

Contract: exact, with stored constants (computed in float64, rounded once). Batch norms may still be
there, or already be folded into convolutions or written as products and sums. Before and after:

    %a = "accel.conv"(%x, %w3) {padding = [1, 1], ...} : (...) -> tensor<1x8x16x16xf32>
    %b = "accel.batch_norm"(%a, %mean3, %var3, %g3, %b3) {eps = 1e-05} : ...
    %c = "accel.conv"(%x, %w1) {padding = [0, 0], ...} : (...) -> tensor<1x8x16x16xf32>
    %d = "accel.batch_norm"(%c, %mean1, %var1, %g1, %b1) {eps = 1e-05} : ...
    %e = "accel.batch_norm"(%x, %mean0, %var0, %g0, %b0) {eps = 1e-05} : ...
    %f = "accel.add"(%b, %d) : ...
    %y = "accel.add"(%f, %e) : ...

    %w = "accel.constant"() {name = "w3.merged"} : () -> tensor<8x8x3x3xf32>
    %z = "accel.constant"() {name = "w3.merged.bias"} : () -> tensor<8xf32>
    %y = "accel.conv"(%x, %w, %z) {padding = [1, 1], ...} : (...) -> tensor<1x8x16x16xf32>
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from accel.ir.builder import Builder
from accel.ir.module import Module, Op, Value, constant_name
from accel.ir.types import TensorType, same_type
from accel.passes.base import EXACT_CONSTANTS, Context, Contract, Pass, register_pass
from accel.passes.weights import drop_unused, stored_constant


@dataclass
class Branch:
    """A term of a sum: conv(source) * scale + shift for each channel, without conv the identity.

    `ops` are the ops that compute it, last first. `refused` says why it ends where it does.
    """

    term: Value
    source: Value
    scale: Tensor  # float64 [C]
    shift: Tensor  # float64 [C]
    conv: Op | None = None
    weight: Tensor | None = None
    ops: list[Op] = field(default_factory=list)
    refused: str = ""

    def kernel(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes and paddings of the kernel along the spatial axes."""
        if self.conv is None or self.weight is None:
            return (1,) * rank, (0,) * rank
        return tuple(self.weight.shape[2:]), self.conv.attribute("padding")


@dataclass(frozen=True)
class Geometry:
    """A merged kernel, and the `places` in it where the branches' kernels begin."""

    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]

    def weight_type(self, branch: TensorType) -> TensorType:
        return branch.with_shape((*branch.shape[:2], *self.kernel))

    def attributes(self, conv: Op) -> dict[str, Any]:
        return {**conv.attributes, "padding": self.padding, "dilation": self.dilation}


@register_pass
@dataclass
class Reparameterize(Pass):
    """Merges sums of convolutions (and batch norms, and the identity) over one input."""

    name: ClassVar[str] = "reparameterize"
    contract: ClassVar[Contract] = EXACT_CONSTANTS

    def run(self, module: Module, context: Context) -> None:
        replaced: list[str] = []
        for function in module.functions.values():
            for op in function.ops:
                if op.name == "add" and not _inside_sum(op):
                    replaced.extend(self._merge_sum(op, module, context))
        drop_unused(module, replaced)

    def _merge_sum(self, root: Op, module: Module, context: Context) -> list[str]:
        """Merges what it can of one sum; returns the names of the constants it replaced."""
        inner: list[Op] = []
        terms = list(_terms(root, inner))
        merged: list[Branch] = []
        for layout in ("nchw", "nhwc"):
            whole = [t for t in terms if same_type(t.type, root.result.type)]
            for together in self._find(whole, layout, root, context, module):
                geometry = _geometry(together, root)
                if isinstance(geometry, str):
                    context.miss(self.name, root, geometry)
                elif context.rewrite(self.name, root):
                    value = _emit(root, together, geometry, module, context)
                    taken = {branch.term for branch in together}
                    terms = [value, *(t for t in terms if t not in taken)]
                    merged.extend(together)
        if not merged:
            return []
        b = Builder(before=root, made_by=self.name)
        total = terms[0]
        for term in terms[1:]:
            total = b.add(total, term)
        root.replace_with([total])
        dead = [*reversed(inner), *(op for branch in merged for op in branch.ops)]
        return _erase_unused(dead)

    def _find(
        self, terms: Sequence[Value], layout: str, root: Op, context: Context, module: Module
    ) -> list[list[Branch]]:
        """Terms that may become one convolution of this layout; near misses are reported."""
        found = [_branch(term, module, layout) for term in terms]
        branches = [branch for branch in found if branch is not None]
        for branch in branches:
            if branch.refused:
                context.miss(self.name, root, branch.refused)
        return _sets(branches)


def _erase_unused(ops: Sequence[Op]) -> list[str]:
    """Erases those of `ops` (users first) without users, and constants that only they read."""
    names: list[str] = []
    for op in ops:
        if op.parent is None or any(r.uses for r in op.results):
            continue
        constants = [v.op for v in op.operands if constant_name(v) is not None]
        op.erase()
        for constant in dict.fromkeys(constants):
            if constant is not None and not constant.result.uses:
                names.append(str(constant.attributes["name"]))
                constant.erase()
    return names


def _inside_sum(op: Op) -> bool:
    """Whether the op is a term of another sum that will be looked at as a whole."""
    user = op.result.single_user
    return user is not None and user.name == "add" and same_type(user.result.type, op.result.type)


def _terms(op: Op, inner: list[Op]) -> Iterator[Value]:
    """Terms of a sum of equal shapes; `inner` collects the adds between them, users last."""
    for value in op.operands:
        made = value.op
        if (
            made is not None
            and made.name == "add"
            and len(value.uses) == 1
            and all(same_type(v.type, op.result.type) for v in made.operands)
        ):
            yield from _terms(made, inner)
            inner.append(made)
        else:
            yield value


def _branch(term: Value, module: Module, layout: str) -> Branch | None:
    """Reads per-channel factors and sums from `term` back to a convolution or to the input."""
    axis = 1 if layout == "nchw" else term.type.rank - 1
    channels = term.shape[axis] if term.type.rank > 2 else None
    if not isinstance(channels, int) or not term.dtype.is_floating_point:
        return None
    scale = torch.ones(channels, dtype=torch.float64)
    branch = Branch(term, term, scale, torch.zeros_like(scale))
    while (op := branch.source.op) is not None:
        step = _affine_step(op, channels, axis, module)
        conv = op.name == "conv" and op.attribute("layout") == layout
        if step is None and not conv:
            break
        if len(branch.source.uses) > 1:
            # With several readers this may be the branches' common input: the identity branch.
            if conv and branch.source is term:
                branch.refused = f"the branch at {_place(op)} has other readers"
            break
        if step is not None:
            branch.source, factor, offset = step
            branch.shift = branch.shift + branch.scale * offset
            branch.scale = branch.scale * factor
            branch.ops.append(op)
            continue
        weight, bias = (
            None if v is None else stored_constant(v, module) for v in op.arguments()[1:]
        )
        if weight is None or (bias is None) != (op.operand("bias") is None):
            branch.refused = f"the weight or bias of the branch at {_place(op)} is not stored"
        else:
            branch.shift = branch.shift + (0 if bias is None else branch.scale * bias.double())
            branch.ops.append(op)
            branch.conv, branch.weight, branch.source = op, weight, op.operands[0]
        break
    return branch


def _place(op: Op) -> str:
    return str(op.location) if op.location else f"accel.{op.name}"


def _sets(branches: Sequence[Branch]) -> list[list[Branch]]:
    """Branches that may become one convolution: same input, stride and groups, and identities."""
    sets: dict[tuple[Any, ...], list[Branch]] = {}
    for branch in branches:
        if branch.conv is not None:
            attributes = (branch.conv.attribute("stride"), branch.conv.attribute("groups"))
            sets.setdefault((branch.source, *attributes), []).append(branch)
    free = [branch for branch in branches if branch.conv is None]
    for (source, stride, _), found in sets.items():
        if all(s == 1 for s in stride):
            found.extend(branch for branch in free if branch.source is source)
            free = [branch for branch in free if branch.source is not source]
    return [found for found in sets.values() if len(found) > 1]


def _geometry(branches: Sequence[Branch], root: Op) -> Geometry | str:
    """The merged convolution's geometry, or why there is none."""
    convs = [branch.conv for branch in branches if branch.conv is not None]
    padding = tuple(max(p) for p in zip(*(c.attribute("padding") for c in convs)))
    dilation: list[int] = []
    for axis in range(len(padding)):
        spread = {
            c.attribute("dilation")[axis] for c in convs if c.operands[1].shape[2 + axis] != 1
        }
        if len(spread) > 1:
            return f"branches have dilations {sorted(spread)}"
        dilation.append(spread.pop() if spread else 1)
    places: list[tuple[int, ...]] = []
    kernel = [1] * len(padding)
    taps = 0
    for branch in branches:
        size, own = branch.kernel(len(padding))
        if any((p - q) % d for p, q, d in zip(padding, own, dilation)):
            return f"paddings {own} and {padding} differ by no multiple of dilation {dilation}"
        place = tuple((p - q) // d for p, q, d in zip(padding, own, dilation))
        kernel = [max(k, o + s) for k, o, s in zip(kernel, place, size)]
        places.append(place)
        taps += math.prod(size)
    if math.prod(kernel) > taps:
        return f"one {kernel} kernel costs more than its branches ({taps} taps)"
    geometry = Geometry(padding, tuple(dilation), tuple(kernel), tuple(places))
    made = convs[0].definition.infer_types(
        [branches[0].source.type, geometry.weight_type(convs[0].operands[1].type)],
        geometry.attributes(convs[0]),
    )
    if not same_type(made[0], root.result.type):
        return f"one {kernel} kernel would give {made[0]}, not {root.result.type}"
    return geometry


def _emit(
    root: Op, branches: Sequence[Branch], geometry: Geometry, module: Module, context: Context
) -> Value:
    """Stores the merged weight and bias, and emits the convolution in front of `root`."""
    first = next(branch for branch in branches if branch.conv is not None)
    assert first.conv is not None
    kind = geometry.weight_type(first.conv.operands[1].type)
    shape = tuple(int(d) for d in kind.shape)
    total = torch.zeros(shape, dtype=torch.float64)
    shift = torch.zeros(shape[0], dtype=torch.float64)
    for branch, place in zip(branches, geometry.places):
        weight = branch.weight
        if weight is None:  # the identity: output channel c reads input channel c of its group
            weight = torch.zeros(*shape[:2], *(1 for _ in place), dtype=torch.float64)
            rows = torch.arange(shape[0])
            weight[rows, rows % shape[1]] = 1.0
        column = branch.scale.reshape(-1, *(1 for _ in shape[1:]))
        window = (slice(None), slice(None))
        window += tuple(slice(o, o + k) for o, k in zip(place, weight.shape[2:]))
        total[window] += weight.double() * column
        shift += branch.shift
    base = f"{constant_name(first.conv.operands[1])}.merged"
    b = Builder(before=root, location=first.conv.location, made_by=Reparameterize.name)
    constants = [b.constant(context.store_constant(module, base, total, kind.dtype), kind)]
    if bool(shift.any()):
        stored = context.store_constant(module, f"{base}.bias", shift, kind.dtype)
        constants.append(b.constant(stored, module.weights.type(stored)))
    result: Value = b.conv(first.source, *constants, **geometry.attributes(first.conv))
    return result


def _affine_step(
    op: Op, channels: int, axis: int, module: Module
) -> tuple[Value, Tensor, Tensor] | None:
    """(x, factor, offset) if the op is x * factor + offset for each channel of `axis`."""
    ones = torch.ones(channels, dtype=torch.float64)
    if op.name == "batch_norm" and axis == 1:
        tensors = []
        for value in op.arguments()[1:]:
            stored = None if value is None else stored_constant(value, module)
            if value is not None and stored is None:
                return None
            tensors.append(None if stored is None else stored.double())
        mean, variance, weight, bias = tensors
        assert mean is not None and variance is not None
        factor = torch.rsqrt(variance + float(op.attribute("eps")))
        factor = factor if weight is None else factor * weight
        offset = -mean * factor if bias is None else bias - mean * factor
        return op.operands[0], factor, offset
    if op.name not in ("mul", "add", "sub"):
        return None
    for i, other in ((0, 1), (1, 0)):
        x, constant = op.operands[i], op.operands[other]
        if not same_type(x.type, op.result.type) or (op.name == "sub" and i == 1):
            continue
        vector = _per_channel(constant, x.type.rank, channels, axis, module)
        if vector is None:
            continue
        if op.name == "mul":
            return x, vector, 0 * ones
        return x, ones, -vector if op.name == "sub" else vector
    return None


def _per_channel(
    value: Value, rank: int, channels: int, axis: int, module: Module
) -> Tensor | None:
    """A constant that has one value for each index of `axis`, as float64 [channels]."""
    op = value.op
    if op is not None and op.name == "full" and not value.shape:
        return torch.full((channels,), float(op.attribute("value")), dtype=torch.float64)
    stored = stored_constant(value, module)
    if stored is None or stored.numel() not in (1, channels) or stored.dim() > rank:
        return None
    shape = (1,) * (rank - stored.dim()) + tuple(stored.shape)
    if stored.numel() > 1 and shape[axis] != channels:
        return None
    return stored.double().reshape(-1).expand(channels)
