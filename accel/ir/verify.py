"""The verifier: SSA order, def-use chains, attributes and types. The same call everywhere.

Result types are inferred again from the definitions and compared, so a pass that changes an
operand without changing the result's type is caught at once.
"""

from __future__ import annotations

import torch

from accel.errors import TypeInferenceError, VerifyError
from accel.ir.module import Function, Module, Op, Region, Value
from accel.ir.op import Trait
from accel.ir.types import TensorType, same_type


def verify(module: Module) -> None:
    """Raises VerifyError naming function, op and place at the first broken rule."""
    for name, function in module.functions.items():
        if name != function.name:
            raise VerifyError(f"function @{function.name} is filed under '{name}'")
        verify_function(function, module)


def verify_function(function: Function, module: Module | None = None) -> None:
    """Checks one function; weights' types too if the module is given."""
    where = f"@{function.name}"
    terminator = function.body.last
    if terminator is None or terminator.name != "return":
        raise VerifyError("a function must end with accel.return", where=where)
    for result, argument in function.donates.items():
        if not (0 <= result < len(terminator.operands) and 0 <= argument < len(function.args)):
            raise VerifyError(f"donates {{{result}: {argument}}} is out of range", where=where)
        if not same_type(terminator.operands[result].type, function.args[argument].type):
            raise VerifyError(f"donates {{{result}: {argument}}}: types differ", where=where)
    symbols = set(function.symbols)
    for value in function.args:
        _check_symbols(value.type, symbols, where)
    _verify_region(function.body, set(), module, where, symbols)


def _verify_region(
    region: Region, visible: set[Value], module: Module | None, where: str, symbols: set[str]
) -> None:
    visible = visible | set(region.args)
    for index, value in enumerate(region.args):
        if value.owner is not region or value.index != index:
            raise VerifyError(f"argument {index} does not belong to its region", where=where)
    count = 0
    for op in region.ops:
        count += 1
        place = f"{where}: accel.{op.name}" + (f" at {op.location}" if op.location else "")
        if op.parent is not region:
            raise VerifyError("an op's parent is not the region that holds it", where=place)
        if op.has(Trait.TERMINATOR) and op is not region.last:
            raise VerifyError("a terminator in the middle of a region", where=place)
        for i, operand in enumerate(op.operands):
            if operand not in visible:
                raise VerifyError(
                    f"operand {i} (%{operand.name or '?'}) is not defined before its use",
                    where=place,
                )
            if (op, i) not in operand.uses:
                raise VerifyError(f"operand {i} does not list this op as a user", where=place)
        for nested in op.regions:
            # Kernel and call bodies see only their arguments: they are programs of their own.
            isolated: set[Value] = set() if op.has(Trait.OPAQUE) else visible
            _verify_region(nested, isolated, module, place, symbols)
        _verify_op(op, module, place)
        for result in op.results:
            _check_symbols(result.type, symbols, place)
        visible.update(op.results)
    if count != region.size:
        raise VerifyError(f"a region of {region.size} ops links {count}", where=where)
    if region.last is None or not region.last.has(Trait.TERMINATOR):
        raise VerifyError("a region must end with a terminator", where=where)


def _verify_op(op: Op, module: Module | None, place: str) -> None:
    d = op.definition
    try:
        d.complete_attributes(op.attributes)
        if d.infer is None:
            d.group_operands([v.type for v in op.operands], op.segments)
            _verify_opaque(op, module, place)
            return
        inferred = d.infer_types([v.type for v in op.operands], op.attributes, op.segments)
    except VerifyError as error:
        if not error.where:
            error.where = place
        raise
    except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        raise TypeInferenceError(
            f"operands or attributes do not fit: {type(error).__name__}: {error}", where=place
        ) from error
    if len(inferred) != len(op.results):
        raise VerifyError(f"{len(op.results)} results, inferred {len(inferred)}", where=place)
    for i, (result, wanted) in enumerate(zip(op.results, inferred)):
        if not same_type(result.type, wanted):
            raise VerifyError(f"result {i} has type {result.type}, inferred {wanted}", where=place)


def _verify_opaque(op: Op, module: Module | None, place: str) -> None:
    if op.name == "constant":
        name = op.attributes["name"]
        if module is not None and len(module.weights) and name in module.weights:
            wanted = module.weights.type(str(name))
            if not same_type(wanted, op.result.type):
                raise VerifyError(f"weight '{name}' is {wanted}, not {op.result.type}", where=place)
        elif module is not None and len(module.weights):
            raise VerifyError(f"no weight named '{name}'", where=place)
    for region in op.regions:
        got = [v.type for v in region.args]
        if len(got) != len(op.operands) or not all(
            same_type(a, b.type) for a, b in zip(got, op.operands)
        ):
            raise VerifyError("region arguments do not match the operands", where=place)
        made = [v.type for v in region.results]
        if len(made) != len(op.results) or not all(
            same_type(a, b.type) for a, b in zip(made, op.results)
        ):
            raise VerifyError("region results do not match the op's results", where=place)


def _check_symbols(type: TensorType, symbols: set[str], where: str) -> None:
    if not isinstance(type.dtype, torch.dtype):
        raise VerifyError(f"{type.dtype!r} is not a dtype", where=where)
    for dim in type.shape:
        if isinstance(dim, int):
            if dim < 0:
                raise VerifyError(f"negative size in {type}", where=where)
            continue
        for s in dim.free_symbols:
            if s.name not in symbols:
                raise VerifyError(f"the function declares no symbol '{s.name}'", where=where)
