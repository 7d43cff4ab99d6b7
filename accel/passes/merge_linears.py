"""Merges linears that share their input: q, k and v; gate and up.

One wide linear reads the input once and fills the machine better than several narrow ones; its
result is cut into the parts by slices, which cost nothing where a consumer reads through them.
Linears merge if they have the same input, stored weights, and biases that are stored or absent (a
missing one counts as zeros where others have one). Linears far apart (the keys and values that all
layers of a decoder take from one encoder) merge in groups of neighbours only: a merged result lives
from its first reader to its last.

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
from accel.ir.op import Trait
from accel.ir.types import SUB_BYTE_BITS, TensorType
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.deferred import deferred_stack
from accel.passes.weights import drop_unused


@register_pass
@dataclass
class MergeLinears(Pass):
    """Linears over one input become one linear and slices.

    Options:
        largest_rows: linears with more output features than this are left alone (a language
            model's head gains nothing).
        window: linears that are more ops apart than this are not merged.
    """

    name: ClassVar[str] = "merge_linears"
    contract: ClassVar[Contract] = EXACT

    largest_rows: int = 32768
    window: int = 48

    def run(self, module: Module, context: Context) -> None:
        freed: list[str] = []
        stacks = _Stacks(module)
        for function in module.functions.values():
            for group in self._groups(function, context):
                if not context.rewrite(self.name, group[0]):
                    return drop_unused(module, freed)
                freed.extend(_merge(group, stacks))
        return drop_unused(module, freed)

    def _groups(self, function: Function, context: Context) -> list[list[Op]]:
        """Linears over one input that are near each other, where there are several."""
        groups: dict[Value, list[list[Op]]] = {}
        places: dict[Op, int] = {}
        place = 0
        for op in function.ops:
            place += not op.has(Trait.CONSTANT)
            if op.name != "linear" or not self._takes(op, context):
                continue
            places[op] = place
            runs = groups.setdefault(op.operands[0], [])
            if runs and place - places[runs[-1][0]] <= self.window:
                runs[-1].append(op)
            else:
                runs.append([op])
        return [run for runs in groups.values() for run in runs if len(run) > 1]

    def _takes(self, op: Op, context: Context) -> bool:
        x, weight, bias = op.arguments()
        if len(x.uses) == 1:
            return False
        rows = weight.shape[0]
        if not isinstance(rows, int) or rows > self.largest_rows:
            context.miss(self.name, op, f"{rows} output features, more than largest_rows")
            return False
        stored = constant_name(weight) is not None and weight.dtype not in SUB_BYTE_BITS
        return stored and (bias is None or constant_name(bias) is not None)


class _Stacks:
    """Merged constants by the names of their parts: tied layers share them."""

    def __init__(self, module: Module) -> None:
        self.weights = module.weights
        self.known: dict[tuple[str, ...], str] = {}

    def stack(self, b: Builder, parts: Sequence[Value]) -> Value:
        """One constant with the rows of all parts."""
        names = [str(constant_name(p)) for p in parts]
        return self.constant(b, names, parts[0].type, sum(int(p.shape[0]) for p in parts))

    def constant(
        self, b: Builder, names: Sequence[str], like: TensorType, rows: int, first: str = ""
    ) -> Value:
        key = tuple(names)
        type = like.with_shape((rows, *like.shape[1:]))
        if key not in self.known:
            first = first or names[0]
            self.known[key] = self.weights.add_lazy(
                f"{first}.merged", type, deferred_stack(self.weights.pick(*names), names)
            )
        return b.constant(self.known[key], type)

    def biases(self, b: Builder, group: Sequence[Op]) -> Value | None:
        """The biases one after the other, zeros for missing ones; None if all are missing."""
        found = [op.arguments()[2] for op in group]
        given = next((bias for bias in found if bias is not None), None)
        if given is None:
            return None
        names: list[str] = []
        rows = 0
        temporary: list[str] = []
        for op, bias in zip(group, found):
            size = int(op.arguments()[1].shape[0])
            rows += size
            if bias is None:
                zeros = torch.zeros(size, dtype=given.dtype)
                temporary.append(self.weights.add(f"zeros.{size}", zeros))
            names.append(temporary[-1] if bias is None else str(constant_name(bias)))
        merged = self.constant(b, names, given.type, rows, str(constant_name(given)))
        for name in temporary:
            self.weights.remove(name)
        return merged


def _merge(group: Sequence[Op], stacks: _Stacks) -> list[str]:
    """Puts one linear in place of the group's; returns the names of the weights it read."""
    b = Builder(before=group[0], made_by=MergeLinears.name)
    x = group[0].operands[0]
    weight = stacks.stack(b, [op.arguments()[1] for op in group])
    merged = b.linear(x, weight, stacks.biases(b, group))
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
