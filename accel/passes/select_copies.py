"""Makes kernels of the copies that reshapes cost, where what reads them is no generated code.

A reshape after a permutation may be no view of memory, so torch copies the tensor, element by
element, with a kernel for any strides. A kernel written for this very map moves 16 bytes at a time
(the patches of ViT-B/16's 64 photographs on an H200: 42 us by torch). What is fused reads views in
place, so only calls of libraries, torch's operators, kernels around an op, and results need copies.
Libraries' results, and what half of a training step gets from the other half, lie as their makers
like, attention's with heads inside of tokens, say: views of them may cost nothing, and are left to
torch.
Contract: exact (elements are only moved).

    %1 = "accel.permute"(%x) {...}            %2 = "accel.kernel"(%x) ({ permute, reshape })
    %2 = "accel.reshape"(%1) {...}      ->                {kind = "pointwise"}
    "accel.call"(%2, ...) {...}               "accel.call"(%2, ...) {...}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accel.ir.capability import KernelGenerator
from accel.ir.module import Function, Module, Op, Value
from accel.ir.op import Trait
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.outline import finish_outline, outline

_SLICE = ("axis", "start", "stop", "step")
_KEPT = ("kernel", "call", "return")  # no kernel that `fuse` makes holds these


@register_pass
@dataclass
class SelectCopies(Pass):
    """Outlines reshapes that copy, with the views before them; sizes must be static."""

    name: ClassVar[str] = "select_copies"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        if context.generator is None:
            return
        for function in module.functions.values():
            self._select(function, context, context.generator)

    def _select(self, function: Function, context: Context, generator: KernelGenerator) -> None:
        training = "kept" in function.metadata
        for op in list(function.ops):
            if op.name != "reshape" or not _copies(op) or not _is_needed(op.result, generator):
                continue
            if _lies_anyhow(_root(op.operands[0]), generator, training):
                continue
            unsupported = generator.supports(op)
            if unsupported is not None:
                context.miss(self.name, op, unsupported)
            elif context.rewrite(self.name, op):
                attributes = {"backend": generator.name, "kind": "pointwise"}
                views = _views_before(op, generator)
                kernel = outline([op], "kernel", attributes, self.name, duplicate=views)
                assert op.parent is not None
                op.parent.insert_before(kernel, op)
                finish_outline(kernel, [op])


def _root(value: Value) -> Value:
    """What a value is a view of."""
    while value.op is not None and value.op.has(Trait.VIEW):
        value = value.op.operands[0]
    return value


def _lies_anyhow(root: Value, generator: KernelGenerator, training: bool) -> bool:
    """Whether a value may come in other than C order: from a library, torch, or a training step's
    other half. Kernels, and whoever calls a model, give dense tensors."""
    made = root.op
    if made is None:
        return training
    return made.name != "kernel" and generator.supports(made) is not None


def _copies(op: Op) -> bool:
    """Whether no strides make a reshape, of static size, a view of its operand's memory."""
    source = _laid_out(op.operands[0])
    shape = _static(op.result)
    if source is None or shape is None:
        return False
    return _viewed(source, shape) is None


def _laid_out(value: Value) -> Tensor | None:
    """A tensor without data that lies as the value does; None where its size is not known."""
    shape, op = _static(value), value.op
    if shape is None:
        return None
    if op is not None and op.has(Trait.CONSTANT):
        return None  # the runtime copies a view of a weight once
    if op is None or not op.has(Trait.VIEW):
        return torch.empty(shape, device="meta")
    source = _laid_out(op.operands[0])
    if source is None:
        return None
    match op.name:
        case "permute":
            axes: Any = op.attribute("axes")
            return source.permute([int(a) for a in axes])
        case "reshape":
            made = _viewed(source, shape)
            return torch.empty(shape, device="meta") if made is None else made
        case "broadcast_to":
            return source.expand(shape)
        case "slice":
            numbers: list[Any] = [op.attribute(n) for n in _SLICE]
            axis, start, stop, step = (int(n) for n in numbers)
            return source[(*[slice(None)] * (axis % source.dim()), slice(start, stop, step))]
        case _:
            return None


def _viewed(source: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor in another shape without a copy; None if there is no such view."""
    try:
        return source.view(shape)
    except (RuntimeError, ValueError):  # how torch says so, the latter while it traces (2.11)
        return None


def _static(value: Value) -> tuple[int, ...] | None:
    sizes = [d for d in value.shape if isinstance(d, int)]
    return tuple(sizes) if len(sizes) == len(value.shape) else None


def _is_needed(value: Value, generator: KernelGenerator) -> bool:
    """Whether something reads the value, through views or not, that `fuse` will not."""
    return any(
        _is_needed(user.result, generator)
        if user.has(Trait.VIEW)
        else user.name in _KEPT or generator.supports(user) is not None
        for user in value.users
    )


def _views_before(op: Op, generator: KernelGenerator) -> list[Op]:
    """The views that a reshape is read through, the nearest first."""
    found: list[Op] = []
    made = op.operands[0].op
    while made is not None and made.has(Trait.VIEW) and generator.supports(made) is None:
        found.append(made)
        made = made.operands[0].op
    return found
