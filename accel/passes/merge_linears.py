"""Merges linears that share their input: q, k and v; gate and up.

One wide linear reads the input once and fills the machine better than several narrow ones; its
result is cut into the parts by slices, which cost nothing where a consumer reads through them.
Linears merge if they have the same input, constant weights, and all or none a constant bias.

Contract: exact (weights are only put one after the other). Before and after:

    %q = "accel.linear"(%x, %wq) : (tensor<2x64xf32>, tensor<64x64xf32>) -> tensor<2x64xf32>
    %k = "accel.linear"(%x, %wk) : (tensor<2x64xf32>, tensor<32x64xf32>) -> tensor<2x32xf32>

    %w = "accel.constant"() {name = "wq.merged"} : () -> tensor<96x64xf32>
    %1 = "accel.linear"(%x, %w) : (tensor<2x64xf32>, tensor<96x64xf32>) -> tensor<2x96xf32>
    %q = "accel.slice"(%1) {axis = 1, start = 0, stop = 64} : ...
    %k = "accel.slice"(%1) {axis = 1, start = 64, stop = 96} : ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from accel.ir.builder import Builder
from accel.ir.module import Function, Module, Op, Value, constant_name
from accel.ir.types import SUB_BYTE_BITS
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.weights import drop_unused


@register_pass
@dataclass
class MergeLinears(Pass):
    """Linears over one input become one linear and slices.

    Options:
        largest_rows: linears with more output features than this are left alone (a language
            model's head gains nothing).
    """

    name: ClassVar[str] = "merge_linears"
    contract: ClassVar[Contract] = EXACT

    largest_rows: int = 8192

    def run(self, module: Module, context: Context) -> None:
        freed: list[str] = []
        for function in module.functions.values():
            for group in self._groups(function, module):
                if not context.rewrite(self.name, group[0]):
                    return drop_unused(module, freed)
                freed.extend(self._merge(group, module))
        return drop_unused(module, freed)

    def _groups(self, function: Function, module: Module) -> list[list[Op]]:
        """Linears by input and kind, where there are several, in program order."""
        groups: dict[tuple[Value, bool], list[Op]] = {}
        for op in function.ops:
            if op.name == "linear" and self._takes(op):
                x, _, bias = op.arguments()
                groups.setdefault((x, bias is not None), []).append(op)
        return [g for g in groups.values() if len(g) > 1]

    def _takes(self, op: Op) -> bool:
        _, weight, bias = op.arguments()
        rows = weight.shape[0]
        return (
            constant_name(weight) is not None
            and (bias is None or constant_name(bias) is not None)
            and weight.dtype not in SUB_BYTE_BITS
            and isinstance(rows, int)
            and rows <= self.largest_rows
        )

    def _merge(self, group: Sequence[Op], module: Module) -> list[str]:
        first = group[0]
        b = Builder(before=first, made_by=self.name)
        x, _, bias = first.arguments()
        operands = [x, _stack(b, [op.arguments()[1] for op in group], module)]
        if bias is not None:
            operands.append(_stack(b, [op.arguments()[2] for op in group], module))
        merged = b.op("linear", operands).result
        freed = [str(constant_name(v)) for op in group for v in op.arguments()[1:] if v is not None]
        start, axis, parts = 0, merged.type.rank - 1, []
        for op in group:
            stop = start + int(op.arguments()[1].shape[0])
            b.location = op.location
            parts.append(b.slice(merged, axis=axis, start=start, stop=stop))
            start = stop
        for op, part in zip(group, parts):
            op.replace_with([part])
        return freed


def _stack(b: Builder, parts: Sequence[Value], module: Module) -> Value:
    """One constant with the rows of all parts."""
    names = [str(constant_name(p)) for p in parts]
    rows = torch.cat([module.weights.tensor(n).detach() for n in names])
    name = module.weights.add(f"{names[0]}.merged", rows)
    return b.constant(name, module.weights.type(name))
