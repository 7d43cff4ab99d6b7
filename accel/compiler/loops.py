"""A loop over the tokens (`accel.scan`) as a call at run time: its body's operators, as JSON.

See `accel.runtime.libraries.loop` for the form. Composites that torch has no operator for were
decomposed before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.types import symbol_names


def loop_options(op: Op, template: Callable[..., Any]) -> dict[str, Any]:
    """The options of a "scan" step. `template(value, inner)` turns attributes into JSON.

    Raises BackendError for an op in the body that torch has no operator for.
    """
    region = op.regions[0]
    numbers = {value: i for i, value in enumerate(region.args)}
    steps: list[list[Any]] = []

    def argument(value: Any) -> Any:
        if isinstance(value, Value):
            return {"operand": numbers[value]}
        return template(value, argument)

    for inner in region.ops:
        if inner is region.last:
            break
        call = inner.aten_call()
        if call is None:
            raise BackendError(
                f"no backend takes accel.{inner.name} inside of a loop over the tokens",
                where=str(inner.location or op.location or ""),
            )
        args = [argument(a) for a in call.args]
        kwargs = {k: argument(v) for k, v in call.kwargs.items()}
        steps.append([call.overload, args, kwargs, len(inner.results)])
        for result in inner.results:
            numbers[result] = len(numbers)
    return {
        "carries": op.attribute("carries"),
        "axes": list(op.attribute("axes")),
        "stacks": list(op.attribute("stacks")),
        "symbols": _symbols(op),
        "body": {"steps": steps, "results": [numbers[v] for v in region.results]},
    }


def _symbols(op: Op) -> dict[str, list[int]]:
    """For each symbol that the body names, an operand and an axis with that size."""
    region = op.regions[0]
    values = [*region.args, *(r for inner in region.ops for r in inner.results)]
    wanted = {
        name
        for value in values
        for dim in value.shape
        if not isinstance(dim, int)
        for name in symbol_names(dim)
    }
    found: dict[str, list[int]] = {}
    for i, operand in enumerate(op.operands):
        for axis, dim in enumerate(operand.shape):
            if isinstance(dim, sympy.Symbol) and dim.name in wanted:
                found.setdefault(dim.name, [i, axis])
    missing = sorted(wanted - set(found))
    if missing:
        raise BackendError(
            f"a loop over the tokens names the size {', '.join(missing)}, which no operand has",
            where=str(op.location or ""),
        )
    return found
