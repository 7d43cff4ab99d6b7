"""Common subexpression elimination: equal pure ops on equal operands are one op.

Value numbering in program order (Cocke, 1970): an op is replaced by an earlier one with the same
definition, attributes and operands (in either order, where they commute). Random draws and ops with
regions are never merged. Contract: exact. Before and after:

    %0 = "accel.add"(%x, %y) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %1 = "accel.add"(%y, %x) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %2 = "accel.mul"(%0, %1) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>

    %0 = "accel.add"(%x, %y) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %2 = "accel.mul"(%0, %0) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from accel.ir.module import Module, Op, Region
from accel.ir.op import Trait
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass


@register_pass
@dataclass
class CommonSubexpressions(Pass):
    """Merges equal pure ops of one function."""

    name: ClassVar[str] = "cse"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions.values():
            if not _merge(function.body, context):
                return


def _merge(region: Region, context: Context) -> bool:
    """Merges in program order; False when fuel is spent."""
    alike: dict[Hashable, Op | dict[Hashable, Op]] = {}  # attributes are compared where needed
    for op in region.ops:
        if not _mergeable(op):
            continue
        operands = _operands(op)
        known = alike.setdefault(operands, op)
        if known is op:
            continue
        if isinstance(known, Op):
            known = alike[operands] = {_attributes(known): known}
        first = known.setdefault(_attributes(op), op)
        if first is op:
            continue
        if not context.rewrite("equal_op", op):
            return False
        op.replace_with(first.results)
    return True


def _mergeable(op: Op) -> bool:
    if op.regions or op.has(Trait.TERMINATOR) or not op.results:
        return False
    return op.has(Trait.PURE) or (op.name == "aten" and bool(op.attribute("pure")))


def _operands(op: Op) -> Hashable:
    operands = [id(v) for v in op.operands]
    if op.has(Trait.COMMUTATIVE):
        operands[:2] = sorted(operands[:2])
    return (op.definition.name, tuple(operands), op.segments)


def _attributes(op: Op) -> Hashable:
    given = op.definition.complete_attributes(op.attributes)
    return tuple([(k, _exactly(v)) for k, v in given.items()])


def _exactly(value: Any) -> Any:
    """A key that keeps 1, 1.0 and True apart, 0.0 and -0.0 too, and equals itself for NaN."""
    if isinstance(value, tuple):
        return tuple(_exactly(v) for v in value)
    return (type(value).__name__, repr(value) if isinstance(value, (float, complex)) else value)
