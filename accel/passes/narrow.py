"""What a program computes at one place of the sequence: a demand-driven dataflow rewrite.

A value whose shape has the symbol `length` says something about every token. `Narrow` builds that
value at a window of a few tokens. It walks back from what is wanted: a *demand* is a value and the
axes on which it is narrowed, and each op says what it needs of its operands for it:

    elementwise ops and views    the same axes, followed through the index map
    iota                         the position itself
    attention                    one query; keys and values of all tokens before it (subclass)
    anything else                all sequence axes, if the op treats tokens one by one, which
                                 evaluating its definition on whole and on narrowed data tells

A demand without axes is the whole value. Two windows exist: the last token of a text that is there
(`LastToken`), and tokens after a text of which only the state is there (`NextTokens`): see
`windows`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import sympy

from accel.errors import CaptureError, OptionError
from accel.ir.builder import Builder
from accel.ir.module import Function, Op, Region, Value
from accel.ir.op import Trait
from accel.ir.types import Dim, TensorType, simplify_dim, symbol_names
from accel.passes.token_wise import is_token_wise

Axes: TypeAlias = frozenset[int]
Emit: TypeAlias = Callable[[Builder, Sequence[Value]], Sequence[Value]]
WHOLE: Axes = frozenset()


@dataclass(frozen=True)
class Plan:
    """How to make a narrowed value: demands on other values, and what to do with those."""

    needs: Sequence[tuple[Value, Axes]]
    emit: Emit


class Narrow(ABC):
    """Emits narrowed values of `main` through `b`.

    Args:
        main: the function whose values are narrowed.
        ids: its argument with the tokens.
        length: the symbol of its sequence axes.
        sizes: other symbols that have become numbers.
        total: what `length` becomes on axes that are not narrowed.
        count: tokens of the window.
    """

    def __init__(
        self,
        main: Function,
        ids: Value,
        b: Builder,
        length: sympy.Symbol,
        sizes: Mapping[str, Dim],
        total: Dim,
        count: Dim = 1,
    ) -> None:
        self.main, self.ids, self.b, self.length = main, ids, b, length
        self.sizes, self.total, self.count = dict(sizes), total, count
        self.made: dict[tuple[Value, Axes], Value] = {}
        self.plans: dict[tuple[Value, Axes], Plan] = {}
        self.from_tokens = depend_on([ids])
        self.kept: set[Value] = set()  # whole ones, from a state (`accel.passes.mixing`)

    def __call__(self, wanted: Value) -> Value:
        """The value narrowed on all its sequence axes."""
        return self.build(wanted, self.sequence_axes(wanted))

    def build(self, wanted: Value, axes: Axes) -> Value:
        """The value narrowed on these axes."""
        goal = (wanted, axes)
        order = {op: i for i, op in enumerate(self.main.ops)}
        pending = [goal]
        while pending:
            key = pending.pop()
            if key not in self.made and key not in self.plans:
                self.plans[key] = self._plan(*key)
                pending.extend(self.plans[key].needs)
        for key in sorted(self.plans, key=lambda k: (order[made_by(k[0])], self._turn(*k))):
            if key not in self.made:
                plan = self.plans[key]
                self.b.location = made_by(key[0]).location
                made = plan.emit(self.b, [self.made[need] for need in plan.needs])
                self.made[key] = made[key[0].index if len(made) > 1 else 0]
                if len(made) > 1:  # an op is there once, whichever of its results are wanted
                    self._others(key, made)
        return self.made[goal]

    def _others(self, key: tuple[Value, Axes], made: Sequence[Value]) -> None:
        """Remembers an op's other results."""
        value, axes = key
        full = axes == self.sequence_axes(value)
        for result, new in zip(made_by(value).results, made):
            own = self.sequence_axes(result) if axes and full else axes
            if full or not axes or len(result.shape) == len(value.shape):
                self.made.setdefault((result, own), new)

    def _turn(self, value: Value, axes: Axes) -> int:
        """When a demand comes among those on one op's results: windows are cut of whole values,
        and whole values that are kept are written from windows."""
        return 1 if axes else 2 * (value in self.kept)

    # -- what the two windows differ in ------------------------------------------------------

    @abstractmethod
    def cut(self, b: Builder, x: Value, axis: int, offset: Dim) -> Value:
        """The window of a whole value along `axis`, `offset` after the first token's place."""

    @abstractmethod
    def line(self, op: Op) -> Emit:
        """An iota at the window."""

    @abstractmethod
    def band(self, op: Op) -> Emit:
        """A tri_mask with its rows at the window."""

    @abstractmethod
    def attend(self, op: Op) -> Plan:
        """Attention of the window's queries."""

    @abstractmethod
    def whole(self, value: Value) -> Plan:
        """The value over all tokens."""

    @abstractmethod
    def otherwise(self, value: Value, axes: Axes) -> Plan:
        """The plan where no rule holds."""

    # -- helpers -----------------------------------------------------------------------------

    def is_sequence(self, dim: Dim) -> bool:
        return not isinstance(dim, int) and self.length.name in symbol_names(dim)

    def sequence_axes(self, value: Value) -> Axes:
        return frozenset(i for i, d in enumerate(value.shape) if self.is_sequence(d))

    def size(self, dim: Dim, narrowed: bool = False) -> Dim:
        """A size of @main as it is here."""
        if isinstance(dim, int):
            return dim
        known = {s: self.sizes[s.name] for s in dim.free_symbols if s.name in self.sizes}
        known[self.length] = self.count if narrowed else self.total
        return simplify_dim(dim.subs(known))

    def shape(self, shape: Sequence[Dim], axes: Axes = WHOLE) -> tuple[Dim, ...]:
        return tuple(self.size(d, i in axes) for i, d in enumerate(shape))

    def attributes(self, op: Op, narrowed: bool = False, **changes: Any) -> dict[str, Any]:
        """The op's attributes with sizes as they are here."""

        def here(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(here(v) for v in value)
            return self.size(value, narrowed) if isinstance(value, sympy.Expr) else value

        return {k: here(v) for k, v in op.attributes.items()} | changes

    def clone(self, op: Op, narrowed: bool = False, **changes: Any) -> Emit:
        """The op itself over other operands."""
        attributes = self.attributes(op, narrowed, **changes)

        def emit(b: Builder, operands: Sequence[Value]) -> Sequence[Value]:
            given: list[Value | None] = list(operands)
            if op.segments is not None:  # absent optional operands
                left = iter(operands)
                given = [next(left) if n else None for n in op.segments for _ in range(max(n, 1))]
            types = None
            regions = [self.copy_region(r) for r in op.regions]
            if op.definition.infer is None:
                axes = [self.sequence_axes(r) if narrowed else WHOLE for r in op.results]
                types = [
                    TensorType(self.shape(r.shape, a), r.dtype) for r, a in zip(op.results, axes)
                ]
            return b.op(op.name, given, attributes, types=types, regions=regions).results

        return emit

    def copy_region(self, region: Region) -> Region:
        """A region with sizes as they are here."""
        copy = Region([TensorType(self.shape(a.shape), a.dtype) for a in region.args])
        made = self.inline(region, copy.args, Builder(copy, made_by=self.b.made_by))
        Builder(copy).op("yield", made)
        return copy

    def inline(
        self, region: Region, given: Sequence[Value], b: Builder | None = None
    ) -> list[Value]:
        """The region's ops over other arguments; its results."""
        b = b or self.b
        mapping = dict(zip(region.args, given))
        for op in region.ops:
            if op is region.last:
                break
            b.location = op.location
            made = self.clone(op)(b, [mapping[v] for v in op.operands])
            mapping.update(zip(op.results, made))
        return [mapping[v] for v in region.results]

    def refuse(self, value: Value, why: str) -> CaptureError:
        op = value.op
        name = f"accel.{op.name}" if op is not None else f"the argument '{value.name}'"
        place = str(op.location) if op is not None and op.location else ""
        return CaptureError(
            f"no key/value cache can be inserted: {name} {why}",
            where=place,
            advice="tokens may look at those before them, by attention or products over them, and "
            "by convolutions, sums and loops",
        )

    # -- rules -------------------------------------------------------------------------------

    def _plan(self, value: Value, axes: Axes) -> Plan:
        if value.op is None:
            raise self.refuse(value, "is needed for all tokens at once")
        if not axes:
            return self.whole(value)
        op = value.op
        found: Plan | None = None
        if all(self._is_run(value.shape[a]) for a in axes):
            if op.has(Trait.ELEMENTWISE):
                needs = [(v, self._aligned(v, value, axes)) for v in op.operands]
                found = Plan(needs, self.clone(op))
            elif op.name in _RULES:
                found = _RULES[op.name](self, op, axes)
            else:
                found = self._token_wise(op, axes)
        return found or self.otherwise(value, axes)

    def _is_run(self, dim: Dim) -> bool:
        """Whether an axis has the tokens in order, and nothing before or after: n * length."""
        factor = sympy.cancel(dim / self.length)
        return self.length not in factor.free_symbols and bool(factor.is_integer)

    def _aligned(self, operand: Value, result: Value, axes: Axes) -> Axes:
        """Axes of an operand that is broadcast to the result."""
        shift = len(result.shape) - len(operand.shape)
        moved = (a - shift for a in axes)
        return frozenset(a for a in moved if a >= 0 and self.is_sequence(operand.shape[a]))

    def _token_wise(self, op: Op, axes: Axes) -> Plan | None:
        if any(self.sequence_axes(r) != axes for r in op.results[:1]):
            return None
        if not is_token_wise(op, self.length):
            return None
        needs = [(v, self.sequence_axes(v)) for v in op.operands]
        return Plan(needs, self.clone(op, narrowed=True))

    def _permute(self, op: Op, axes: Axes) -> Plan:
        order = op.attribute("axes")
        return Plan([(op.operands[0], frozenset(order[a] for a in axes))], self.clone(op))

    def _broadcast(self, op: Op, axes: Axes) -> Plan:
        x = op.operands[0]
        shape = self.shape(op.result.shape, axes)
        return Plan([(x, self._aligned(x, op.result, axes))], self.clone(op, shape=shape))

    def _reshape(self, op: Op, axes: Axes) -> Plan | None:
        """Elements keep their order, so the sequence axes correspond one to one."""
        x = op.operands[0]
        before = sorted(self.sequence_axes(x))
        after = sorted(self.sequence_axes(op.result))
        if len(before) != len(after) or not all(self._is_run(x.shape[i]) for i in before):
            return None
        need = frozenset(i for i, j in zip(before, after) if j in axes)
        shape = self.shape(op.result.shape, axes)
        return Plan([(x, need)], self.clone(op, shape=shape))

    def _slice(self, op: Op, axes: Axes) -> Plan | None:
        x, axis = op.operands[0], op.attribute("axis") % len(op.result.shape)
        if axis not in axes:
            return Plan([(x, axes)], self.clone(op))
        if self.is_sequence(x.shape[axis]) or op.attribute("step") != 1 or len(axes) != 1:
            return None
        start = op.attribute("start")
        rows = x.shape[axis]
        if isinstance(rows, int) and isinstance(self.total, int) and self.total + start > rows:
            raise OptionError(
                f"a text of {self.total} tokens, and a table of positions has {rows - start}",
                where=str(op.location or ""),
                advice="choose a smaller capacity",
            )
        return Plan([(x, WHOLE)], lambda b, values: [self.cut(b, values[0], axis, start)])

    def _iota(self, op: Op, axes: Axes) -> Plan:
        axis = op.attribute("axis") % len(op.result.shape)
        if axis in axes:
            return Plan([], self.line(op))
        return Plan([], self.clone(op, shape=self.shape(op.result.shape, axes)))

    def _full(self, op: Op, axes: Axes) -> Plan:
        return Plan([], self.clone(op, shape=self.shape(op.result.shape, axes)))

    def _tri_mask(self, op: Op, axes: Axes) -> Plan | None:
        return Plan([], self.band(op)) if axes == {0} else None

    def _cat(self, op: Op, axes: Axes) -> Plan | None:
        if op.attribute("axis") % len(op.result.shape) in axes:
            return None
        return Plan([(v, axes) for v in op.operands], self.clone(op))

    def _linear(self, op: Op, axes: Axes) -> Plan | None:
        x, *constants = op.operands
        if len(op.result.shape) - 1 in axes or any(self.sequence_axes(c) for c in constants):
            return None
        return Plan([(x, axes), *((c, WHOLE) for c in constants)], self.clone(op))

    def _embedding(self, op: Op, axes: Axes) -> Plan | None:
        table, ids = op.operands
        if self.sequence_axes(table) or len(op.result.shape) - 1 in axes:
            return None
        return Plan([(table, WHOLE), (ids, axes)], self.clone(op))

    def _index(self, op: Op, axes: Axes) -> Plan | None:
        """Rows of a table by indices that stand side by side."""
        x, *indices = op.operands
        if op.name == "index":
            places = op.attribute("axes")
        else:
            places = (op.attribute("axis") % len(x.shape),)
        adjacent = all(b - a == 1 for a, b in pairwise(places))
        if self.sequence_axes(x):
            return self._token_wise(op, axes)
        if not adjacent:
            return None
        rank = max(len(i.shape) for i in indices)
        inner = [a - places[0] for a in axes]
        if any(not 0 <= a < rank for a in inner):
            return None
        needs = [(x, WHOLE)]
        for i in indices:
            own = (a - (rank - len(i.shape)) for a in inner)
            needs.append((i, frozenset(a for a in own if a >= 0 and self.is_sequence(i.shape[a]))))
        return Plan(needs, self.clone(op))

    def _attention(self, op: Op, axes: Axes) -> Plan | None:
        return self.attend(op) if axes == {2} else None


_RULES: dict[str, Callable[[Narrow, Op, Axes], Plan | None]] = {
    "permute": Narrow._permute,
    "broadcast_to": Narrow._broadcast,
    "reshape": Narrow._reshape,
    "slice": Narrow._slice,
    "iota": Narrow._iota,
    "full": Narrow._full,
    "tri_mask": Narrow._tri_mask,
    "cat": Narrow._cat,
    "linear": Narrow._linear,
    "embedding": Narrow._embedding,
    "index": Narrow._index,
    "gather": Narrow._index,
    "attention": Narrow._attention,
    "streaming_attention": Narrow._attention,
}


def made_by(value: Value) -> Op:
    assert value.op is not None
    return value.op


def depend_on(sources: Sequence[Value]) -> set[Value]:
    """All values that follow from these."""
    found: set[Value] = set()
    pending = list(sources)
    while pending:
        value = pending.pop()
        if value not in found:
            found.add(value)
            pending.extend(r for user in value.users for r in user.results)
    return found


def stored(value: Value) -> list[Value]:
    """What a value is decoded from (`Trait.DECODE`): the value itself if it is not.

    Casts of what decoding reads, such as scales in half precision, belong to it; so does one of
    its result.
    """
    op = value.op
    if op is not None and op.name == "cast":
        inner = op.operands[0].op
        op = inner if inner is not None and inner.has(Trait.DECODE) else None
    if op is None or not op.has(Trait.DECODE):
        return [value]
    return [leaf for operand in op.operands for leaf in _leaves(operand)]


def _leaves(value: Value) -> list[Value]:
    op = value.op
    if op is not None and op.name == "cast":
        narrow = op.operands[0]
        return [narrow] if narrow.dtype.itemsize < value.dtype.itemsize else [value]
    return stored(value)
