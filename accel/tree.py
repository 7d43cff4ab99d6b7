"""Nested inputs and outputs as a flat list of tensors plus a JSON-able description.

A compiled program takes and returns flat lists of tensors. `flatten` turns any arguments or results
(tuples, lists, dicts, named tuples, dataclasses, model outputs, caches) into the tensors, in order,
and a description; `unflatten` goes back. Constants (None, numbers, strings, dtypes, devices) are
part of the description, so two calls fit the same program if their descriptions are equal.

Descriptions (JSON):
    {"tensor": i}                                   leaf i
    {"int": i}, {"float": i}, {"bool": i}           leaf i is a 0-d tensor, wanted as a number
    {"value": 3}                                    None, bool, int, float, str
    {"complex": [re, im]}, {"dtype": "float32"}, {"device": "cpu"}, {"torch": "channels_last"}
    {"type": "module:Name"}                         a class itself
    {"tuple": [...]}, {"list": [...]}, {"dict": [[key, node], ...]}   (keys are descriptions too)
    {"class": "module:Name", "args": [...]}         a named tuple
    {"class": "module:Name", "items": [[k, node]]}  a dict-like class, e.g. a model's output
    {"class": "module:Name", "fields": [[k, node]]} an object with attributes that hold tensors
Reading one imports nothing: classes come from modules already loaded, or from `classes`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.errors import InputError

Node = dict[str, Any]
_SHOWN_KEYS = 8
_PLAIN = (bool, int, float, str)
_NUMBERS: dict[str, Any] = {"int": torch.SymInt, "float": torch.SymFloat, "bool": torch.SymBool}


def flatten(value: Any) -> tuple[list[Any], Node]:
    """The leaves of `value` (tensors and SymInts) in order, and its description.

    Raises InputError for values that cannot be described (functions, open files...).
    """
    leaves: list[Any] = []
    return leaves, _flatten(value, leaves, set())


def _flatten(value: Any, leaves: list[Any], open_: set[int]) -> Node:
    if isinstance(value, Tensor):
        leaves.append(value)
        return {"tensor": len(leaves) - 1}
    for kind, symbolic in _NUMBERS.items():
        if isinstance(value, symbolic):
            leaves.append(value)
            return {kind: len(leaves) - 1}
    simple = _describe_constant(value)
    if simple is not None:
        return simple
    if id(value) in open_:
        raise InputError(f"a {type(value).__name__} contains itself")
    open_.add(id(value))
    try:
        return _flatten_container(value, leaves, open_)
    finally:
        open_.discard(id(value))


def _describe_constant(value: Any) -> Node | None:
    if value is None or type(value) in _PLAIN:
        return {"value": value}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.memory_format, torch.layout)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, type):
        return {"type": f"{value.__module__}:{value.__qualname__}"}
    return None


def _flatten_container(value: Any, leaves: list[Any], open_: set[int]) -> Node:
    def many(items: Sequence[Any]) -> list[Node]:
        return [_flatten(v, leaves, open_) for v in items]

    def pairs(items: Any) -> list[list[Any]]:
        return [[k, _flatten(v, leaves, open_)] for k, v in items]

    if type(value) is tuple or type(value) is torch.Size:
        return {"tuple": many(value)}
    if type(value) is list:
        return {"list": many(value)}
    if type(value) is dict:
        return {"dict": [[_key(k), _flatten(v, leaves, open_)] for k, v in value.items()]}
    name = f"{type(value).__module__}:{type(value).__qualname__}"
    if isinstance(value, tuple):  # a named tuple, or torch.return_types
        return {"class": name, "args": many(value)}
    if isinstance(value, Mapping):
        return {"class": name, "items": pairs((_key(k), v) for k, v in value.items())}
    if dataclasses.is_dataclass(value):
        return {
            "class": name,
            "fields": pairs((f.name, getattr(value, f.name)) for f in dataclasses.fields(value)),
        }
    if isinstance(value, (int, str, float)):  # subclasses: enums, numpy scalars
        return {"value": value.value if hasattr(value, "value") else type(value).__mro__[1](value)}
    if hasattr(value, "__dict__") and not callable(value):
        return {"class": name, "fields": pairs(vars(value).items())}
    raise InputError(
        f"a value of type {type(value).__name__} is neither a tensor nor a container of tensors",
        advice="pass tensors, numbers, strings, and tuples, lists, dicts or objects of these",
    )


def _key(key: Any) -> Any:
    node = _describe_constant(key)
    if node is None:
        raise InputError(f"a dict key of type {type(key).__name__}")
    return node


def unflatten(
    node: Node,
    leaves: Sequence[Any],
    classes: Mapping[str, type] | Callable[[str], type | None] | None = None,
) -> Any:
    """The value that `flatten` described, over new leaves.

    A class that is not loaded falls back to a dict (of items or fields) or a tuple.
    Raises InputError for a malformed description.
    """
    try:
        return _unflatten(node, leaves, _resolver(classes))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"malformed description of a structure: {error}") from error


def _resolver(
    classes: Mapping[str, type] | Callable[[str], type | None] | None,
) -> Callable[[str], type | None]:
    if callable(classes):
        return classes
    known = classes or {}
    return lambda name: known[name] if name in known else class_named(name)


def class_named(name: str) -> type | None:
    """The class of a description ("module:Name"), if its module is loaded."""
    module, _, qualified = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def _unflatten(node: Node, leaves: Sequence[Any], resolve: Callable[[str], type | None]) -> Any:
    if "class" in node:
        return _make_object(node, leaves, resolve)
    ((kind, body),) = node.items()
    match kind:
        case "tensor":
            return leaves[body]
        case "int" | "float" | "bool":
            if isinstance(leaves[body], _NUMBERS[kind]):
                return leaves[body]
            return {"int": int, "float": float, "bool": bool}[kind](leaves[body])
        case "value":
            return body
        case "complex":
            return complex(*body)
        case "dtype":
            dtype = getattr(torch, body)
            if not isinstance(dtype, torch.dtype):
                raise InputError(f"'{body}' is no dtype")
            return dtype
        case "device":
            return torch.device(body)
        case "torch":
            known = getattr(torch, body)
            if not isinstance(known, (torch.memory_format, torch.layout)):
                raise InputError(f"'{body}' is neither a memory format nor a layout")
            return known
        case "type":
            return resolve(body)
        case "tuple":
            return tuple(_unflatten(n, leaves, resolve) for n in body)
        case "list":
            return [_unflatten(n, leaves, resolve) for n in body]
        case "dict":
            return {_unflatten(k, (), resolve): _unflatten(n, leaves, resolve) for k, n in body}
        case _:
            raise InputError(f"malformed description of a structure: '{kind}'")


def _make_object(node: Node, leaves: Sequence[Any], resolve: Callable[[str], type | None]) -> Any:
    cls = resolve(node["class"])
    if "args" in node:
        args = [_unflatten(n, leaves, resolve) for n in node["args"]]
        if cls is None or not issubclass(cls, tuple):
            return tuple(args)
        return cls(*args) if hasattr(cls, "_fields") else cls(args)
    if "items" in node:
        items = [(_unflatten(k, (), resolve), v) for k, v in node["items"]]
        made = {k: _unflatten(v, leaves, resolve) for k, v in items}
        if cls is None or not issubclass(cls, Mapping):
            return made
        if dataclasses.is_dataclass(cls) or issubclass(cls, OrderedDict):
            return cls(**made) if dataclasses.is_dataclass(cls) else cls(made)
        return cls(made)  # type: ignore[call-arg]
    fields = {k: _unflatten(v, leaves, resolve) for k, v in node["fields"]}
    if cls is None:
        return fields
    result: Any = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(result, name, value)
    return result


def align(wanted: Node, got: Node, leaves: Sequence[Any]) -> list[Any] | None:
    """The leaves in the order of `wanted`; None if that describes another structure.

    The order of a dict's keys does not matter. Constants are equal if their types are, too: a
    program that multiplies by 3 is not the one that multiplies by 3.0.
    """
    found: dict[int, int] = {}
    if not _align(wanted, got, found):
        return None
    return [leaves[found[i]] for i in range(len(found))]


def same_structure(wanted: Node, got: Node) -> bool:
    """Whether calls of these descriptions are calls of one program."""
    return _align(wanted, got, {})


def _align(wanted: Node, got: Node, found: dict[int, int]) -> bool:
    if wanted.keys() != got.keys() or wanted.get("class") != got.get("class"):
        return False
    for kind in ("tensor", *_NUMBERS):
        if kind in wanted:
            found[wanted[kind]] = got[kind]
            return True
    for kind in ("tuple", "list", "args"):
        if kind in wanted:
            pairs = list(zip(wanted[kind], got[kind]))
            same = len(wanted[kind]) == len(got[kind])
            return same and all(_align(w, g, found) for w, g in pairs)
    for kind in ("dict", "items", "fields"):
        if kind in wanted:
            expected, items = wanted[kind], got[kind]
            if kind == "dict":
                expected, items = (sorted(each, key=_by_key) for each in (expected, items))
            return [k for k, _ in expected] == [k for k, _ in items] and all(
                _align(w, g, found) for (_, w), (_, g) in zip(expected, items)
            )
    return wanted == got and repr(list(wanted.values())) == repr(list(got.values()))


def _by_key(item: list[Any]) -> str:
    return repr(item[0])


def describe_difference(wanted: Node, got: Node, path: str = "") -> str:
    """Where two descriptions first differ, for an error message; "" if they are equal."""
    if same_structure(wanted, got):
        return ""
    if wanted.keys() == got.keys():
        for kind in ("tuple", "list", "args"):
            if kind in wanted and len(wanted[kind]) == len(got[kind]):
                for i, (w, g) in enumerate(zip(wanted[kind], got[kind])):
                    if not same_structure(w, g):
                        return describe_difference(w, g, f"{path}[{i}]")
        for kind in ("dict", "items", "fields"):
            if kind in wanted and [k for k, _ in wanted[kind]] == [k for k, _ in got[kind]]:
                for (key, w), (_, g) in zip(wanted[kind], got[kind]):
                    if not same_structure(w, g):
                        name = key if isinstance(key, str) else next(iter(key.values()))
                        return describe_difference(w, g, f"{path}.{name}")
    return f"{path or 'the arguments'}: expected {_short(wanted)}, got {_short(got)}"


def _short(node: Node) -> str:
    if "tensor" in node:
        return "a tensor"
    if "value" in node:
        return repr(node["value"])
    if "dict" in node and len(node["dict"]) <= _SHOWN_KEYS:
        return f"a dict of {', '.join(repr(next(iter(k.values()))) for k, _ in node['dict'])}"
    for kind in ("tuple", "list", "dict"):
        if kind in node:
            return f"a {kind} of {len(node[kind])}"
    return str(node.get("class", node))
