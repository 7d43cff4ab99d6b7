"""One program for every length, from the captures of two lengths.

Where a model counts to the length of its text (`for t in range(length)`), a capture holds for one
length only. Two captures whose loops are rolled up (`accel.passes.reroll`) are the same ops over
the same constants; they differ in numbers. `generalize` walks through both: numbers that are equal
stay, numbers that differ must lie on a line (a * length + b, a and b integers) and become that
expression. A capture of a third length tells whether the line was right.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import sympy
import torch

from accel.errors import CaptureError
from accel.ir.builder import Builder
from accel.ir.module import Function, Module, Op, Region, SymbolInfo, Value
from accel.ir.storage import WeightStore
from accel.ir.types import TensorType, same_type, simplify_dim


def generalize(modules: Sequence[Module], lengths: Sequence[int], symbol: SymbolInfo) -> Module:
    """The program of which `modules` are instances.

    Args:
        modules: captures at `lengths`, three or more, ascending.
        symbol: the range of the length; its symbol is called "length".

    Raises CaptureError, naming op and line, where they are not instances of one program.
    """
    merge = _Merge(modules[0], modules[1], lengths[0], lengths[1])
    made = merge.module()
    main = made.main
    for i, (short, long) in enumerate(pairwise(modules)):
        if i:
            again = _Merge(short, long, lengths[i], lengths[i + 1]).module().main
            for a, b in zip(main.ops, again.ops):
                if a.attributes != b.attributes:
                    raise _differ(a, f"depends on the length other than linearly: {b.attributes}")
    main.symbols = {**main.symbols, "length": symbol}
    return made


class _Merge:
    """Walks through two modules at once."""

    def __init__(self, a: Module, b: Module, short: int, long: int) -> None:
        self.a, self.b, self.short, self.long = a, b, short, long
        self.length = sympy.Symbol("length", integer=True, positive=True)

    def module(self) -> Module:
        old, other = self.a.main, self.b.main
        made = Module(weights=self.a.weights.copy(), metadata=dict(self.a.metadata))
        function = made.add(Function(old.name))
        mapping: dict[Value, Value] = {}
        numbers: dict[Value, Value] = {}
        for x, y in zip(old.args, other.args):
            mapping[x] = function.body.add_arg(self.type(x.type, y.type, None), x.name)
            numbers[x] = y
        self.region(old.body, other.body, function.body, mapping, numbers)
        function.symbols = dict(old.symbols)
        function.donates = dict(old.donates)
        function.metadata = dict(old.metadata)
        return made

    def region(
        self,
        old: Region,
        other: Region,
        new: Region,
        mapping: dict[Value, Value],
        numbers: dict[Value, Value],
    ) -> None:
        b = Builder(new)
        if old.size != other.size:
            where = next((x for x, y in zip(old.ops, other.ops) if x.name != y.name), old.last)
            assert where is not None
            raise _differ(where, "or what follows it is there once for each token")
        for x, y in zip(old.ops, other.ops):
            if x.definition is not y.definition or x.segments != y.segments:
                raise _differ(x, f"is accel.{y.name} in a text of another length")
            if any(numbers.get(v) is not w for v, w in zip(x.operands, y.operands)):
                raise _differ(x, "reads something else in a text of another length")
            self.op(x, y, b, mapping, numbers)
            numbers.update(zip(x.results, y.results))

    def op(
        self, x: Op, y: Op, b: Builder, mapping: dict[Value, Value], numbers: dict[Value, Value]
    ) -> None:
        if x.name == "constant":
            self.constant(x, y)
        attributes = {k: self.value(v, y.attributes.get(k), x) for k, v in x.attributes.items()}
        regions = []
        for r, s in zip(x.regions, y.regions):
            inner = Region([self.type(p.type, q.type, x) for p, q in zip(r.args, s.args)])
            inside, pairs = dict(zip(r.args, inner.args)), dict(zip(r.args, s.args))
            self.region(r, s, inner, inside, pairs)
            regions.append(inner)
        types = None
        if x.definition.infer is None:
            types = [self.type(p.type, q.type, x) for p, q in zip(x.results, y.results)]
        given: list[Value | None] = [mapping[v] for v in x.operands]
        if x.segments is not None:
            left = iter(list(given))
            given = [next(left) if n else None for n in x.segments for _ in range(max(n, 1))]
        b.location = x.location
        made = b.op(x.name, given, attributes, types=types, regions=regions)
        for old, new in zip(x.results, made.results):
            new.name = old.name
            mapping[old] = new

    def constant(self, x: Op, y: Op) -> None:
        """Constants that are no parameters may hold numbers that follow from the length."""
        a, b = str(x.attributes["name"]), str(y.attributes["name"])
        if a != b or not same_type(x.result.type, y.result.type):
            raise _differ(x, "has another size in a text of another length")
        if not _same_weight(self.a.weights, self.b.weights, a):
            raise _differ(x, "holds other numbers in a text of another length")

    def type(self, a: TensorType, b: TensorType, op: Op | None) -> TensorType:
        if a.dtype != b.dtype or a.rank != b.rank:
            raise _differ(op, f"is {a} and {b}, by the length of the text")
        return TensorType(tuple(self.value(x, y, op) for x, y in zip(a.shape, b.shape)), a.dtype)

    def value(self, a: Any, b: Any, op: Op | None) -> Any:
        """An attribute, or a size."""
        if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
            return tuple(self.value(x, y, op) for x, y in zip(a, b))
        if type(a) is type(b) and a == b:
            return a
        numbers = (int, sympy.Expr)
        if isinstance(a, bool) or not isinstance(a, numbers) or not isinstance(b, numbers):
            raise _differ(op, f"depends on the length of the text: {a}, {b}")
        slope = sympy.expand(b - a) / (self.long - self.short)
        if not all(c.is_Integer for c in sympy.expand(slope).as_coefficients_dict().values()):
            raise _differ(op, f"does not grow in steps with the length of the text: {a}, {b}")
        return simplify_dim(sympy.expand(slope * (self.length - self.short) + a))


def _same_weight(a: WeightStore, b: WeightStore, name: str) -> bool:
    if name not in b:
        return False
    x, y = a.tensor(name), b.tensor(name)
    return x is y or x.data_ptr() == y.data_ptr() or torch.equal(x, y)


def _differ(op: Op | None, why: str) -> CaptureError:
    name = f"accel.{op.name}" if op is not None else "an argument"
    return CaptureError(
        f"the model counts to the length of its text, and {name} {why}",
        where=str(op.location or "") if op is not None else "",
        advice="a loop over the tokens is understood if every token does the same",
    )
