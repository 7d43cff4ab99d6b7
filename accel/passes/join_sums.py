"""Sums over rows join the kernel that computes, or reads, what they add.

A backward pass is full of them: the gradient of a bias adds up over all rows the gradient that a
kernel has just made; those of a norm's weight and bias add up products of what the kernel for the
norm's input reads. A kernel of their own reads all that from memory again. Here `reduction` kernels
over everything but the columns are merged into the `rowwise` kernel that has the same rows: its
kind becomes `summed`, with whole results first and sums of columns after. (Sums of what a pointwise
kernel makes stay: with GELU's gradient one kernel takes as long as two.)

Contract: exact (regions are put together as they are). Before and after:

    %1 = "accel.kernel"(%g, %x) ({ mul })          %1, %2 = "accel.kernel"(%g, %x) ({
    %2 = "accel.kernel"(%1) ({ sum {axes = [0]} })      mul, sum
                                                      }) {kind = "summed"}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.ir.capability import KernelGenerator
from accel.ir.module import Function, Module, Op, Region, Value, clone_op
from accel.ir.op import Trait, definition
from accel.ir.sums import column_sum
from accel.ir.types import product
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass

_LEAST_ROWS = 1024  # fewer are no strips for every multiprocessor
_MOST_COLUMNS = 1024  # of a row: more take too many registers for two programs at once
_MOST_SUMS = 4  # running sums in registers


@register_pass
@dataclass
class JoinSums(Pass):
    """Merges kernels that add up columns into those of their rows; at most `most` sums each."""

    name: ClassVar[str] = "join_sums"
    contract: ClassVar[Contract] = EXACT

    most: int = _MOST_SUMS

    def run(self, module: Module, context: Context) -> None:
        if context.generator is None:
            return
        for function in module.functions.values():
            for op in list(function.ops):
                if op.name == "kernel" and op.attribute("kind") == "reduction":
                    self._join(function, op, context, context.generator)

    def _join(
        self, function: Function, sums: Op, context: Context, generator: KernelGenerator
    ) -> None:
        space = _space_of_sums(sums)
        if space is None:
            return
        order = {op: i for i, op in enumerate(function.ops)}
        for kernel in _candidates(sums):
            if not _fits(kernel, sums, space, order, self.most):
                continue
            joined = _joined(kernel, sums, self.name)
            reason = generator.supports_anchor(joined, "summed")
            if reason is not None:
                context.miss(self.name, sums, reason)
            elif context.rewrite(self.name, sums):
                _replace(kernel, sums, joined)
                return
            joined.erase()


def _space_of_sums(kernel: Op) -> tuple[int, int] | None:
    """Rows and columns of a kernel whose results are all sums over everything but the columns."""
    region = kernel.regions[0]
    found: set[tuple[int, int]] = set()
    for value in region.results:
        op = column_sum(value)
        if op is None or not op.operands[0].type.is_static:
            return None
        x = op.operands[0]
        columns = int(x.shape[-1])
        if value.type.numel() != columns or not value.dtype.is_floating_point:
            return None
        if op.result.dtype.itemsize > 4:
            return None
        found.add((int(product(x.shape)) // max(columns, 1), columns))
    return found.pop() if len(found) == 1 else None


def _candidates(sums: Op) -> list[Op]:
    """Kernels that make, or read, what the sums read, nearest first."""
    found: dict[Op, None] = {}
    for value in sums.operands:
        source = _unshaped(value)
        if source.op is not None and source.op.name == "kernel":
            found.setdefault(source.op)
    for value in sums.operands:
        for user in value.users:
            if user.name == "kernel" and user is not sums:
                found.setdefault(user)
    return list(found)


def _unshaped(value: Value) -> Value:
    while value.op is not None and value.op.name == "reshape":
        value = value.op.operands[0]
    return value


def _fits(kernel: Op, sums: Op, space: tuple[int, int], order: dict[Op, int], most: int) -> bool:
    rows, columns = space
    kind = kernel.attribute("kind")
    if kind not in ("rowwise", "summed") or kernel.parent is not sums.parent:
        return False
    if rows < _LEAST_ROWS or columns > _MOST_COLUMNS or columns < 2:
        return False
    whole = [v for v in kernel.results if _is_whole(v, rows, columns)]
    old_sums = [v for v in kernel.results if v not in whole]
    if not whole or (kind != "summed" and old_sums) or len(old_sums) + len(sums.results) > most:
        return False
    large = [v for v in sums.operands if v.type.numel() == rows * columns]
    if not all(_unshaped(v).op is kernel or v in kernel.operands for v in large):
        return False
    place = order[kernel]
    if any(order[user] <= place for r in sums.results for user in r.users):
        return False
    made = [_unshaped(v) for v in sums.operands]
    return all(
        v.op is kernel or v.op is None or order[v.op] < place for v in made
    ) and all(  # views that are made after the kernel, of what was there before, are made again
        v in kernel.results or v is o or o.op is None or order[o.op] < place
        for v, o in zip(made, sums.operands, strict=True)
    )


def _is_whole(value: Value, rows: int, columns: int) -> bool:
    shape = value.shape
    return bool(shape) and shape[-1] == columns and value.type.numel() == rows * columns


def _joined(kernel: Op, sums: Op, name: str) -> Op:
    """One kernel in place of both, in front of the first one."""
    region, mapping, operands = Region(), {}, list[Value]()

    def argument(outer: Value) -> Value:
        if outer not in operands:
            operands.append(outer)
            region.add_arg(outer.type, outer.name)
        return region.args[operands.index(outer)]

    for outer, inner in zip(kernel.operands, kernel.regions[0].args, strict=True):
        mapping[inner] = argument(outer)
    results = _copy(kernel, region, mapping)
    made = dict(zip(kernel.results, results, strict=True))
    for outer, inner in zip(sums.operands, sums.regions[0].args, strict=True):
        source = _unshaped(outer)
        mapping[inner] = _viewed(outer, made, region) if source in made else argument(outer)
    results += _copy(sums, region, mapping)
    region.append(Op(definition("yield"), results, {}, ()))
    joined = Op(
        kernel.definition,
        operands,
        {**kernel.attributes, "kind": "summed"},
        [v.type for v in (*kernel.results, *sums.results)],
        regions=[region],
        location=kernel.location,
        made_by=name,
    )
    assert kernel.parent is not None
    kernel.parent.insert_before(joined, kernel)
    return joined


def _replace(kernel: Op, sums: Op, joined: Op) -> None:
    old = [*kernel.results, *sums.results]
    for before, after in zip(old, joined.results, strict=True):
        after.name = before.name
        before.replace_all_uses(after)
    sums.erase()
    kernel.erase()


def _copy(kernel: Op, region: Region, mapping: dict[Value, Value]) -> list[Value]:
    """Copies a kernel's ops; returns what it yields there."""
    inside = kernel.regions[0]
    for op in inside.ops:
        if not op.has(Trait.TERMINATOR):
            region.append(clone_op(op, mapping))
    return [mapping[v] for v in inside.results]


def _viewed(value: Value, made: dict[Value, Value], region: Region) -> Value:
    """A view of what the first kernel makes, inside of the joined one."""
    if value in made:
        return made[value]
    assert value.op is not None
    inner = _viewed(value.op.operands[0], made, region)
    return region.append(clone_op(value.op, {value.op.operands[0]: inner})).result
