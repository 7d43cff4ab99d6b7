"""Meanings given by one ATen overload, which a runtime can call by name without a definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from accel.errors import InterpretError


@dataclass(frozen=True, slots=True)
class Lit:
    """A literal in an `aten(...)` form."""

    value: Any


@dataclass(frozen=True, slots=True)
class Arg:
    """An argument computed from the operands' shapes and dtypes and from the attributes.

    The function gets all of them by name. Operands are tensors when a program is interpreted and
    IR values when it is lowered: both have `shape` and `dtype`, and may be put into the result.
    """

    function: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class AtenCall:
    """One ATen overload with its arguments: `aten::topk.default`'s spelling is `aten::topk`."""

    overload: str
    args: list[Any]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Aten:
    """A meaning given by one ATen overload, for which a runtime needs no definition.

    `args` and `kwargs` name the definition's operands and attributes; `Lit` wraps a literal and
    `Arg` computes an argument. With `when`, the form holds only where that says so. Results that
    ATen returns as None (an output mask said so) are left out.
    """

    overload: str
    args: tuple[str | Lit | Arg, ...] = ()
    kwargs: Mapping[str, str | Lit | Arg] = field(default_factory=dict)
    when: Callable[[Mapping[str, Any]], bool] | None = None

    def bind(self, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        def get(a: str | Lit | Arg) -> Any:
            if isinstance(a, str):
                return values[a]
            return a.value if isinstance(a, Lit) else a.function(values)

        return [get(a) for a in self.args], {k: get(a) for k, a in self.kwargs.items()}

    def resolve(self) -> Callable[..., Any]:
        return resolve_overload(self.overload)


def resolve_overload(overload: str) -> Callable[..., Any]:
    """The function of a name such as `aten::add.Tensor`.

    Raises InterpretError if the dispatcher knows no such operator: the name may come from a file,
    and must not reach anything but registered operators.
    """
    base, _, suffix = overload.partition(".")
    suffix = "" if suffix == "default" else suffix
    try:
        torch._C._dispatch_find_schema_or_throw(base, suffix)
    except RuntimeError:
        raise InterpretError(f"there is no operator '{overload}'") from None
    namespace, _, name = base.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name)
    found: Callable[..., Any] = getattr(packet, suffix or "default")
    return found


def aten(
    overload: str,
    *args: str | Lit | Arg,
    when: Callable[[Mapping[str, Any]], bool] | None = None,
    **kwargs: str | Lit | Arg,
) -> Aten:
    """`aten("topk", "x", "k", "axis")`: the namespace `aten::` is implied."""
    return Aten(f"aten::{overload}", args, kwargs, when)
