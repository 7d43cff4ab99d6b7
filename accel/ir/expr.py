"""Reads symbolic sizes from text: integers, symbols, + - * // / ** and Mod, floor, Max, Min.

sympy's own parser runs `eval`, which data from a file must never reach. Expressions are kept small:
what a program needs is a few terms, and sympy's time grows without bound for what is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import sympy

from accel.errors import IRParseError
from accel.ir.types import Dim, symbol

_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_]\w*)|(\*\*|//|[-+*/(),]))", re.ASCII)
_FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int]] = {  # with fewest and most arguments
    "Mod": (sympy.Mod, 2, 2),
    "floor": (lambda e: _floor(e), 1, 1),
    "ceiling": (sympy.ceiling, 1, 1),
    "Max": (sympy.Max, 1, 8),
    "Min": (sympy.Min, 1, 8),
    "Abs": (sympy.Abs, 1, 1),
    "sqrt": (sympy.sqrt, 1, 1),
}
_DEPTH = 60
_TOKENS = 400
_EXPONENT = 16
_TERMS = 2000  # of the expanded expression


def _floor(value: Any) -> Any:
    """sympy drops the floor of products that it takes to be integers (see `simplify_dim`)."""
    made = sympy.floor(value)
    return made if isinstance(made, sympy.floor) else sympy.floor(sympy.expand_mul(value))


def parse_expr(text: str) -> Dim:
    """The expression written by `str(expr)`. Raises IRParseError for anything else."""
    return _parse(text)


@lru_cache(4096)
def _parse(text: str) -> Dim:
    tokens: list[str] = []
    position = 0
    stripped = text.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if match is None or len(tokens) >= _TOKENS:
            bad = f"bad character {stripped[position]!r}" if match is None else "too many terms"
            raise IRParseError(f"{bad} in size expression '{_short(text)}'")
        tokens.append(match.group().strip())
        position = match.end()
    reader = _Reader(tokens, text)
    result = sympy.sympify(reader.sum(0))
    if reader.tokens:
        raise IRParseError(f"'{reader.tokens[0]}' is left over in size expression '{_short(text)}'")
    bad_parts = (sympy.zoo, sympy.nan, sympy.oo, -sympy.oo, sympy.I)
    if result.has(*bad_parts) or result.is_integer is False:
        raise IRParseError(f"size expression '{_short(text)}' is no integer")
    return int(result) if result.is_Integer else result


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def _terms(expr: Any) -> int:
    """How many terms the expanded expression may have, at most."""
    if expr.is_Add:
        return sum(map(_terms, expr.args))
    if expr.is_Mul:
        count = 1
        for argument in expr.args:
            count = min(count * _terms(argument), _TERMS + 1)
        return count
    if expr.is_Pow and expr.exp.is_Integer:
        return int(min(_terms(expr.base) ** abs(int(expr.exp)), _TERMS + 1))
    return 1


class _Reader:
    def __init__(self, tokens: list[str], text: str) -> None:
        self.tokens = tokens[::-1]
        self.text = _short(text)

    def peek(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self, wanted: str = "") -> str:
        if not self.tokens or (wanted and self.tokens[-1] != wanted):
            raise IRParseError(f"expected '{wanted or 'a term'}' in size expression '{self.text}'")
        return self.tokens.pop()

    def small(self, value: Any) -> Any:
        if _terms(value) > _TERMS or (value.is_Rational and abs(value) >= 2**64):
            raise IRParseError(f"size expression '{self.text}' is too large")
        return value

    def deeper(self, depth: int) -> int:
        if depth >= _DEPTH:
            raise IRParseError(f"size expression '{self.text}' nests too deep")
        return depth + 1

    def sum(self, depth: int) -> Any:
        terms = [self.term(depth)]
        while self.peek() in ("+", "-"):
            sign = self.take()
            other = self.term(depth)
            terms.append(other if sign == "+" else -other)
        return self.small(sympy.Add(*terms))

    def term(self, depth: int) -> Any:
        # All factors at once: sympy multiplies a number into a sum if there are just these two.
        factors: list[Any] = []
        while self.peek() == "-":
            self.take()
            factors.append(sympy.Integer(-1))
        factors.append(self.factor(depth))
        while self.peek() in ("*", "//", "/"):
            operator = self.take()
            other = self.factor(depth)
            if operator != "*" and other == 0:
                raise IRParseError(f"size expression '{self.text}' divides by 0")
            if operator == "//":
                factors = [
                    sympy.floor(sympy.expand_mul(self.small(sympy.Mul(*factors, 1 / other))))
                ]
            else:
                factors.append(other if operator == "*" else 1 / other)
        return self.small(sympy.Mul(*factors))

    def factor(self, depth: int) -> Any:
        if self.peek() == "-":
            self.take()
            return -self.factor(self.deeper(depth))
        base = self.atom(self.deeper(depth))
        if self.peek() != "**":
            return base
        self.take()
        exponent = self.factor(self.deeper(depth))
        if not exponent.is_Integer or not 0 <= exponent <= _EXPONENT:
            raise IRParseError(f"size expression '{self.text}': exponent {exponent}")
        return self.small(base**exponent)

    def atom(self, depth: int) -> Any:
        token = self.take()
        if token.isdigit():
            if len(token) > 20:
                raise IRParseError(f"size expression '{self.text}' is too large")
            return self.small(sympy.Integer(int(token)))
        if token == "(":
            value = self.sum(depth)
            self.take(")")
            return value
        if len(token) > 64 or not (token[0].isalpha() or token[0] == "_"):
            raise IRParseError(f"unexpected '{_short(token)}' in size expression '{self.text}'")
        if self.peek() != "(":
            return symbol(token)
        if token not in _FUNCTIONS:
            raise IRParseError(f"unknown function '{token}' in size expression '{self.text}'")
        self.take("(")
        arguments = [self.sum(depth)]
        while self.peek() == ",":
            self.take()
            arguments.append(self.sum(depth))
        self.take(")")
        function, fewest, most = _FUNCTIONS[token]
        if not fewest <= len(arguments) <= most or (token == "Mod" and arguments[1] == 0):
            raise IRParseError(f"arguments of {token} in size expression '{self.text}'")
        return function(*arguments)
