"""Gives products of stored weights to the kernel generator, with the weight in blocks of columns.

The generated product keeps a tile of results in registers; for that, a step of its sum must find
one row of the weight's block side by side. So the weight [N, K] is stored as [N / columns, K,
columns] (zeros fill the last block up), once, at compile time; views inside the kernel give it its
shape back. Elementwise ops after the product are computed on the tile. A weight that something
besides linears reads (a tied embedding table) stays as it is, so as not to be stored twice.
Contract: exact (the kernel's region is the ops it replaces; weights are only moved and padded).

    %w = "accel.constant"() {name = "w"}    %b = "accel.constant"() {name = "w.blocks"}
    %1 = "accel.linear"(%x, %w)       ->    %2 = "accel.kernel"(%x, %b) ({
    %2 = "accel.silu"(%1)                     permute, reshape, linear, slice, silu
                                            }) {kind = "matmul", ...}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.builder import Builder
from accel.ir.capability import KernelGenerator
from accel.ir.module import Module, Op, constant_name
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.deferred import deferred_blocks
from accel.passes.outline import elementwise_epilogue, finish_outline, is_full, outline
from accel.passes.weights import drop_unused


@register_pass
@dataclass
class SelectMatmul(Pass):
    """Outlines linears over stored weights. `max_epilogue` bounds the ops taken along after one."""

    name: ClassVar[str] = "select_matmul"
    contract: ClassVar[Contract] = EXACT

    max_epilogue: int = 6

    def run(self, module: Module, context: Context) -> None:
        if context.generator is None:
            return
        moved: list[str] = []
        for name, ops in _readers(module).items():
            if self._takes(name, ops, context, context.generator) and all(
                context.rewrite(self.name, op) for op in ops
            ):
                self._select(name, ops, module, context.generator)
                moved.append(name)
        drop_unused(module, moved)

    def _takes(
        self, name: str, ops: list[Op], context: Context, generator: KernelGenerator
    ) -> bool:
        """Whether all readers of the weight are linears that the generator has code for."""
        linears = [op for op in ops if _is_weight_of(op, name)]
        for op in linears:
            reason = generator.supports_matmul(op)
            if reason is None and len(linears) < len(ops):
                other = next(o for o in ops if o not in linears)
                reason = f"weight '{name}' is also read by accel.{other.name}"
            if reason is not None:
                context.miss(self.name, op, reason)
                return False
        return bool(linears)

    def _select(self, name: str, ops: list[Op], module: Module, generator: KernelGenerator) -> None:
        lanes = generator.matmul_columns(ops[0])
        matrix = module.weights.type(name)
        columns, depth = int(matrix.shape[0]), int(matrix.shape[1])
        blocks = -(-columns // lanes)
        stored = matrix.with_shape((blocks, depth, lanes))
        blocked = module.weights.add_lazy(
            f"{name}.blocks", stored, deferred_blocks(module.weights.copy(), name, lanes)
        )
        for op in ops:
            epilogue = elementwise_epilogue(op, generator, self.max_epilogue)
            x, weight, bias = op.arguments()
            b = Builder(before=op, location=op.location, made_by=self.name)
            turned = b.permute(b.constant(blocked, stored), axes=(0, 2, 1))
            wide = b.reshape(turned, shape=(blocks * lanes, depth))
            product = b.linear(x, wide)
            if blocks * lanes != columns:
                axis = product.type.rank - 1
                product = b.slice(product, axis=axis, start=0, stop=columns)
            if bias is not None:
                product = b.add(product, bias)
            members: list[Op] = []
            made = turned.op
            while made is not None and made is not op:
                members.append(made)
                made = made.next
            members += epilogue
            op.replace_with([product])
            attributes = {"backend": generator.name, "kind": "matmul"}
            kernel = outline(members, "kernel", attributes, self.name, inline=is_full)
            last = members[-1]
            assert last.parent is not None
            last.parent.insert_before(kernel, last)
            finish_outline(kernel, members)
            if weight.op is not None and not weight.uses:
                weight.op.erase()


def _is_weight_of(op: Op, name: str) -> bool:
    """Whether the op is a linear that reads the named constant as its weight, and only so."""
    places = [i for i, v in enumerate(op.operands) if constant_name(v) == name]
    return op.name == "linear" and places == [1]


def _readers(module: Module) -> dict[str, list[Op]]:
    """The ops that read each stored weight of some linear, over all functions."""
    found: dict[str, list[Op]] = {}
    for op in module.walk():
        if op.name == "constant":
            readers = found.setdefault(str(op.attributes["name"]), [])
            readers.extend(dict.fromkeys(user for user, _ in op.result.uses))
    return {n: ops for n, ops in found.items() if any(op.name == "linear" for op in ops)}
