"""Which elementwise ops can ride along at the end of a vendor call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from accel.ir.module import Op, Value
from accel.ir.types import same_type


@dataclass
class Epilogue:
    """Ops after the root, in order, and the options that say them to the library."""

    ops: list[Op] = field(default_factory=list)
    binary: str = "none"
    unary: str = "none"
    scalars: tuple[float | None, ...] = ()
    algorithm: str = ""

    def options(self) -> tuple[tuple[str, Any], ...]:
        return (
            ("binary", self.binary),
            ("unary", self.unary),
            ("scalars", self.scalars),
            ("algorithm", self.algorithm),
        )


def match_unary(op: Op) -> tuple[str, tuple[float | None, ...], str] | None:
    """oneDNN's name, scalars and algorithm for an activation; None if it has none."""
    if op.name == "gelu":
        return "gelu", (), str(op.attribute("approximate"))
    if op.name == "silu":
        return "swish", (), ""
    if op.name == "leaky_relu":
        return "leaky_relu", (float(op.attribute("slope")),), ""
    if op.name == "clamp":
        low, high = op.attribute("min"), op.attribute("max")
        if low is not None and high is not None:
            return "hardtanh", (float(low), float(high)), ""
        return ("relu", (), "") if low == 0 and high is None else None
    if op.name in ("relu", "sigmoid", "tanh", "hardswish"):
        return op.name, (), ""
    return None


def match_epilogue(root: Op, *, binary: bool, after_binary: frozenset[str]) -> Epilogue:
    """The longest chain that the library takes: [add other] then [activation], or one activation.

    Each value on the way must have no other user, and `other` must have the result's exact type
    (a broadcast add is not the library's add).
    """
    found = Epilogue()
    value = root.result
    if binary:
        user = value.single_user
        other = _other_operand(user, value)
        if user is not None and other is not None and same_type(other.type, value.type):
            found.ops.append(user)
            found.binary = "add"
            value = user.result
    user = value.single_user
    if user is None or len(user.operands) != 1:
        return found
    unary = match_unary(user)
    if unary is None or (found.ops and unary[0] not in after_binary):
        return found
    found.unary, found.scalars, found.algorithm = unary
    found.ops.append(user)
    return found


def _other_operand(op: Op | None, value: Value) -> Value | None:
    if op is None or op.name != "add":
        return None
    first, second = op.operands
    return second if first is value else first
