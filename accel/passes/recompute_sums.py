"""Sums over rows compute what they add, instead of reading it from memory.

The gradient of a norm's weight adds up, over all rows, products that the gradient for its input
needs as well, along other axes. One kernel cannot do both, and would write the products in float32
for the other to read. Where reading again what the products are made of costs less, the sums get a
kernel with the products inside; sums of one space that read the same tensors share it.

Contract: exact (elementwise ops are computed twice, from the same values). Before and after:

    %1 = "accel.mul"(%g, %x)                   %2 = "accel.kernel"(%g, %x) ({
    %2 = "accel.sum"(%1) {axes = [0]}    ->      mul, sum
    %3 = "accel.sub"(%1, %m)                   }) {kind = "reduction"}
                                               %1 = "accel.mul"(%g, %x)
                                               %3 = "accel.sub"(%1, %m)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.capability import KernelGenerator
from accel.ir.module import Function, Module, Op, Value
from accel.ir.op import Trait
from accel.ir.types import product, same_shape
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.outline import finish_outline, is_full, outline

_MOST_OPS = 24


@dataclass
class _Sum:
    """A reduction, elementwise ops of its own after it, and the ops that compute its operand."""

    root: Op
    axes: tuple[int, ...]
    tail: list[Op]
    chain: list[Op]
    leaves: set[Value]
    saves: bool = True


@register_pass
@dataclass
class RecomputeSums(Pass):
    """Outlines sums over leading axes with what they add. `max_ops` bounds what is recomputed."""

    name: ClassVar[str] = "recompute_sums"
    contract: ClassVar[Contract] = EXACT

    max_ops: int = _MOST_OPS

    def run(self, module: Module, context: Context) -> None:
        if context.generator is None:
            return
        for function in module.functions.values():
            finder = _Finder(function, context.generator, self.max_ops)
            for group in finder.groups():
                if context.rewrite(self.name, group[0].root):
                    _emit(function, group, context.generator, self.name)


class _Finder:
    def __init__(self, function: Function, generator: KernelGenerator, most: int) -> None:
        self.function, self.generator, self.most = function, generator, most
        self.order = {op: i for i, op in enumerate(function.ops)}

    def groups(self) -> list[list[_Sum]]:
        """Sums that one kernel computes; only groups in which at least one saves traffic."""
        found = [s for op in self.function.ops if (s := self._sum(op)) is not None]
        groups: list[list[_Sum]] = []
        for one in found:
            for group in groups:
                if self._joins(group, one):
                    group.append(one)
                    break
            else:
                groups.append([one])
        return [g for g in groups if any(s.saves for s in g)]

    def _sum(self, op: Op) -> _Sum | None:
        if op.name != "sum" or self.generator.supports(op) is not None:
            return None
        x = op.operands[0]
        rank = x.type.rank
        axes = tuple(sorted(int(a) % rank for a in op.attribute("axes")))
        trailing = axes == tuple(range(rank - len(axes), rank))
        if trailing or not x.type.is_static or not axes:
            return None
        chain, leaves = self._chain(x)
        if len(chain) > self.most:
            return None
        size = product(x.shape)
        assert isinstance(size, int)
        read = sum(_bytes(v) for v in leaves if _count(v) * 8 >= size)
        own = [o for o in chain if not o.has(Trait.VIEW)]
        stored = any(user not in chain and user is not op for o in own for user in o.result.users)
        saves = bool(own) and stored and read <= 2 * _bytes(x)
        return _Sum(op, axes, self._tail(op), chain, leaves, saves)

    def _chain(self, value: Value) -> tuple[list[Op], set[Value]]:
        """Elementwise ops and views before a value, in order; and what they read."""
        chain: set[Op] = set()
        leaves: set[Value] = set()
        pending = [value]
        while pending:
            current = pending.pop()
            op = current.op
            inside = (
                op is not None
                and (op.has(Trait.ELEMENTWISE) or op.has(Trait.VIEW))
                and len(op.results) == 1
                and self.generator.supports(op) is None
                and not (op.has(Trait.ELEMENTWISE) and self._is_stored(current))
            )
            if op is None or not inside:
                if not is_full(current):
                    leaves.add(current)
            elif op not in chain:
                chain.add(op)
                pending.extend(op.operands)
        return sorted(chain, key=self.order.__getitem__), leaves

    def _is_stored(self, value: Value) -> bool:
        """Whether something that is no kernel reads a value: it is in memory anyway."""
        for user in value.users:
            if user.has(Trait.VIEW) and len(user.results) == 1:
                if self._is_stored(user.result):
                    return True
            elif self.generator.supports(user) is not None:
                return True
        return False

    def _tail(self, op: Op) -> list[Op]:
        """A cast of the sum, if that is all that reads it."""
        user = op.result.single_user
        fits = user is not None and user.name == "cast" and self.generator.supports(user) is None
        return [user] if user is not None and fits else []

    def _joins(self, group: list[_Sum], one: _Sum) -> bool:
        first = group[0]
        if first.axes != one.axes:
            return False
        if not same_shape(first.root.operands[0].shape, one.root.operands[0].shape):
            return False
        large = {v for s in group for v in s.leaves if v.type.rank > 1}
        own = {v for v in one.leaves if v.type.rank > 1}
        if not (own <= large or large <= own):
            return False
        # The kernel stands where the last sum was: nothing may read an earlier one before.
        end = self.order[one.root]
        ends = [s.tail[-1] if s.tail else s.root for s in group]
        return all(self.order[user] > end for o in ends for user in o.result.users)


def _emit(function: Function, group: list[_Sum], generator: KernelGenerator, name: str) -> None:
    order = {op: i for i, op in enumerate(function.ops)}
    members = sorted((o for s in group for o in (s.root, *s.tail)), key=order.__getitem__)
    chain = {o for s in group for o in s.chain}
    attributes = {"backend": generator.name, "kind": "reduction"}
    kernel = outline(
        members,
        "kernel",
        attributes,
        name,
        duplicate=sorted(chain, key=order.__getitem__),
        inline=is_full,
    )
    last = members[-1]
    assert last.parent is not None
    last.parent.insert_before(kernel, last)
    finish_outline(kernel, members)


def _count(value: Value) -> int:
    count = product(value.shape)
    return count if isinstance(count, int) else 0


def _bytes(value: Value) -> int:
    return _count(value) * value.dtype.itemsize
