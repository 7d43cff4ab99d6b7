"""Reads the leaves of the text: types, attributes, locations (see `accel.ir.parser`)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import sympy

from accel.errors import AccelError
from accel.ir.attributes import Attribute
from accel.ir.expr import parse_expr
from accel.ir.lexer import Lexer, Token, shorten
from accel.ir.module import Location, Value
from accel.ir.types import DTYPE_BY_NAME, Dim, TensorType

_MAX_DEPTH = 48
_MAX_DIM = 10**18
_INTEGER_KINDS = ("i64", "ui64", "si64", "i32", "index")

# Stands for a `?` until the op's `accel.dims` are read.
_UNKNOWN: sympy.Expr = sympy.Dummy("unknown")


class Reader:
    """Types, attributes and locations at the lexer's cursor."""

    def __init__(self, text: str, filename: str) -> None:
        self.lexer = Lexer(text, filename)
        self.depth = 0
        self.types: dict[str, TensorType] = {}

    def deeper(self, what: str) -> None:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            self.lexer.fail(f"{what} nest deeper than {_MAX_DEPTH}")

    def signature(self) -> tuple[list[TensorType], list[TensorType]]:
        self.lexer.expect(":")
        operands = self.type_list()
        self.lexer.expect("->")
        return operands, self.type_list() if self.lexer.now.text == "(" else [self.type()]

    def type_list(self) -> list[TensorType]:
        self.lexer.expect("(")
        types: list[TensorType] = []
        while not self.lexer.accept(")"):
            types.append(self.type())
            if self.lexer.now.text != ")":
                self.lexer.expect(",")
        return types

    def type(self) -> TensorType:
        """`tensor<2x?x3xf32>`; a `?` is filled from the op's `accel.dims`."""
        lexer = self.lexer
        lexer.expect("tensor")
        start = lexer.expect("<").start
        depth, end = 1, start + 1
        while depth and end < len(lexer.text):
            depth += {"<": 1, ">": -1}.get(lexer.text[end], 0)
            end += 1
            if end - start > 400:
                lexer.fail("a type that does not end", start)
        body = lexer.text[start + 1 : end - 1]
        lexer.skip_to(end)
        if body not in self.types:
            self.types[body] = self.tensor_type(body, start)
        return self.types[body]

    def tensor_type(self, body: str, start: int) -> TensorType:
        dims: list[Dim] = []
        rest = body
        while "x" in rest:
            head, _, tail = rest.partition("x")
            if head == "?":
                dims.append(_UNKNOWN)
            elif head.isascii() and head.isdigit() and len(head) < 20 and int(head) < _MAX_DIM:
                dims.append(int(head))
            else:
                break
            rest = tail
        dtype = DTYPE_BY_NAME.get(rest)
        if dtype is None:
            self.lexer.fail(f"unknown element type '{shorten(rest)}'", start)
        return TensorType(tuple(dims), dtype)

    def dictionary(self) -> dict[str, Any]:
        lexer = self.lexer
        lexer.expect("{")
        result: dict[str, Any] = {}
        while not lexer.accept("}"):
            token = lexer.advance()
            if token.kind not in ("word", "string"):
                lexer.fail(f"expected an attribute name, found '{token.text}'", token.start)
            key = lexer.string(token) if token.kind == "string" else token.text
            if key in result:
                lexer.fail(f"attribute '{shorten(key)}' is given twice", token.start)
            result[key] = self.attribute() if lexer.accept("=") else None
            if lexer.now.text != "}":
                lexer.expect(",")
        return result

    def attribute(self) -> Attribute:
        lexer = self.lexer
        token = lexer.advance()
        if token.kind == "string":
            return lexer.string(token)
        if token.text in ("true", "false", "unit"):
            return {"true": True, "false": False, "unit": None}[token.text]
        if token.text == "[":
            self.deeper("attributes")
            items: list[Attribute] = []
            while not lexer.accept("]"):
                items.append(self.attribute())
                if lexer.now.text != "]":
                    lexer.expect(",")
            self.depth -= 1
            return tuple(items)
        if token.kind in ("int", "float", "hex"):
            return self.number(token)
        if token.kind == "attr":
            return self.dialect_attribute(token)
        name = token.text
        if name == "complex":
            lexer.expect("<")
            name = f"complex<{lexer.advance().text}>"
            lexer.expect(">")
        if name in DTYPE_BY_NAME:
            return DTYPE_BY_NAME[name]
        return lexer.fail(f"cannot read the attribute '{shorten(token.text)}'", token.start)

    def number(self, token: Token) -> int | float:
        lexer, text = self.lexer, token.text
        kind = ""
        if lexer.accept(":"):
            kind = lexer.expect_kind("word", "a type").text
            if kind != "f64" and kind not in _INTEGER_KINDS:
                lexer.fail(f"a number of type '{shorten(kind)}'", token.start)
        if len(text) > 400:
            lexer.fail("a number with too many digits", token.start)
        if kind == "f64" and token.kind == "hex":
            bits = int(text, 16)
            if not 0 <= bits < 2**64:
                lexer.fail(f"{text} does not fit 64 bits", token.start)
            bits_value: float = struct.unpack("<d", struct.pack("<Q", bits))[0]
            return bits_value
        if token.kind == "float" or kind == "f64":
            if kind in _INTEGER_KINDS:
                lexer.fail(f"{text} is no {kind}", token.start)
            value = float(text)
            if math.isinf(value):
                lexer.fail(f"{text} does not fit a double", token.start)
            return value
        number = int(text, 0) if token.kind == "hex" else int(text)
        if not -(2**63) <= number < 2**64:
            lexer.fail(f"{shorten(text)} does not fit 64 bits", token.start)
        return number

    def dialect_attribute(self, name: Token) -> Attribute:
        lexer = self.lexer
        lexer.expect("<")
        token = lexer.expect_kind("string", "a quoted attribute body")
        lexer.expect(">")
        body = lexer.string(token)
        try:
            if name.text == "#accel.expr":
                return parse_expr(body)
            if name.text == "#accel.complex":
                real, imaginary = body.split(" ")
                return complex(float(real), float(imaginary))
        except AccelError as error:
            lexer.fail(error.what, token.start)
        except ValueError:
            lexer.fail(f"'{shorten(body)}' is no complex number", token.start)
        return lexer.fail(f"unknown attribute {shorten(name.text)}", name.start)

    def json(self, text: Any, start: int) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            self.lexer.fail(f"metadata is not JSON: {type(error).__name__}", start)
        if not isinstance(value, dict):
            self.lexer.fail("metadata is not a JSON object", start)
        return value

    def location(self) -> tuple[Location | None, str]:
        """A trailing `loc(...)`: the place, and the name of the pass that made the op."""
        if not self.lexer.accept("loc"):
            return None, ""
        self.lexer.expect("(")
        location, made_by = self.place()
        self.lexer.expect(")")
        return location, made_by

    def place(self) -> tuple[Location | None, str]:
        lexer = self.lexer
        if lexer.accept("unknown"):
            return None, ""
        text = lexer.string(lexer.expect_kind("string", "a file or pass name"))
        if lexer.accept(":"):
            line = lexer.expect_kind("int", "a line")
            if len(line.text) > 9 or line.text.startswith("-"):
                lexer.fail(f"line {shorten(line.text)}", line.start)
            lexer.expect(":")
            lexer.expect_kind("int", "a column")
            return Location(text, int(line.text)), ""
        lexer.expect("(")
        self.deeper("locations")
        inner, _ = self.place()
        self.depth -= 1
        lexer.expect(")")
        if text.startswith("scope ") and inner is not None:
            return Location(inner.file, inner.line, text[6:]), ""
        return inner, text


def fill_dims(values: list[Value], dims: Any) -> None:
    """Puts the expressions of `accel.dims` in place of the `?`, in order.

    Raises ValueError where they do not fit.
    """
    if not isinstance(dims, tuple):
        raise ValueError("accel.dims is not a list of sizes")
    rest = iter(dims)
    for value in values:
        if _UNKNOWN not in value.type.shape:
            continue
        shape: list[Dim] = []
        for dim in value.type.shape:
            item = next(rest, None) if dim is _UNKNOWN else dim
            if isinstance(item, bool) or not isinstance(item, (int, sympy.Expr)):
                raise ValueError("accel.dims has not one size for each '?'")
            shape.append(item)
        value.type = TensorType(tuple(shape), value.type.dtype)
    if next(rest, None) is not None:
        raise ValueError("accel.dims has more sizes than there are '?'")


def fill_arguments(arguments: Sequence[Value], operands: Sequence[Value]) -> None:
    """A region's arguments have the types of its op's operands, symbolic sizes among them.

    Raises ValueError where a `?` has no size to take.
    """
    for argument, operand in zip_longest(arguments, operands):
        if argument is None or _UNKNOWN not in argument.type.shape:
            continue
        if operand is None or str(argument.type) != str(operand.type):
            raise ValueError("a region's arguments are not of the operands' types")
        argument.type = operand.type
