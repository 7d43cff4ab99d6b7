"""Tokens of MLIR's generic form, and the errors that point at them."""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

from accel.errors import IRParseError

# Possessive quantifiers (`++`, `*+`) keep matching linear, whatever the text.
_TOKEN = re.compile(
    r"""
    (?>[ \t\r\n]++|//[^\n]*+)*+
    (?:
      (?P<string>"(?>[^"\\\n]++|\\[^\n])*+")
    | (?P<value>%[A-Za-z0-9_$.\-]++)
    | (?P<block>\^[A-Za-z0-9_$.]++)
    | (?P<symbol>@[A-Za-z0-9_$.\-]++)
    | (?P<attr>\#[A-Za-z_][A-Za-z0-9_$.]*+)
    | (?P<hex>-?0x[0-9A-Fa-f]++)
    | (?P<float>-?[0-9]++\.[0-9]*+(?:[eE][-+]?[0-9]++)?)
    | (?P<int>-?[0-9]++)
    | (?P<arrow>->)
    | (?P<word>[A-Za-z_][A-Za-z0-9_$.]*+)
    | (?P<punct>[(){}\[\]<>=:,?*])
    | (?P<end>\Z)
    )
    """,
    re.VERBOSE,
)
_SPACE = re.compile(r"(?>[ \t\r\n]++|//[^\n]*+)*+")
_ESCAPE = re.compile(r'\\(?:([0-9A-Fa-f]{2})|([nt"\\])|(.?))', re.DOTALL)
_NAMED = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}


class Token(NamedTuple):
    kind: str
    text: str
    start: int


class Lexer:
    """A cursor over the tokens of one text: `now` is the next one to read."""

    def __init__(self, text: str, filename: str) -> None:
        self.text = text
        self.filename = filename
        self.now = Token("start", "", 0)
        self.advance()

    def advance(self) -> Token:
        """Goes to the next token; returns the one that was `now`. The end stays the end."""
        token = self.now
        position = token.start + len(token.text) if token.kind != "end" else len(self.text)
        found = _TOKEN.match(self.text, position)
        if found is None:
            space = _SPACE.match(self.text, position)
            assert space is not None  # it matches the empty string
            self.fail(f"unexpected character {self.text[space.end()]!r}", space.end())
        kind = found.lastgroup
        assert kind is not None
        text = found[kind] if kind != "end" else "end of text"
        self.now = Token(kind, text, found.start(kind))
        return token

    def skip_to(self, position: int) -> None:
        """Goes on with the first token that starts at `position` or later."""
        while self.now.start < position and self.now.kind != "end":
            self.advance()

    def accept(self, text: str) -> bool:
        """Skips the token if it reads `text` (strings are never punctuation)."""
        if self.now.text == text and self.now.kind != "string":
            self.advance()
            return True
        return False

    def expect(self, text: str) -> Token:
        if self.now.text != text or self.now.kind == "string":
            self.fail(f"expected '{text}', found '{shorten(self.now.text)}'")
        return self.advance()

    def expect_kind(self, kind: str, what: str) -> Token:
        if self.now.kind != kind:
            self.fail(f"expected {what}, found '{shorten(self.now.text)}'")
        return self.advance()

    def string(self, token: Token) -> str:
        """The text of a string token: `\\HH` is a byte, `\\n` `\\t` `\\"` `\\\\` as usual."""
        body = token.text[1:-1]
        if "\\" not in body:
            return body
        out = bytearray()
        end = 0
        for match in _ESCAPE.finditer(body):
            out += body[end : match.start()].encode("utf-8", "surrogatepass")
            byte, named, _ = match.groups()
            if byte is not None:
                out.append(int(byte, 16))
            elif named is not None:
                out += _NAMED[named].encode()
            else:
                self.fail(f"unknown escape '{match.group()}'", token.start + 1 + match.start())
            end = match.end()
        out += body[end:].encode("utf-8", "surrogatepass")
        try:
            return out.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            self.fail("a string that is not UTF-8", token.start)

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
        shown = source[left : left + 100].replace("\t", " ")
        caret = " " * (column - 1 - left) + "^"
        raise IRParseError(
            message,
            where=f"{self.filename}:{line}:{column}\n{shown}\n{caret}",
            advice="the text is MLIR's generic form, as accel's dumps are",
        )


def shorten(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
