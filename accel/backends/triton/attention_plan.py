"""Where an attention kernel reads its operands, and where it writes the result."""

from __future__ import annotations

from dataclasses import dataclass

from accel.backends.loops.index import Affine, Axis, Indexer
from accel.backends.loops.phases import Planner
from accel.backends.loops.places import find_place
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index, broadcast_index
from accel.backends.triton.attention_op import facts_of
from accel.errors import BackendError
from accel.ir.module import Op, Value
from accel.ir.types import Dim


@dataclass(frozen=True)
class Plan:
    """Axes of the loops, and where operands are read and the result is written."""

    op: Op
    indexer: Indexer
    outer: tuple[Axis, ...]  # batch and head
    query: Index  # (b, h, i, depth) of q
    key: Index  # (b, g, j, depth) of k, depth down the rows
    value: Index  # (b, g, j, e) of v, j down the rows
    place: Index  # (b, h, i, j) of a score
    column: Affine
    address: Affine  # of the result
    reads: tuple[Affine, ...]
    fixed: frozenset[Axis]

    @property
    def turn(self) -> Op | None:
        """The rotary embedding of the queries, where the region has it whole."""
        made = facts_of(self.op).q.op
        return made if made is not None and made.name == "rope" else None

    @property
    def queries(self) -> Value:
        """What the queries are loaded from: what is turned, where that is left to the writer."""
        return facts_of(self.op).q if self.turn is None else self.turn.operands[0]


def plan(planner: Planner) -> Plan:
    """Plans a region whose only result is an attention, or a view of it."""
    region, indexer = planner.region, planner.indexer
    op = next(op for op in region.ops if op.name == "attention")
    if len(region.results) != 1:
        raise BackendError("an attention kernel has one result", where=str(op.location or ""))
    q, k, v, mask, sinks = op.arguments()
    _, found = find_place(planner, op)
    batch, head, row, column, address = found
    group = indexer.divide(head, int(q.shape[1]) // int(k.shape[1]))[0]
    depth, across = (_along(planner, "depth", k.shape[3]) for _ in range(2))
    key, down = (_along(planner, "key", k.shape[2]) for _ in range(2))
    place = (batch, head, row, key)
    survey = Survey(indexer, {})
    query_at, key_at = (batch, head, row, across), (batch, group, key, depth)
    value_at = (batch, group, down, column)
    for operand, index in ((k, key_at), (v, value_at)):
        survey.element(operand, index)
    turn = q.op if q.op is not None and q.op.name == "rope" else None
    for operand in (q,) if turn is None else turn.operands:
        survey.element(operand, broadcast_index(query_at, q.shape, operand.shape))
    if mask is not None:
        survey.element(mask, broadcast_index(place, (0, 0, 0, 0), mask.shape))
    if sinks is not None:
        survey.element(sinks, (head,))
    indexer.splits.clear()
    outer = tuple(sorted((batch.axes | head.axes), key=lambda a: a.order))
    return Plan(op, indexer, outer, query_at, key_at, value_at, place, column, address,
                (*survey.reads, address), frozenset(survey.fixed))  # fmt: skip


def seen_head(plan: Plan, indexer: Indexer) -> Affine:
    """Of the heads that a mask tells apart, the one of a place: 0 where it is the same for all."""
    mask = plan.op.arguments()[3]
    shape = (1,) * (4 - mask.type.rank) + tuple(mask.shape)
    index = tuple(Affine() if d == 1 else at for d, at in zip(shape[:2], plan.place[:2]))
    return indexer.flatten(index, shape[:2])


def _along(planner: Planner, name: str, extent: Dim) -> Affine:
    return Affine() if extent == 1 else planner.indexer.of(planner.indexer.axis(name, extent))
