"""Rewriting: rules, and the worklist driver that applies them to a fixpoint.

    rules = RuleSet([
        Rewrite("add_zero", op("add", x, 0), x),                       # a row: pattern -> pattern
        Rewrite("merge", op(...), lambda b, m: b.permute(m["x"], axes=...)),   # pattern -> function
        MyStructuralRule(),                                            # a class with `apply`
    ])
    rewrite(module, rules, context)

A replacement's types are inferred and compared with what it replaces: a rule that builds another
type is refused with RewriteError. Before each rewrite the driver asks `context.rewrite(rule, op)`
(fuel, ledger). Fixpoints are bounded; when the bound is hit, the error names the rules that cycle.
Dead pure ops are erased on the way. (accel.ir.patterns holds the pattern language.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from accel.errors import RewriteError
from accel.ir.builder import Builder
from accel.ir.module import Function, Module, Op, Region, Value
from accel.ir.op import OpDefinition, Trait
from accel.ir.patterns import (
    ANY,
    Bind,
    Match,
    Matcher,
    Maybe,
    NearMiss,
    OpPattern,
    Scalar,
    ValuePattern,
    Var,
    bind,
    maybe,
    op,
    scalar,
    splat_value,
    var,
    where,
)
from accel.ir.types import TensorType, broadcast_shapes, same_shape, same_type

__all__ = [
    "ANY",
    "Match",
    "Matcher",
    "Rewrite",
    "Rule",
    "RuleSet",
    "bind",
    "erase_if_dead",
    "maybe",
    "op",
    "rewrite",
    "scalar",
    "splat_value",
    "var",
    "where",
]

Made: TypeAlias = Value | Sequence[Value] | None


class RewriteContext(Protocol):
    """What the driver needs to know of `accel.passes.base.Context`."""

    current_pass: str

    def rewrite(self, rule: str, op: Op | None = None) -> bool: ...

    def miss(self, rule: str, op: Op, reason: str) -> None: ...


@dataclass
class FreeContext:
    """A context without limits, for rewriting outside of any pass."""

    current_pass: str = ""

    def rewrite(self, rule: str, op: Op | None = None) -> bool:
        return True

    def miss(self, rule: str, op: Op, reason: str) -> None:
        return None


class Rule(ABC):
    """A structural rewrite. `roots`: names of the ops it starts from, or a trait of theirs."""

    name: str
    roots: tuple[str, ...] | Trait

    @abstractmethod
    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        """New values for the op's results, built with `b` (which points before the op), or None.

        Must not change anything else: what was built is erased again on None or without fuel.
        """


class Rewrite(Rule):
    """A pattern and its replacement: another pattern over the same names, or `make(b, match)`.

    With `near` > 0, a match that failed after that many matched ops is reported as a near miss.
    A value that replaces a larger one (x + 0, with a 0 of larger shape) is broadcast.
    """

    def __init__(
        self,
        name: str,
        pattern: OpPattern,
        replacement: ValuePattern | float | Callable[[Builder, Match], Made],
        *,
        when: Callable[[Match], bool] | None = None,
        near: int = 0,
    ) -> None:
        self.name = name
        self.pattern = pattern
        self.roots = (pattern.definition.name,)
        self.when = when
        self.near = near
        if isinstance(replacement, (bool, int, float)):
            replacement = Scalar(value=replacement)
        self.replacement = replacement

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        matcher = Matcher(self.pattern, explain=self.near > 0)
        for match in matcher.all(op):
            if self.when is not None and not self.when(match):
                continue
            if isinstance(self.replacement, (Var, Scalar, OpPattern)):
                made = _instantiate(self.replacement, b, match, op.result.type)
                return _broadcast(b, made, op.result.type)
            made_by_function = self.replacement(b, match)
            if made_by_function is not None:
                return made_by_function
        missed: NearMiss | None = matcher.miss
        if self.near and missed is not None and missed.matched >= self.near:
            context.miss(self.name, missed.op, missed.reason)
        return None


def _instantiate(p: ValuePattern, b: Builder, match: Match, like: TensorType) -> Value:
    """Builds a replacement pattern. Numbers become constants of `like`'s dtype."""
    if isinstance(p, Var):
        found: Value = match[p.name]
        return found
    if isinstance(p, Scalar):
        return b.scalar(match[p.name] if p.name else p.value or 0, like.dtype)
    values: list[Value | None] = []
    for inner in p.operands:
        if isinstance(inner, Maybe):
            values.append(match[inner.pattern.name])
        elif inner is None:
            values.append(None)
        elif not isinstance(inner, Scalar):
            values.append(_instantiate(inner, b, match, like))
        else:
            values.append(None)
    sibling = next((v.type for v in values if v is not None), like)
    for i, inner in enumerate(p.operands):
        if isinstance(inner, Scalar):
            values[i] = _instantiate(inner, b, match, sibling)
    attributes = {k: match[v.name] if isinstance(v, Bind) else v for k, v in p.attributes.items()}
    return b.op(p.definition.name, values, attributes).result


def _broadcast(b: Builder, value: Value, type: TensorType) -> Value:
    if value.dtype != type.dtype or same_shape(value.shape, type.shape):
        return value
    if not same_shape(broadcast_shapes(value.shape, type.shape), type.shape):
        return value
    widened: Value = b.broadcast_to(value, shape=type.shape)
    return widened


class RuleSet:
    """Rules, looked up by op definition."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = list(rules)
        names = [r.name for r in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise RewriteError(f"two rules are named '{name}'")
        self._cache: dict[OpDefinition, list[Rule]] = {}

    def of(self, d: OpDefinition) -> list[Rule]:
        found = self._cache.get(d)
        if found is None:
            found = [
                r
                for r in self.rules
                if (d.has(r.roots) if isinstance(r.roots, Trait) else d.name in r.roots)
            ]
            self._cache[d] = found
        return found


def rewrite(
    target: Module | Function | Region,
    rules: RuleSet,
    context: RewriteContext | None = None,
    *,
    limit: int | None = None,
) -> int:
    """Applies the rules until none fires; returns the number of rewrites.

    Args:
        target: function bodies or one region; nested regions are programs of their own and are
            left alone.
        limit: the most rewrites allowed; by default 40 per op and 1000 more.

    Raises RewriteError naming the rule for a replacement of another type, and naming the rules
    that cycle when the bound is hit.
    """
    context = context or FreeContext()
    if isinstance(target, Module):
        return sum(rewrite(f, rules, context, limit=limit) for f in target.functions.values())
    region = target.body if isinstance(target, Function) else target
    return _Driver(region, rules, context, limit).run()


@dataclass(slots=True)
class _Origin:
    """Which rewrite made an op, and out of what: the evidence when rules cycle."""

    rule: str
    parent: _Origin | None
    depth: int


@dataclass
class _Driver:
    region: Region
    rules: RuleSet
    context: RewriteContext
    limit: int | None
    queue: deque[Op] = field(default_factory=deque)
    queued: set[Op] = field(default_factory=set)
    origins: dict[Op, _Origin] = field(default_factory=dict)
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=64))
    count: int = 0
    out_of_fuel: bool = False

    def run(self) -> int:
        size = self.region.size
        limit = self.limit if self.limit is not None else 40 * size + 1000
        depth_limit = size + 200
        for each in self.region.ops:
            self.push(each)
        while self.queue and not self.out_of_fuel:
            current = self.queue.popleft()
            self.queued.discard(current)
            if current.parent is not self.region:
                continue
            rules = self.rules.of(current.definition)
            if not rules:
                continue
            b = Builder(before=current, made_by=self.context.current_pass or current.made_by)
            for rule in rules:
                if self.try_rule(rule, current, b, depth_limit) or self.out_of_fuel:
                    break
            if self.count > limit:
                raise RewriteError(
                    f"no fixpoint after {self.count} rewrites; the last were by "
                    f"{', '.join(sorted(set(self.recent)))}"
                )
        return self.count

    def push(self, each: Op) -> None:
        if each not in self.queued:
            self.queued.add(each)
            self.queue.append(each)

    def try_rule(self, rule: Rule, current: Op, b: Builder, depth_limit: int) -> bool:
        anchor = current.prev
        made = rule.apply(current, b, self.context)
        if made is None and current.prev is anchor:
            return False
        new = self.inserted(anchor, current)
        if made is None:
            self.discard(new)
            return False
        values = [made] if isinstance(made, Value) else list(made)
        self.check_types(rule, current, values)
        if not self.context.rewrite(rule.name, current):
            self.discard(new)
            self.out_of_fuel = True
            return False
        self.count += 1
        self.recent.append(rule.name)
        self.note_origin(rule, current, new, depth_limit)
        producers = [v.op for v in current.operands if v.op is not None]
        current.replace_with(values)
        for each in reversed(new):
            erase_if_dead(each)
        for each in new:  # operands before users
            self.push(each)
        for value in values:
            for user in value.users:
                self.push(user)
        for producer in producers:
            if not erase_if_dead(producer):
                self.push(producer)
        return True

    def inserted(self, anchor: Op | None, current: Op) -> list[Op]:
        new: list[Op] = []
        each = current.prev
        while each is not None and each is not anchor:
            new.append(each)
            each = each.prev
        return new[::-1]

    def discard(self, new: list[Op]) -> None:
        for each in reversed(new):
            each.erase()

    def check_types(self, rule: Rule, current: Op, values: Sequence[Value]) -> None:
        if len(values) != len(current.results):
            raise RewriteError(
                f"rule '{rule.name}' built {len(values)} values for accel.{current.name}, which "
                f"has {len(current.results)}"
            )
        for old, value in zip(current.results, values):
            if value is old:
                raise RewriteError(f"rule '{rule.name}' replaces a value by itself")
            if not same_type(old.type, value.type):
                raise RewriteError(
                    f"rule '{rule.name}' built {value.type} to replace {old.type}",
                    where=str(current.location or f"accel.{current.name}"),
                )

    def note_origin(self, rule: Rule, current: Op, new: list[Op], depth_limit: int) -> None:
        parent = self.origins.pop(current, None)
        origin = _Origin(rule.name, parent, parent.depth + 1 if parent else 0)
        for each in new:
            self.origins[each] = origin
        if origin.depth > depth_limit:
            names: list[str] = []
            link: _Origin | None = origin
            while link is not None and len(names) < 16:
                names.append(link.rule)
                link = link.parent
            raise RewriteError(
                f"rules cycle: {', '.join(sorted(set(names)))}",
                where=str(current.location or f"accel.{current.name}"),
                advice=f"each op was made from the last one: {' <- '.join(names[:6])} ...",
            )


def erase_if_dead(start: Op) -> bool:
    """Erases a pure op without users, then what only it used. Returns whether `start` went."""
    erased = False
    stack = [start]
    while stack:
        each = stack.pop()
        if each.parent is None or not each.has(Trait.PURE) or each.has(Trait.TERMINATOR):
            continue
        if any(r.uses for r in each.results):
            continue
        stack.extend(v.op for v in each.operands if v.op is not None)
        erased = erased or each is start
        each.erase()
    return erased
