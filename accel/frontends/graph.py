"""FX graphs as programs: what Dynamo traced, and what AOTAutograd made of it.

Dynamo's graphs hold Python functions; running one on its fake tensors under the recorder gives ATen
calls with composites whole. AOTAutograd's graphs hold ATen calls already. Both become a `Program`:
a module with one function over tensors, and how the graph's own inputs and outputs map to it. Sizes
among the inputs cost nothing if some tensor's shape tells them; one that none tells is the length
of an empty tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

import accel.frontends.aten  # noqa: F401  (fills the table)
from accel.errors import CaptureError
from accel.frontends.calls import Call, check_plain, storage_key, written_storages
from accel.frontends.importer import Importer
from accel.frontends.scalars import SYMBOLIC
from accel.frontends.symbols import Symbols
from accel.frontends.trace import record
from accel.ir.module import Function, Location, Module, Value
from accel.ir.types import TensorType, symbol

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass(frozen=True)
class Output:
    """One output of the graph: result `index`, input `index` itself or a view of it, or a value.

    A view's value is (sizes, strides, offset), ints or expressions over torch's size symbols.
    """

    kind: Literal["result", "number", "input", "view", "value"]
    index: int = 0
    value: Any = None


@dataclass(frozen=True)
class Argument:
    """One argument of the program: a tensor input, a number as a 0-d tensor, or a size.

    A size that no tensor's shape tells is passed as an empty tensor of that length.
    """

    kind: Literal["tensor", "number", "size"]
    index: int


@dataclass
class Program:
    """A graph's module, and its calling convention.

    Attributes:
        module: one function, `main`, over tensors.
        arguments: what its arguments are made from.
        frozen: graph inputs that are constants of the module.
        outputs: how each graph output comes about.
        writes: (graph input, result): the input's new elements.
        symbols: torch's size symbols: (graph input, axis), axis -1 for an input that is a size.
    """

    module: Module
    arguments: list[Argument] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    writes: list[tuple[int, int]] = field(default_factory=list)
    symbols: dict[sympy.Symbol, tuple[int, int]] = field(default_factory=dict)


def location_of(node: fx.Node) -> Location | None:
    """The user's file and line, from what the tracers noted on a node."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    stack = node.meta.get("nn_module_stack") or {}
    scope = ""
    if stack:
        path = str(list(stack.values())[-1][0])
        scope = path.replace("L['self']", "").replace("L['fn']", "").strip(".").replace("['", "")
    if not frames:
        return None
    name, line = frames[-1]
    return Location(name, int(line), scope)


def import_dynamo_graph(
    graph: fx.GraphModule, inputs: Sequence[Any], freeze: Callable[[Tensor], bool]
) -> Program:
    """The program of a graph that Dynamo traced, for inference.

    Args:
        inputs: the real example inputs; those for which `freeze` is true become constants.

    Raises CaptureError for what the recorder or the IR cannot express.
    """
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"the higher-order op {node.target} is not supported",
                where=str(location_of(node) or ""),
            )
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta.get("example_value") for n in placeholders]
    for fake in fakes:
        if isinstance(fake, Tensor):
            check_plain(fake)
    mode = _fake_mode(fakes)

    def once() -> Program:
        runner = _Runner(graph, mode)
        calls, result = record(lambda: runner.run(*fakes), mode, runner.where)
        outputs = list(result) if isinstance(result, (list, tuple)) else [result]
        importer = _Importer(fakes, inputs, mode, runner.attributes, freeze, aliased=False)
        return importer.build(calls, outputs)

    return _until_fixed(once, fakes, may_fix=True)


def import_aten_graph(
    graph: fx.GraphModule, inputs: Sequence[Any], *, may_fix: bool = True
) -> Program:
    """The program of a functional ATen graph from AOTAutograd: forward, backward or inference.

    `may_fix` says that guards are still taken: not so for a backward.
    Raises CaptureError for what the IR cannot express.
    """

    def once() -> Program:
        return _import_aten_graph(graph, inputs)

    fakes = [n.meta.get("val") for n in graph.graph.nodes if n.op == "placeholder"]
    return _until_fixed(once, fakes, may_fix)


def _import_aten_graph(graph: fx.GraphModule, inputs: Sequence[Any]) -> Program:
    calls, fakes, outputs, attributes = _calls_of(graph)
    mode = _fake_mode(fakes)
    importer = _Importer(fakes, inputs, mode, attributes, lambda t: False, aliased=True)
    return importer.build(calls, outputs)


class _NotASize(Exception):
    """Graph input `index` is used as a size, and may be negative, 0 or 1."""

    def __init__(self, index: int) -> None:
        self.index = index


def _until_fixed(once: Callable[[], Program], fakes: Sequence[Any], may_fix: bool) -> Program:
    """`once()`, with guards on numbers that are sizes: 2 or more, or exactly the example's."""
    for _ in range(len(fakes) + 1):
        try:
            return once()
        except _NotASize as error:
            if not may_fix:
                break
            number = fakes[error.index]
            if not number >= 2:  # asking leaves a guard, which narrows the range
                int(number)
    raise CaptureError(
        "a size of the backward graph depends on a number that may be negative, 0 or 1",
        advice="compile with dynamic=False",
    )


class _Runner(fx.Interpreter):
    """Runs a Dynamo graph; knows the place of the node that runs, and fakes attributes."""

    def __init__(self, graph: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph)
        self.mode = mode
        self.place: Location | None = None
        self.attributes: dict[int, tuple[Tensor, Tensor, str]] = {}  # id(real): real, fake, name

    def where(self) -> Location | None:
        return self.place

    def run_node(self, n: fx.Node) -> Any:
        place = location_of(n)
        if place is not None:
            self.place = place
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        real = super().get_attr(target, args, kwargs)
        if not isinstance(real, Tensor) or isinstance(real, FakeTensor):
            return real
        if id(real) not in self.attributes:
            fake = self.mode.from_tensor(real.detach(), static_shapes=True)
            self.attributes[id(real)] = (real, fake, str(target))
        return self.attributes[id(real)][1]


def _fake_mode(fakes: Sequence[Any]) -> FakeTensorMode:
    """The mode of the graph's inputs; without inputs, that of the compilation in progress."""
    for fake in fakes:
        if isinstance(fake, FakeTensor):
            return fake.fake_mode
    context = torch._guards.TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    return mode if mode is not None else FakeTensorMode(allow_non_fake_inputs=True)


def _calls_of(
    graph: fx.GraphModule,
) -> tuple[list[Call], list[Any], list[Any], dict[int, tuple[Tensor, Tensor, str]]]:
    """Calls, placeholders' fakes, outputs, and real tensors of an ATen graph."""
    env: dict[fx.Node, Any] = {}
    seen: set[int] = set()
    calls: list[Call] = []
    fakes: list[Any] = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            env[node] = _own(node.meta.get("val"), seen)
            fakes.append(env[node])
        elif node.op == "get_attr":
            env[node] = getattr(graph, node.target)
        elif node.op == "output":
            flat = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
            outputs = [env[a] if isinstance(a, fx.Node) else a for a in flat]
        elif isinstance(node.target, torch._ops.OpOverload) and not _is_size(node):
            args = fx.map_arg(node.args, env.__getitem__)
            kwargs = fx.map_arg(node.kwargs, env.__getitem__)
            env[node] = _own(node.meta.get("val"), seen)
            calls.append(Call(node.target, tuple(args), dict(kwargs), env[node], location_of(node)))
        elif node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
            env[node] = env[node.args[0]][node.args[1]]
        elif isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int)):
            env[node] = node.meta["val"]
        else:
            raise CaptureError(
                f"the higher-order op {node.target} is not supported",
                where=str(location_of(node) or ""),
            )
    return calls, fakes, outputs, {}


def _is_size(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _own(value: Any, seen: set[int]) -> Any:
    """Fakes that no other node has: nodes copied by a partitioner share theirs."""
    if isinstance(value, (list, tuple)):
        return type(value)(_own(v, seen) for v in value)
    if isinstance(value, FakeTensor):
        if id(value) in seen:
            with value.fake_mode:
                value = torch.ops.aten.alias.default(value)
        seen.add(id(value))
    return value


class _Importer:
    """Builds the Program from calls."""

    def __init__(
        self,
        fakes: Sequence[Any],
        reals: Sequence[Any],
        mode: FakeTensorMode,
        attributes: dict[int, tuple[Tensor, Tensor, str]],
        freeze: Callable[[Tensor], bool],
        aliased: bool,
    ) -> None:
        self.fakes, self.reals, self.freeze, self.aliased = fakes, reals, freeze, aliased
        self.attributes = attributes
        self.program = Program(Module())
        self.function = self.program.module.add(Function("main"))
        self.symbols = Symbols(mode.shape_env)
        self.importer = Importer(self.function, self.program.module, self.symbols)

    def build(self, calls: Sequence[Call], outputs: Sequence[Any]) -> Program:
        with _disable_current_modes():  # constants are real tensors
            return self._build(calls, outputs)

    def _build(self, calls: Sequence[Call], outputs: Sequence[Any]) -> Program:
        importer = self.importer
        self._add_inputs(written_storages(calls))
        for real, fake, name in self.attributes.values():
            importer.aliases.add_root(fake, None, self._constant(name, real))
        importer.run(calls, outputs)
        values = self._add_outputs(outputs)
        self._settle_arguments()
        self._finish(values)
        self.function.symbols = self.symbols.infos()
        self.program.module.metadata["fallbacks"] = dict(sorted(importer.fallbacks.items()))
        return self.program

    def _add_inputs(self, written: set[int]) -> None:
        for i, fake in enumerate(self.fakes):
            if isinstance(fake, (torch.SymInt, torch.SymFloat)):
                self._add_number(i, fake)
            elif isinstance(fake, Tensor):
                self._add_tensor(i, fake, written)

    def _add_number(self, i: int, fake: torch.SymInt | torch.SymFloat) -> None:
        expr = fake.node.expr
        if not isinstance(expr, sympy.Symbol):
            return  # follows from others, or is fixed
        whole = isinstance(fake, torch.SymInt)
        dtype = torch.int64 if whole else torch.float64
        value = self.function.body.add_arg(TensorType((), dtype), f"number{i}")
        self.importer.scalars.numbers[expr] = value
        self.program.arguments.append(Argument("number", i))
        if whole:
            self.program.symbols.setdefault(expr, (i, -1))

    def _add_tensor(self, i: int, fake: Tensor, written: set[int]) -> None:
        for axis, size in enumerate(fake.shape):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                self.program.symbols[size.node.expr] = (i, axis)
                self.importer.scalars.numbers.pop(size.node.expr, None)
        real = self.reals[i] if i < len(self.reals) else None
        if (
            isinstance(real, Tensor)
            and not isinstance(real, FakeTensor)
            and storage_key(fake) not in written
            and self.freeze(real)
        ):
            self.program.frozen.append(i)
            self.importer.aliases.add_root(fake, None, self._constant(f"weight{i}", real))
            return
        value = self.function.body.add_arg(self.importer.type(fake), f"arg{i}")
        self.importer.aliases.add_root(fake, value)
        self.program.arguments.append(Argument("tensor", i))

    def _settle_arguments(self) -> None:
        """Drops numbers that nobody reads; adds sizes that no tensor tells."""
        body, arguments = self.function.body, self.program.arguments
        told = {d.name for v in body.args for d in v.shape if isinstance(d, sympy.Symbol)}
        for position in reversed(range(len(arguments))):
            if arguments[position].kind == "number" and not body.args[position].uses:
                body.remove_arg(position)
                del arguments[position]
        for name, theirs in self.symbols.used.items():
            place = self.program.symbols.get(theirs)
            if name not in told and place is not None:
                if self.symbols.lowest(theirs) < 2:
                    raise _NotASize(place[0])
                body.add_arg(TensorType((symbol(name), 0), torch.int8), f"size{place[0]}")
                arguments.append(Argument("size", place[0]))
        self.function.metadata["arguments"] = [{"name": v.name, "kind": "input"} for v in body.args]

    def _constant(self, name: str, real: Tensor) -> Callable[[], Value]:
        def make() -> Value:
            weights = self.program.module.weights
            stored = weights.add(name, real.detach(), origin=name)
            return self.importer.b.constant(stored, weights.type(stored))

        return make

    def _add_outputs(self, outputs: Sequence[Any]) -> list[Value]:
        """Values of the graph's outputs, each tensor once; notes how each output comes about."""
        importer = self.importer
        importer.b.location = None
        values: list[Value] = []
        results: dict[int, int] = {}
        for leaf in outputs:
            if isinstance(leaf, Tensor):
                known = self._from_input(leaf)
                if known is not None:
                    self.program.outputs.append(known)
                    continue
                if id(leaf) not in results:
                    results[id(leaf)] = len(values)
                    values.append(importer(leaf))
                self.program.outputs.append(Output("result", results[id(leaf)]))
            elif isinstance(leaf, SYMBOLIC):
                self.program.outputs.append(Output("number", len(values)))
                values.append(importer.result(leaf))
            else:
                self.program.outputs.append(Output("value", value=leaf))
        return values

    def _finish(self, values: list[Value]) -> None:
        """The return: outputs, then new values of written inputs."""
        importer = self.importer
        kinds: list[dict[str, Any]] = [{"kind": "output"} for _ in values]
        for position, argument in enumerate(self.program.arguments):
            fake = self.fakes[argument.index]
            if argument.kind == "tensor" and importer.aliases.written(fake):
                self.program.writes.append((argument.index, len(values)))
                self.function.donates[len(values)] = position
                kinds.append({"kind": "mutation", "argument": position})
                values.append(importer(fake))
        importer.b.op("return", values)
        self.function.metadata["results"] = kinds

    def _from_input(self, leaf: Tensor) -> Output | None:
        """An output that is an input, or a view of one, is handed out as such."""
        key = storage_key(leaf)
        if not key:
            return None
        for i, fake in enumerate(self.fakes):
            if not isinstance(fake, Tensor) or storage_key(fake) != key:
                continue
            if fake is leaf:
                return Output("input", i)
            if self.aliased:
                return None  # whoever made the graph restores the aliasing
            if (leaf.dtype, leaf.is_conj(), leaf.is_neg()) != (
                fake.dtype,
                fake.is_conj(),
                fake.is_neg(),
            ):
                return None  # the same memory read as something else: a copy has its values
            view = (
                tuple(expr_of(n) for n in leaf.shape),
                tuple(expr_of(n) for n in leaf.stride()),
                expr_of(leaf.storage_offset()),
            )
            return Output("view", i, view)
        return None


def expr_of(size: int | torch.SymInt) -> Any:
    return size if isinstance(size, int) else size.node.expr
