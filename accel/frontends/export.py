"""Whole-graph capture: a model and example inputs become a `Module` with one function, `main`.

    module = capture(model, (x,), {"mask": m}, dynamic_shapes={"mask": {0: "batch"}})

Parameters and buffers go to the weight store, tied ones once. Buffers that the model writes
(running statistics) are state: an argument, a result, and a donation. Inputs and outputs may be any
nest of containers; `Function.metadata` tells the calling side how they map to the flat arguments:

    arguments   one entry an argument: {"name", "kind": "input" | "state", "initial": weight name}
    results     one entry a result: {"kind": "output"}, or {"kind": "state" | "mutation",
                "argument": i}: the new value of argument i
    inputs, outputs    descriptions for `accel.tree.unflatten`
    guards      conditions on symbols, besides their ranges, under which the program is valid
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

import accel.frontends.aten  # noqa: F401  (fills the table)
from accel import tree
from accel.errors import AccelError, CaptureError, InputError
from accel.frontends import autocast
from accel.frontends.calls import Call, check_plain, storage_key, written_storages
from accel.frontends.dynamic import DynamicShapes
from accel.frontends.fakes import fake_weights
from accel.frontends.importer import Importer
from accel.frontends.trace import FrameLocator, record
from accel.ir.module import Function, Module, Value
from accel.ir.types import Shape, TensorType, same_shape


def capture(
    model: nn.Module | Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    small: bool = False,
    selections: bool = False,
) -> Module:
    """The program that `model(*args, **kwargs)` runs, for inference.

    Args:
        model: a module (in training mode its random ops and statistics are captured too), or any
            callable over tensors.
        args, kwargs: example inputs. Tensors become arguments; other values are fixed.
        dynamic_shapes: as for `torch.export`: per input (by name, or in order) a dict from axis to
            `torch.export.Dim`, or to a name, e.g. `{"input_ids": {0: "batch", 1: "length"}}`.
        small: dynamic axes of which the example has no or one element are static.
        selections: rows that a mask selects are computed for all rows; whoever asks for it compares
            the program with the model (`accel.frontends.selections`).

    Raises CaptureError, with the user's file and line, for control flow or sizes that depend on
    data, for a dynamic size that the model fixes, and for what the IR cannot express.
    """
    return _Capture(model, args, kwargs or {}, dynamic_shapes, small, selections).module


def small_sizes(
    model: nn.Module | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
) -> list[tuple[int, int, int]]:
    """(input, axis, size) of each dynamic axis of which a call has no or one element, as its
    declaration allows: a program for more elements says nothing about such a call, which gets one
    of its own (`capture(..., small=True)`)."""
    leaves, inputs = tree.flatten((tuple(args), dict(kwargs)))
    names = _leaf_names(model, inputs, len(leaves))
    return DynamicShapes(dynamic_shapes, inputs, names, model).small_sizes(leaves)


class _Probe(nn.Module):
    """Calls the model and keeps its buffers as they are afterwards: some are assigned anew."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.after: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.model(*args, **kwargs)
        self.after = dict(self.model.named_buffers(remove_duplicate=False))
        return result


class _Capture:
    def __init__(
        self,
        model: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        dynamic_shapes: Any,
        small: bool = False,
        selections: bool = False,
    ) -> None:
        self.selections = selections
        if not callable(model):
            raise CaptureError(
                f"a model is a torch.nn.Module or a function, not a {type(model).__name__}"
            )
        self.leaves, self.inputs = tree.flatten((tuple(args), dict(kwargs)))
        for leaf in self.leaves:
            if not isinstance(leaf, Tensor):
                raise InputError("example inputs must be concrete: got a symbolic number")
            check_plain(leaf)
        self.names = _leaf_names(model, self.inputs, len(self.leaves))
        self.dynamic = DynamicShapes(dynamic_shapes, self.inputs, self.names, model, small)
        self.fake_mode = FakeTensorMode(
            allow_non_fake_inputs=True, shape_env=self.dynamic.shape_env
        )
        # PyTorch's own memory of results costs as much again as a result; ours has them already.
        self.fake_mode.cache_enabled = False
        self.fakes = [
            self.dynamic.fake(self.fake_mode, i, leaf) for i, leaf in enumerate(self.leaves)
        ]
        self.dynamic.relate()
        self.weights = _named_weights(model)
        self.module = self._build(model)

    def _build(self, model: Any) -> Module:
        to_cpu = all(leaf.device.type == "cpu" for leaf in self.leaves)
        # A tied weight is one fake, stored once.
        fakes = fake_weights(self.fake_mode, self.weights, to_cpu=to_cpu)
        calls, result, after = self._trace(model, fakes)
        with autocast.suspended(autocast.current()):
            return self._import(fakes, calls, result, after)

    def _import(
        self, fakes: dict[str, Tensor], calls: list[Call], result: Any, after: dict[str, Tensor]
    ) -> Module:
        """The module of what was recorded."""
        outputs, description = tree.flatten(result)
        self.dynamic.check_counts()
        symbols = self.dynamic.symbols()
        module = Module()
        function = module.add(Function("main"))
        importer = Importer(function, module, symbols)
        written = written_storages(calls)
        arguments = self._add_inputs(importer)
        states = self._add_weights(importer, fakes, after, written, arguments)
        importer.run(calls, [*outputs, *after.values()])
        self._finish(importer, arguments, states, outputs)
        function.symbols = symbols.infos()
        function.metadata = {
            **function.metadata,
            "arguments": arguments,
            "inputs": self.inputs,
            "outputs": description,
            "guards": self.dynamic.guards(symbols),
        }
        module.metadata["fallbacks"] = dict(sorted(importer.fallbacks.items()))
        importer.aliases.close()
        return module

    def _trace(
        self, model: Any, fakes: dict[str, Tensor]
    ) -> tuple[list[Call], Any, dict[str, Tensor]]:
        """Runs the model on fakes. Returns calls, result, and buffers assigned anew."""
        locate = FrameLocator()
        where = self.dynamic.watch(locate)
        args, kwargs = tree.unflatten(self.inputs, self.fakes)
        try:
            if not isinstance(model, nn.Module):
                calls, result = record(
                    lambda: model(*args, **kwargs), self.fake_mode, where, self.selections
                )
                return calls, result, {}
            probe = _Probe(model)
            replaced = {f"model.{name}": t for name, t in fakes.items()}
            with locate.follow(model):
                calls, result = record(
                    lambda: torch.func.functional_call(
                        probe, replaced, args, kwargs, tie_weights=False
                    ),
                    self.fake_mode,
                    where,
                    self.selections,
                )
        except AccelError:
            raise
        except Exception as error:
            raise self.dynamic.explain(error, locate.place_of(error)) from error
        after = {
            name: t for name, t in probe.after.items() if name in fakes and t is not fakes[name]
        }
        return calls, result, after

    def _add_inputs(self, importer: Importer) -> list[dict[str, Any]]:
        function = importer.function
        arguments: list[dict[str, Any]] = []
        for name, fake in zip(self.names, self.fakes):
            if fake in importer.aliases:
                value = function.body.add_arg(importer.type(fake), name)
            else:
                value = function.body.add_arg(importer.type(fake), name)
                importer.aliases.add_root(fake, value)
            arguments.append({"name": name, "kind": "input"})
        return arguments

    def _add_weights(
        self,
        importer: Importer,
        fakes: dict[str, Tensor],
        after: dict[str, Tensor],
        written: set[int],
        arguments: list[dict[str, Any]],
    ) -> dict[str, int]:
        """Constants, and arguments for those that the model writes. Returns state -> argument."""
        states: dict[str, int] = {}
        for name, fake in fakes.items():
            if fake in importer.aliases:
                continue  # tied to one that came before
            real = self.weights[name]
            if storage_key(fake) in written or name in after:
                initial = importer.module.weights.add(name, real.detach().cpu(), origin=name)
                states[name] = len(importer.function.args)
                value = importer.function.body.add_arg(importer.type(fake), name)
                importer.aliases.add_root(fake, value)
                arguments.append({"name": name, "kind": "state", "initial": initial})
            else:
                importer.aliases.add_root(fake, None, _constant_maker(importer, name, real))
        for name, assigned in after.items():
            fakes[name] = assigned
        self._final = {name: fakes[name] for name in states}
        return states

    def _finish(
        self,
        importer: Importer,
        arguments: list[dict[str, Any]],
        states: dict[str, int],
        outputs: Sequence[Any],
    ) -> None:
        """The return, with new values of state and of written inputs after the outputs."""
        function = importer.function
        importer.b.location = None
        values: list[Value] = []
        results: list[dict[str, Any]] = []
        for leaf in outputs:
            values.append(importer.result(leaf))
            results.append({"kind": "output"})
        final: list[tuple[str, int, Tensor]] = [
            ("mutation", i, fake)
            for i, fake in enumerate(self.fakes)
            if importer.aliases.written(fake)
        ]
        final += [("state", index, self._final[name]) for name, index in states.items()]
        for kind, index, tensor in final:
            self._check_size(importer, arguments[index]["name"], function.args[index], tensor)
            function.donates[len(values)] = index
            values.append(importer.b.cast_to(importer(tensor), function.args[index].dtype))
            results.append({"kind": kind, "argument": index})
        importer.b.op("return", values)
        function.metadata["results"] = results

    def _check_size(self, importer: Importer, name: str, before: Value, after: Tensor) -> None:
        """A program's state keeps its size."""

        def text(shape: Shape) -> str:
            return f"[{', '.join(map(str, shape))}]"

        if not same_shape(before.shape, importer.shape(after.shape)):
            raise CaptureError(
                f"the model gives its buffer '{name}' another size: "
                f"{text(before.shape)} becomes {text(importer.shape(after.shape))}",
                advice="let it have its largest size before you compile",
            )


def _constant_maker(importer: Importer, name: str, real: Tensor) -> Callable[[], Value]:
    def make() -> Value:
        weights = importer.module.weights
        stored = weights.add_lazy(
            name,
            TensorType(tuple(real.shape), real.dtype),
            real.detach,
            origin=name,
        )
        return importer.b.constant(stored, weights.type(stored))

    return make


def _named_weights(model: Any) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        return {}
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise CaptureError(
                f"'{name}' of a lazy module has no size yet",
                advice="call the model once before you compile it",
            )
    return named


def _leaf_names(model: Any, inputs: tree.Node, count: int) -> list[str]:
    """A name for each tensor: the parameter it is passed for, and its place inside of it."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    args, kwargs = inputs["tuple"]
    names: list[str] = [""] * count
    for i, node in enumerate(args["tuple"]):
        name = positional[i] if i < len(positional) else f"arg{i}"
        _name_leaves(node, name, names)
    for key, node in kwargs["dict"]:
        _name_leaves(node, str(key["value"]), names)
    return names


def _name_leaves(node: tree.Node, path: str, names: list[str]) -> None:
    if "tensor" in node:
        names[node["tensor"]] = path
        return
    for kind in ("tuple", "list", "args"):
        for i, child in enumerate(node.get(kind, ())):
            _name_leaves(child, f"{path}.{i}", names)
    for kind in ("dict", "items", "fields"):
        for key, child in node.get(kind, ()):
            label = key if isinstance(key, str) else next(iter(key.values()))
            _name_leaves(child, f"{path}.{label}", names)
