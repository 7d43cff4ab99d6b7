"""Prints a module in MLIR's generic form; `accel.ir.parser` reads it back to the same program.

A stock MLIR parser that allows unregistered dialects accepts the text. What MLIR's types cannot
say lives in attributes: symbolic sizes (`accel.dims`: the expressions for the `?` of the results,
in order), symbol ranges and donation. With locations on, an op ends with
`loc("pass"("file.py":12:0))` or `loc("file.py":12:0)`.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache

import sympy
import torch

from accel.errors import VerifyError
from accel.ir.module import Function, Location, Module, Op, Region, Value
from accel.ir.op import Attribute
from accel.ir.types import DTYPE_NAMES, TensorType


def print_module(module: Module, *, locations: bool = False) -> str:
    """The whole module; weights appear as `accel.constant` ops, not as data."""
    attributes: dict[str, Attribute] = {}
    if module.metadata:
        # MLIR allows builtin.module only attributes with a dialect's prefix.
        attributes["accel.metadata"] = json.dumps(module.metadata, sort_keys=True)
    lines = ['"builtin.module"() ({']
    for function in module.functions.values():
        lines.extend(_Printer(locations).function(function))
    tail = f"}}) {_dictionary(attributes)} : () -> ()" if attributes else "}) : () -> ()"
    return "\n".join([*lines, tail]) + "\n"


def print_function(function: Function, *, locations: bool = False) -> str:
    return "\n".join(_Printer(locations).function(function)) + "\n"


def print_op(op: Op) -> str:
    """One op with its operands' names, for error messages and traces."""
    return "\n".join(_Printer(False).op(op, 0))


class _Printer:
    """Prints one region's ops. Inside of another region its names must differ from the outer ones:
    MLIR sees those too, though the dialect's regions do not use them."""

    def __init__(self, locations: bool, outer: _Printer | None = None) -> None:
        self.locations = locations
        self.outer = outer
        # Texts by identity: a model has few different types and lines, and uses each many times.
        self.texts: dict[int, str] = outer.texts if outer else {}
        self.places: dict[tuple[str, int], str] = outer.places if outer else {}
        self.names: dict[Value, str] = {}
        self.taken: set[str] = set()
        self.counter: int = outer.counter if outer else 0  # for values without a name
        self.suffixes: dict[str, int] = {}  # for values of one name

    def function(self, function: Function) -> list[str]:
        attributes: dict[str, Attribute] = {"sym_name": function.name}
        if function.symbols:
            attributes["symbols"] = tuple(
                (name, s.min, -1 if s.max is None else s.max)
                for name, s in function.symbols.items()
            )
        dims = _dims(v.type for v in function.args)
        if dims:
            attributes["accel.dims"] = dims
        if function.donates:
            attributes["donates"] = tuple(sorted(function.donates.items()))
        if function.metadata:
            attributes["metadata"] = json.dumps(function.metadata, sort_keys=True)
        lines = ['  "accel.func"() ({']
        lines.extend(self.region(function.body, 4))
        lines.append(f"  }}) {_dictionary(attributes)} : () -> ()")
        return lines

    def region(self, region: Region, indent: int) -> list[str]:
        pad = " " * (indent - 2)
        args = ", ".join([f"{self.name(v)}: {self.type(v.type)}" for v in region.args])
        lines = [f"{pad}^bb0({args}):" if args else f"{pad}^bb0:"]
        for op in region.ops:
            lines.extend(self.op(op, indent))
        return lines

    def op(self, op: Op, indent: int) -> list[str]:
        pad = " " * indent
        name, type, given = self.name, self.type, op.operands
        names, texts = self.names, self.texts
        operands = ", ".join([names.get(v) or name(v) for v in given])
        nested: list[str] = []
        if op.regions:
            inner = _Printer(self.locations, self)
            for i, region in enumerate(op.regions):
                nested.append(" ({" if i == 0 else f"{pad}}}, {{")
                nested.extend(inner.region(region, indent + 4))
        results = ", ".join([name(v) for v in op.results])
        prefix = f"{results} = " if results else ""
        made = ", ".join([type(v.type) for v in op.results])
        attributes = op.attributes
        if op.segments is not None:
            attributes = {**attributes, "operand_segments": op.segments}
        if "?" in made:
            attributes = {**attributes, "accel.dims": _dims(v.type for v in op.results)}
        text = f" {_dictionary(attributes)}" if attributes else ""
        types = ", ".join([texts.get(id(v.type)) or type(v.type) for v in given])
        made = made if len(op.results) == 1 else f"({made})"
        tail = f"{text} : ({types}) -> {made}{self.location(op)}"
        head = f'{pad}{prefix}"accel.{op.name}"({operands})'
        if not nested:
            return [head + tail]
        return [head + nested[0], *nested[1:], f"{pad}}}){tail}"]

    def location(self, op: Op) -> str:
        if not self.locations or (op.location is None and not op.made_by):
            return ""
        key = (op.made_by, id(op.location))
        text = self.places.get(key)
        if text is None:
            place = _location(op.location) if op.location is not None else "unknown"
            text = f" loc({_string(op.made_by)}({place}))" if op.made_by else f" loc({place})"
            self.places[key] = text
        return text

    def type(self, type: TensorType) -> str:
        key = id(type)
        return self.texts.get(key) or self.texts.setdefault(key, str(type))

    def name(self, value: Value) -> str:
        """The value's hint if it is free, with a number if it is taken, or a number alone.

        A name that is read back and printed again stays as it is.
        """
        known = self.names.get(value)
        if known is not None:
            return known
        hint = value.name
        if not (hint.isascii() and hint.isidentifier()):
            hint = _BAD.sub("_", hint)
        if not hint or hint[0] in "0123456789.":
            name = str(self.counter)
            self.counter += 1
        else:
            name = hint
            while self.is_taken(name):
                number = self.suffix(hint)
                self.suffixes[hint] = number + 1
                name = f"{hint}_{number}"
            self.taken.add(name)
        self.names[value] = f"%{name}"
        return self.names[value]

    def is_taken(self, name: str) -> bool:
        return name in self.taken or (self.outer is not None and self.outer.is_taken(name))

    def suffix(self, hint: str) -> int:
        """The next number to try behind a name."""
        if hint in self.suffixes or self.outer is None:
            return self.suffixes.get(hint, 0)
        return self.outer.suffix(hint)


# What MLIR does not allow in a value's name.
_BAD = re.compile(r"[^A-Za-z0-9_$.]")


def _location(location: Location) -> str:
    place = f"{_string(location.file)}:{location.line}:0"
    return f"{_string('scope ' + location.scope)}({place})" if location.scope else place


def _dims(types: Iterable[TensorType]) -> tuple[sympy.Expr, ...]:
    return tuple(d for t in types for d in t.shape if not isinstance(d, int))


def _dictionary(attributes: Mapping[str, Attribute]) -> str:
    return "{" + ", ".join([f"{k} = {format_attribute(v)}" for k, v in attributes.items()]) + "}"


@lru_cache(4096)
def _string(text: str) -> str:
    if _PLAIN.fullmatch(text):
        return f'"{text}"'
    out = []
    for byte in text.encode("utf-8", "surrogatepass"):
        c = chr(byte)
        out.append(c if 32 <= byte < 127 and c not in '"\\' else f"\\{byte:02X}")
    return '"' + "".join(out) + '"'


_PLAIN = re.compile(r"[ !#-\[\]-~]*+")


def format_attribute(value: Attribute) -> str:
    """One attribute as MLIR text."""
    if type(value) is str:
        return _string(value)
    if type(value) is tuple:
        return "[" + ", ".join([format_attribute(v) for v in value]) + "]"
    if value is None:
        return "unit"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise VerifyError(f"the attribute value {value} does not fit 64 bits")
        return f"{value} : i64" if value < 2**63 else f"{value} : ui64"
    if isinstance(value, float):
        return f"{_float(value)} : f64"
    if isinstance(value, complex):
        return f"#accel.complex<{_string(f'{value.real!r} {value.imag!r}')}>"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if isinstance(value, sympy.Expr):
        return f"#accel.expr<{_string(str(value))}>"
    return "[" + ", ".join([format_attribute(v) for v in value]) + "]"


def _float(value: float) -> str:
    """A decimal that reads back to the same double, or the bits for inf and nan."""
    if not math.isfinite(value):
        return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    if "." not in mantissa:
        mantissa += ".0"
    return f"{mantissa}{e}{exponent}"
