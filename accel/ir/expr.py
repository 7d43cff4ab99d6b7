"""Reads symbolic sizes from text: integers, symbols, + - * // / ** and Mod, floor, Max, Min.

sympy's own parser runs `eval`, which data from a file must never reach.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import sympy

from accel.errors import IRParseError
from accel.ir.types import Dim, simplify_dim, symbol

_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_]\w*)|(\*\*|//|[-+*/(),]))")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Mod": sympy.Mod,
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "Abs": sympy.Abs,
}
_DEPTH = 100


def parse_expr(text: str) -> Dim:
    """The expression written by `str(expr)`. Raises IRParseError for anything else."""
    tokens: list[str] = []
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise IRParseError(f"bad character {text[position]!r} in size expression '{text}'")
        tokens.append(match.group().strip())
        position = match.end()
    reader = _Reader(tokens, text)
    result = reader.sum(0)
    if reader.tokens:
        raise IRParseError(f"'{reader.tokens[0]}' is left over in size expression '{text}'")
    return simplify_dim(result)


class _Reader:
    def __init__(self, tokens: list[str], text: str) -> None:
        self.tokens = tokens
        self.text = text

    def peek(self) -> str:
        return self.tokens[0] if self.tokens else ""

    def take(self, wanted: str = "") -> str:
        if not self.tokens or (wanted and self.tokens[0] != wanted):
            raise IRParseError(f"expected '{wanted or 'a term'}' in size expression '{self.text}'")
        return self.tokens.pop(0)

    def sum(self, depth: int) -> Any:
        if depth > _DEPTH:
            raise IRParseError(f"size expression nests deeper than {_DEPTH}")
        value = self.term(depth + 1)
        while self.peek() in ("+", "-"):
            sign = self.take()
            other = self.term(depth + 1)
            value = value + other if sign == "+" else value - other
        return value

    def term(self, depth: int) -> Any:
        value = self.factor(depth + 1)
        while self.peek() in ("*", "//", "/"):
            operator = self.take()
            other = self.factor(depth + 1)
            if operator == "*":
                value = value * other
            elif operator == "/":
                value = value / other
            else:
                value = sympy.floor(value / other)
        return value

    def factor(self, depth: int) -> Any:
        if depth > _DEPTH:
            raise IRParseError(f"size expression nests deeper than {_DEPTH}")
        if self.peek() == "-":
            self.take()
            return -self.factor(depth + 1)
        base = self.atom(depth + 1)
        if self.peek() == "**":
            self.take()
            return base ** self.factor(depth + 1)
        return base

    def atom(self, depth: int) -> Any:
        token = self.take()
        if token.isdigit():
            return sympy.Integer(token)
        if token == "(":
            value = self.sum(depth + 1)
            self.take(")")
            return value
        if not (token[0].isalpha() or token[0] == "_"):
            raise IRParseError(f"unexpected '{token}' in size expression '{self.text}'")
        if self.peek() != "(":
            return symbol(token)
        if token not in _FUNCTIONS:
            raise IRParseError(f"unknown function '{token}' in size expression '{self.text}'")
        self.take("(")
        arguments = [self.sum(depth + 1)]
        while self.peek() == ",":
            self.take()
            arguments.append(self.sum(depth + 1))
        self.take(")")
        return _FUNCTIONS[token](*arguments)
