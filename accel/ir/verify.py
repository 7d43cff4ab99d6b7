"""The verifier: SSA order, def-use chains, attributes and types. The same call everywhere.

Result types are inferred again from the definitions and compared, so a pass that changes an
operand without changing the result's type is caught at once. Definitions remember what they
inferred, so this costs a few microseconds for each op; one for an op that is known to be exactly
as it was when it was last verified (`settled`, see `accel.ir.snapshot`): of it only the links are
checked, and that its weight is there.
"""

from __future__ import annotations

from collections.abc import Set

import sympy
import torch

from accel.errors import VerifyError
from accel.ir.module import Function, Module, Op, Region, Value
from accel.ir.op import Trait
from accel.ir.types import TensorType, same_type, symbol_names


def verify(module: Module, settled: Set[Op] = frozenset()) -> None:
    """Raises VerifyError naming function, op and place at the first broken rule.

    `settled` ops have the definition, operands, attributes, types and regions that were verified
    before.
    """
    for name, function in module.functions.items():
        if name != function.name:
            raise VerifyError(f"function @{function.name} is filed under '{name}'")
        verify_function(function, module, settled)


def verify_function(
    function: Function, module: Module | None = None, settled: Set[Op] = frozenset()
) -> None:
    """Checks one function; weights' types too if the module is given and has weights."""
    where = f"@{function.name}"
    body = function.body
    if body.parent is not function:
        raise VerifyError("the body's parent is not the function", where=where)
    if body.last is None or body.last.name != "return":
        raise VerifyError("a function must end with accel.return", where=where)
    for name, info in function.symbols.items():
        if not name.isidentifier():
            raise VerifyError(f"'{name}' is no name for a symbol", where=where)
        if info.min < 0 or (info.max is not None and info.max < info.min):
            raise VerifyError(f"symbol {name} has no values: {info}", where=where)
    checker = _Checker(module, frozenset(function.symbols), where, settled)
    checker.region(body)
    results = body.last.operands
    for result, argument in function.donates.items():
        if not (0 <= result < len(results) and 0 <= argument < len(function.args)):
            raise VerifyError(f"donates {{{result}: {argument}}} is out of range", where=where)
        if not same_type(results[result].type, function.args[argument].type):
            raise VerifyError(f"donates {{{result}: {argument}}}: types differ", where=where)
    if len(set(function.donates.values())) < len(function.donates):
        raise VerifyError(f"donates {function.donates} gives one argument away twice", where=where)


class _Checker:
    """The rules for the regions of one function."""

    def __init__(
        self, module: Module | None, symbols: frozenset[str], where: str, settled: Set[Op]
    ) -> None:
        self.module = module
        self.symbols = symbols
        self.where = where
        self.settled = settled
        # Types that were looked at, by identity: definitions share the ones they inferred.
        self.seen: dict[int, TensorType] = {}

    def fail(self, message: str, op: Op | None = None) -> None:
        raise VerifyError(message, where=self.place(op))

    def place(self, op: Op | None) -> str:
        if op is None:
            return self.where
        return f"{self.where}: accel.{op.name}" + (f" at {op.location}" if op.location else "")

    def region(self, region: Region, end: str = "return") -> None:
        """Every region is a program of its own: it sees only its arguments."""
        visible: set[Value] = set(region.args)
        for index, value in enumerate(region.args):
            if value.owner is not region or value.index != index:
                self.fail(f"argument {index} does not belong to its region")
            self.type(value, None)
        count = used = 0
        previous: Op | None = None
        op = region.first
        while op is not None:
            if op.parent is not region or op.prev is not previous:
                self.fail("an op's links do not agree with the region that holds it", op)
            operands = op.operands
            self.op(op, operands, region, visible)
            count += 1
            used += len(operands)
            visible.update(op.results)
            previous, op = op, op.next
        if count != region.size or previous is not region.last:
            self.fail(f"a region of {region.size} ops links {count}")
        if previous is None or previous.name != end:
            self.fail(f"a region must end with accel.{end}")
        if sum(len(value.uses) for value in visible) != used:
            self.stale_use(region, visible)

    def op(self, op: Op, operands: tuple[Value, ...], region: Region, visible: set[Value]) -> None:
        if op is not region.last and op.has(Trait.TERMINATOR):
            self.fail("a terminator in the middle of a region", op)
        for i, operand in enumerate(operands):
            if operand not in visible:
                self.fail(f"operand {i} (%{operand.name or '?'}) is not defined before its use", op)
            if (op, i) not in operand.uses:
                self.fail(f"operand {i} does not list this op as a user", op)
        for i, result in enumerate(op.results):
            if result.owner is not op or result.index != i:
                self.fail(f"result {i} does not belong to its op", op)
        if op not in self.settled:
            self.types(op)
        elif op.name == "constant":
            self.constant(op)  # its weight may be another

    def types(self, op: Op) -> None:
        """Attributes fit the definition, and results have the types that it infers."""
        definition = op.definition
        try:
            if definition.infer is None:
                definition.check_attributes(op.attributes)
                op.arguments()
                self.opaque(op)
                for result in op.results:
                    self.type(result, op)
                return
            inferred = definition.infer_types(
                [v.type for v in op.operands], op.attributes, op.segments
            )
        except VerifyError as error:
            error.where = error.where or self.place(op)
            raise
        if op.regions:
            self.fail("this op takes no regions", op)
        if len(inferred) != len(op.results):
            self.fail(f"{len(op.results)} results, inferred {len(inferred)}", op)
        for i, (result, wanted) in enumerate(zip(op.results, inferred)):
            given = result.type
            if given is not wanted and given != wanted and not same_type(given, wanted):
                self.fail(f"result {i} has type {describe(given)}, inferred {describe(wanted)}", op)
            self.type(result, op)

    def opaque(self, op: Op) -> None:
        """Constants, kernels, calls, fallbacks: what carries its own result types."""
        if op.name == "constant":
            self.constant(op)
        wanted = 1 if op.name in ("kernel", "call", "scan") else 0
        if len(op.regions) != wanted:
            self.fail(f"{len(op.regions)} regions where {wanted} belongs", op)
        for region in op.regions:
            if region.parent is not op:
                self.fail("a region's parent is not the op that holds it", op)
            outer, results = [v.type for v in op.operands], [v.type for v in op.results]
            if op.name == "scan":
                outer, results = self.scan(op, outer, results)
            self.same(op, "region arguments", [v.type for v in region.args], outer)
            self.region(region, end="yield")
            self.same(op, "region results", [v.type for v in region.results], results)

    def scan(
        self, op: Op, outer: list[TensorType], results: list[TensorType]
    ) -> tuple[list[TensorType], list[TensorType]]:
        """Types of one token's parts, inside of the region."""
        count, axes, stacks = (op.attribute(n) for n in ("carries", "axes", "stacks"))
        if len(outer) < count + len(axes) or len(results) != count + len(stacks) or not axes:
            self.fail(f"{count} carries, axes {axes} and {stacks} do not fit", op)
        for types, places in ((outer, axes), (results, stacks)):
            for i, axis in enumerate(places, count):
                if not 0 <= axis < types[i].rank:
                    self.fail(f"axis {axis} of {types[i]}", op)
                shape = tuple(1 if a == axis else d for a, d in enumerate(types[i].shape))
                types[i] = TensorType(shape, types[i].dtype)
        return outer, results

    def same(self, op: Op, what: str, a: list[TensorType], b: list[TensorType]) -> None:
        if a != b and (len(a) != len(b) or not all(map(same_type, a, b))):
            self.fail(f"{what} do not match: {list(map(str, a))}, {list(map(str, b))}", op)

    def constant(self, op: Op) -> None:
        name = str(op.attributes["name"])
        if len(op.results) != 1:
            self.fail("a constant has one result", op)
        if not op.result.type.is_static:
            self.fail(f"a constant of symbolic type {op.result.type}", op)
        if self.module is None or not len(self.module.weights):
            return
        if name not in self.module.weights:
            self.fail(f"no weight named '{name}'", op)
        wanted = self.module.weights.type(name)
        if wanted != op.result.type:
            self.fail(f"weight '{name}' is {wanted}, not {op.result.type}", op)

    def type(self, value: Value, op: Op | None) -> None:
        """The type is well formed and its symbols are declared."""
        given = value.type
        if id(given) in self.seen:
            return
        if not isinstance(given.dtype, torch.dtype):
            self.fail(f"{given.dtype!r} is not a dtype", op)
        for dim in given.shape:
            if isinstance(dim, int):
                if dim < 0:
                    self.fail(f"negative size in {given}", op)
                continue
            if not isinstance(dim, sympy.Expr):
                self.fail(f"{dim!r} is no size", op)
            for name in symbol_names(dim):
                if name not in self.symbols:
                    self.fail(f"the function declares no symbol '{name}'", op)
        self.seen[id(given)] = given

    def stale_use(self, region: Region, visible: set[Value]) -> None:
        for value in visible:
            for user, i in value.uses:
                operands = user.operands
                if user.parent is not region or i >= len(operands) or operands[i] is not value:
                    self.fail(
                        f"%{value.name or '?'} lists a user, accel.{user.name}, that is not in its "
                        "region: erase ops that are not needed"
                    )


def describe(type: TensorType) -> str:
    """The type with its symbolic sizes spelled out."""
    if type.is_static:
        return str(type)
    return f"{type} with sizes {', '.join(map(str, type.shape))}"
