"""The reference: runs any function by its definitions' `evaluate`.

`interpret(function, inputs, weights)` runs in the program's dtypes; with `oracle=True` every
floating value is float64 and every complex one complex128 (ops that read bits get the declared
dtypes), which gives the function "over the reals" that exact passes must keep. Every other way of
running a program is tested against this.

Values of sub-byte dtypes are int8 or uint8 tensors with one element for each entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from accel.errors import AccelError, InterpretError
from accel.ir.module import Function, Op, Region, Value
from accel.ir.op import Attribute, Trait
from accel.ir.storage import WeightStore
from accel.ir.types import SUB_BYTE_BITS, format_shape, substitute, symbol_names, value_dtype

Observer = Callable[[Op, Sequence[Tensor]], None]


def interpret(
    function: Function,
    inputs: Sequence[Tensor],
    weights: WeightStore | None = None,
    *,
    oracle: bool = False,
    observe: Observer | None = None,
    grad: bool = False,
) -> list[Tensor]:
    """Runs `function`; returns its results. No input is written.

    Args:
        inputs: one tensor per argument, of the declared shapes and dtypes (in oracle mode any
            floating dtype for a floating one; int8 or uint8 for sub-byte dtypes).
        weights: where `accel.constant` reads.
        observe: called with each op and its result tensors, in order.
        grad: records what gradients of weights and inputs need.

    A value lives until its last use. Raises InterpretError where inputs do not fit, an op cannot be
    evaluated, or makes something else than its type says.
    """
    if len(inputs) != len(function.args):
        raise InterpretError(
            f"@{function.name} takes {len(function.args)} inputs, got {len(inputs)}"
        )
    symbols = bind_symbols(function, [tuple(t.shape) for t in inputs])
    for i, (arg, tensor) in enumerate(zip(function.args, inputs)):
        wanted, given = value_dtype(arg.dtype), tensor.dtype
        widened = oracle and given.is_floating_point and wanted.is_floating_point
        if given != wanted and not widened:
            raise InterpretError(f"{_argument(function, i)} is {given}, declared {arg.type}")
    machine = _Machine(weights if weights is not None else WeightStore(), symbols, oracle, observe)
    with torch.set_grad_enabled(grad):
        return machine.run(function.body, [machine.widen(t) for t in inputs])


def _argument(function: Function, index: int) -> str:
    name = function.args[index].name
    return f"argument {index} (%{name})" if name else f"argument {index}"


def bind_symbols(function: Function, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Values of the function's symbols for inputs of these shapes.

    A symbol is the size of an axis somewhere, or follows from an expression that is linear in it
    (2 * n + 1). Raises InterpretError where a shape contradicts the declared type or a symbol's
    range. Symbols that no argument determines are left out.
    """
    values: dict[str, int] = {}
    pending: list[tuple[sympy.Expr, int, int]] = []
    for i, (arg, shape) in enumerate(zip(function.args, shapes)):
        if len(shape) != arg.type.rank:
            raise InterpretError(
                f"{_argument(function, i)} has rank {len(shape)}, declared {arg.type}"
            )
        for dim, size in zip(arg.type.shape, shape):
            if isinstance(dim, sympy.Symbol):
                known = values.setdefault(dim.name, int(size))
            elif isinstance(dim, int):
                known = dim
            else:
                pending.append((dim, int(size), i))
                continue
            if known != size:
                raise InterpretError(
                    f"{_argument(function, i)} has size {size} where {dim} (= {known}) is declared"
                )
    _bind_expressions(function, pending, values)
    for name, info in function.symbols.items():
        if name in values and not (
            info.min <= values[name] and (info.max is None or values[name] <= info.max)
        ):
            bound = f"{info.min}.." if info.max is None else f"{info.min}..{info.max}"
            raise InterpretError(f"{name} = {values[name]} is outside of {bound}")
    return values


def _bind_expressions(
    function: Function, pending: list[tuple[sympy.Expr, int, int]], values: dict[str, int]
) -> None:
    """Checks expressions whose symbols are known; solves those with one unknown."""
    while pending:
        rest = []
        for dim, size, i in pending:
            known = substitute(dim, values)
            if not isinstance(known, int) and not _solve(known, size, values):
                rest.append((dim, size, i))
            elif isinstance(known, int) and known != size:
                raise InterpretError(
                    f"{_argument(function, i)} has size {size} where {dim} (= {known}) is declared"
                )
        if len(rest) == len(pending):
            return
        pending = rest


def _solve(known: sympy.Expr, size: int, values: dict[str, int]) -> bool:
    """Binds the only symbol of a linear expression; False if it is not one, or has no solution."""
    names = symbol_names(known)
    if len(names) != 1:
        return False
    variable = next(iter(known.free_symbols))
    slope = known.coeff(variable)
    offset = known - slope * variable
    if not slope.is_Rational or not offset.is_Rational or slope == 0:
        return False
    solution = (size - offset) / slope
    if not solution.is_Integer or solution < 0:
        raise InterpretError(f"no {names[0]} makes {known} = {size}")
    values[names[0]] = int(solution)
    return True


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

    def run(self, region: Region, inputs: list[Tensor]) -> list[Tensor]:
        env: dict[Value, Tensor] = dict(zip(region.args, inputs))
        inputs.clear()  # so that an input dies at its last use too
        last_use = _last_uses(region)
        for value in region.args:
            if not value.uses:
                del env[value]
        for op in region.ops:
            if op is region.last:
                return [env[v] for v in op.operands]
            results = self.evaluate(op, [env[v] for v in op.operands])
            self.check(op, results)
            if self.observe is not None:
                self.observe(op, results)
            env.update(zip(op.results, results))
            del results
            for dead in last_use.get(op, ()):
                env.pop(dead, None)
        raise InterpretError("a region has no terminator")

    def evaluate(self, op: Op, operands: list[Tensor]) -> list[Tensor]:
        if op.name == "constant":
            return [self.widen(self.weights.tensor(str(op.attributes["name"])))]
        if op.name == "scan":
            return self.loop(op, operands)
        if op.regions:
            return self.run(op.regions[0], operands)
        try:
            if self.oracle and op.has(Trait.BITS):
                return self.in_program_dtypes(op, operands)
            return [self.widen(r) for r in self.call(op, operands, self.oracle)]
        except AccelError:
            raise
        except Exception as error:  # whatever torch raises for an op it cannot run
            if self.oracle and op.name == "aten" and isinstance(error, RuntimeError):
                return self.in_program_dtypes(op, operands)
            raise _failed(op, error) from error

    def loop(self, op: Op, operands: list[Tensor]) -> list[Tensor]:
        """An `accel.scan`, token by token."""
        count, axes, stacks = (op.attribute(n) for n in ("carries", "axes", "stacks"))
        carries, rest = operands[:count], operands[count + len(axes) :]
        whole = list(zip(operands[count : count + len(axes)], axes))
        tokens = {x.shape[axis] for x, axis in whole}
        if len(tokens) != 1:
            raise InterpretError(f"accel.scan over {sorted(tokens)} tokens", where=_place(op))
        parts: list[list[Tensor]] = [[] for _ in stacks]
        for token in range(tokens.pop()):
            now = [x.narrow(axis, token, 1) for x, axis in whole]
            made = self.run(op.regions[0], [*carries, *now, *rest])
            carries = made[:count]
            for part, new in zip(parts, made[count:]):
                part.append(new)
        return [*carries, *(torch.cat(p, axis) for p, axis in zip(parts, stacks))]

    def in_program_dtypes(self, op: Op, operands: list[Tensor]) -> list[Tensor]:
        """In oracle mode: an op on bits, or an `accel.aten` whose kernel has no float64 version."""
        narrow = [
            t.to(v.dtype) if t.is_floating_point() or t.is_complex() else t
            for t, v in zip(operands, op.operands)
        ]
        try:
            return [self.widen(r) for r in self.call(op, narrow, False)]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise _failed(op, error) from error

    def call(self, op: Op, operands: list[Tensor], oracle: bool) -> list[Tensor]:
        d = op.definition
        if d.evaluate is None:
            raise InterpretError(f"accel.{op.name} has no meaning to evaluate", where=_place(op))
        attributes = {
            k: self.attribute(v, oracle, op)
            for k, v in d.complete_attributes(op.attributes).items()
        }
        made = d.evaluate(*d.group_operands(operands, op.segments), **attributes)
        return [made] if isinstance(made, Tensor) else list(made)

    def check(self, op: Op, results: list[Tensor]) -> None:
        """The results have the declared types."""
        if len(results) != len(op.results):
            raise InterpretError(
                f"accel.{op.name} made {len(results)} results, declared {len(op.results)}",
                where=_place(op),
            )
        for value, tensor in zip(op.results, results):
            shape = value.type.shape
            if not value.type.is_static:
                shape = tuple(substitute(d, self.symbols) for d in shape)
            same = self.oracle or tensor.dtype == value_dtype(value.dtype)
            if tuple(tensor.shape) != shape or not same:
                raise InterpretError(
                    f"accel.{op.name} made {tensor.dtype} {list(tensor.shape)}, declared "
                    f"{value.type} with sizes {format_shape(shape)}",
                    where=_place(op),
                )

    def widen(self, tensor: Tensor) -> Tensor:
        if self.oracle and tensor.dtype.is_floating_point:
            return tensor.to(torch.float64)
        if self.oracle and tensor.dtype.is_complex:
            return tensor.to(torch.complex128)
        return tensor

    def attribute(self, value: Attribute, oracle: bool, op: Op) -> Any:
        if isinstance(value, tuple):
            return tuple(self.attribute(v, oracle, op) for v in value)
        if isinstance(value, sympy.Expr):
            known = substitute(value, self.symbols)
            if not isinstance(known, int):
                raise InterpretError(
                    f"the inputs give no integer for the size {value} (= {known})",
                    where=_place(op),
                    advice="every symbol must be the size of an argument's axis",
                )
            return known
        if oracle and isinstance(value, torch.dtype) and value not in SUB_BYTE_BITS:
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


def _failed(op: Op, error: Exception) -> InterpretError:
    lines = str(error).splitlines() or [type(error).__name__]
    return InterpretError(f"accel.{op.name} failed: {lines[0]}", where=_place(op))


def _place(op: Op) -> str:
    return str(op.location) if op.location else f"accel.{op.name}"
