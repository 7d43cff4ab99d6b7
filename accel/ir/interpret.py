"""The reference: runs any function by its definitions' `evaluate`.

`interpret(function, inputs, weights)` runs in the program's dtypes; with `oracle=True` every
floating value is float64 and every complex one complex128 (ops that read bits get the declared
dtypes), which gives the function "over the reals" that exact passes must keep. Every other way of
running a program is tested against this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from accel.errors import InterpretError
from accel.ir.module import Function, Op, Region, Value
from accel.ir.op import Attribute, Trait
from accel.ir.storage import WeightStore
from accel.ir.types import SUB_BYTE_BITS, Dim, substitute, value_dtype

Observer = Callable[[Op, Sequence[Tensor]], None]


def interpret(
    function: Function,
    inputs: Sequence[Tensor],
    weights: WeightStore | None = None,
    *,
    oracle: bool = False,
    observe: Observer | None = None,
) -> list[Tensor]:
    """Runs `function`; returns its results. No input is written.

    Args:
        inputs: one tensor per argument, of the declared shapes and dtypes (in oracle mode any
            floating dtype).
        weights: where `accel.constant` reads.
        observe: called with each op and its result tensors, in order.

    Raises InterpretError where inputs do not fit, or an op cannot be evaluated.
    """
    if len(inputs) != len(function.args):
        raise InterpretError(
            f"@{function.name} takes {len(function.args)} inputs, got {len(inputs)}"
        )
    symbols = bind_symbols(function, [tuple(t.shape) for t in inputs])
    machine = _Machine(weights if weights is not None else WeightStore(), symbols, oracle, observe)
    values = [machine.widen(t) for t in inputs]
    with torch.no_grad():
        return machine.run(function.body, values)


def bind_symbols(function: Function, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Values of the function's symbols for inputs of these shapes.

    Raises InterpretError where a shape contradicts the declared type or a symbol's range.
    """
    values: dict[str, int] = {}
    pending: list[tuple[Dim, int, str]] = []
    for i, (arg, shape) in enumerate(zip(function.args, shapes)):
        label = f"argument {i} (%{arg.name})" if arg.name else f"argument {i}"
        if len(shape) != arg.type.rank:
            raise InterpretError(f"{label} has rank {len(shape)}, declared {arg.type}")
        for dim, size in zip(arg.type.shape, shape):
            if isinstance(dim, sympy.Symbol) and dim.name not in values:
                values[dim.name] = int(size)
            else:
                pending.append((dim, int(size), label))
    for dim, size, label in pending:
        wanted = _solve(dim, size, values)
        if wanted != size:
            raise InterpretError(f"{label} has size {size} where {dim} (= {wanted}) is declared")
    for name, info in function.symbols.items():
        if name in values and not (
            info.min <= values[name] and (info.max is None or values[name] <= info.max)
        ):
            bound = "" if info.max is None else f"..{info.max}"
            raise InterpretError(f"{name} = {values[name]} is outside of {info.min}{bound}")
    return values


def _solve(dim: Dim, size: int, values: dict[str, int]) -> Dim:
    """The value of `dim`; a symbol that only occurs inside an expression is solved for."""
    known = substitute(dim, values)
    if isinstance(known, int):
        return known
    free = list(known.free_symbols)
    if len(free) == 1:
        solutions = [s for s in sympy.solve(known - size, free[0]) if s.is_Integer and s > 0]
        if len(solutions) == 1:
            values[free[0].name] = int(solutions[0])
            return size
    return known


class _Machine:
    def __init__(
        self,
        weights: WeightStore,
        symbols: Mapping[str, int],
        oracle: bool,
        observe: Observer | None,
    ) -> None:
        self.weights = weights
        self.symbols = symbols
        self.oracle = oracle
        self.observe = observe

    def run(self, region: Region, inputs: Sequence[Tensor]) -> list[Tensor]:
        env: dict[Value, Tensor] = dict(zip(region.args, inputs))
        last_use = _last_uses(region)
        for op in region.ops:
            if op is region.last:
                return [env[v] for v in op.operands]
            results = self.evaluate(op, [env[v] for v in op.operands])
            if self.observe is not None:
                self.observe(op, results)
            env.update(zip(op.results, results))
            for dead in last_use.get(op, ()):
                env.pop(dead, None)
        raise InterpretError("a region has no terminator")

    def evaluate(self, op: Op, operands: list[Tensor]) -> list[Tensor]:
        if op.name == "constant":
            return [self.widen(self.weights.tensor(str(op.attributes["name"])))]
        if op.regions:
            return self.run(op.regions[0], operands)
        d = op.definition
        if d.evaluate is None:
            raise InterpretError(f"accel.{op.name} has no meaning to evaluate", where=_place(op))
        wide = self.oracle and not op.has(Trait.BITS)
        if self.oracle and not wide:
            operands = [t.to(value_dtype(v.dtype)) for t, v in zip(operands, op.operands)]
        attributes = {
            k: self._attribute(v, wide) for k, v in d.complete_attributes(op.attributes).items()
        }
        args = d.group_operands(operands, op.segments)
        try:
            made = d.evaluate(*args, **attributes)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise InterpretError(
                f"accel.{op.name} failed: {str(error).splitlines()[0]}", where=_place(op)
            ) from error
        results = [made] if isinstance(made, Tensor) else list(made)
        return [self.widen(r) for r in results]

    def widen(self, tensor: Tensor) -> Tensor:
        if self.oracle and tensor.dtype.is_floating_point:
            return tensor.to(torch.float64)
        if self.oracle and tensor.dtype.is_complex:
            return tensor.to(torch.complex128)
        return tensor

    def _attribute(self, value: Attribute, wide: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(self._attribute(v, wide) for v in value)
        if isinstance(value, sympy.Expr):
            return substitute(value, self.symbols)
        if wide and isinstance(value, torch.dtype) and value not in SUB_BYTE_BITS:
            if value.is_complex:
                return torch.complex128
            if value.is_floating_point and value.itemsize > 1:
                return torch.float64
        return value


def _last_uses(region: Region) -> dict[Op, list[Value]]:
    """Which values no later op of the region reads, by the op that reads them last."""
    seen: set[Value] = set()
    result: dict[Op, list[Value]] = {}
    for op in region.reversed_ops():
        for value in op.operands:
            if value not in seen:
                seen.add(value)
                result.setdefault(op, []).append(value)
        for value in op.results:
            if value not in seen:
                result.setdefault(op, []).append(value)
    return result


def _place(op: Op) -> str:
    return str(op.location) if op.location else f"accel.{op.name}"
