"""From a user's call to flat tensors, and from flat results to what the user gets.

Frontends leave the calling convention in a function's metadata:

    arguments   one entry per tensor: {"name", "kind": "input"}, or {"name", "kind": "state",
                "initial": name of the weight that holds its first value}
    results     one entry per result: {"kind": "output"}, or {"kind": "state" | "mutation",
                "argument": i}: the new value of argument i
    inputs      description (`accel.tree`) of the example call, (args, kwargs)
    outputs     description of what the model returns
    parameters  optional: the model's signature, as `describe_parameters` writes it. With it, a
                call may pass arguments by position or by name and leave out defaults.

A function without this metadata takes its tensors by position and returns a list.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from accel import tree
from accel.errors import ArtifactError, InputError
from accel.runtime.plan import FunctionPlan
from accel.runtime.schema import decode

_KINDS = {
    "positional": inspect.Parameter.POSITIONAL_ONLY,
    "both": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "args": inspect.Parameter.VAR_POSITIONAL,
    "keyword": inspect.Parameter.KEYWORD_ONLY,
    "kwargs": inspect.Parameter.VAR_KEYWORD,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True)
class Argument:
    kind: Literal["input", "state"]
    name: str = ""
    initial: str = ""


@dataclass(frozen=True)
class Result:
    kind: Literal["output", "state", "mutation"]
    argument: int = -1


def describe_parameters(function: Callable[..., Any]) -> list[dict[str, Any]]:
    """A signature as JSON. Defaults that are no constants are left out: such a parameter must be
    passed. Empty if the callable has no signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    found: list[dict[str, Any]] = []
    for p in parameters:
        entry: dict[str, Any] = {"name": p.name, "kind": _NAMES[p.kind]}
        if p.default is not p.empty:
            try:
                leaves, node = tree.flatten(p.default)
            except InputError:
                leaves, node = [None], {}
            if not leaves:
                entry["default"] = node
        found.append(entry)
    return found


class Record(Mapping[str, Any]):
    """An object of a class that is not loaded here: fields by name, attribute, or number."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.__dict__.update(fields)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return list(self.__dict__.values())[key]
        return self.__dict__[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)

    def __repr__(self) -> str:
        return f"Record({self.__dict__!r})"


def classes_of_data(name: str) -> type | None:
    """Classes that a file may have instances of made: named tuples, torch's and transformers' own
    results. Nothing is imported. Anything else becomes a `Record`."""
    module, _, qualified = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        return Record
    if issubclass(found, tuple) and (hasattr(found, "_fields") or module == "torch.return_types"):
        return found
    known = module == "collections" or module.startswith("transformers.")
    results = issubclass(found, Mapping) or module == "transformers.cache_utils"
    return found if known and results else Record


class Convention:
    """The calling convention of one function. Raises ArtifactError if it does not fit the plan."""

    def __init__(self, plan: FunctionPlan, classes: Callable[[str], type | None]) -> None:
        data, self._classes, self._function = plan.metadata, classes, plan.name
        self.arguments: list[Argument] = self._entries(
            Argument, data.get("arguments"), len(plan.inputs), "input"
        )
        self.results: list[Result] = self._entries(
            Result, data.get("results"), len(plan.outputs), "output"
        )
        leaves = [i for i, a in enumerate(self.arguments) if a.kind == "input"]
        if leaves != list(range(len(leaves))):
            raise ArtifactError(f"'{plan.name}' has state before inputs")
        if any(r.kind == "output" for r in self.results[self.outputs_count :]) or any(
            r.kind != "output" and not 0 <= r.argument < len(self.arguments) for r in self.results
        ):
            raise ArtifactError(f"'{plan.name}' has results that belong to nothing")
        self._inputs, self._outputs = data.get("inputs"), data.get("outputs")
        self._args, self._kwargs = self._split()
        self._has_constants = '"value"' in json.dumps(self._inputs, default=str)
        self._parameters = self._signature(data.get("parameters"))

    def _entries(self, cls: Any, entries: Any, count: int, kind: str) -> list[Any]:
        if entries is None:
            return [cls(kind=kind) for _ in range(count)]
        if not isinstance(entries, list) or len(entries) != count:
            raise ArtifactError(f"'{self._function}' has {count} {kind}s and no entry for each")
        defaults = {"name": "", "initial": ""} if cls is Argument else {"argument": -1}
        return [decode(cls, {**defaults, **e} if isinstance(e, dict) else e) for e in entries]

    @property
    def outputs_count(self) -> int:
        return sum(r.kind == "output" for r in self.results)

    @property
    def inputs_count(self) -> int:
        return sum(a.kind == "input" for a in self.arguments)

    def _split(self) -> tuple[list[Any], dict[str, Any]]:
        """Descriptions of the example's positional and keyword arguments."""
        if self._inputs is None:
            return [{"tensor": i} for i in range(self.inputs_count)], {}
        try:
            args, kwargs = self._inputs["tuple"]
            return args["tuple"], {key["value"]: node for key, node in kwargs["dict"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"'{self._function}' has a malformed 'inputs'") from error

    def _signature(self, parameters: Any) -> inspect.Signature | None:
        if not parameters:
            return None
        try:
            made = []
            for p in parameters:
                default = inspect.Parameter.empty
                if "default" in p:
                    default = tree.unflatten(p["default"], (), self._classes)
                made.append(inspect.Parameter(p["name"], _KINDS[p["kind"]], default=default))
            return inspect.Signature(made)
        except (KeyError, TypeError, ValueError, InputError) as error:
            raise ArtifactError(f"'{self._function}' has malformed parameters") from error

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The call's tensors in order. InputError if its structure or a constant differs."""
        if len(args) != len(self._args) or kwargs.keys() != self._kwargs.keys():
            args, kwargs = self._arrange(args, kwargs)
        ordered = {name: kwargs[name] for name in self._kwargs}
        leaves, node = tree.flatten((tuple(args), ordered))
        if self._inputs is None:
            if len(leaves) != self.inputs_count or any(not isinstance(a, Tensor) for a in args):
                raise InputError(f"'{self._function}' takes {self.inputs_count} tensors")
        elif node != self._inputs or self._has_constants:
            aligned = tree.align(self._inputs, node, leaves)
            if aligned is None:
                raise self._difference(node)
            return aligned
        return leaves

    def _arrange(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """The same call with arguments passed as in the example."""
        signature = self._parameters
        if signature is None:
            raise InputError(
                f"'{self._function}' takes {len(self._args)} positional arguments and the keywords "
                f"{sorted(self._kwargs)}; got {len(args)} and {sorted(kwargs)}"
            )
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"'{self._function}': {error}") from error
        bound.apply_defaults()
        values = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                values.update(values.pop(name))
            elif parameter.kind is parameter.VAR_POSITIONAL and values.pop(name):
                raise InputError(f"'{self._function}' was compiled for {len(self._args)} arguments")
        names = list(signature.parameters)[: len(self._args)]
        wanted = [*names, *self._kwargs]
        missing = [n for n in wanted if n not in values]
        if missing:
            raise InputError(f"'{self._function}' was compiled with a value for '{missing[0]}'")
        for name in values.keys() - set(wanted):
            parameter = signature.parameters.get(name)  # type: ignore[assignment]
            default = inspect.Parameter.empty if parameter is None else parameter.default
            if values[name] is not default and tree.flatten(values[name]) != tree.flatten(default):
                raise InputError(
                    f"'{self._function}' was compiled without a value for '{name}'",
                    advice="pass it among the example inputs when you compile",
                )
        return [values[n] for n in names], {n: values[n] for n in self._kwargs}

    def _difference(self, node: tree.Node) -> InputError:
        args, kwargs = node["tuple"]
        given = [*args["tuple"], *(n for _, n in kwargs["dict"])]
        names = [f"positional argument {i}" for i in range(len(self._args))]
        if self._parameters is not None:
            known = list(self._parameters.parameters)[: len(self._args)]
            names = [f"argument '{n}'" for n in known]
        names += [f"argument '{n}'" for n in self._kwargs]
        for name, wanted, got in zip(names, [*self._args, *self._kwargs.values()], given):
            if not tree.same_structure(wanted, got):
                return InputError(
                    f"'{self._function}': {tree.describe_difference(wanted, got, name)}",
                    advice="values other than tensors are fixed when a model is compiled",
                )
        return InputError(f"'{self._function}': the arguments have another structure")

    def unflatten(self, outputs: Sequence[Tensor]) -> Any:
        """What the model returns, from its output tensors."""
        if self._outputs is None:
            return list(outputs)
        return tree.unflatten(self._outputs, outputs, self._classes)
