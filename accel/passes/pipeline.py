"""Pipelines as text: `canonicalize,quantize{bits=4,group=64},dce`.

Names are those of registered passes; options are the fields of the pass's dataclass, converted to
the fields' types. Values: numbers, true/false, none, words, "quoted strings", and [a,b] for tuples.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from accel.errors import OptionError
from accel.names import near
from accel.passes.base import Pass, pass_class
from accel.passes.registry import load_passes

_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|([{}\[\],=])|([^\s{}\[\],="]+))')


def parse_pipeline(text: str | Sequence[str | Pass]) -> list[Pass]:
    """The passes of a pipeline: text, or a list of texts and passes.

    Raises OptionError for an unknown pass or option (with near names), for a value that does not
    fit the option's type, and for text that is no pipeline.
    """
    if not isinstance(text, str):
        passes: list[Pass] = []
        for item in text:
            passes.extend([item] if isinstance(item, Pass) else parse_pipeline(item))
        return passes
    return _Reader(text).pipeline()


def format_pipeline(passes: Iterable[Pass]) -> str:
    """Text that `parse_pipeline` reads back; options at their defaults are left out."""
    return ",".join(format_pass(p) for p in passes)


def format_pass(p: Pass) -> str:
    """One pass with the options that differ from their defaults."""
    given = {k: v for k, v in p.options().items() if v != _default(p, k)}
    inner = ",".join(f"{k}={_format(v)}" for k, v in given.items())
    return f"{p.name}{{{inner}}}" if inner else p.name


def _default(p: Pass, name: str) -> Any:
    if not dataclasses.is_dataclass(p):
        return dataclasses.MISSING
    (found,) = (f for f in dataclasses.fields(p) if f.name == name)
    if found.default_factory is not dataclasses.MISSING:
        return found.default_factory()
    return found.default


def _format(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{','.join(_format(v) for v in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    text = str(value)
    if isinstance(value, str) and not re.fullmatch(r"[\w./:+-]+", text):
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return text


class _Reader:
    def __init__(self, text: str) -> None:
        load_passes()
        self.text = text
        self.tokens: list[str] = []
        position = 0
        stripped = text.rstrip()
        while position < len(stripped):
            found = _TOKEN.match(stripped, position)
            if found is None:
                raise OptionError(
                    f"cannot read the pipeline '{text}' at '{stripped[position:]}'",
                    advice="write name{option=value,option=value},name",
                )
            self.tokens.append(found.group().strip())
            position = found.end()

    def peek(self) -> str:
        return self.tokens[0] if self.tokens else ""

    def take(self, wanted: str = "") -> str:
        token = self.tokens.pop(0) if self.tokens else ""
        if not token or (wanted and token != wanted):
            raise OptionError(
                f"the pipeline '{self.text}' has '{token or 'its end'}' where "
                f"{repr(wanted) if wanted else 'a name or value'} belongs",
                advice="write name{option=value,option=value},name",
            )
        return token

    def pipeline(self) -> list[Pass]:
        passes: list[Pass] = []
        while self.tokens:
            if self.peek() == ",":
                self.take()
                continue
            passes.append(self.one())
            if self.tokens:
                self.take(",")
        return passes

    def one(self) -> Pass:
        cls = pass_class(self.take())
        given: dict[str, Any] = {}
        if self.peek() == "{":
            self.take("{")
            while self.peek() != "}":
                name = self.take()
                self.take("=")
                given[name] = self.value()
                if self.peek() != "}":
                    self.take(",")
            self.take("}")
        return make_pass(cls, given)

    def value(self) -> Any:
        if self.peek() != "[":
            return self.take()
        self.take("[")
        items: list[Any] = []
        while self.peek() != "]":
            items.append(self.value())
            if self.peek() != "]":
                self.take(",")
        self.take("]")
        return items


def make_pass(cls: type[Pass], given: dict[str, Any]) -> Pass:
    """The pass with options from text, or from JSON values of the right types."""
    fields: tuple[dataclasses.Field[Any], ...] = (
        dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    )
    known = {f.name for f in fields if f.init}
    hints = typing.get_type_hints(cls) if known else {}
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            advice = near(name, known) if known else "it has no options"
            raise OptionError(f"pass '{cls.name}' has no option '{name}'", advice=advice)
        try:
            options[name] = _convert(value, hints[name])
        except (ValueError, TypeError):
            wanted = getattr(hints[name], "__name__", None) or str(hints[name])
            if typing.get_origin(hints[name]) is not None:
                wanted = str(hints[name]).replace("typing.", "")
            raise OptionError(
                f"pass '{cls.name}': option {name} = {value} does not fit its type",
                advice=f"it takes {wanted}",
            ) from None
    return cls(**options)


def _convert(value: Any, hint: Any) -> Any:
    """A value of the annotated type from its text; ValueError if it does not fit."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in sorted(args, key=lambda a: a is str):  # a word is a str as the last resort
            try:
                return _convert(value, option)
            except ValueError:
                continue
        raise ValueError(value)
    if origin is typing.Literal:
        for option in args:
            if _unquote(value) in (option, str(option)):
                return option
        raise ValueError(value)
    if origin in (tuple, list, typing.Sequence) or hint in (tuple, list):
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(v, args[0] if args else str) for v in items)
    if isinstance(value, (list, tuple)):
        raise ValueError(value)
    return _convert_plain(value, hint)


def _convert_plain(value: Any, hint: Any) -> Any:
    if hint is type(None):
        if value is None or str(value).lower() == "none":
            return None
        raise ValueError(value)
    if hint is bool:
        words = {"true": True, "false": False, "1": True, "0": False}
        if str(value).lower() not in words:
            raise ValueError(value)
        return words[str(value).lower()]
    if hint is int:
        if isinstance(value, (bool, float)):
            raise ValueError(value)
        return int(str(value), 0) if isinstance(value, str) else int(value)
    if hint is float:
        return float(value)
    return _unquote(value) if hint is str else value


def _unquote(value: Any) -> Any:
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == '"':
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value
