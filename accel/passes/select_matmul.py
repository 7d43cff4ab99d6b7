"""Gives linears and convolutions to the kernel generator, with the weight in blocks of columns.

The generated product keeps a tile of results in registers; for that, a step of its sum must find
one row of the weight's block side by side. So the weight [N, K] is stored as [N / columns, K,
columns] (zeros fill the last block up), once, at compile time; views inside the kernel give it its
shape back. A convolution's weight [N, C, KH, KW] is [N / columns, KH, KW, C, columns], and its
padding is a pad in the kernel. Elementwise ops after the product are computed on the tile. A weight
that something else reads too (a tied embedding table) stays as it is, so as not to be stored twice.
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
from accel.ir.module import Module, Op, Value, constant_name
from accel.ir.storage import WeightStore
from accel.ir.types import TensorType, product
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.deferred import Deferred, deferred_blocks
from accel.passes.outline import elementwise_epilogue, finish_outline, is_full, outline
from accel.passes.weights import drop_unused

_FEW_ROWS = 8  # with fewer rows of x, reading the weight takes longer than multiplying


@register_pass
@dataclass
class SelectMatmul(Pass):
    """Outlines products of stored weights. `max_epilogue` bounds the ops taken along after one."""

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
        """Whether all readers of the weight are products that the generator has code for."""
        products = [op for op in ops if _is_weight_of(op, name)]
        for op in products:
            reason = generator.supports_anchor(op, "matmul")
            if reason is None and len(products) < len(ops):
                other = next(o for o in ops if o not in products)
                reason = f"weight '{name}' is also read by accel.{other.name}"
            if reason is not None:
                context.miss(self.name, op, reason)
                return False
        return bool(products)

    def _select(self, name: str, ops: list[Op], module: Module, generator: KernelGenerator) -> None:
        lanes = generator.matmul_columns(ops[0])
        rows = [product(op.result.shape[:-1]) for op in ops]
        streamed = any(isinstance(n, int) and n <= _FEW_ROWS for n in rows)
        stored, load = _in_blocks(module.weights, name, lanes, streamed)
        blocked = module.weights.add_lazy(f"{name}.blocks", stored, load)
        for op in ops:
            epilogue = elementwise_epilogue(op, generator, self.max_epilogue)
            constant = op.operands[1].op
            b = Builder(before=op, location=op.location, made_by=self.name)
            first = b.constant(blocked, stored)
            result, before = _rewrite(b, op, first)
            members: list[Op] = []
            made = first.op.next if first.op is not None else None
            while made is not None and made is not op:
                members.append(made)
                made = made.next
            members += epilogue
            op.replace_with([result])
            attributes = {"backend": generator.name, "kind": "matmul"}
            kernel = outline(
                members, "kernel", attributes, self.name, duplicate=before, inline=is_full
            )
            last = members[-1]
            assert last.parent is not None
            last.parent.insert_before(kernel, last)
            finish_outline(kernel, members)
            if constant is not None and not constant.result.uses:
                constant.erase()


def _in_blocks(
    weights: WeightStore, name: str, lanes: int, streamed: bool
) -> tuple[TensorType, Deferred]:
    """The weight [N, K] or [N, C, KH, KW] in blocks of `lanes` columns, the last filled up."""
    given = weights.type(name)
    columns, *rest = (int(d) for d in given.shape)
    inner = (*rest[1:], rest[0])  # the window before the channels
    stored = given.with_shape((-(-columns // lanes), *inner, lanes))
    return stored, deferred_blocks(weights.pick(name), name, lanes, streamed=streamed)


def _rewrite(b: Builder, op: Op, stored: Value) -> tuple[Value, list[Op]]:
    """The op on the blocked weight, and the ops before it that the kernel takes along."""
    x, weight, bias = op.arguments()
    blocks, lanes, columns = stored.shape[0], stored.shape[-1], weight.shape[0]
    shape = (blocks * lanes, *weight.shape[1:])
    if op.name == "linear":
        wide = b.reshape(b.permute(stored, axes=(0, 2, 1)), shape=shape)
        product, before = b.linear(x, wide), []
    else:
        wide = b.reshape(b.permute(stored, axes=(0, 4, 3, 1, 2)), shape=shape)
        border = (0, *op.attribute("padding"), 0)
        before = _views_and_pads(x)
        if any(border):
            x = b.pad(x, low=border, high=border)
        attributes = {**op.attributes, "padding": (0, 0)}
        product = b.op("conv", [x, wide, None], attributes).result
    if blocks * lanes != columns:
        axis = product.type.rank - 1
        product = b.slice(product, axis=axis, start=0, stop=columns)
    if bias is not None:
        product = b.add(product, bias)
    return product, before


def _views_and_pads(x: Value) -> list[Op]:
    """Ops that only say where an image's elements are; they stay for whoever else uses them."""
    found: list[Op] = []
    op = x.op
    while op is not None and op.name in ("pad", "permute", "reshape"):
        found.insert(0, op)
        op = op.operands[0].op
    return found


def _is_weight_of(op: Op, name: str) -> bool:
    """Whether the op is a product that reads the named constant as its weight, and only so."""
    places = [i for i, v in enumerate(op.operands) if constant_name(v) == name]
    return op.name in ("linear", "conv") and places == [1]


def _readers(module: Module) -> dict[str, list[Op]]:
    """The ops that read each stored weight of some product, over all functions."""
    found: dict[str, list[Op]] = {}
    for op in module.walk():
        if op.name == "constant":
            readers = found.setdefault(str(op.attributes["name"]), [])
            readers.extend(dict.fromkeys(user for user, _ in op.result.uses))
    return {n: ops for n, ops in found.items() if any(op.name in ("linear", "conv") for op in ops)}
