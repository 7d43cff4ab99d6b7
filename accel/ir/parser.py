"""Reads what `accel.ir.printer` writes: MLIR's generic form of the accel dialect.

`parse_module(text)` raises IRParseError with line, column and a caret. Result types of ops with a
definition are inferred again by the verifier, which runs next; the text may leave out attributes
that have defaults, and value names are free. Types, attributes and locations are read by
`accel.ir.reader`.
"""

from __future__ import annotations

from typing import Any, NoReturn

from accel.errors import AccelError
from accel.ir.lexer import shorten
from accel.ir.module import Function, Module, Op, Region, SymbolInfo, Value
from accel.ir.op import definition, has_definition
from accel.ir.reader import Reader, fill_arguments, fill_dims
from accel.ir.types import TensorType
from accel.ir.verify import verify


def parse_module(text: str, filename: str = "<text>", *, check: bool = True) -> Module:
    """The module of a text: a `builtin.module`, or bare `accel.func` ops. Verified unless told.

    Raises IRParseError, and VerifyError for a text that reads well but breaks a rule of the IR.
    """
    module = _Parser(text, filename).module()
    if check:
        verify(module)
    return module


class _Parser(Reader):
    def module(self) -> Module:
        lexer = self.lexer
        module = Module()
        wrapped = lexer.now.text == '"builtin.module"'
        if wrapped:
            lexer.advance()
            self.open_region()
            if lexer.now.kind == "block":
                self.block_header()
        while lexer.now.text == '"accel.func"':
            start = lexer.now.start
            function = self.function()
            if function.name in module.functions:
                lexer.fail(f"function @{shorten(function.name)} is defined twice", start)
            module.add(function)
        if wrapped:
            start, attributes = self.close_region({"accel.metadata"})
            module.metadata = self.json(attributes.get("accel.metadata", "{}"), start)
        if lexer.now.kind != "end" or not (wrapped or module.functions):
            found = shorten(lexer.now.text)
            wanted = '"accel.func"' if module.functions else '"builtin.module" or "accel.func"'
            lexer.fail(f"expected {wanted}, found '{found}'")
        return module

    def function(self) -> Function:
        begin = self.lexer.advance().start
        self.open_region()
        function = Function("")
        self.region(function.body, {})
        names = {"sym_name", "symbols", "donates", "metadata", "accel.dims"}
        start, attributes = self.close_region(names)

        def bad(name: str) -> NoReturn:
            self.lexer.fail(f"the function's attribute '{name}' is malformed", begin)

        name = attributes.get("sym_name")
        if not isinstance(name, str):
            bad("sym_name")
        function.name = name
        for row in _rows(attributes.get("symbols", ()), (str, int, int)):
            if row is None or row[0] in function.symbols:
                bad("symbols")
            function.symbols[row[0]] = SymbolInfo(row[1], None if row[2] < 0 else row[2])
        for row in _rows(attributes.get("donates", ()), (int, int)):
            if row is None or row[0] in function.donates:
                bad("donates")
            function.donates[row[0]] = row[1]
        function.metadata = self.json(attributes.get("metadata", "{}"), start)
        try:
            fill_dims(function.args, attributes.get("accel.dims", ()))
            # Outer ops come first, so the operands of inner ones are complete.
            for op in function.walk():
                for region in op.regions:
                    fill_arguments(region.args, op.operands)
        except ValueError as error:
            self.lexer.fail(str(error), begin)
        return function

    def open_region(self) -> None:
        for text in ("(", ")", "(", "{"):
            self.lexer.expect(text)

    def close_region(self, names: set[str]) -> tuple[int, dict[str, Any]]:
        """After a module's or function's region: its attributes, of these names only."""
        lexer = self.lexer
        lexer.expect("}")
        lexer.expect(")")
        start = lexer.now.start
        attributes = self.dictionary() if lexer.now.text == "{" else {}
        for name in attributes:
            if name not in names:
                lexer.fail(f"unknown attribute '{shorten(name)}'", start)
        self.signature()
        self.location()
        return start, attributes

    def region(self, region: Region, names: dict[str, Value]) -> None:
        self.deeper("regions")
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
            self.lexer.fail(f"{shorten(name)} is defined twice")
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
        dialect, _, name = lexer.string(token).partition(".")
        if dialect != "accel" or not has_definition(name):
            lexer.fail(f"unknown op {shorten(token.text)}", token.start)
        operands = self.operands(names)
        regions = self.op_regions()
        attributes = self.dictionary() if lexer.now.text == "{" else {}
        operand_types, result_types = self.signature()
        location, made_by = self.location()
        if [str(t) for t in operand_types] != [str(v.type) for v in operands]:
            given = ", ".join(str(v.type) for v in operands)
            lexer.fail(f"operand types do not match: the operands are ({given})", token.start)
        if len(result_types) != len(results):
            lexer.fail(f"{len(results)} names for {len(result_types)} results", token.start)
        dims = attributes.pop("accel.dims", ())
        try:
            op = Op(
                definition(name),
                operands,
                attributes,
                result_types,
                regions=regions,
                segments=self.segments(name, attributes, len(operands)),
                location=location,
                made_by=made_by,
            )
            fill_dims(op.results, dims)
        except (AccelError, ValueError) as error:
            lexer.fail(error.what if isinstance(error, AccelError) else str(error), token.start)
        region.append(op)
        for text, value in zip(results, op.results):
            self.define(names, text, value)

    def operands(self, names: dict[str, Value]) -> list[Value]:
        lexer = self.lexer
        lexer.expect("(")
        operands: list[Value] = []
        while not lexer.accept(")"):
            use = lexer.expect_kind("value", "an operand")
            if use.text not in names:
                lexer.fail(f"{shorten(use.text)} is not defined before its use", use.start)
            operands.append(names[use.text])
            if lexer.now.text != ")":
                lexer.expect(",")
        return operands

    def segments(self, name: str, attributes: dict[str, Any], count: int) -> tuple[int, ...] | None:
        """Sizes of the operand groups, where their number alone does not tell.

        Raises ValueError for sizes that are none, TypeInferenceError for sizes that do not fit.
        """
        d = definition(name)
        given = attributes.pop("operand_segments", None)
        if given is None:
            return d.default_segments(count) if d.needs_segments else None
        if not d.needs_segments:
            raise ValueError(f"accel.{name} has no operand_segments")
        if not isinstance(given, tuple) or any(type(size) is not int for size in given):
            raise ValueError("operand_segments is not a list of sizes")
        d.group_operands([None] * count, given)
        return given

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


def _rows(value: Any, kinds: tuple[type, ...]) -> list[Any]:
    """The tuples of a tuple; None for each that has not these kinds of items."""
    if not isinstance(value, tuple):
        return [None]
    return [
        row if isinstance(row, tuple) and tuple(map(type, row)) == kinds else None for row in value
    ]
