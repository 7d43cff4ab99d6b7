"""From a kernel-level function to a plan: one step for each op that does something.

Constants become weights, VIEW ops become view steps, kernels and calls their steps; every other op
must have an ATen form and is run by torch, visibly. An op with none is a BackendError: the passes
before should have decomposed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from accel.compiler.loops import loop_options
from accel.compiler.sizes import size_expr
from accel.errors import BackendError
from accel.ir.expr import parse_expr
from accel.ir.module import Function, Module, Op, Value
from accel.ir.op import Trait
from accel.ir.types import Dim
from accel.runtime.plan import FunctionPlan, SizeExpr, Step, ValueKind, ValueSpec, dtype_name


@dataclass(frozen=True)
class KernelSymbol:
    """Where a kernel op's code is: its symbol and the sizes to pass after the buffers.

    `inplace` has pairs (result, input) where the result may overwrite the input, `updates` those
    where it starts as a copy of the input, or is its memory. A GPU kernel may
    be several launches, each a step of its own, with buffers of `scratch` bytes between them, of
    which those in `zeroed` are zeros at the start.
    """

    symbol: str
    dims: tuple[Dim, ...] = ()
    inplace: tuple[tuple[int, int], ...] = ()
    updates: tuple[tuple[int, int], ...] = ()
    launches: tuple[Launch, ...] = ()
    scratch: tuple[SizeExpr, ...] = ()
    zeroed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Launch:
    """One launch: ("input" | "result" | "scratch", number) of what it reads and writes, in order.

    `inplace` has pairs (position in `writes`, position in `reads`). So has `updates`, where what is
    written starts as a copy of what is read, or is the same memory.
    """

    symbol: str
    reads: tuple[tuple[str, int], ...]
    writes: tuple[tuple[str, int], ...]
    sizes: tuple[str, ...]
    inplace: tuple[tuple[int, int], ...] = ()
    updates: tuple[tuple[int, int], ...] = ()


def lower_function(
    function: Function, module: Module, kernels: Mapping[Op, KernelSymbol]
) -> FunctionPlan:
    """The plan of one function. New constants (from `full`) are added to the module's weights."""
    return _Lowering(function, module, kernels).run()


class _Lowering:
    def __init__(
        self, function: Function, module: Module, kernels: Mapping[Op, KernelSymbol]
    ) -> None:
        self.function = function
        self.module = module
        self.kernels = kernels
        self.values: list[ValueSpec] = []
        self.ids: dict[Value, int] = {}
        self.weights: dict[str, int] = {}
        self.steps: list[Step] = []

    def run(self) -> FunctionPlan:
        function = self.function
        inputs = [self.new(a, "input", name=a.name, index=i) for i, a in enumerate(function.args)]
        for op in function.ops:
            if op.has(Trait.TERMINATOR):
                break
            if any(r.uses for r in op.results) or not op.has(Trait.PURE):
                self.lower(op)
        outputs = [self.ids[v] for v in function.results]
        return FunctionPlan(
            name=function.name,
            values=self.values,
            inputs=inputs,
            outputs=outputs,
            steps=self.steps,
            symbols={name: (s.min, s.max) for name, s in function.symbols.items()},
            donates=dict(function.donates),
            guards=_guards(function),
            metadata=dict(function.metadata),
        )

    def new(self, value: Value, kind: ValueKind, *, name: str = "", index: int = 0) -> int:
        shape = [size_expr(d) for d in value.shape]
        self.values.append(ValueSpec(kind, dtype_name(value.dtype), shape, name, index))
        self.ids[value] = len(self.values) - 1
        return self.ids[value]

    def lower(self, op: Op) -> None:
        if op.name == "constant":
            self.weight(op.result, str(op.attributes["name"]))
        elif op.name == "full" and op.result.type.is_static:
            self.full(op)
        elif op.name == "kernel" and self.kernels[op].launches:
            self.launches(op, self.kernels[op])
        elif op.name == "kernel":
            symbol = self.kernels[op]
            dims = [size_expr(d) for d in symbol.dims]
            pairs = {"inplace": symbol.inplace, "updates": symbol.updates}
            options = {k: [list(p) for p in v] for k, v in pairs.items() if v}
            name = symbol.symbol
            self.step("kernel", name, op, op.operands, "buffer", options=options, dims=dims)
        elif op.name == "call":
            options = {k: _json(v) for k, v in op.attribute("options")}
            library = str(op.attributes["library"])
            if any(o.has(Trait.UPDATE) for o in op.regions[0].ops):
                options["inplace"] = [[0, 0]]  # where the plan donates the operand
            self.step("library", library, op, _call_inputs(op), "owned", options=options)
        elif op.name == "scan":
            self.step("library", "scan", op, op.operands, "owned", options=loop_options(op, _json))
        elif op.has(Trait.VIEW) and op.name in _VIEWS:
            self.step("view", _VIEWS[op.name], op, op.operands, "view", options=_view_options(op))
        else:
            self.aten(op)

    def weight(self, value: Value, name: str) -> None:
        if name not in self.weights:
            self.weights[name] = self.new(value, "weight", name=name)
        self.ids[value] = self.weights[name]

    def full(self, op: Op) -> None:
        shape = tuple(int(d) for d in op.result.shape if isinstance(d, int))
        label = f"full.{op.attributes['value']}.{dtype_name(op.result.dtype)}.{shape}"
        if label not in self.weights:
            # Expanded from one element: a large constant costs no memory in the file.
            scalar = torch.full((), op.attributes["value"], dtype=op.result.dtype)  # type: ignore[arg-type]
            name = self.module.weights.add(label, scalar)
            self.values.append(ValueSpec("weight", dtype_name(op.result.dtype), [], name))
            scalar_id = len(self.values) - 1
            if shape:
                self.new(op.result, "view")
                options = {"shape": list(shape)}
                self.steps.append(
                    Step("view", "expand", [scalar_id], [self.ids[op.result]], options)
                )
                self.weights[label] = self.ids[op.result]
            else:
                self.weights[label] = scalar_id
        self.ids[op.result] = self.weights[label]

    def step(
        self,
        kind: Any,
        name: str,
        op: Op,
        inputs: Sequence[Value | None],
        made: ValueKind,
        *,
        options: dict[str, Any] | None = None,
        dims: list[SizeExpr] | None = None,
    ) -> None:
        numbers = [-1 if v is None else self.ids[v] for v in inputs]
        outputs = [self.new(r, made) for r in op.results]
        self.steps.append(
            Step(kind, name, numbers, outputs, options or {}, dims or [], source=_source(op))
        )

    def launches(self, op: Op, kernel: KernelSymbol) -> None:
        """A kernel as one step a launch."""
        places = {("input", i): self.ids[v] for i, v in enumerate(op.operands)}
        for i, result in enumerate(op.results):
            places["result", i] = self.new(result, "buffer")
        for i, size in enumerate(kernel.scratch):
            self.values.append(ValueSpec("buffer", "uint8", [size], "scratch"))
            places["scratch", i] = len(self.values) - 1
        zeroed = {("scratch", i) for i in kernel.zeroed}
        for launch in kernel.launches:
            pairs = {"inplace": launch.inplace, "updates": launch.updates}
            options: dict[str, Any] = {k: [list(p) for p in v] for k, v in pairs.items() if v}
            fresh = [i for i, slot in enumerate(launch.writes) if slot in zeroed]
            if fresh:
                options["zeroed"] = fresh
            self.steps.append(
                Step(
                    "kernel",
                    launch.symbol,
                    [places[slot] for slot in launch.reads],
                    [places[slot] for slot in launch.writes],
                    options,
                    list(launch.sizes),
                    source=_source(op),
                )
            )

    def aten(self, op: Op) -> None:
        inputs: list[int] = []

        def template(value: Any) -> Any:
            if isinstance(value, Value):
                inputs.append(self.ids[value])
                return {"operand": len(inputs) - 1}
            return _json(value, template)

        if op.name == "aten":
            name = str(op.attributes["name"])
            numbers = [self.ids[v] for v in op.operands]
            args = [_fallback_template(a) for a in op.attribute("args")]
            kwargs = {k: _fallback_template(v) for k, v in op.attribute("kwargs")}
        else:
            call = op.aten_call()
            if call is None:
                raise BackendError(
                    f"no backend takes accel.{op.name}",
                    where=str(op.location or op),
                    advice="compile with the tvm extra installed, or report the op",
                )
            name, numbers = call.overload, inputs
            args = [template(a) for a in call.args]
            kwargs = {k: template(v) for k, v in call.kwargs.items()}
        outputs = [self.new(r, "owned") for r in op.results]
        options = {"args": args, "kwargs": kwargs}
        self.steps.append(Step("aten", name, numbers, outputs, options, source=_source(op)))


def _guards(function: Function) -> list[list[Any]]:
    """The frontend's conditions on sizes, for the runtime to check at each new set of sizes."""
    turned = {">": "<", ">=": "<="}
    guards = []
    for guard in function.metadata.get("guards", ()):
        sides = [size_expr(parse_expr(guard[side])) for side in ("left", "right")]
        relation = guard["relation"]
        if relation in turned:
            relation, sides = turned[relation], sides[::-1]
        guards.append([relation, *sides])
    return guards


_VIEWS = {
    "reshape": "reshape",
    "permute": "permute",
    "slice": "slice",
    "broadcast_to": "expand",
}


def _view_options(op: Op) -> dict[str, Any]:
    """A view's parameters: sizes are size expressions, everything else plain."""
    attributes = op.definition.complete_attributes(op.attributes)
    return {
        k: [size_expr(d) for d in v] if isinstance(v, tuple) else size_expr(v)
        for k, v in attributes.items()
    }


def _call_inputs(op: Op) -> list[Value | None]:
    """Operands of a vendor call by role: the root's signature first, then the epilogue's others.

    Absent optional operands of the root (no bias) are None, so that libraries see fixed places.
    A value that plays two roles (k = v, say) is one operand of the call but appears twice here.
    Codes that the region converts for the root are operands as they are.
    """
    region = op.regions[0]
    outer = dict(zip(region.args, op.operands))
    roots = [o for o in region.ops if o.has(Trait.CONTRACTION) or o.has(Trait.UPDATE)]
    if len(roots) != 1:
        raise BackendError(f"a vendor call with {len(roots)} contractions", where=str(op.location))
    root = roots[0]
    converted = {v: v.op.operands[0] for v in root.operands if v.op is not None}
    given = [converted.get(v, v) if v is not None else None for v in root.arguments()]
    inputs: list[Value | None] = [outer[v] if v is not None else None for v in given]
    ahead = {root, *(v.op for v in converted)}
    for other in region.ops:
        if other not in ahead and not other.has(Trait.TERMINATOR):
            inputs.extend(outer[v] for v in other.operands if v in outer)
    return inputs


def _json(value: Any, inner: Any = None) -> Any:
    """An attribute as a JSON template."""
    inner = inner or _json
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, sympy.Expr):
        return {"size": size_expr(value)}
    if isinstance(value, (tuple, list)):
        return {"list": [inner(v) for v in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (torch.memory_format, torch.layout, torch.device)):
        return {"torch": str(value).removeprefix("torch.")}
    return value


def _fallback_template(value: Any) -> Any:
    """The template of an `accel.aten` argument, where ("operand", i) and ("list", ...) are tags."""
    if isinstance(value, tuple) and value and value[0] == "operand":
        return {"operand": value[1]}
    if isinstance(value, tuple) and value and value[0] == "list":
        return {"list": [_fallback_template(v) for v in value[1:]]}
    return _json(value, _fallback_template)


def _source(op: Op) -> str:
    return str(op.location) if op.location is not None else f"accel.{op.name}"
