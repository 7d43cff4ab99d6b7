"""Tokens of MLIR's generic form, and the errors that point at them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from accel.errors import IRParseError

_TOKEN = re.compile(
    r"""
    (?P<space>[ \t\r\n]+|//[^\n]*)
  | (?P<string>"(?:[^"\\\n]|\\.)*")
  | (?P<value>%[A-Za-z0-9_$.\-]+)
  | (?P<block>\^[A-Za-z0-9_$.]+)
  | (?P<symbol>@[A-Za-z0-9_$.\-]+)
  | (?P<attr>\#[A-Za-z_][A-Za-z0-9_$.]*)
  | (?P<hex>-?0x[0-9A-Fa-f]+)
  | (?P<float>-?[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?)
  | (?P<int>-?[0-9]+)
  | (?P<arrow>->)
  | (?P<word>[A-Za-z_][A-Za-z0-9_$.]*)
  | (?P<punct>[(){}\[\]<>=:,?*])
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    start: int


class Lexer:
    """A cursor over the tokens of one text."""

    def __init__(self, text: str, filename: str) -> None:
        self.text = text
        self.filename = filename
        self.tokens = self._tokenize()
        self.index = 0

    def _tokenize(self) -> list[Token]:
        tokens, position = [], 0
        while position < len(self.text):
            match = _TOKEN.match(self.text, position)
            if match is None:
                self.fail(f"unexpected character {self.text[position]!r}", position)
            if match.lastgroup != "space":
                tokens.append(Token(str(match.lastgroup), match.group(), position))
            position = match.end()
        tokens.append(Token("end", "end of text", len(self.text)))
        return tokens

    @property
    def now(self) -> Token:
        return self.tokens[self.index]

    def advance(self) -> Token:
        token = self.tokens[self.index]
        self.index = min(self.index + 1, len(self.tokens) - 1)
        return token

    def accept(self, text: str) -> bool:
        """Skips the token if it reads `text` (strings are never punctuation)."""
        if self.now.text == text and self.now.kind != "string":
            self.advance()
            return True
        return False

    def expect(self, text: str) -> Token:
        if self.now.text != text or self.now.kind == "string":
            self.fail(f"expected '{text}', found '{self.now.text}'")
        return self.advance()

    def expect_kind(self, kind: str, what: str) -> Token:
        if self.now.kind != kind:
            self.fail(f"expected {what}, found '{self.now.text}'")
        return self.advance()

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        """Raises IRParseError with line, column and a caret under the place."""
        where = self.now.start if position is None else position
        line = self.text.count("\n", 0, where) + 1
        start = self.text.rfind("\n", 0, where) + 1
        end = self.text.find("\n", where)
        source = self.text[start : end if end >= 0 else len(self.text)]
        column = where - start + 1
        # Long lines are shown around the caret.
        left = max(0, column - 60)
        caret = " " * (column - 1 - left) + "^"
        raise IRParseError(
            message, where=f"{self.filename}:{line}:{column}\n{source[left : left + 100]}\n{caret}"
        )


def unescape(token: str) -> str:
    """The text of a string token: `\\HH` is a byte, `\\n` `\\t` `\\"` `\\\\` as usual."""
    body, out, i = token[1:-1], bytearray(), 0
    named = {"n": b"\n", "t": b"\t", '"': b'"', "\\": b"\\"}
    while i < len(body):
        if body[i] != "\\":
            out += body[i].encode()
            i += 1
        elif body[i + 1] in named and not re.fullmatch("[0-9A-Fa-f]{2}", body[i + 1 : i + 3]):
            out += named[body[i + 1]]
            i += 2
        else:
            out.append(int(body[i + 1 : i + 3], 16))
            i += 3
    return out.decode()
