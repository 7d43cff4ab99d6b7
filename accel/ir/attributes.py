"""What an attribute may hold, and whether a value fits an op definition's annotation.

Annotations are read as text: `int`, `float`, `bool`, `str`, `complex`, `torch.dtype`, `Dim` (an int
or a sympy expression), `Shape` (a tuple of Dim), `tuple[X, ...]`, `None`, unions of these, and
`Attribute` or `Any` for whatever an attribute may hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeAlias

import sympy
import torch

# What an attribute may hold. Shapes are tuples of int and sympy.Expr.
Attribute: TypeAlias = (
    bool | int | float | complex | str | torch.dtype | sympy.Expr | tuple[Any, ...] | None
)

Check = Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_dim(value: Any) -> bool:
    return _is_int(value) or isinstance(value, sympy.Expr)


def _is_attribute(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_attribute, value))
    return value is None or isinstance(
        value, (bool, int, float, complex, str, torch.dtype, sympy.Expr)
    )


_CHECKS: dict[str, Check] = {
    "int": _is_int,
    "float": lambda value: _is_int(value) or isinstance(value, float),
    "complex": lambda value: isinstance(value, complex),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "torch.dtype": lambda value: isinstance(value, torch.dtype),
    "Dim": _is_dim,
    "Shape": lambda value: isinstance(value, tuple) and all(map(_is_dim, value)),
    "None": lambda value: value is None,
    "Attribute": _is_attribute,
    "Any": _is_attribute,
}


@cache
def attribute_check(annotation: str) -> Check:
    """The test for a value of this annotation. Raises ValueError for one it cannot read."""
    checks = [_simple(part.strip()) for part in annotation.split("|")]
    if len(checks) == 1:
        return checks[0]
    return lambda value: any(check(value) for check in checks)


def _simple(annotation: str) -> Check:
    if annotation in _CHECKS:
        return _CHECKS[annotation]
    if annotation.startswith("tuple[") and annotation.endswith(", ...]"):
        inner = attribute_check(annotation[6:-6])
        return lambda value: isinstance(value, tuple) and all(map(inner, value))
    raise ValueError(f"attribute annotation '{annotation}' is not known")


def attributes_key(attributes: Mapping[str, Attribute]) -> tuple[Any, ...]:
    """A key that tells apart what Python calls equal: 1, 1.0 and True. Values must hash."""
    if not attributes:
        return ()
    return tuple([
        (name, type(value), value, tuple(map(type, value)) if type(value) is tuple else None)
        for name, value in attributes.items()
    ])  # fmt: skip
