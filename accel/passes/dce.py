"""Dead code elimination: removes ops whose results nobody reads, and weights that no op names.

An op goes if it is pure (`Trait.PURE`, or an `accel.aten` marked so) and none of its results has a
user; what only it used goes with it. Arguments stay: signatures are the caller's. Contract: exact.
Before and after:

    %0 = "accel.exp"(%x) : (tensor<4xf32>) -> tensor<4xf32>
    %1 = "accel.neg"(%x) : (tensor<4xf32>) -> tensor<4xf32>
    "accel.return"(%1) : (tensor<4xf32>) -> ()

    %1 = "accel.neg"(%x) : (tensor<4xf32>) -> tensor<4xf32>
    "accel.return"(%1) : (tensor<4xf32>) -> ()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.module import Module, Op, Region
from accel.ir.op import Trait
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass


@register_pass
@dataclass
class DeadCode(Pass):
    """Removes unused pure ops, in nested regions too, and weights without a reader.

    Options:
        weights: also drop from the weight store what no op reads.
    """

    name: ClassVar[str] = "dce"
    contract: ClassVar[Contract] = EXACT

    weights: bool = True

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions.values():
            if not _sweep(function.body, context):
                return
        if self.weights:
            drop_unread_weights(module)


def _sweep(region: Region, context: Context) -> bool:
    """Erases dead ops from the last to the first; False when fuel is spent."""
    for op in region.reversed_ops():
        if removable(op) and not any(r.uses for r in op.results):
            if not context.rewrite("dead_op", op):
                return False
            op.erase()
            continue
        for nested in op.regions:
            if not _sweep(nested, context):
                return False
    return True


def removable(op: Op) -> bool:
    """Whether the op has no effect besides its results."""
    if op.has(Trait.TERMINATOR):
        return False
    return op.has(Trait.PURE) or (op.name == "aten" and bool(op.attribute("pure")))


def drop_unread_weights(module: Module) -> None:
    """Removes weights that no `accel.constant` names and no state begins with."""
    read = {str(op.attributes["name"]) for op in module.walk() if op.name == "constant"}
    for function in module.functions.values():
        read |= {str(a.get("initial", "")) for a in function.metadata.get("arguments", ())}
    for name in [n for n in module.weights if n not in read]:
        module.weights.remove(name)
