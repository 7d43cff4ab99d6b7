"""Triton source as text: expressions with their types, and blocks of lines.

Generated kernels are programs over *tiles*: a program computes `ROWS` rows (dimension 0) and `COLS`
columns (dimension 1) at a time, or a one-dimensional tile, or a single element. An `Expr` knows the
type that it is computed in and which of the two dimensions it varies along; a `Block` collects
lines, and `let` names a value so that shared subexpressions are computed once and the source reads
like a program somebody wrote.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_SMALLEST_NORMAL = 2.0**-126
_NAME = re.compile(r"[A-Za-z_]\w*")

ROW, COL = "row", "col"


@dataclass(frozen=True)
class Expr:
    """Code of one value.

    Attributes:
        text: a name, a literal, or an expression that is safe as an operand.
        kind: what it is computed in: "float32", "float64", "int8" ... "uint8", "bool".
        dims: the tile's dimensions it varies along.
        number: the value of a constant.
    """

    text: str
    kind: str
    dims: frozenset[str] = frozenset()
    number: bool | int | float | None = None

    def __str__(self) -> str:
        return self.text


def element_type(kind: str) -> str:
    """Triton's name of a type: "bool" is int1."""
    return "tl.int1" if kind == "bool" else f"tl.{kind}"


def number(value: bool | int | float, kind: str) -> Expr:
    """A constant. Written as a literal where Triton gives a literal the same type."""
    if kind == "bool":
        return Expr(f"tl.full([], {bool(value)}, tl.int1)", kind, number=bool(value))
    if kind.startswith("float"):
        text = _float_text(float(value))
        plain = kind == "float32" and (value == 0 or not abs(value) < _SMALLEST_NORMAL)
    else:
        text, plain = str(int(value)), kind == "int32"
    if not plain:
        text = f"tl.full([], {text}, {element_type(kind)})"
    return Expr(text, kind, number=value)


def _float_text(value: float) -> str:
    if math.isnan(value):
        return 'float("nan")'
    if math.isinf(value):
        return 'float("inf")' if value > 0 else 'float("-inf")'
    return repr(value)


def solid(expr: Expr) -> Expr:
    """The expression as a Triton value also where it is a literal (which Python would compute)."""
    if expr.number is None or expr.text.startswith("tl."):
        return expr
    typed = f"tl.full([], {expr.text}, {element_type(expr.kind)})"
    return Expr(typed, expr.kind, number=expr.number)


@dataclass
class Names:
    """Fresh names: add_1, add_2..."""

    counts: dict[str, int] = field(default_factory=dict)

    def fresh(self, stem: str) -> str:
        count = self.counts[stem] = self.counts.get(stem, 0) + 1
        return f"{stem}_{count}"


class Block:
    """Lines of one loop body (or of the whole kernel)."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def let(self, text: str, kind: str, dims: frozenset[str], stem: str) -> Expr:
        """Names a value; names stay as they are."""
        if _NAME.fullmatch(text):
            return Expr(text, kind, dims)
        name = self.names.fresh(stem)
        self.lines.append(f"{name} = {text}")
        return Expr(name, kind, dims)

    def nest(self, head: str, body: Block) -> None:
        """`head` (a for statement) over the lines of `body`."""
        if body.lines:
            self.lines.append(head)
            self.lines.extend(f"    {line}" for line in body.lines)

    def source(self, indent: str = "    ") -> str:
        return "\n".join(f"{indent}{line}" for line in self.lines)


def dims_of(*parts: Expr) -> frozenset[str]:
    return frozenset().union(*(p.dims for p in parts))
