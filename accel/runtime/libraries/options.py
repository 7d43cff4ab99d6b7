"""Reading the JSON options of a vendor call, strictly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.errors import ArtifactError


def integers(options: Mapping[str, Any], name: str) -> list[int]:
    """A list of integers, written {"list": [...]}."""
    value = options.get(name)
    items = value.get("list") if isinstance(value, dict) else value
    if not isinstance(items, list) or not all(type(i) is int for i in items):
        raise ArtifactError(f"option '{name}' must be a list of integers, got {value!r}")
    return items


def numbers(options: Mapping[str, Any], name: str) -> list[float | None]:
    value = options.get(name, [])
    items = value.get("list") if isinstance(value, dict) else value
    if not isinstance(items, list) or not all(i is None or type(i) in (int, float) for i in items):
        raise ArtifactError(f"option '{name}' must be a list of numbers, got {value!r}")
    return [None if i is None else float(i) for i in items]


def choice(options: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str:
    """One of the known words; the first is the default."""
    value = options.get(name, known[0])
    if value not in known:
        raise ArtifactError(f"option '{name}' is {value!r}, not one of {', '.join(known)}")
    return str(value)


def integer(options: Mapping[str, Any], name: str) -> int:
    value = options.get(name)
    if type(value) is not int:
        raise ArtifactError(f"option '{name}' must be an integer, got {value!r}")
    return value


def without_sinks(operands: Sequence[Any], count: int) -> list[Any]:
    """An attention's `count` operands, without the absent sinks that may come after them."""
    return list(operands[:-1] if len(operands) == count + 1 and operands[-1] is None else operands)
