"""Constant folding: what depends on constants only is computed now, in float64, and rounded once.

Whole constant subgraphs are evaluated by the interpreter's oracle, so intermediate results are not
rounded at all. A result with one value everywhere becomes an `accel.full`; other results are
stored, unless that would inflate the weights: a result may be as large as the weights that it
frees (a transposed copy takes the original's place), or as `limit_bytes` if it was generated from
next to none (positions, the angles of rotary embeddings). Encoded weights (`Trait.DECODE`) stay
encoded. Contract: exact, up to the rounding of the stored constants. Before and after:

    %w = "accel.constant"() {name = "w"} : () -> tensor<8x4xf32>
    %0 = "accel.permute"(%w) {axes = [1, 0]} : (tensor<8x4xf32>) -> tensor<4x8xf32>
    %1 = "accel.matmul"(%x, %0) : (tensor<2x4xf32>, tensor<4x8xf32>) -> tensor<2x8xf32>

    %0 = "accel.constant"() {name = "w.permute"} : () -> tensor<4x8xf32>
    %1 = "accel.matmul"(%x, %0) : (tensor<2x4xf32>, tensor<4x8xf32>) -> tensor<2x8xf32>
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
from torch import Tensor

from accel.errors import InterpretError
from accel.ir.builder import Builder
from accel.ir.cost import stored_bytes
from accel.ir.interpret import interpret
from accel.ir.module import Function, Module, Op, Value, clone_op
from accel.ir.op import Trait
from accel.ir.rewrite import erase_if_dead
from accel.ir.storage import WeightStore
from accel.ir.types import SUB_BYTE_BITS
from accel.passes.base import EXACT_CONSTANTS, Context, Contract, Pass, register_pass
from accel.passes.deferred import deferred_function

# Stored results may exceed the weights that they free by this much.
_SLACK_BYTES = 4096
# No intermediate result may be larger.
_LARGEST_BYTES = 1 << 31
_NEVER = Trait.DECODE | Trait.RANDOM | Trait.TERMINATOR


@register_pass
@dataclass
class Fold(Pass):
    """Evaluates constant subgraphs.

    Options:
        limit_bytes: the largest result that is stored for a subgraph with hardly any weights.
    """

    name: ClassVar[str] = "fold"
    contract: ClassVar[Contract] = EXACT_CONSTANTS

    limit_bytes: int = 1 << 20

    def run(self, module: Module, context: Context) -> None:
        for function in module.functions.values():
            roots = _Frontier(function, self.limit_bytes, context).roots()
            allowed: list[Op] = []
            for root in roots:
                if not context.rewrite("fold", root):
                    break
                allowed.append(root)
            self._fold(allowed, module, context)

    def _fold(self, roots: Sequence[Op], module: Module, context: Context) -> None:
        computed = [r for r in roots if not _is_view_of_weight(r)]
        values = dict(zip(computed, _evaluate(computed, module.weights, context)))
        for root in roots:
            b = Builder(before=root, made_by=self.name)
            if root in values:
                results = values[root]
                if results is None:
                    continue
                new = [
                    _constant(b, old, tensor, root, module, context)
                    for old, tensor in zip(root.results, results)
                ]
            else:
                new = [_lazy_view(b, root, module)]
            producers = [v.op for v in root.operands if v.op is not None]
            root.replace_with(new)
            for producer in producers:
                erase_if_dead(producer)


class _Frontier:
    """The ops to fold: those with constant inputs whose results others read, and that pay."""

    def __init__(self, function: Function, limit: int, context: Context) -> None:
        self.limit = limit
        self.context = context
        self.known: dict[Op, None] = {}
        for op in function.ops:
            if _is_foldable(op) and all(v.op in self.known for v in op.operands):
                self.known[op] = None

    def roots(self) -> list[Op]:
        """In program order. What does not pay is given up, and its operands looked at instead."""
        while True:
            roots = [op for op in self.known if self._is_root(op)]
            bases = {root: self._bases(root) for root in roots}
            shares: dict[Op, int] = {}
            for each in bases.values():
                for base in each:
                    shares[base] = shares.get(base, 0) + 1
            refused = [r for r in roots if not self._pays(r, bases[r], shares)]
            if not refused:
                return roots
            for root in refused:
                del self.known[root]

    def _is_root(self, op: Op) -> bool:
        read = any(user not in self.known for r in op.results for user in r.users)
        return read and not _is_generated(op)

    def _bases(self, root: Op) -> list[Op]:
        """The stored constants that the root depends on."""
        stack, seen = [root], {root}
        found: list[Op] = []
        while stack:
            op = stack.pop()
            if op.name == "constant":
                found.append(op)
            for value in op.operands:
                if value.op is not None and value.op not in seen:
                    seen.add(value.op)
                    stack.append(value.op)
        return found

    def _pays(self, root: Op, bases: Sequence[Op], shares: dict[Op, int]) -> bool:
        made = sum(int(r.type.nbytes()) for r in root.results)
        if made <= _SLACK_BYTES:
            return True
        if sum(stored_bytes(base.result) for base in bases) <= _SLACK_BYTES:
            return made <= self.limit
        freed = sum(
            stored_bytes(base.result) // shares[base]
            for base in bases
            if all(user in self.known for user in base.result.users)
        )
        if made <= freed + _SLACK_BYTES:
            return True
        reason = f"the result has {made} bytes, the weights it would free {freed}"
        self.context.miss("fold", root, reason)
        return False


def _is_generated(op: Op) -> bool:
    """Leaves, and views of what is computed without reading memory: positions and masks of them."""
    base: Op | None = op
    while base is not None and base.has(Trait.VIEW):
        base = base.operands[0].op
    return base is not None and not base.operands and (base is op or base.name != "constant")


def _is_foldable(op: Op) -> bool:
    if op.name == "constant":
        return op.result.dtype not in SUB_BYTE_BITS
    if not op.has(Trait.PURE) or op.has(_NEVER) or op.has(Trait.OPAQUE) or op.regions:
        return False
    if any(_is_symbolic(a) for a in op.attributes.values()):
        return False
    return all(
        r.type.is_static
        and r.dtype not in SUB_BYTE_BITS
        and int(r.type.nbytes()) <= _LARGEST_BYTES
        and not (r.dtype.is_floating_point and r.dtype.itemsize == 1)
        for r in op.results
    )


def _is_symbolic(attribute: Any) -> bool:
    if isinstance(attribute, tuple):
        return any(_is_symbolic(a) for a in attribute)
    return isinstance(attribute, sympy.Expr)


def _subgraph(roots: Iterable[Op]) -> list[Op]:
    """The ops that the roots depend on, in program order within each root."""
    order: dict[Op, None] = {}
    stack = [(root, False) for root in roots]
    while stack:
        op, ready = stack.pop()
        if op in order:
            continue
        if ready:
            order[op] = None
            continue
        stack.append((op, True))
        stack.extend((v.op, False) for v in op.operands if v.op is not None)
    return list(order)


def _function_of(roots: Sequence[Op]) -> Function:
    """A function without arguments that returns the results of the roots."""
    function = Function("constants")
    mapping: dict[Value, Value] = {}
    for op in _subgraph(roots):
        function.body.append(clone_op(op, mapping))
    Builder(function.body).op("return", [mapping[r] for root in roots for r in root.results])
    return function


def _evaluate(
    roots: Sequence[Op], weights: WeightStore, context: Context
) -> list[list[Tensor] | None]:
    """Results of each root in float64; None for one that cannot be evaluated."""
    if not roots:
        return []
    try:
        flat = interpret(_function_of(roots), (), weights, oracle=True)
    except InterpretError as error:
        if len(roots) == 1:
            context.miss("fold", roots[0], error.what)
            return [None]
        return [_evaluate([root], weights, context)[0] for root in roots]
    results = iter(flat)
    return [[next(results) for _ in root.results] for root in roots]


def _constant(
    b: Builder, old: Value, tensor: Tensor, root: Op, module: Module, context: Context
) -> Value:
    """A `full` if the tensor has one value everywhere, else a stored constant."""
    number = splat_of(tensor)
    if number is not None:
        return b.full_of(old.shape, number, old.dtype)  # type: ignore[arg-type]
    name = context.store_constant(module, _name_for(root), tensor, old.dtype)
    return b.constant(name, old.type)


def splat_of(tensor: Tensor) -> bool | int | float | complex | None:
    """The value of all elements, if there are some and they are equal."""
    if not tensor.numel():
        return None
    first = tensor.flatten()[0]
    if tensor.numel() > 1 and not bool((tensor == first).all()):
        return None
    number: bool | int | float | complex = first.item()
    return None if number != number else number


def _name_for(root: Op) -> str:
    """The first weight's name with the op's: `w.permute`; `folded.add` without one."""
    for op in _subgraph([root]):
        if op.name == "constant":
            return f"{op.attributes['name']}.{root.name}"
    return f"folded.{root.name}"


def _is_view_of_weight(root: Op) -> bool:
    """Whether only permutes, reshapes, slices and the like lie between the root and one weight."""
    op: Op | None = root
    while op is not None and op.has(Trait.VIEW) and op.name != "broadcast_to":
        op = op.operands[0].op
    return op is not None and op.name == "constant"


def _lazy_view(b: Builder, root: Op, module: Module) -> Value:
    """A constant that is computed when first read: no rounding, no work at compile time."""
    names = [str(op.attributes["name"]) for op in _subgraph([root]) if op.name == "constant"]
    load = deferred_function(_function_of([root]), module.weights.pick(*names))
    name = module.weights.add_lazy(_name_for(root), root.result.type, load)
    return b.constant(name, root.result.type)
