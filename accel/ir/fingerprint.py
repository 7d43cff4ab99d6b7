"""Structural fingerprints: equal for programs that print alike, up to names of values.

The pass manager compares them to tell whether a pass changed anything. They are sha256 over a
canonical description, so they also serve as cache keys across processes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from accel.ir.module import Function, Module, Op, Region, Value
from accel.ir.printer import format_attribute


def fingerprint(module: Module) -> str:
    """Of functions, metadata and the *names* of weights (not their data)."""
    hasher = hashlib.sha256(json.dumps(module.metadata, sort_keys=True).encode())
    for function in module.functions.values():
        hasher.update(function_fingerprint(function).encode())
    return hasher.hexdigest()


def function_fingerprint(function: Function) -> str:
    head = (
        function.name,
        [(name, s.min, s.max) for name, s in function.symbols.items()],
        sorted(function.donates.items()),
        json.dumps(function.metadata, sort_keys=True),
    )
    return hashlib.sha256(f"{head}{region_fingerprint(function.body)}".encode()).hexdigest()


def region_fingerprint(region: Region) -> str:
    """Of one region; values from outside of it are numbered in the order they are met."""
    lines: list[str] = []
    _describe(region, {}, {}, lines)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _describe(
    region: Region, numbers: dict[Value, int], types: dict[int, str], lines: list[str]
) -> None:
    """`types` has the texts of types by identity: definitions share the ones they inferred."""

    def number(value: Value) -> int:
        return numbers.setdefault(value, len(numbers))

    def type_of(value: Value) -> str:
        key = id(value.type)
        return types.get(key) or types.setdefault(key, _type(value))

    lines.append(f"^{[(number(a), type_of(a)) for a in region.args]}")
    for op in region.ops:
        operands = [number(v) for v in op.operands]
        attributes = op.attributes and {k: _attribute(v) for k, v in op.attributes.items()}
        results = [(number(r), type_of(r)) for r in op.results]
        lines.append(f"{op.name}{operands}{op.segments}{attributes}{results}")
        for nested in op.regions:
            lines.append("{")
            _describe(nested, numbers, types, lines)
            lines.append("}")


def _type(value: Value) -> str:
    dims = ",".join(map(str, value.type.shape))
    return f"{dims}:{value.type.dtype}"


def _attribute(value: Any) -> Any:
    if type(value) in (str, int, bool):
        return value
    return format_attribute(value)


def same_op(a: Op, b: Op) -> bool:
    """Equal definition, attributes and operands; results may differ in name only."""
    return (
        a.definition is b.definition
        and a.operands == b.operands
        and a.segments == b.segments
        and {k: _attribute(v) for k, v in a.attributes.items()}
        == {k: _attribute(v) for k, v in b.attributes.items()}
    )
