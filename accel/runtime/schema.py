"""From JSON to dataclasses and back, strictly.

`decode(cls, value)` builds the dataclass from parsed JSON and accepts nothing else than its fields
with their declared types: unknown or missing keys, wrong types, and numbers out of range are
ArtifactErrors that name the place (`functions.main.steps[3].kind`). `parse` reads JSON text with
limits: no duplicate keys, no NaN or infinity (they are written {"float": "inf"}), bounded depth.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, TypeVar

from accel.errors import ArtifactError

T = TypeVar("T")
_MAX_DEPTH = 64
_MAX_INT = 1 << 63


def parse(data: bytes, what: str) -> Any:
    """Parsed JSON. ArtifactError, naming `what`, if it is malformed, too deep or ambiguous."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=functools.partial(_no_duplicates, what),
            parse_constant=functools.partial(_no_constants, what),
        )
    except (UnicodeDecodeError, ValueError) as error:
        raise ArtifactError(f"{what} is not JSON: {error}") from error
    except RecursionError as error:
        raise ArtifactError(f"{what} is nested too deep") from error


def _no_duplicates(what: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ArtifactError(f"{what} has a key twice in one object")
    return found


def _no_constants(what: str, text: str) -> Any:
    raise ArtifactError(f"{what} holds {text}, which is not JSON")


def dump(value: Any) -> bytes:
    """Canonical JSON of a dataclass (or plain data): sorted only where dicts have no order."""
    text = json.dumps(encode(value), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode()


def encode(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, inf and nan to {"float": text}; the rest is JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def decode(cls: type[T], value: Any, path: str = "") -> T:
    """`value` as an instance of the dataclass `cls`; ArtifactError where it does not fit."""
    decoder: typing.Callable[[Any, str], Any] = _decoder(typing.cast(Any, cls))
    return typing.cast(T, decoder(value, path))


def _fail(path: str, what: str) -> ArtifactError:
    return ArtifactError(f"the manifest is malformed: {what}", where=path or "the top level")


@functools.cache
def _decoder(kind: Any) -> typing.Callable[[Any, str], Any]:
    """A function (value, path) -> decoded value, for a type annotation."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass_decoder(typing.cast(type, kind))
    if kind is Any:
        return _decode_any
    if origin is typing.Literal:
        return lambda value, path: _one_of(args, value, path)
    if origin is list:
        return _list_decoder(_decoder(args[0]))
    if origin is tuple:
        return _tuple_decoder([_decoder(a) for a in args])
    if origin is dict:
        return _dict_decoder(args[0] is int, _decoder(args[1]))
    if origin in (typing.Union, types.UnionType):
        return _union_decoder(args)
    if kind in (int, float, str, bool, type(None)):
        return lambda value, path: _scalar(kind, value, path)
    raise TypeError(f"no decoder for {kind}")


def _one_of(allowed: tuple[Any, ...], value: Any, path: str) -> Any:
    if isinstance(value, str) and value in allowed:
        return value
    raise _fail(path, f"expected one of {', '.join(map(repr, allowed))}")


def _scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < _MAX_INT else value
    if type(value) is not kind:
        raise _fail(path, f"expected {kind.__name__}, got {type(value).__name__}")
    if type(value) is int and not -_MAX_INT <= value < _MAX_INT:
        raise _fail(path, "an integer that needs more than 64 bits")
    return value


def _decode_any(value: Any, path: str, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise _fail(path, "nested too deep")
    if isinstance(value, dict):
        if value.keys() == {"float"} and value["float"] in ("inf", "-inf", "nan"):
            return float(value["float"])
        return {k: _decode_any(v, path, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_decode_any(v, path, depth + 1) for v in value]
    if type(value) is int:
        _scalar(int, value, path)
    return value


def _list_decoder(item: typing.Callable[[Any, str], Any]) -> typing.Callable[[Any, str], Any]:
    def run(value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise _fail(path, f"expected a list, got {type(value).__name__}")
        return [item(v, f"{path}[{i}]") for i, v in enumerate(value)]

    return run


def _tuple_decoder(
    items: list[typing.Callable[[Any, str], Any]],
) -> typing.Callable[[Any, str], Any]:
    def run(value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) != len(items):
            raise _fail(path, f"expected a list of {len(items)}")
        return tuple(f(v, f"{path}[{i}]") for i, (f, v) in enumerate(zip(items, value)))

    return run


def _dict_decoder(
    int_keys: bool, item: typing.Callable[[Any, str], Any]
) -> typing.Callable[[Any, str], Any]:
    def run(value: Any, path: str) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise _fail(path, f"expected an object, got {type(value).__name__}")
        return {
            _int_key(k, path) if int_keys else k: item(v, f"{path}.{k}") for k, v in value.items()
        }

    return run


def _int_key(key: str, path: str) -> int:
    if len(key) > 18 or not key.isascii() or not key.isdigit() or str(int(key)) != key:
        raise _fail(path, f"expected a number as key, got '{key[:40]}'")
    return int(key)


def _union_decoder(kinds: tuple[Any, ...]) -> typing.Callable[[Any, str], Any]:
    decoders = [_decoder(k) for k in kinds]

    def run(value: Any, path: str) -> Any:
        for decoder in decoders:
            try:
                return decoder(value, path)
            except ArtifactError:
                continue
        raise _fail(path, f"expected {' or '.join(getattr(k, '__name__', str(k)) for k in kinds)}")

    return run


def _dataclass_decoder(cls: type) -> typing.Callable[[Any, str], Any]:
    hints = typing.get_type_hints(cls)
    fields = {f.name: _decoder(hints[f.name]) for f in dataclasses.fields(cls)}
    names = fields.keys()

    def run(value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            raise _fail(path, f"expected an object, got {type(value).__name__}")
        if value.keys() != names:
            unknown, missing = sorted(value.keys() - names), sorted(names - value.keys())
            raise _fail(path, f"unknown keys {unknown[:5]}" if unknown else f"no {missing[:5]}")
        prefix = f"{path}." if path else ""
        return cls(**{name: item(value[name], prefix + name) for name, item in fields.items()})

    return run
