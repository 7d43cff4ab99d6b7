"""Reads what `accel.ir.printer` writes: MLIR's generic form of the accel dialect.

`parse_module(text)` raises IRParseError with line, column and a caret. Result types of ops with a
definition are inferred again by the verifier, which callers run next; the text may leave out
attributes that have defaults, and value names are free.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import sympy

from accel.errors import AccelError
from accel.ir.expr import parse_expr
from accel.ir.lexer import Lexer, unescape
from accel.ir.module import Function, Location, Module, Op, Region, SymbolInfo, Value
from accel.ir.op import Attribute, definition, has_definition
from accel.ir.types import DTYPE_BY_NAME, Dim, TensorType, symbol
from accel.ir.verify import verify

_MAX_DEPTH = 64


def parse_module(text: str, filename: str = "<text>", *, check: bool = True) -> Module:
    """The module of a text: a `builtin.module`, or bare `accel.func` ops. Verified unless told."""
    parser = _Parser(text, filename)
    module = parser.module()
    if check:
        verify(module)
    return module


class _Parser:
    def __init__(self, text: str, filename: str) -> None:
        self.lexer = Lexer(text, filename)
        self.depth = 0

    # -- structure -------------------------------------------------------------------------

    def module(self) -> Module:
        lexer = self.lexer
        module = Module()
        wrapped = lexer.now.text == '"builtin.module"'
        if wrapped:
            lexer.advance()
            for text in ("(", ")", "(", "{"):
                lexer.expect(text)
            if lexer.now.kind == "block":
                self.block_header()
        while lexer.now.text == '"accel.func"':
            module.add(self.function())
        if wrapped:
            lexer.expect("}")
            lexer.expect(")")
            attributes = self.dictionary() if lexer.now.text == "{" else {}
            module.metadata = self.json(attributes.get("metadata", "{}"))
            self.signature()
            self.location()
        if lexer.now.kind != "end":
            lexer.fail(f"expected \"accel.func\" or the end, found '{lexer.now.text}'")
        return module

    def function(self) -> Function:
        lexer = self.lexer
        start = lexer.advance().start
        for text in ("(", ")", "(", "{"):
            lexer.expect(text)
        function = Function("")
        names: dict[str, Value] = {}
        self.region(function.body, names)
        lexer.expect("}")
        lexer.expect(")")
        attributes = self.dictionary() if lexer.now.text == "{" else {}
        self.signature()
        self.location()
        try:
            function.name = str(attributes["sym_name"])
            for name, low, high in attributes.get("symbols", ()):
                function.symbols[name] = SymbolInfo(low, None if high < 0 else high)
            function.donates = {int(r): int(a) for r, a in attributes.get("donates", ())}
            function.metadata = self.json(attributes.get("metadata", "{}"))
            _fill_dims(list(function.args), attributes.get("accel.dims", ()))
        except (KeyError, TypeError, ValueError) as error:
            lexer.fail(f"bad function attributes: {error}", start)
        return function

    def json(self, text: Any) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (TypeError, ValueError) as error:
            self.lexer.fail(f"metadata is not JSON: {error}")
        if not isinstance(value, dict):
            self.lexer.fail("metadata is not a JSON object")
        return value

    def region(self, region: Region, names: dict[str, Value]) -> None:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            self.lexer.fail(f"regions nest deeper than {_MAX_DEPTH}")
        if self.lexer.now.kind == "block":
            for name, type in self.block_header():
                self.define(names, name, region.add_arg(type))
        while self.lexer.now.text != "}":
            self.op(region, names)
        self.depth -= 1

    def block_header(self) -> list[tuple[str, TensorType]]:
        lexer = self.lexer
        lexer.advance()
        args: list[tuple[str, TensorType]] = []
        if lexer.accept("("):
            while not lexer.accept(")"):
                name = lexer.expect_kind("value", "an argument").text
                lexer.expect(":")
                args.append((name, self.type()))
                if lexer.now.text != ")":
                    lexer.expect(",")
        lexer.expect(":")
        return args

    def define(self, names: dict[str, Value], name: str, value: Value) -> None:
        if name in names:
            self.lexer.fail(f"{name} is defined twice")
        names[name] = value
        hint = name[1:]
        value.name = "" if hint.isdigit() else hint

    def op(self, region: Region, names: dict[str, Value]) -> None:
        lexer = self.lexer
        results: list[str] = []
        while lexer.now.kind == "value":
            results.append(lexer.advance().text)
            if not lexer.accept(","):
                break
        if results:
            lexer.expect("=")
        token = lexer.expect_kind("string", 'an op, as in "accel.add"(...)')
        dialect, _, name = unescape(token.text).partition(".")
        if dialect != "accel" or not has_definition(name):
            lexer.fail(f"unknown op {token.text}", token.start)
        lexer.expect("(")
        operands: list[Value] = []
        while not lexer.accept(")"):
            use = lexer.expect_kind("value", "an operand")
            if use.text not in names:
                lexer.fail(f"{use.text} is not defined before its use", use.start)
            operands.append(names[use.text])
            if lexer.now.text != ")":
                lexer.expect(",")
        regions = self.op_regions()
        attributes = self.dictionary() if lexer.now.text == "{" else {}
        operand_types, result_types = self.signature()
        location, made_by = self.location()
        if [str(t) for t in operand_types] != [str(v.type) for v in operands]:
            given = ", ".join(str(v.type) for v in operands)
            lexer.fail(f"operand types do not match: the operands are ({given})", token.start)
        if len(result_types) != len(results):
            lexer.fail(f"{len(results)} names for {len(result_types)} results", token.start)
        segments = attributes.pop("operand_segments", None)
        dims = attributes.pop("accel.dims", ())
        d = definition(name)
        try:
            if segments is None and d.needs_segments:
                segments = d.default_segments(len(operands))
            op = Op(
                d, operands, attributes, result_types, regions=regions, segments=segments,
                location=location, made_by=made_by,
            )  # fmt: skip
            _fill_dims(op.results, dims)
        except (AccelError, TypeError, ValueError) as error:
            lexer.fail(getattr(error, "what", str(error)), token.start)
        region.append(op)
        for text, value in zip(results, op.results):
            self.define(names, text, value)

    def op_regions(self) -> list[Region]:
        lexer = self.lexer
        regions: list[Region] = []
        if not lexer.accept("("):
            return regions
        while True:
            lexer.expect("{")
            region = Region()
            self.region(region, {})
            regions.append(region)
            lexer.expect("}")
            if not lexer.accept(","):
                break
        lexer.expect(")")
        return regions

    # -- types and attributes --------------------------------------------------------------

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
        body = lexer.text[start + 1 : end - 1]
        while lexer.now.start < end and lexer.now.kind != "end":
            lexer.advance()
        dims: list[Dim] = []
        while "x" in body:
            head, _, rest = body.partition("x")
            if head == "?":
                dims.append(_UNKNOWN)
            elif head.isdigit() and len(head) < 19:
                dims.append(int(head))
            else:
                break
            body = rest
        dtype = DTYPE_BY_NAME.get(body)
        if dtype is None:
            lexer.fail(f"unknown element type '{body}'", start)
        return TensorType(tuple(dims), dtype)

    def dictionary(self) -> dict[str, Any]:
        lexer = self.lexer
        lexer.expect("{")
        result: dict[str, Any] = {}
        while not lexer.accept("}"):
            token = lexer.advance()
            if token.kind not in ("word", "string"):
                lexer.fail(f"expected an attribute name, found '{token.text}'", token.start)
            key = unescape(token.text) if token.kind == "string" else token.text
            if key in result:
                lexer.fail(f"attribute '{key}' is given twice", token.start)
            result[key] = self.attribute() if lexer.accept("=") else None
            if lexer.now.text != "}":
                lexer.expect(",")
        return result

    def attribute(self) -> Attribute:
        lexer = self.lexer
        token = lexer.advance()
        if token.kind == "string":
            return unescape(token.text)
        if token.text in ("true", "false", "unit"):
            return {"true": True, "false": False, "unit": None}[token.text]
        if token.text == "[":
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                lexer.fail(f"attributes nest deeper than {_MAX_DEPTH}")
            items: list[Attribute] = []
            while not lexer.accept("]"):
                items.append(self.attribute())
                if lexer.now.text != "]":
                    lexer.expect(",")
            self.depth -= 1
            return tuple(items)
        if token.kind in ("int", "float", "hex"):
            return self.number(token.text)
        if token.kind == "attr":
            return self.dialect_attribute(token.text)
        if token.text == "complex":
            inner = lexer.now.text if lexer.accept("<") else ""
            inner = lexer.advance().text
            lexer.expect(">")
            token_text = f"complex<{inner}>"
        else:
            token_text = token.text
        if token_text in DTYPE_BY_NAME:
            return DTYPE_BY_NAME[token_text]
        return lexer.fail(f"cannot read the attribute '{token.text}'", token.start)

    def number(self, text: str) -> int | float:
        kind = self.lexer.advance().text if self.lexer.accept(":") else ""
        if text.startswith("0x") and kind.startswith("f"):
            value: float = struct.unpack("<d", struct.pack("<Q", int(text, 16)))[0]
            return value
        if "." in text or kind.startswith("f"):
            return float(text)
        number = int(text, 0)
        if not -(2**63) <= number < 2**64:
            self.lexer.fail(f"{text} does not fit 64 bits")
        return number

    def dialect_attribute(self, name: str) -> Attribute:
        lexer = self.lexer
        lexer.expect("<")
        token = lexer.expect_kind("string", "a quoted attribute body")
        lexer.expect(">")
        body = unescape(token.text)
        if name == "#accel.expr":
            try:
                return parse_expr(body)
            except AccelError as error:
                lexer.fail(error.what, token.start)
        if name == "#accel.complex":
            real, _, imaginary = body.partition(" ")
            return complex(float(real), float(imaginary))
        return lexer.fail(f"unknown attribute {name}", token.start)

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
        text = unescape(lexer.expect_kind("string", "a file or pass name").text)
        if lexer.accept(":"):
            line = int(lexer.expect_kind("int", "a line").text)
            lexer.expect(":")
            lexer.expect_kind("int", "a column")
            return Location(text, line), ""
        lexer.expect("(")
        inner, _ = self.place()
        lexer.expect(")")
        if text.startswith("scope ") and inner is not None:
            return Location(inner.file, inner.line, text[6:]), ""
        return inner, text


_UNKNOWN: sympy.Expr = symbol("unknown__")


def _fill_dims(values: list[Value], dims: Any) -> None:
    """Puts the expressions of `accel.dims` in place of the `?`, in order."""
    rest = list(dims)
    for value in values:
        shape: list[Dim] = []
        for dim in value.type.shape:
            if dim is not _UNKNOWN:
                shape.append(dim)
                continue
            if not rest:
                raise ValueError("more '?' than sizes in accel.dims")
            item = rest.pop(0)
            if not isinstance(item, (int, sympy.Expr)):
                raise ValueError("accel.dims holds something that is no size")
            shape.append(item)
        value.type = TensorType(tuple(shape), value.type.dtype)
    if rest:
        raise ValueError("more sizes in accel.dims than '?'")
