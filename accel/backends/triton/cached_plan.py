"""What a cached attention kernel (see `cached`) computes: its axes, its writes, its tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.phases import Planner
from accel.backends.loops.trace import Index
from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.types import Dim


@dataclass(frozen=True)
class CachedTile:
    """Keys of one step, programs that share a key/value head, and how they are run."""

    keys: int
    split: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Write:
    """New rows of a cache: `source` goes over `cache`, an argument, at `start`; result `result`.

    Of a cache in pages, `table` says in which.
    """

    cache: Value
    source: Value
    start: Value
    result: int
    table: Value | None = None


@dataclass
class Plan:
    """The axes of a kernel's tiles, and what it writes."""

    op: Op
    batch: tuple[Axis, ...]
    group: tuple[Axis, ...]
    rows: tuple[Axis, ...]  # heads of the group, new tokens
    lead: tuple[Affine, Affine]  # batch and key/value head
    query: tuple[Affine, Affine]  # head and new token of a row
    result: int = 0
    views: list[Op] = field(default_factory=list)  # from the attention's result to the region's
    writes: dict[Value, Write] = field(default_factory=dict)  # by what attention reads


def make_plan(planner: Planner) -> Plan:
    """Plans a region with one cached attention, views of its result and updates of its cache."""
    region, indexer = planner.region, planner.indexer
    op = next(op for op in region.ops if op.name == "cached_attention")
    q, k, *_ = op.arguments()
    batch, heads, tokens, _ = q.shape
    group = int(heads) // int(k.shape[1])

    def axis(name: str, extent: Dim) -> tuple[Affine, tuple[Axis, ...]]:
        if extent == 1:
            return Affine(), ()
        made = indexer.axis(name, extent)
        return indexer.of(made), (made,)

    b, b_axes = axis("b", batch)
    g, g_axes = axis("g", k.shape[1])
    r, r_axes = axis("r", group)
    s, s_axes = axis("s", tokens)
    plan = Plan(op, b_axes, g_axes, (*r_axes, *s_axes), (b, g), (g.times(group).plus(r), s))
    for number, value in enumerate(region.results):
        made = value.op
        if made is not None and made.has(Trait.UPDATE):
            cache, source, *table, start = made.operands
            read = next(x for x in op.operands[1:3] if value in (x, updated_pool(x)))
            plan.writes[read] = Write(cache, source, start, number, *table)
            continue
        plan.result = number
        while made is not None and made is not op:
            if not made.has(Trait.VIEW):
                raise BackendError(f"a cached attention kernel that returns accel.{made.name}")
            plan.views.insert(0, made)
            made = made.operands[0].op
    return plan


def updated_pool(value: Value) -> Value | None:
    """The pool behind a cache in pages, where new tokens are written to it before."""
    for name in ("reshape", "permute", "gather"):
        if value.op is None or value.op.name != name:
            return None
        value = value.op.operands[0]
    return value if value.op is not None and value.op.name == "update_pages" else None


def through_views(planner: Planner, views: Sequence[Op], index: Index) -> Index:
    """Where the views (permutes and reshapes) put the element at `index` of their source."""
    for op in views:
        if op.name == "permute":
            index = tuple(index[int(a)] for a in op.attribute("axes"))
        elif op.name == "reshape":
            index = planner.indexer.reshape(index, op.operands[0].shape, op.result.shape)
        else:
            raise BackendError(f"accel.{op.name} after cached attention")
    return index
