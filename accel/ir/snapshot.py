"""What a program looked like at one moment: cheap to take, and cheap to compare with a later one.

The pass manager takes one after each pass. Two snapshots of which nothing differs are the same
program; where they differ, `same_program` numbers the values of both and compares again, so that
a pass which built an equal program anew has changed nothing. It also says which ops are
`settled`: what type inference and costs depend on is as it was, object for object.

A snapshot keeps what it mentions alive, so identities stay good.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from accel.ir.module import Function, Module, Op, Region, Value
from accel.ir.printer import format_attribute
from accel.ir.types import TensorType

# op, definition, segments, operands, attributes, identities of attribute values (1 and True are
# equal but not the same), result types, regions.
Row: TypeAlias = tuple[Any, ...]
# region, arguments, their types, rows
Rows: TypeAlias = tuple[Region, tuple[Value, ...], tuple[TensorType, ...], list[Row]]


class Snapshot:
    """A module's functions, op by op."""

    __slots__ = ("bodies", "heads", "ops")

    def __init__(self, module: Module) -> None:
        functions = module.functions.values()
        self.heads = [json.dumps(module.metadata, sort_keys=True), *map(_head, functions)]
        self.bodies = [_rows(f.body) for f in functions]
        self.ops = sum(map(_count, self.bodies))  # in all functions and nested regions

    def same_program(self, other: Snapshot) -> bool:
        """Whether both print alike, up to names of values."""
        if self.heads != other.heads or self.ops != other.ops:
            return False
        if self.bodies == other.bodies:
            return True
        return list(map(_canonical, self.bodies)) == list(map(_canonical, other.bodies))

    def settled(self, before: Snapshot) -> frozenset[Op]:
        """Ops of which all is as it was but their place: operands, attributes, types, regions.

        None where metadata or symbols differ, or where a value that stayed got another type.
        """
        if self.heads != before.heads:
            return frozenset()
        known: dict[Op | Region, Row] = {}
        for body in before.bodies:
            _collect(body, known)
        found: list[Op] = []
        if all(_find_settled(body, known, found) for body in self.bodies):
            return frozenset(found)
        return frozenset()


def _head(function: Function) -> str:
    symbols = [(name, s.min, s.max) for name, s in function.symbols.items()]
    metadata = json.dumps(function.metadata, sort_keys=True)
    return f"{function.name} {symbols} {sorted(function.donates.items())} {metadata}"


def _rows(region: Region) -> Rows:
    rows: list[Row] = []
    append = rows.append
    op = region.first
    while op is not None:
        attributes, results, regions = op.attributes, op.results, op.regions
        append((
            op,
            op.definition,
            op.segments,
            op.operands,
            tuple(attributes.items()) if attributes else (),
            tuple(map(id, attributes.values())) if attributes else (),
            (results[0].type,) if len(results) == 1 else tuple([r.type for r in results]),
            tuple(map(_rows, regions)) if regions else (),
        ))  # fmt: skip
        op = op.next
    return region, tuple(region.args), tuple([a.type for a in region.args]), rows


def _count(rows: Rows) -> int:
    return len(rows[3]) + sum(_count(inner) for row in rows[3] if row[7] for inner in row[7])


def _collect(rows: Rows, known: dict[Op | Region, Row]) -> None:
    known[rows[0]] = rows[1:3]
    for row in rows[3]:
        known[row[0]] = row
        for inner in row[7]:
            _collect(inner, known)


def _find_settled(rows: Rows, known: dict[Op | Region, Row], found: list[Op]) -> bool:
    """Adds the ops that are as they were. False if a value that stayed has another type."""
    if known.get(rows[0], rows[1:3]) != rows[1:3]:
        return False
    for row in rows[3]:
        old = known.get(row[0])
        if old == row:
            found.append(row[0])
            continue
        if old is not None and old[6] != row[6]:
            return False
        for inner in row[7]:
            if not _find_settled(inner, known, found):
                return False
    return True


def _canonical(rows: Rows) -> list[Any]:
    """The rows with numbers for values and text for all else."""
    lines: list[Any] = []
    _number(rows, {}, lines)
    return lines


def _number(rows: Rows, numbers: dict[Value, int], lines: list[Any]) -> None:
    def number(value: Value) -> int:
        return numbers.setdefault(value, len(numbers))

    _, arguments, types, inside = rows
    lines.append([(number(a), _type(t)) for a, t in zip(arguments, types)])
    for op, definition, segments, operands, attributes, _, made, regions in inside:
        lines.append((
            definition.name,
            segments,
            [number(v) for v in operands],
            [(name, type(v), format_attribute(v)) for name, v in attributes],
            [(number(r), _type(t)) for r, t in zip(op.results, made)],
        ))  # fmt: skip
        for inner in regions:
            _number(inner, numbers, lines)
    lines.append(None)


def _type(type: TensorType) -> tuple[str, str]:
    return (",".join(map(str, type.shape)), str(type.dtype))
