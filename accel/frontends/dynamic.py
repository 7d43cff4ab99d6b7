"""Dynamic sizes of a capture: what the user declared, and what tracing learned.

Declared axes get symbols in a `ShapeEnv`; axes of one name are one symbol. Tracing may narrow a
symbol's range (a position table has 4096 rows), which is taken over, or state a condition (a length
divisible by 8), which becomes a guard of the program; a size that the model fixes is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    ConstraintViolationError,
    DimDynamic,
    GuardOnDataDependentSymNode,
    StatelessSymbolicContext,
)

from accel import tree
from accel.errors import CaptureError, FixedSizeError, OptionError
from accel.frontends.shape_env import Label, PlainShapeEnv
from accel.frontends.symbols import SIZED_BY_DATA, Symbols
from accel.frontends.trace import refusal
from accel.ir.module import Location

# What torch says when a higher-order op meets a tracer without a rule for it.
_HIGHER_ORDER = "not registered"


class _Axis:
    """One declared axis: which leaf, which axis, the name, and the range."""

    def __init__(self, leaf: int, axis: int, name: str, low: int | None, high: int | None) -> None:
        self.leaf, self.axis, self.name, self.low, self.high = leaf, axis, name, low, high


class DynamicShapes:
    """The dynamic axes of a capture's inputs.

    With `small`, axes of which the inputs have no or one element are as in the inputs: what such a
    size broadcasts with, and which way a model branches on it, no larger size tells.

    Raises OptionError where `dynamic_shapes` does not fit the inputs.
    """

    def __init__(
        self, spec: Any, inputs: tree.Node, names: Sequence[str], model: Any, small: bool = False
    ) -> None:
        self.names, self._small = names, small
        self.axes: list[_Axis] = []
        self._sizes: list[tuple[_Axis, torch.SymInt]] = []
        self._fixed_at: Location | None = None
        if spec is not None:
            args, kwargs = inputs["tuple"]
            self._walk(_by_position(spec, args, kwargs, model), inputs)
        # Static captures have one too: a tensor's item() in arithmetic is a symbolic number.
        self.shape_env = PlainShapeEnv(duck_shape=False, specialize_zero_one=True)

    def fake(self, mode: FakeTensorMode, index: int, tensor: Tensor) -> Tensor:
        """The fake tensor for input `index`, with symbols where axes are dynamic."""
        mine = [a for a in self.axes if a.leaf == index]
        if tensor.requires_grad:
            tensor = tensor.detach()
        if not mine:
            return mode.from_tensor(tensor, static_shapes=True)
        rank = tensor.dim()
        kinds = [DimDynamic.STATIC] * rank
        for axis in list(mine):
            if not 0 <= axis.axis < rank:
                raise OptionError(
                    f"dynamic_shapes names axis {axis.axis} of '{self.names[index]}', which has "
                    f"{rank} axes"
                )
            if tensor.shape[axis.axis] < 2 and self._small:
                mine.remove(axis)
            elif tensor.shape[axis.axis] < 2:
                raise OptionError(
                    f"axis {axis.axis} of '{self.names[index]}' is dynamic, but the example has "
                    f"size {tensor.shape[axis.axis]} there",
                    advice="give an example of size 2 or more along dynamic axes",
                )
        for axis in mine:
            kinds[axis.axis] = DimDynamic.DYNAMIC
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=kinds,
            constraint_sizes=[None] * rank,
            dynamic_strides=[DimDynamic.INFER_STRIDE] * rank,
            constraint_strides=[None] * rank,
        )
        fake = mode.from_tensor(
            tensor.contiguous(),
            source=Label(f"__accel_input_{index}"),
            symbolic_context=context,
        )
        for axis in mine:
            size = fake.shape[axis.axis]
            assert isinstance(size, torch.SymInt)
            self._sizes.append((axis, size))
        return fake

    def small_sizes(self, tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
        """(input, axis, size) of the dynamic axes that have no or one element in these inputs, and
        may."""
        sizes = ((a, tensors[a.leaf].shape[a.axis]) for a in self.axes)
        return [(a.leaf, a.axis, n) for a, n in sizes if n < 2 and n >= (a.low or 0)]

    def relate(self) -> None:
        """States ranges, and that axes of one name are equal."""
        first: dict[str, torch.SymInt] = {}
        for axis, size in self._sizes:
            if axis.low is not None:
                torch._check(size >= axis.low)
            if axis.high is not None:
                torch._check(size <= axis.high)
            if axis.name and axis.name in first:
                torch._check(size == first[axis.name])
            elif axis.name:
                first[axis.name] = size
        self._count = len(self.shape_env.guards)

    def watch(self, where: Callable[[], Location | None]) -> Callable[[], Location | None]:
        """`where`, which also remembers the first place after a dynamic size became a number."""
        if not self._sizes:
            return where

        def watched() -> Location | None:
            place = where()
            if self._fixed_at is None and any(s.node.expr.is_number for _, s in self._sizes):
                self._fixed_at = place
            return place

        return watched

    def check_counts(self) -> None:
        """Raises CaptureError where the model made a size of a number that a tensor held."""
        if any(self.shape_env.replace(c).is_number for c in self.shape_env.counts):
            raise CaptureError("Python needs the value of a tensor", advice=SIZED_BY_DATA)

    def symbols(self) -> Symbols:
        """Names for torch's symbols: the user's. Raises CaptureError for a size that was fixed."""
        names: dict[str, str] = {}
        for axis, size in self._sizes:
            expr = size.node.expr
            if isinstance(expr, sympy.Symbol):
                if axis.name:
                    names.setdefault(str(expr.name), axis.name)
            elif expr.is_number:
                raise self._fixed(axis, int(expr))
        return Symbols(self.shape_env, names)

    def _fixed(self, axis: _Axis, value: int) -> FixedSizeError:
        label = f"axis {axis.axis} of '{self.names[axis.leaf]}'"
        return FixedSizeError(
            f"{label} ({axis.name or 'dynamic'}) was declared dynamic, but the model fixes it to "
            f"{value}",
            where=str(self._fixed_at or ""),
            advice="leave this axis static, or remove what compares or indexes with its size",
        )

    def guards(self, symbols: Symbols) -> list[dict[str, str]]:
        """Conditions that tracing relied on and that ranges and equal names do not imply."""
        found: list[dict[str, str]] = []
        for guard in self.shape_env.guards[self._count :]:
            expr = self.shape_env.replace(guard.expr)
            if expr in (sympy.true, sympy.false) or self._implied(expr):
                continue
            if not self.shape_env.counts.isdisjoint(expr.free_symbols):
                continue  # whoever captures so compares the program with the model
            for part in self._parts(expr):
                condition = relation(symbols, part)
                if condition is not None and condition not in found:
                    found.append(condition)
        return found

    def _parts(self, expr: Any) -> list[Any]:
        """Comparisons that together imply a condition: of alternatives, the one that held."""
        if isinstance(expr, sympy.Not) and isinstance(expr.args[0], sympy.Or):
            return [part for arg in expr.args[0].args for part in self._parts(sympy.Not(arg))]
        if isinstance(expr, sympy.And):
            return [part for arg in expr.args for part in self._parts(arg)]
        if isinstance(expr, sympy.Or):
            hints = {s.node.expr: s.node.hint for _, s in self._sizes if not s.node.expr.is_number}
            held = [arg for arg in expr.args if arg.subs(hints) == sympy.true]
            return self._parts(held[0]) if held else [expr]
        return [expr]

    def _implied(self, expr: Any) -> bool:
        known = self.shape_env._maybe_evaluate_static(expr, axioms=())  # guards are axioms
        return known is not None and bool(known == sympy.true)

    def explain(self, error: Exception, where: Location | None) -> CaptureError:
        """The typed error for what went wrong while tracing."""
        place = str(where or "")
        if isinstance(error, GuardOnDataDependentSymNode):
            return refusal(error, None, where)
        if isinstance(error, ConstraintViolationError):
            return CaptureError(f"the dynamic sizes contradict the model: {error}", where=place)
        text = str(error).strip().splitlines()
        if _HIGHER_ORDER in str(error):
            return CaptureError(
                "control flow as an operator (torch.cond, while_loop, map, scan) is not supported",
                where=place,
                advice="use torch.where on both outcomes, or a Python loop of fixed length",
            )
        return CaptureError(
            f"the model failed while it was traced: {type(error).__name__}: "
            f"{text[0] if text else ''}",
            where=place,
            advice="run the model with the same inputs in eager mode; if that works, please report "
            "this",
        )

    def _walk(self, spec: Any, node: tree.Node) -> None:
        if spec is None:
            return
        if "tensor" in node:
            self._add(node["tensor"], spec)
            return
        for kind in ("tuple", "list", "args"):
            if kind in node:
                if not isinstance(spec, (tuple, list)) or len(spec) != len(node[kind]):
                    raise OptionError(f"dynamic_shapes: {spec!r} for {len(node[kind])} values")
                for s, child in zip(spec, node[kind]):
                    self._walk(s, child)
                return
        for kind in ("dict", "items", "fields"):
            if kind in node:
                if not isinstance(spec, Mapping):
                    raise OptionError(f"dynamic_shapes: {spec!r} where a dict is passed")
                for key, child in node[kind]:
                    label = key if isinstance(key, str) else next(iter(key.values()))
                    self._walk(spec.get(label), child)
                return

    def _add(self, leaf: int, spec: Any) -> None:
        if not isinstance(spec, (Mapping, list, tuple)):
            raise OptionError(
                f"dynamic_shapes: {spec!r} for a tensor", advice='for example {0: "batch"}'
            )
        items = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
        for axis, dim in items:
            if dim is None or isinstance(dim, int) or _is_hint(dim, "STATIC"):
                continue
            if isinstance(dim, str):
                self.axes.append(_Axis(leaf, int(axis), dim, None, None))
            elif _is_hint(dim, "AUTO") or _is_hint(dim, "DYNAMIC"):
                self.axes.append(_Axis(leaf, int(axis), "", None, None))
            elif hasattr(dim, "root"):
                raise OptionError(
                    f"dynamic_shapes: the derived size {dim} is not supported",
                    advice="declare the axis with Dim.AUTO: the relation is found by tracing",
                )
            elif not hasattr(dim, "__name__") or type(axis) is not int:
                raise OptionError(
                    f"dynamic_shapes: axis {axis!r} with the size {dim!r}",
                    advice="axes are numbers; sizes are names, or torch.export's Dim",
                )
            else:
                low, high = getattr(dim, "min", None), getattr(dim, "max", None)
                bounded = isinstance(high, int) and high < 2**31
                self.axes.append(
                    _Axis(leaf, int(axis), dim.__name__, low or None, high if bounded else None)
                )


def _is_hint(dim: Any, name: str) -> bool:
    hint = getattr(torch.export.Dim, name, None)
    return hint is not None and dim is hint


def _by_position(spec: Any, args: tree.Node, kwargs: tree.Node, model: Any) -> Any:
    """(specs of positional arguments, specs of keyword arguments) from torch.export's forms."""
    keys = [k["value"] for k, _ in kwargs["dict"]]
    count = len(args["tuple"])
    if isinstance(spec, (tuple, list)):
        if len(spec) != count + len(keys):
            raise OptionError(
                f"dynamic_shapes has {len(spec)} entries for {count + len(keys)} inputs"
            )
        return list(spec[:count]), dict(zip(keys, spec[count:]))
    if not isinstance(spec, Mapping):
        raise OptionError("dynamic_shapes must be a dict by input name, or a tuple in order")
    function = model.forward if isinstance(model, nn.Module) else model
    parameters = list(inspect.signature(function).parameters)
    positional = parameters[:count] + [f"arg{i}" for i in range(len(parameters), count)]
    unknown = set(spec) - set(positional) - set(keys)
    if unknown:
        raise OptionError(
            f"dynamic_shapes names what is not passed: {', '.join(sorted(map(str, unknown)))}",
            advice=f"the inputs are: {', '.join([*positional, *keys])}",
        )
    return [spec.get(name) for name in positional], {k: spec.get(k) for k in keys}


_RELATIONS: dict[type, str] = {
    sympy.Eq: "==",
    sympy.Ne: "!=",
    sympy.Lt: "<",
    sympy.Le: "<=",
    sympy.Gt: ">",
    sympy.Ge: ">=",
}


def relation(symbols: Symbols, expr: Any) -> dict[str, str] | None:
    """A condition as {"relation": "<=", "left": text, "right": text}, texts as in IR attributes.

    None for one that holds in plain arithmetic. Raises CaptureError for one that is no comparison.
    """
    kind = next((name for cls, name in _RELATIONS.items() if isinstance(expr, cls)), None)
    if kind is None:
        raise CaptureError(
            f"the model depends on the condition {expr} between dynamic sizes",
            advice="leave one of the axes static",
        )
    left, right = (symbols.plain(side) for side in expr.args)
    if (type(expr)(left, right)) == sympy.true:
        return None
    return {"relation": kind, "left": str(left), "right": str(right)}
