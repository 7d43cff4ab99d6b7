"""Gives attention over a cache to the kernel generator, and with it what a token does to the cache.

A step of decoding writes one row of keys and values for each layer and reads the cache: small work
in many small kernels, whose launches cost more than the work. The generator's kernel takes the
whole of it, if it says so (`supports_neighbour`): the rotary embedding of the new query and key,
the two updates, attention, the merge of its heads. Updates that stay (a prompt's keys and values)
become kernels of kind "update", which write the new rows alone, those of a layer together, and
turn the keys; the prompt's own attention reads them from the cache.
Contract: exact (the kernel's region is the ops it replaces).

    %1 = "accel.rope"(%q, %cos, %sin)                  %5, %6, %7 = "accel.kernel"(%qkv, ...) ({
    %2 = "accel.rope"(%k, %cos, %sin)                    rope, rope, dynamic_update,
    %3 = "accel.dynamic_update"(%keys, %2, %at)    ->    dynamic_update, cached_attention
    %4 = "accel.dynamic_update"(%values, %v, %at)      }) {kind = "cached_attention"}
    %5 = "accel.cached_attention"(%1, %3, %4, %at)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from accel.ir.builder import Builder
from accel.ir.capability import KernelGenerator
from accel.ir.module import Function, Op, Value
from accel.ir.op import Trait
from accel.passes.anchored import AnchoredPass
from accel.passes.base import EXACT, Context, Contract, register_pass
from accel.passes.outline import finish_outline, is_full, outline
from accel.passes.select_attention import views_after, views_before


@register_pass
@dataclass
class SelectCached(AnchoredPass):
    """Outlines attention over caches, and updates. `most` bounds the ops computed before it."""

    name: ClassVar[str] = "select_cached"
    contract: ClassVar[Contract] = EXACT
    anchors: ClassVar[tuple[str, ...]] = ("cached_attention",)

    most: int = 16

    def _select(
        self, op: Op, context: Context, generator: KernelGenerator, order: dict[Op, int]
    ) -> None:
        decoding = _decoding(op, generator)
        updates = _updates_of(op, decoding, context, generator, order)
        inside = {op, *updates, *decoding}
        inside |= self._before(inside, op, generator)
        ops = sorted(inside, key=order.__getitem__)
        after = views_after(op, generator)
        if not context.rewrite(self.name, op):
            return
        views = {v for o in ops for v in views_before(o, generator, _tiles)} - inside
        views |= _pages_before(op, generator)
        outside = sorted(views, key=order.__getitem__)
        self._outline([*ops, *after], op.name, generator, order, duplicate=outside)

    def _before(self, inside: set[Op], op: Op, generator: KernelGenerator) -> set[Op]:
        """Pointwise ops that nothing but the kernel needs: they compute its query and new rows."""
        found: set[Op] = set()
        values = [op.operands[0], *(u.operands[1] for u in inside if u.has(Trait.UPDATE))]
        pending = [v.op for v in values]
        while pending and len(found) < self.most:
            made = pending.pop()
            if made is None or made in found or not _is_pointwise(made, generator):
                continue
            if _tiles(made):
                continue
            if any(user not in found and user not in inside for user in made.result.users):
                if not made.has(Trait.VIEW):
                    continue
            else:
                found.add(made)
            pending.extend(v.op for v in made.operands)
        return found

    def _after_anchors(
        self, function: Function, context: Context, generator: KernelGenerator, order: dict[Op, int]
    ) -> None:
        """Updates that no attention took; two of one shape at one place share a kernel."""
        left: list[Op] = []
        for op in function.ops:
            if op.name != "dynamic_update":
                continue
            reason = generator.supports_anchor(op, "update")
            if reason is not None:
                context.miss(self.name, op, reason)
            elif op.operands[0].op is None:
                left.append(op)
        while left:
            group = [left.pop(0)]
            if left and _alike(group[0], left[0], order):
                group.append(left.pop(0))
            if not context.rewrite(self.name, group[0]):
                return
            updates = list(group)
            group = [*self._turns(updates, generator, order), *updates]
            views = {v for o in group for v in views_before(o, generator)}
            kernel = outline(
                group,
                "kernel",
                {"backend": generator.name, "kind": "update"},
                self.name,
                duplicate=sorted(views, key=order.__getitem__),
                inline=is_full,
            )
            _insert_early(kernel, group[-1], function, order)
            finish_outline(kernel, group)

    def _turns(
        self, updates: Sequence[Op], generator: KernelGenerator, order: dict[Op, int]
    ) -> list[Op]:
        """Rotary embeddings that new rows come from, which the update's kernel then computes: what
        else reads them reads the rows where they are written."""
        found: list[Op] = []
        for update in updates:
            source, others = _read_back(update, updates, order)
            if source is None or generator.supports_neighbour(update, source) is not None:
                continue
            for user in others:
                _read_rows(update, source.result, user, self.name, order)
            found.append(source)
        return sorted(dict.fromkeys(found), key=order.__getitem__)


def _read_back(
    update: Op, updates: Sequence[Op], order: dict[Op, int]
) -> tuple[Op | None, list[Op]]:
    """The rotary embedding that makes an update's rows, and who else reads them; None where those
    come before the update's kernel, or do not find the rows at the start of the state."""
    state, rows, start = update.operands
    source = rows.op
    if source is None or source.name != "rope" or state.dtype != rows.dtype:
        return None, []
    others = [user for user in dict.fromkeys(rows.users) if user is not update]
    if others and (update.attribute("ring") or not is_zero(start)):
        return None, []
    read = [v for o in (source, *updates) for v in o.operands]
    made = [order[v.op] for v in read if v.op not in (None, source) and not is_full(v)]
    if any(user.has(Trait.TERMINATOR) or order[user] < max(made, default=0) for user in others):
        return None, []
    return source, others


def _read_rows(update: Op, rows: Value, user: Op, made_by: str, order: dict[Op, int]) -> None:
    """Points a reader of an update's rows to the updated state."""
    axis = int(update.attribute("axis")) % rows.type.rank
    b = Builder(before=user, location=update.location, made_by=made_by)
    part = b.slice(update.result, axis=axis, start=0, stop=rows.shape[axis])
    for index, operand in enumerate(user.operands):
        if operand is rows:
            user.set_operand(index, part)
    assert part.op is not None
    order[part.op] = order[user]


def is_zero(value: Value) -> bool:
    """Whether it is the constant 0."""
    return value.op is not None and value.op.name == "full" and value.op.attribute("value") == 0


def _pages_before(op: Op, generator: KernelGenerator) -> set[Op]:
    """Where the cache is read through a table: the gather and the views around it."""
    found: set[Op] = set()
    for value in op.operands[1:3]:
        chain, made = [], value.op
        while made is not None and made.has(Trait.VIEW) and generator.supports(made) is None:
            chain.append(made)
            made = made.operands[0].op
        if made is not None and made.name == "gather" and generator.supports(made) is None:
            found |= {*chain, made, *views_before(made, generator)}
    return found


def _tiles(op: Op) -> bool:
    """Copies of heads, one after the other: a head would be two axes of the kernel."""
    made = op.operands[0].op if op.name == "reshape" else None
    if made is None or made.name != "broadcast_to":
        return False
    before, after = ([d for d in v.shape if d != 1] for v in (made.result, op.result))
    return before != after


def _decoding(op: Op, generator: KernelGenerator) -> set[Op]:
    """What computes keys and values from the caches, element by element, and nothing else needs."""
    found: set[Op] = set()
    first = [v.op for v in op.operands[1:3]]
    if any(o is None or generator.supports_neighbour(op, o) is not None for o in first):
        return found
    pending = list(first)
    while pending:
        made = pending.pop()
        if made is None or made in found or made.has(Trait.UPDATE):
            continue
        if not _decodes(made, op, generator) or any(
            user is not op and user not in found for user in made.result.users
        ):
            continue
        found.add(made)
        pending.extend(v.op for v in made.operands)
    return found


def _decodes(op: Op, anchor: Op, generator: KernelGenerator) -> bool:
    if op.name == "gather":  # pages
        return generator.supports_neighbour(anchor, op) is None
    known = op.has(Trait.DECODE) or _is_pointwise(op, generator)
    return known and generator.supports_decoding(op) is None and len(op.results) == 1


def _is_pointwise(op: Op, generator: KernelGenerator) -> bool:
    if op.name == "rope":  # decomposed inside of the kernel
        return generator.supports_decoding(op) is None
    plain = op.has(Trait.ELEMENTWISE) or op.has(Trait.VIEW)
    return plain and len(op.results) == 1 and generator.supports(op) is None


def _updates_of(
    op: Op,
    decoding: set[Op],
    context: Context,
    generator: KernelGenerator,
    order: dict[Op, int],
) -> list[Op]:
    """The updates of its keys and values, or of what they are computed from, if it takes all."""
    read = [*op.operands[1:3], *(v for o in decoding for v in o.operands)]
    found = dict.fromkeys(v.op for v in read)
    updates = [u for u in found if u is not None and u.has(Trait.UPDATE)]
    updates.sort(key=order.__getitem__)
    if len(updates) < 2:
        return []
    for update in updates:
        reason = generator.supports_neighbour(op, update)
        others = [u for u in update.result.users if u not in decoding]
        if reason is None and any(_is_early(u, op, order) for u in others):
            reason = "the updated cache is read before"
        if reason is not None:
            context.miss("select_cached", update, reason)
            return []
    return updates


def _is_early(user: Op, op: Op, order: dict[Op, int]) -> bool:
    """Whether an op comes before the kernel around `op` would."""
    return user is not op and not user.has(Trait.TERMINATOR) and order[user] < order[op]


def _insert_early(kernel: Op, latest: Op, function: Function, order: dict[Op, int]) -> None:
    """Inserts it as soon as its operands are there: what it reads need not live for longer."""
    made = [v.op for v in kernel.operands if v.op is not None]
    last = max(made, key=order.__getitem__, default=None)
    place = (function.body.first if last is None else last.next) or latest
    function.body.insert_before(kernel, place)
    order[kernel] = order[place]


def _alike(one: Op, other: Op, order: dict[Op, int]) -> bool:
    """Whether both write as many rows at the same place, and neither waits for the other."""

    def place(op: Op) -> Value | object:
        start = op.operands[2]
        made = start.op
        return made.attribute("value") if made is not None and made.name == "full" else start

    early = [u for u in one.result.users if not u.has(Trait.TERMINATOR)]
    return (
        one.operands[1].shape == other.operands[1].shape
        and one.attribute("axis") == other.attribute("axis")
        and place(one) == place(other)
        and all(order[u] > order[other] for u in early)
    )
