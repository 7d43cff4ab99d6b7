"""Patterns over ops, as data: what a rewrite rule looks for, and how it is found.

    x = var("x")
    op("permute", op("permute", x, axes=bind("inner")), axes=bind("outer"))
    op("mul", x, 1)                             # a number: a constant with that value everywhere
    op("softmax", x, axis=where(is_last, "the last axis"))

Every attribute of every op in a pattern is matched (a literal), bound (`bind`), tested (`where`) or
explicitly `ANY`. One that is not mentioned is an error when the pattern is built: this is how
patterns go wrong in other compilers (an attention pattern whose permute axes were wildcards).
Optional operands are mentioned too: a pattern, None (must be absent) or `maybe(pattern)`.

Matching backtracks over the two operand orders of commutative ops. Where a match fails late, the
matcher remembers the nearest miss: which op, which attribute, which second user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from accel.errors import RewriteError
from accel.ir.module import Op, Value
from accel.ir.op import OpDefinition, Trait, definition, has_definition
from accel.ir.types import same_dim

Number: TypeAlias = bool | int | float | complex


class _AnyAttribute:
    def __repr__(self) -> str:
        return "ANY"


ANY = _AnyAttribute()
"""An attribute whose value does not matter. There is no implicit wildcard."""


@dataclass(frozen=True, slots=True)
class Bind:
    """Binds an attribute; a name bound twice must have equal values."""

    name: str


@dataclass(frozen=True, slots=True)
class Where:
    """Tests an attribute with `test(value, op)`; `text` says what is wanted, for near misses."""

    test: Callable[[Any, Op], bool]
    text: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Var:
    """Binds any value, if `test` (say, on its type) agrees. A name used twice: the same value."""

    name: str
    test: Callable[[Value], bool] | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A constant with one value everywhere: equal to `value`, or bound as a number to `name`."""

    name: str = ""
    value: Number | None = None
    tolerance: float = 0.0  # relative, for constants that users write in decimal digits


@dataclass(frozen=True, slots=True)
class Maybe:
    """An optional operand that may be there (then `pattern` matches it) or not (binds None)."""

    pattern: Var


@dataclass(frozen=True, eq=False)
class OpPattern:
    """One op with patterns for all operands and all attributes. Made by `op`."""

    definition: OpDefinition
    operands: tuple[ValuePattern | Maybe | None, ...]
    attributes: dict[str, Any]
    single: bool
    name: str

    @property
    def size(self) -> int:
        """The number of ops in the pattern."""
        return 1 + sum(p.size for p in self.operands if isinstance(p, OpPattern))


ValuePattern: TypeAlias = Var | Scalar | OpPattern


def bind(name: str) -> Bind:
    return Bind(name)


def where(test: Callable[[Any, Op], bool], text: str, name: str = "") -> Where:
    return Where(test, text, name)


def maybe(name: str) -> Maybe:
    return Maybe(Var(name))


def scalar(name: str = "", *, value: Number | None = None, tolerance: float = 0.0) -> Scalar:
    return Scalar(name, value, tolerance)


def var(
    name: str,
    *,
    dtype: torch.dtype | Callable[[torch.dtype], bool] | None = None,
    rank: int | None = None,
    test: Callable[[Value], bool] | None = None,
    text: str = "",
) -> Var:
    """A value pattern; `dtype`, `rank` and `test` narrow it."""
    if dtype is None and rank is None:
        return Var(name, test, text)

    def check(value: Value) -> bool:
        if rank is not None and len(value.shape) != rank:
            return False
        if isinstance(dtype, torch.dtype) and value.dtype != dtype:
            return False
        if callable(dtype) and not dtype(value.dtype):
            return False
        return test is None or test(value)

    wanted = text or " ".join(str(w) for w in (dtype, rank and f"rank {rank}") if w)
    return Var(name, check, wanted)


def op(
    op_name: str,
    *operands: ValuePattern | Maybe | Number | None,
    single: bool = False,
    result: str = "",
    **attributes: Any,
) -> OpPattern:
    """A pattern for `accel.<op_name>`.

    Args:
        operands: one entry per operand of the definition; numbers stand for constants.
        single: the result must have this one user only.
        result: binds the op's value to this name.
        attributes: every attribute of the definition: a literal, `bind`, `where` or `ANY`.

    Raises RewriteError for an unknown op, a wrong number of operands, or attributes that are
    unknown or not mentioned.
    """
    if not has_definition(op_name):
        raise RewriteError(f"a pattern names an unknown op accel.{op_name}")
    d = definition(op_name)
    known = [a.name for a in d.attributes]
    for name in attributes:
        if name not in known:
            raise RewriteError(f"pattern of accel.{op_name}: it has no attribute '{name}'")
    missing = [name for name in known if name not in attributes]
    if missing:
        raise RewriteError(
            f"pattern of accel.{op_name} does not mention {', '.join(missing)}",
            advice="match every attribute, bind it, or write ANY",
        )
    variadic = bool(d.operands) and d.operands[-1].variadic
    if not variadic and len(operands) != len(d.operands):
        raise RewriteError(
            f"pattern of accel.{op_name} has {len(operands)} operands, not {len(d.operands)}",
            advice="optional operands are mentioned too: None, or maybe(name)",
        )
    patterns = tuple(
        Scalar(value=p) if isinstance(p, (bool, int, float, complex)) else p for p in operands
    )
    return OpPattern(d, patterns, attributes, single, result)


@dataclass(frozen=True, slots=True)
class Match:
    """What a pattern bound: `m["x"]` is a Value, an attribute's value, or a number."""

    root: Op
    bound: dict[str, Any]
    ops: tuple[Op, ...]  # matched ops, the root first

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]


@dataclass(slots=True)
class NearMiss:
    """The furthest that a failed match came: `matched` ops, then `reason` at `op`."""

    matched: int
    op: Op
    reason: str


class Matcher:
    """Matches one pattern at one op; with `explain`, `miss` then holds the nearest miss."""

    def __init__(self, pattern: OpPattern, *, explain: bool = False) -> None:
        self.pattern = pattern
        self.explain = explain
        self.miss: NearMiss | None = None

    def first(self, root: Op) -> Match | None:
        return next(self.all(root), None)

    def all(self, root: Op) -> Iterator[Match]:
        """Every way the pattern matches with its root at `root`."""
        if root.definition is not self.pattern.definition or len(root.results) != 1:
            return
        for state in self._op(self.pattern, root, _State({}, ()), is_root=True):
            yield Match(root, state.bound, state.ops)

    def _fail(self, state: _State, at: Op, reason: str, *args: object) -> None:
        if self.explain and (self.miss is None or len(state.ops) > self.miss.matched):
            self.miss = NearMiss(len(state.ops), at, reason.format(*args))

    def _op(
        self, p: OpPattern, found: Op, state: _State, is_root: bool = False
    ) -> Iterator[_State]:
        if p.single and not is_root and len(found.result.uses) != 1:
            if self.explain:
                self._fail(state, found, _second_user(found))
            return
        attributes = self._attributes(p, found, state)
        if attributes is None:
            return
        bound = {**state.bound, **attributes}
        if p.name:
            bound[p.name] = found.result
        state = _State(bound, (*state.ops, found))
        arguments = found.arguments()
        if len(arguments) != len(p.operands):
            self._fail(state, found, "has {} operands", len(arguments))
            return
        yield from self._operands(p.operands, arguments, state, found)
        if p.definition.has(Trait.COMMUTATIVE) and len(arguments) == 2:
            yield from self._operands(p.operands, arguments[::-1], state, found)

    def _attributes(self, p: OpPattern, found: Op, state: _State) -> dict[str, Any] | None:
        """What the attributes bind, or None if one does not fit."""
        bound: dict[str, Any] = {}
        for name, wanted in p.attributes.items():
            if wanted is ANY:
                continue
            value = found.attribute(name)
            expected: Any = wanted
            if isinstance(wanted, Where):
                fits, key, expected = wanted.test(value, found), wanted.name, wanted.text
            elif isinstance(wanted, Bind):
                key = wanted.name
                expected = bound.get(key, state.bound.get(key, value))
                fits = _equal(expected, value)
            else:
                fits, key = _equal(wanted, value), ""
            if not fits:
                self._fail(state, found, "{} = {}, not {}", name, value, expected)
                return None
            if key:
                bound[key] = value
        return bound

    def _operands(
        self, patterns: Sequence[Any], values: Sequence[Any], state: _State, found: Op
    ) -> Iterator[_State]:
        if not patterns:
            yield state
            return
        for after in self._value(patterns[0], values[0], state, found):
            yield from self._operands(patterns[1:], values[1:], after, found)

    def _value(
        self, p: ValuePattern | Maybe | None, value: Value | None, state: _State, user: Op
    ) -> Iterator[_State]:
        if isinstance(p, Maybe):
            if value is None:
                yield state.bind(p.pattern.name, None)
            else:
                yield from self._value(p.pattern, value, state, user)
        elif p is None or value is None:
            if p is None and value is None:
                yield state
            else:
                self._fail(state, user, "an optional operand is there, or is missing")
        elif isinstance(p, Var):
            if p.test is not None and not p.test(value):
                self._fail(state, user, "{!r} is not {}", value, p.text or "as wanted")
            elif p.name not in state.bound:
                yield state.bind(p.name, value)
            elif state.bound[p.name] is value:
                yield state
            else:
                self._fail(state, user, "reads {!r}, not '{}'", value, p.name)
        elif isinstance(p, Scalar):
            yield from self._scalar(p, value, state, user)
        else:
            found = value.op
            if found is None or found.definition is not p.definition or len(found.results) != 1:
                name = "an argument" if found is None else f"accel.{found.name}"
                self._fail(state, user, "reads {}, not accel.{}", name, p.definition.name)
            else:
                yield from self._op(p, found, state)

    def _scalar(self, p: Scalar, value: Value, state: _State, user: Op) -> Iterator[_State]:
        number = splat_value(value)
        if number is None:
            self._fail(state, user, "{!r} is no constant with one value", value)
        elif p.value is not None and not _close(number, p.value, p.tolerance):
            self._fail(state, user, "the constant is {}, not {}", number, p.value)
        elif p.name:
            if p.name not in state.bound:
                yield state.bind(p.name, number)
            elif state.bound[p.name] == number:
                yield state
        else:
            yield state


@dataclass(frozen=True, slots=True)
class _State:
    bound: dict[str, Any]
    ops: tuple[Op, ...]

    def bind(self, name: str, value: Any) -> _State:
        return _State({**self.bound, name: value}, self.ops)


def splat_value(value: Value) -> Any:
    """The number, if the value is an `accel.full`; else None."""
    made = value.op
    return made.attributes["value"] if made is not None and made.name == "full" else None


def _close(a: Any, b: Any, tolerance: float) -> bool:
    """Equal numbers, or nearly; True is not 1."""
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    return bool(a == b or (tolerance and abs(a - b) <= tolerance * abs(b)))


def _equal(a: Any, b: Any) -> bool:
    """Attributes are equal; sizes if provably so. True is not 1."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b))
    if hasattr(a, "free_symbols") or hasattr(b, "free_symbols"):
        numeric = all(hasattr(v, "free_symbols") or isinstance(v, int) for v in (a, b))
        return numeric and same_dim(a, b)
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _second_user(found: Op) -> str:
    users = [u.name for u in found.result.users]
    return f"has {len(found.result.uses)} uses (by {', '.join(users[:4])}), not one"
