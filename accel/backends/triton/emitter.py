"""Writes the Triton code of elements: a `Tracer` whose scalars are tiles.

A *scope* is what has been computed so far and where: the kernel's own (values that vary with the
row only), one for each set of columns, and one for each side of a choice. An element is computed in
the outermost scope that knows all its axes, once, and named. Both sides of a choice are computed,
under masks: a load happens only in lanes where its address is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from accel.backends.loops.index import Affine, Axis, Indexer
from accel.backends.loops.survey import index_axes, packed_address
from accel.backends.loops.trace import Index, Key, Tracer
from accel.backends.triton import dtypes, scalar
from accel.backends.triton.addresses import Addresses, size_text
from accel.backends.triton.text import Block, Expr, Names, dims_of
from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.types import SUB_BYTE_BITS, Dim

_MOST_ELEMENTS = 4000  # of one kernel: a bound on compile time


@dataclass
class Scope:
    """Values that are known, and the block that new ones are written to."""

    block: Block
    axes: frozenset[Axis]
    guard: Expr | None = None  # a condition under which loads happen
    known: dict[Any, Any] = field(default_factory=dict)


class Emitter(Tracer):
    """Code of one kernel.

    Args:
        pointers: names of the arguments and scratch values that can be read.
        scratch: which of them are scratch memory, which holds compute types.
        kind: "int32" or "int64" index arithmetic.
    """

    def __init__(
        self, indexer: Indexer, pointers: Mapping[Value, str], scratch: set[Value], kind: str
    ) -> None:
        super().__init__(indexer)
        self.pointers, self.scratch, self.kind = pointers, scratch, kind
        self.addresses = Addresses(indexer, kind)
        self.scopes = [Scope(Block(Names()), frozenset())]
        self.results: dict[Key, Expr] = {}  # of reductions
        self.masks: dict[Axis, str] = {}  # lanes in which an axis is within its extent
        self.used: dict[Value, None] = {}  # what is read, in order
        self.checks = False  # whether an index is checked
        self._elements = 0

    @property
    def block(self) -> Block:
        return self.scopes[-1].block

    # -- scopes ----------------------------------------------------------------------------

    @contextmanager
    def inside(self, scope: Scope) -> Iterator[None]:
        self.scopes.append(scope)
        try:
            yield
        finally:
            self.scopes.pop()

    def column_scope(self, axes: Sequence[Axis], block: Block | None = None) -> Scope:
        """A scope that knows some more axes; in the current block unless it gets one (a loop's)."""
        known = self.scopes[-1].axes | frozenset(axes)
        return Scope(block or self.block, known)

    @contextmanager
    def _guarded(self, condition: Expr) -> Iterator[None]:
        top = self.scopes[-1]
        with self.inside(Scope(top.block, top.axes, guard=condition)):
            yield

    @contextmanager
    def _home(self, axes: frozenset[Axis]) -> Iterator[Scope]:
        """The outermost scope that knows the axes and lies in the innermost guarded one."""
        floor = max((i for i, s in enumerate(self.scopes) if s.guard is not None), default=0)
        depth = floor
        while not axes <= self.scopes[depth].axes:
            depth += 1
            if depth == len(self.scopes):
                raise BackendError(f"axes {sorted(map(str, axes))} are used outside of their loops")
        inner = self.scopes[depth + 1 :]
        del self.scopes[depth + 1 :]
        try:
            yield self.scopes[depth]
        finally:
            self.scopes.extend(inner)

    def _find(self, key: Any) -> Any:
        for scope in reversed(self.scopes):
            if key in scope.known:
                return scope.known[key]
        return None

    # -- masks -----------------------------------------------------------------------------

    def mask(self, axes: frozenset[Axis]) -> str:
        """The lanes that may touch memory at an address over these axes; "" is all."""
        found = dict.fromkeys(self.masks[a] for a in sorted(axes, key=_order) if a in self.masks)
        found.update(dict.fromkeys(str(s.guard) for s in self.scopes if s.guard is not None))
        return " & ".join(found)

    def load_text(self, pointer: str, address: Expr, axes: frozenset[Axis]) -> Expr:
        mask = self.mask(axes)
        place = pointer if address.text == "0" else f"{pointer} + {address}"
        dims = address.dims
        for scope in self.scopes:
            if scope.guard is not None and not scope.guard.dims <= dims:
                # Triton takes no mask of more dimensions than the pointers have.
                place = f"{place} + {scope.guard}.to(tl.int32) * 0"
                dims |= scope.guard.dims
        return Expr(f"tl.load({place}, mask={mask})" if mask else f"tl.load({place})", "", dims)

    # -- Tracer ----------------------------------------------------------------------------

    def known_element(self, value: Value, index: Index) -> Expr:
        key = (value, index)
        found = self._find(key)
        if found is not None:
            return found
        with self._home(index_axes(index)) as home:
            if value in self.pointers:
                code = self.load(value, index)
            else:
                code = self.compute(value, index)
            is_view = value.op is not None and value.op.has(Trait.VIEW)
            if not is_view and code.number is None:
                stem = "x" if value.op is None else _STEMS.get(value.op.name, value.op.name)
                code = self.block.let(code.text, code.kind, code.dims, stem)
            home.known[key] = code
            self._elements += 1
            if self._elements > _MOST_ELEMENTS:
                raise BackendError(f"a kernel of over {_MOST_ELEMENTS} elements")
        return code

    def load(self, value: Value, index: Index) -> Expr:
        self.used.setdefault(value)
        pointer, dtype = self.pointers[value], value.dtype
        if value in self.scratch:
            flat = self.indexer.flatten(index, value.shape)
            loaded = self.load_text(pointer, self.addresses.code(flat), flat.axes)
            return Expr(loaded.text, dtypes.compute(dtype), loaded.dims)
        if dtype in SUB_BYTE_BITS:
            address, inside = packed_address(self.indexer, value, index)
            byte = self.load_text(pointer, self.addresses.code(address), address.axes)
            return dtypes.from_byte(byte, self.addresses.code(inside), dtype, self.block)
        flat = self.indexer.flatten(index, value.shape)
        loaded = self.load_text(pointer, self.addresses.code(flat), flat.axes)
        return dtypes.from_storage(loaded, dtype, self.block)

    def arithmetic(self, op: Op, args: list[Expr]) -> Expr:
        return scalar.emit(op, args, self.block)

    def number(self, op: Op) -> Expr:
        value = op.attribute("value")
        return scalar.constant(value, op.result.dtype)

    def position(self, value: Affine, dtype: torch.dtype) -> Expr:
        code = self.addresses.code(value)
        if not value.terms and isinstance(value.constant, int):
            return scalar.constant(value.constant, dtype)
        place = self.block.let(code.text, self.kind, code.dims, "place")
        if not code.dims and not value.axes:  # a size: a parameter
            place = Expr(place.text, self.kind)
        have = torch.int64 if place.kind == "int64" else torch.int32
        return dtypes.convert(place, have, dtype, self.block)

    def condition(self, nonnegative: Sequence[Affine]) -> Expr:
        parts = [self._nonnegative(c) for c in nonnegative]
        text = " & ".join(str(p) for p in parts)
        if not dims_of(*parts) and len(parts) == 1 and not nonnegative[0].terms:
            text = f"tl.full([], {text}, tl.int1)"
        return Expr(text, "bool", dims_of(*parts))

    def _nonnegative(self, value: Affine) -> Expr:
        """`value >= 0`, as a comparison with a number where that can be: `i < 64` tells Triton
        where the condition changes, `63 - i >= 0` does not."""
        terms, limit, text = value.terms, value.constant, "{} >= 0"
        steps = [c for _, c in terms if isinstance(c, int)]
        plain = isinstance(limit, int) and terms and len(steps) == len(terms)
        if plain and max(steps) < 0:
            value, text = Affine(0, tuple((a, -c) for a, c in terms)), f"{{}} < {limit + 1}"
        elif plain and min(steps) > 0:
            value, text = Affine(0, terms), f"{{}} >= {-limit}"
        made = self.addresses.code(value)
        return Expr(f"({text.format(made)})", "bool", made.dims)

    def choose(
        self,
        nonnegative: Sequence[Affine],
        yes: Callable[[], Expr],
        no: Callable[[], Expr],
        dtype: torch.dtype,
    ) -> Expr:
        made = self.condition(nonnegative)
        test = self.block.let(made.text, "bool", made.dims, "inside")
        opposite = self.block.let(f"{test} == 0", "bool", made.dims, "outside")
        sides: list[Expr] = []
        for condition, side in ((test, yes), (opposite, no)):
            with self._guarded(condition):
                sides.append(side())
        text = f"tl.where({test}, {sides[0]}, {sides[1]})"
        return Expr(text, dtypes.compute(dtype), dims_of(test, *sides))

    def lookup(
        self, value: Value, index: Index, low: Dim, high: Dim, *, wrap: Dim, clamp: bool
    ) -> Affine:
        key = ("lookup", value, index, low, high, wrap, clamp)
        found = self._find(key)
        if found is not None:
            return found
        axes = index_axes(index)
        with self._home(axes) as home:
            # Compared as it is stored: narrowing first could bring a wild index into range.
            wide = dtypes.cast(self.element(value, index), "int64")
            place = self.block.let(wide.text, "int64", wide.dims, "place")
            if wrap != 0:
                text = f"tl.where({place} < 0, {place} + {size_text(wrap)}, {place})"
                place = self.block.let(text, "int64", place.dims, "place")
            first, last = size_text(low), size_text(high)
            if clamp:
                text = f"tl.minimum(tl.maximum({place}, {first}), {last})"
                place = self.block.let(text, "int64", place.dims, "place")
            else:
                place = self._checked(place, first, last, axes)
            if self.kind == "int32":
                place = self.block.let(f"{place}.to(tl.int32)", "int32", place.dims, "place")
            home.known[key] = result = self.indexer.datum(place, axes)
        return result

    def _checked(self, place: Expr, first: str, last: str, axes: frozenset[Axis]) -> Expr:
        """The place if it is in range; else `first`, and the kernel reports failure."""
        self.checks = True
        text = f"({place} < {first}) | ({place} > {last})"
        wrong = self.block.let(text, "bool", place.dims, "wrong")
        mask = self.mask(axes)
        lanes = f"{wrong} & {mask}" if mask else wrong.text
        lane = f"{wrong}.to(tl.int32) * 0"  # the same word in every lane
        self.block.line(f"tl.store(status + {lane}, 1, mask={lanes})")
        text = f"tl.where({wrong}, {first}, {place})"
        return self.block.let(text, "int64", place.dims, "place")

    def reduction(self, op: Op, index: Index) -> Expr:
        key = (op.result, index)
        if key not in self.results:
            raise BackendError(f"accel.{op.name} is used before it is computed")
        return self.results[key]


def _order(axis: Axis) -> int:
    return axis.order


_STEMS = {"broadcast_to": "x", "reshape": "x", "permute": "x"}
