"""Writes the code of elements: the second subclass of `Tracer`.

Code goes into scopes, one a loop. An element is computed in the outermost scope that knows all its
axes, once, and named; so what does not depend on the inner loop leaves it here, not in LLVM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from accel.backends.loops.index import Affine, Axis, Indexer
from accel.backends.loops.survey import index_axes, packed_address
from accel.backends.loops.trace import COSTLY, Index, Key, Tracer
from accel.backends.tvm import dtypes, scalar, tir
from accel.backends.tvm.addresses import Addresses, Sizes
from accel.backends.tvm.tir import Block, Buffer, Expr, cast, select
from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.types import SUB_BYTE_BITS, Dim

_MOST_STATEMENTS = 6000  # of one kernel: a bound on compile time


@dataclass
class Scope:
    """A loop body, or one side of a choice. Nothing moves out of a `guarded` one."""

    block: Block
    axes: frozenset[Axis]
    guarded: bool = False
    known: dict[Any, Any] = field(default_factory=dict)


@dataclass
class Kept:
    """Elements kept in a local array, computed by the first loop that needs them.

    Element `place` of a loop is at `place` - `offset` of the array.
    """

    buffer: Buffer
    place: Affine
    offset: Expr
    filled: bool = False


class Emitter(Tracer):
    """Code of one phase.

    Args:
        buffers: where arguments and scratch values are read.
        sizes: code of symbolic sizes.
    """

    def __init__(self, indexer: Indexer, buffers: Mapping[Value, Buffer], sizes: Sizes) -> None:
        super().__init__(indexer)
        self.buffers = buffers
        self.addresses = Addresses(sizes)
        self.sizes = sizes
        self.scopes = [Scope(Block(), frozenset())]
        self.results: dict[Key, Callable[[], Expr]] = {}  # of the row's reductions
        self.kept: dict[Key, Kept] = {}
        self.failed: Buffer | None = None  # set where an index was out of range
        self._statements = 0

    @property
    def block(self) -> Block:
        return self.scopes[-1].block

    # -- scopes ----------------------------------------------------------------------------

    @contextmanager
    def scope(self, axes: Sequence[Axis] = (), *, guarded: bool = False) -> Iterator[Block]:
        block = Block()
        known = self.scopes[-1].axes | frozenset(axes)
        self.scopes.append(Scope(block, known, guarded))
        try:
            yield block
        finally:
            self.scopes.pop()

    @contextmanager
    def loop(
        self,
        group: tuple[Axis, ...],
        extent: Expr,
        base: Expr | None = None,
        *,
        guarded: bool = False,
    ) -> Iterator[None]:
        """A loop over merged axes, from `base` (0) on, `extent` steps."""
        variable = tir.var(group[0].name)
        code = variable if base is None else base + variable
        self.addresses.bind(group, code)
        try:
            with self.scope(group, guarded=guarded) as body:
                yield
            self.block.loop(variable, extent, body)
        finally:
            self.addresses.unbind(group)

    @contextmanager
    def _home(self, axes: frozenset[Axis]) -> Iterator[Scope]:
        """The outermost scope that knows the axes and lies in the innermost guarded one."""
        floor = max((i for i, s in enumerate(self.scopes) if s.guarded), default=0)
        depth = floor
        while not axes <= self.scopes[depth].axes:
            depth += 1
            if depth == len(self.scopes):
                raise BackendError(f"axes {axes} are used outside of their loops")
        inner = self.scopes[depth + 1 :]
        del self.scopes[depth + 1 :]
        try:
            yield self.scopes[depth]
        finally:
            self.scopes.extend(inner)

    def _find(self, key: Any) -> Any:
        for s in reversed(self.scopes):
            if key in s.known:
                return s.known[key]
        return None

    # -- Tracer ----------------------------------------------------------------------------

    def known_element(self, value: Value, index: Index) -> Expr:
        key = (value, index)
        found = self._find(key)
        if found is not None:
            return found
        with self._home(index_axes(index)) as home:
            kept = self.kept.get(key)
            if kept is not None and kept.filled:
                code = tir.load(kept.buffer, self.addresses.code(kept.place) - kept.offset)
            elif value in self.buffers:
                code = self.load(value, index)
            else:
                code = self.compute(value, index)
            is_view = value.op is not None and value.op.has(Trait.VIEW)
            named = code if is_view else self.block.let(code, value.name or "v")
            if kept is not None and not kept.filled:
                place = self.addresses.code(kept.place) - kept.offset
                self.block.store(kept.buffer, named, place)
            home.known[key] = named
            self._statements += 1
            if self._statements > _MOST_STATEMENTS:
                raise BackendError(f"a kernel of over {_MOST_STATEMENTS} elements")
        return named

    def load(self, value: Value, index: Index) -> Expr:
        buffer, dtype = self.buffers[value], value.dtype
        if dtype in SUB_BYTE_BITS:
            address, inside = packed_address(self.indexer, value, index)
            byte = tir.load(buffer, self.addresses.code(address))
            return dtypes.from_byte(byte, self.addresses.code(inside), dtype, self.block)
        flat = self.indexer.flatten(index, value.shape)
        code = tir.load(buffer, self.addresses.code(flat))
        if dtypes.is_rounded(dtype) and tir.dtype_of(code) == dtypes.compute(dtype):
            return code  # scratch memory holds what is computed with
        return dtypes.from_storage(code, dtype, self.block)

    def arithmetic(self, op: Op, args: list[Expr]) -> Expr:
        if op.name == "div" and _is_elementary(op.operands[0]):
            inverse = self._inverse(args[1], op.operands[1].dtype)
            if inverse is not None:
                return args[0] * inverse
        return scalar.emit(op, args, self.block)

    def _inverse(self, divisor: Expr, dtype: torch.dtype) -> Expr | None:
        """1 / divisor, if the divisor is the same in all steps of the inner loop.

        Only for numerators that are rounded results of elementary functions (softmax, say):
        multiplying by the inverse adds half a unit in the last place.
        """
        key = ("inverse", id(divisor))
        found = self._find(key)
        if found is not None:
            return found
        for home in self.scopes[:-1]:
            if any(code is divisor for code in home.known.values()):
                one = tir.const(1.0, dtypes.compute(dtype))
                home.known[key] = inverse = home.block.let(one / divisor, "inverse")
                return inverse
        return None

    def number(self, op: Op) -> Expr:
        number = op.attribute("value")
        return scalar.constant(number, op.result.dtype, self.block)

    def position(self, value: Affine, dtype: torch.dtype) -> Expr:
        code = self.block.let(self.addresses.code(value), "place")
        return dtypes.convert(code, torch.int64, dtype, self.block)

    def condition(self, nonnegative: Sequence[Affine]) -> Expr:
        parts = [self.addresses.code(c) >= tir.i64(0) for c in nonnegative]
        result = parts[0]
        for part in parts[1:]:
            result = tir.tirx.And(result, part)
        return result

    def choose(
        self,
        nonnegative: Sequence[Affine],
        yes: Callable[[], Expr],
        no: Callable[[], Expr],
        dtype: torch.dtype,
    ) -> Expr:
        condition = self.condition(nonnegative)
        kind = dtypes.compute(dtype)
        chosen = tir.local_array("chosen", 1, "uint8" if kind == "bool" else kind)
        self.block.allocate(chosen)
        sides: list[Block] = []
        for side in (yes, no):
            with self.scope(guarded=True) as body:
                body.store(chosen, cast(side(), tir.element_type(chosen)), tir.i64(0))
            sides.append(body)
        self.block.branch(condition, *sides)
        result = tir.load(chosen, tir.i64(0))
        return tir.ne(result, tir.const(0, "uint8")) if kind == "bool" else result

    def lookup(
        self, value: Value, index: Index, low: Dim, high: Dim, *, wrap: Dim, clamp: bool
    ) -> Affine:
        key = ("lookup", value, index, low, high, wrap, clamp)
        found = self._find(key)
        if found is not None:
            return found
        axes = index_axes(index)
        with self._home(axes) as home:
            place = self.block.let(cast(self.element(value, index), "int64"), "place")
            if wrap != 0:
                negative = place < tir.i64(0)
                place = self.block.let(
                    select(negative, place + self.sizes.code(wrap), place), "place"
                )
            first, last = self.sizes.code(low), self.sizes.code(high)
            if clamp:
                place = self.block.let(select(place > last, last, place), "place")
                place = self.block.let(select(place < first, first, place), "place")
            else:
                place = self._checked(place, first, last)
            home.known[key] = result = self.indexer.datum(place, axes)
        return result

    def _checked(self, place: Expr, first: Expr, last: Expr) -> Expr:
        """The place if it is in range; else `first`, and the kernel fails."""
        if self.failed is None:
            self.failed = tir.local_array("failed", 1, "int32")
        outside = self.block.let(tir.tirx.Or(place < first, place > last), "outside")
        zero = tir.i64(0)
        flags = tir.load(self.failed, zero) | cast(outside, "int32")
        self.block.store(self.failed, flags, zero)
        return self.block.let(select(outside, first, place), "place")

    def reduction(self, op: Op, index: Index) -> Expr:
        key = (op.result, index)
        if key not in self.results:
            raise BackendError(f"accel.{op.name} is used before it is computed")
        return self.results[key]()


def _is_elementary(value: Value) -> bool:
    return value.op is not None and value.op.name in COSTLY
