"""Gives the top-k of short rows to the kernel generator, with what a router of experts has around.

A softmax over the same rows before it rides along, and elementwise ops before that; behind it, on
the k values, elementwise ops and the division by their sum. Contract: exact (the kernel's region is
the ops it replaces).

    %1 = "accel.softmax"(%x) {axis = 1}            %2, %3 = "accel.kernel"(%x) ({
    %2, %3 = "accel.topk"(%1) {k = 2, axis = 1}  ->   softmax, topk, sum, div
    %4 = "accel.sum"(%2) {axes = [1]}               }) {kind = "topk"}
    %5 = "accel.div"(%2, %4)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.capability import KernelGenerator
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.types import same_shape
from accel.passes.anchored import AnchoredPass
from accel.passes.base import EXACT, Context, Contract, register_pass
from accel.passes.outline import prologue

KIND = "topk"


@register_pass
@dataclass
class SelectTopK(AnchoredPass):
    """Outlines top-k with at most `most` elementwise ops before it, and after."""

    name: ClassVar[str] = "select_topk"
    contract: ClassVar[Contract] = EXACT
    anchors: ClassVar[tuple[str, ...]] = (KIND,)
    kind: ClassVar[str] = KIND

    most: int = 4

    def _select(
        self, op: Op, context: Context, generator: KernelGenerator, order: dict[Op, int]
    ) -> None:
        if not context.rewrite(self.name, op):
            return
        after = self._after(op, generator)
        inside = {op, *after}
        outside = [u for o in inside for r in o.results for u in r.users if u not in inside]
        last = max((op, *after), key=order.__getitem__)
        if any(u.parent is op.parent and order.get(u, len(order)) < order[last] for u in outside):
            after = []  # something reads the places before the values are done
        ops = sorted((*self._before(op, generator), op, *after), key=order.__getitem__)
        self._outline(ops, KIND, generator, order)

    def _before(self, op: Op, generator: KernelGenerator) -> list[Op]:
        """A softmax that only the top-k reads, and a chain of elementwise ops before it."""
        found: list[Op] = []
        value = op.operands[0]
        made = value.op
        whole = made is not None and made.name == "softmax" and value.single_user is op
        if made is not None and whole and int(made.attribute("axis")) in (-1, value.type.rank - 1):
            found.append(made)
        first = found[-1] if found else op
        return [*found, *prologue([first], generator, self.most, _is_chained)]

    def _after(self, op: Op, generator: KernelGenerator) -> list[Op]:
        """What is done with the values: a division by their sum, elementwise ops."""
        value = op.results[0]
        found = _normalization(value)
        if found:
            value = found[-1].result
        while len(found) < self.most:
            user = value.single_user
            if user is None or not user.has(Trait.ELEMENTWISE) or len(user.operands) != 1:
                break
            if not same_shape(user.result.shape, value.shape) or generator.supports(user):
                break
            found.append(user)
            value = user.result
        return found


def _normalization(value: Value) -> list[Op]:
    """The sum of values along the last axis, and their division by it, if that is all of them."""
    users = list(value.users)
    total = next((u for u in users if u.name == "sum"), None)
    quotient = next((u for u in users if u.name == "div"), None)
    if total is None or quotient is None or len(users) != 2 or quotient.operands[0] is not value:
        return []
    axes = tuple(int(a) % value.type.rank for a in total.attribute("axes"))
    if axes != (value.type.rank - 1,) or not total.attribute("keepdim"):
        return []
    alone = total.result.single_user is quotient and quotient.operands[1] is total.result
    return [total, quotient] if alone else []


def _is_chained(op: Op) -> bool:
    return op.has(Trait.ELEMENTWISE) and len(op.operands) == 1
