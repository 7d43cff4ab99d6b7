"""Gives attention to the kernel generator, with the views around it.

A generated kernel reads queries, keys and values through their head split (and out of a fused qkv
projection), turns queries (rotary embedding) and writes the merged heads, so nothing is copied
before or after; scores stay in the core. What the generator does not take (few queries, odd head
sizes) is left to a vendor library. With `masks` the kernel also computes the mask, where that reads
less than a mask of all pairs: a causal band with padded keys, a bias of distances.
Contract: exact (the kernel's region is the ops it replaces).

    %q = "accel.permute"(%1)                     %3 = "accel.kernel"(%1, %k, %v) ({
    %2 = "accel.attention"(%q, %k, %v)     ->      permute, attention, permute, reshape
    %3 = "accel.reshape"("accel.permute"(%2))    }) {kind = "attention", ...}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import sympy

from accel.ir.capability import KernelGenerator
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.types import Dim, same_dim
from accel.passes.anchored import AnchoredPass
from accel.passes.base import EXACT, Context, Contract, register_pass

# Ops that have a kind of kernel of their own name.
KINDS = ("attention", "cached_attention", "flash_attention", "flash_attention_backward")


_MASKS = {"attention": 3, "flash_attention": 3, "flash_attention_backward": 6}
_LARGE = 1 << 20  # a size in place of a symbol
_RANK = 4  # of queries, keys, values and results


@register_pass
@dataclass
class SelectAttention(AnchoredPass):
    """Outlines attention and its views into kernels; with `masks`, what computes the mask too."""

    name: ClassVar[str] = "select_attention"
    contract: ClassVar[Contract] = EXACT
    anchors: ClassVar[tuple[str, ...]] = KINDS

    masks: bool = False

    def _select(
        self, op: Op, context: Context, generator: KernelGenerator, order: dict[Op, int]
    ) -> None:
        if not context.rewrite(self.name, op):
            return
        turn = _turn_before(op, generator)
        ops = [*turn, op, *views_after(op, generator)]
        before = {v for o in (*turn, op) for v in views_before(o, generator)}
        if self.masks:
            before |= mask_before(op, generator)
        views = sorted(before, key=order.__getitem__)
        # Where it has several results, somebody may read one before the last view of another.
        place = ops[-1] if len(op.results) == 1 else op
        self._outline(ops, op.name, generator, order, duplicate=views, place=place, constants=False)


def _turn_before(op: Op, generator: KernelGenerator) -> list[Op]:
    """The rotary embedding of the queries, if nothing else reads what it makes: a program has its
    queries in its hands once, and can turn them there."""
    made = op.operands[0].op if op.name == "attention" else None
    if made is None or made.name != "rope" or len(made.result.uses) != 1:
        return []
    return [made] if generator.supports_neighbour(op, made) is None else []


def _is_view(op: Op | None, generator: KernelGenerator) -> bool:
    return op is not None and op.has(Trait.VIEW) and generator.supports(op) is None


def views_before(
    op: Op, generator: KernelGenerator, stops: Callable[[Op], bool] = lambda op: False
) -> set[Op]:
    """VIEW ops that the operands are read through, up to those that stop. They stay for whoever
    else uses them."""
    found: set[Op] = set()
    pending = list(op.operands)
    while pending:
        made = pending.pop().op
        if made is None or made in found or stops(made) or not _is_view(made, generator):
            continue
        found.add(made)
        pending.extend(made.operands)
    return found


def mask_before(op: Op, generator: KernelGenerator, most: int = 24) -> set[Op]:
    """The ops that compute an attention's mask, if they are at most so many, elementwise or without
    operands, and read nothing that has an element for each pair of query and key."""
    number = _MASKS.get(op.name)
    mask = None if number is None else op.arguments()[number]
    if mask is None:
        return set()
    q, k = op.operands[1:3] if op.name == "flash_attention_backward" else op.operands[:2]
    found: set[Op] = set()
    pending, leaves = [mask], []
    while pending:
        value = pending.pop()
        made = value.op
        if made is None or not _computes(made, generator):
            leaves.append(value)
        elif made not in found:
            found.add(made)
            pending.extend(made.operands)
    pair = (q.shape[2], k.shape[2])
    small = all(sum(any(same_dim(d, n) for n in pair) for d in v.shape) < 2 for v in leaves)
    return found if small and len(found) <= most else set()


def _computes(op: Op, generator: KernelGenerator) -> bool:
    plain = op.has(Trait.ELEMENTWISE) or op.has(Trait.VIEW)
    made_up = not op.operands and op.name != "constant"
    return (plain or made_up) and generator.supports(op) is None


def views_after(op: Op, generator: KernelGenerator) -> list[Op]:
    """The head merge: permutes and reshapes that nothing else comes between; of each result that
    is a tensor of heads."""
    return [v for r in op.results if len(r.shape) == _RANK for v in _views_after(r, generator)]


def _views_after(value: Value, generator: KernelGenerator) -> list[Op]:
    found: list[Op] = []
    user = value.single_user
    shape = value.shape  # before the reshapes in a row
    while user is not None and user.name in ("permute", "reshape") and _is_view(user, generator):
        if user.name == "permute":
            shape = user.result.shape
        elif not _merges(shape, user.result.shape):
            break
        found.append(user)
        user = user.result.single_user
    return found


def _merges(before: Sequence[Dim], after: Sequence[Dim]) -> bool:
    """Whether axes are merged or split, none of them in parts with others: in [S, 4, 16] ->
    [2 S, 32] a row has two heads of four, and no axis is one of before."""
    left, right = list(before), list(after)
    while left and right:
        groups = [left.pop(0)], [right.pop(0)]
        while not same_dim(math.prod(groups[0]), math.prod(groups[1])):
            ratio = sympy.sympify(math.prod(groups[0])) / math.prod(groups[1])
            ahead = bool(ratio.subs(dict.fromkeys(ratio.free_symbols, _LARGE)) > 1)
            side, rest = (groups[1], right) if ahead else (groups[0], left)
            if not rest:
                return False
            side.append(rest.pop(0))
        if not any(sum(d != 1 for d in group) < 2 for group in groups):
            return False
    return True
