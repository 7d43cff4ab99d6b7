"""Fusion planning: which ops become one generated kernel.

Producers and consumers with the same iteration space join one group; a group becomes an
`accel.kernel` whose region holds the ops. Three kinds (docs/architecture.md): `pointwise`,
`rowwise` (reductions over one set of trailing axes among pointwise ops over the same rows) and
`reduction` (other axes). VIEW ops of values from outside are read through as index maps; VIEW ops
that nobody computes on stay outside, where they cost nothing.
Contract: exact (regions hold the very ops they replace). After: XLA's fusion, Inductor's scheduler.

    %1 = "accel.mul"(%x, %s)           %2 = "accel.kernel"(%x, %s) ({ mul, add }) {kind =
    %2 = "accel.add"(%1, %y)      ->                                       "pointwise", ...}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from accel.ir.capability import KernelGenerator
from accel.ir.module import Function, Module, Op, Region, Value
from accel.ir.op import Trait
from accel.ir.types import Shape, product, same_dim, same_shape
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.outline import finish_outline, outline


@register_pass
@dataclass
class Fuse(Pass):
    """Groups ops into kernels. `max_ops` and `max_inputs` bound one kernel's size."""

    name: ClassVar[str] = "fuse"
    contract: ClassVar[Contract] = EXACT

    max_ops: int = 96
    max_inputs: int = 24

    def run(self, module: Module, context: Context) -> None:
        if context.generator is None:
            return
        for function in module.functions.values():
            plan = _Planner(function, context.generator, self.max_ops, self.max_inputs, context)
            plan.build()
            plan.emit(self.name)


@dataclass(eq=False)
class Group:
    """Ops of one kernel to be. `rows`/`axes` are set once a reduction is in.

    `shape` is the iteration space: the full shape that every member has, up to the reduced axes.
    """

    shape: Shape
    stage: int
    ops: list[Op] = field(default_factory=list)
    axes: tuple[int, ...] | None = None  # reduced axes of `shape`
    reads: set[Value] = field(default_factory=set)

    @property
    def kind(self) -> str:
        return _kind(self.shape, self.axes)


class _Planner:
    def __init__(
        self,
        function: Function,
        generator: KernelGenerator,
        max_ops: int,
        max_inputs: int,
        context: Context,
    ) -> None:
        self.function = function
        self.generator = generator
        self.max_ops = max_ops
        self.max_inputs = max_inputs
        self.context = context
        self.group_of: dict[Op, Group] = {}
        self.stage: dict[Op, int] = {}
        self.fusible: set[Op] = set()
        self.recomputed: set[Op] = set()
        self.order: dict[Op, int] = {op: i for i, op in enumerate(function.ops)}

    # -- grouping --------------------------------------------------------------------------

    def build(self) -> None:
        self.fusible = {op for op in self.function.ops if self._fusible(op)}
        self.recomputed = {op for op in self.fusible if self._is_recomputed(op)}
        for op in self.function.ops:
            self.stage[op] = self._earliest(op)
        self._delay()
        for op in self.function.ops:
            if op in self.fusible and op not in self.recomputed and not self._is_source(op):
                self._place(op)

    def _fusible(self, op: Op) -> bool:
        return len(op.results) == 1 and self.generator.supports(op) is None

    def _is_source(self, op: Op) -> bool:
        """Whether the op is read through: it is no member of a group."""
        return op.has(Trait.VIEW) or op.has(Trait.CONSTANT)

    def _earliest(self, op: Op) -> int:
        """Stages count the unfusible edges before an op: groups of one stage cannot form a cycle
        through other stages, so cycles need looking for inside a stage only."""
        producers = [v.op for v in op.operands if v.op is not None]
        return max((self.stage[p] + self._steps(p, op) for p in producers), default=0)

    def _steps(self, producer: Op, op: Op) -> int:
        """1 for an edge that no kernel can hold, else 0."""
        inside = producer in self.fusible or producer.has(Trait.VIEW)
        through = op in self.fusible and inside
        return 0 if through or producer.has(Trait.CONSTANT) else 1

    def _delay(self) -> None:
        """Moves elementwise ops of what is in memory anyway to the stage of their first user.

        A kernel of their own would write what the user's kernel computes from the same reads.
        """
        late: set[Op] = set()
        for op in self.function.ops:
            if op in self.fusible and (op.has(Trait.VIEW) or op.has(Trait.ELEMENTWISE)):
                sources = [v.op for v in op.operands if v.op is not None]
                if all(s in late or s not in self.fusible or self._is_free(s) for s in sources):
                    late.add(op)
        for op in reversed(list(self.function.ops)):
            if op not in late or op in self.recomputed:
                continue
            users = op.result.users
            if users and all(u in self.fusible for u in users):
                self.stage[op] = max(self.stage[op], min(self.stage[u] for u in users))

    def _is_free(self, op: Op) -> bool:
        return op in self.recomputed or op.has(Trait.CONSTANT)

    def _is_recomputed(self, op: Op) -> bool:
        """Whether kernels compute the op for themselves: an elementwise op of a small constant or
        argument (a norm's weight, widened), read by larger ones only, or a range of numbers. A
        kernel of its own would cost more."""
        if not op.operands:
            return not op.has(Trait.CONSTANT) and self._is_read_in_kernels(op)
        if not op.has(Trait.ELEMENTWISE):
            return False
        source = op.operands[0].op
        while source is not None and source.has(Trait.VIEW):
            source = source.operands[0].op
        small = len(op.operands) == 1 and (source is None or source.has(Trait.CONSTANT))
        counted = all(_is_counted(value) for value in op.operands)
        return (small or counted) and all(
            self._is_larger(user, op.result) for user in op.result.users
        )

    def _is_read_in_kernels(self, op: Op) -> bool:
        """Whether all that reads the op, through views too, has generated code."""
        for user in op.result.users:
            if user not in self.fusible:
                return False
            if user.has(Trait.VIEW) and not self._is_read_in_kernels(user):
                return False
        return True

    def _is_larger(self, user: Op, value: Value) -> bool:
        if user not in self.fusible or user.has(Trait.VIEW):
            return False
        count, size = product(user.results[0].shape), product(value.shape)
        return not isinstance(count, int) or (isinstance(size, int) and count >= 8 * size)

    def _place(self, op: Op) -> None:
        axes = _reduced_axes(op)
        shape = op.operands[0].shape if axes is not None else op.result.shape
        best: Group | None = None
        for value in op.operands:
            group = self._producer_group(value)
            if group is None or group.stage != self.stage[op] or group is best:
                continue
            reason = self._refusal(group, op, shape, axes)
            if reason is not None:
                self.context.miss("fuse", op, reason)
            elif best is None or len(group.ops) > len(best.ops):
                best = group
        best = best or self._sibling(op, shape, axes)
        if best is None:
            best = Group(shape, self.stage[op])
        elif not self.context.rewrite("fuse.join", op):
            return
        self._join(best, op, axes, shape)
        self._merge_producers(op, best)

    def _producer_group(self, value: Value) -> Group | None:
        return self.group_of.get(value.op) if value.op is not None else None

    def _refusal(
        self, group: Group, op: Op, shape: Shape, axes: tuple[int, ...] | None
    ) -> str | None:
        """Why `op` cannot join the group of one of its producers; None if it can."""
        if len(group.ops) >= self.max_ops:
            return f"the kernel already has {self.max_ops} ops"
        outside = {v for v in op.operands if self._producer_group(v) is not group}
        if len(group.reads | outside) > self.max_inputs:
            return f"the kernel would read more than {self.max_inputs} tensors"
        same = same_shape(group.shape, shape)
        if axes is not None:
            # A reduction joins what it reduces; over axes that are not the last, only if nothing of
            # the full shape must also be stored.
            ok = same and group.axes in (None, axes)
            if ok and _kind(shape, axes) == "reduction":
                ok = self._closed(group, op)
        elif not op.has(Trait.ELEMENTWISE):
            # A cat or pad reads what the group computes at other places than its own.
            ok = group.axes is None and self._closed(group, op)
        elif group.axes is None:
            ok = same
        elif group.kind == "rowwise":
            ok = same or _is_reduced(shape, group)
        else:
            ok = _is_reduced(shape, group)
        if not ok:
            return f"iteration spaces differ: {group.shape} and {shape}"
        if self._would_cycle(group, op):
            return "another kernel lies between"
        return None

    def _closed(self, group: Group, op: Op) -> bool:
        """Whether nothing but the group and `op` uses what the group computes."""
        inside = (*group.ops, op)
        return all(user in inside for m in group.ops for r in m.results for user in r.users)

    def _sibling(self, op: Op, shape: Shape, axes: tuple[int, ...] | None) -> Group | None:
        """A group of the same stage and space that reads the same large tensor."""
        if axes is not None:
            return None
        for value in op.operands:
            if not value.shape or not same_dim(product(value.shape), product(shape)):
                continue
            for user, _ in value.uses:
                group = self.group_of.get(user)
                if (
                    group is not None
                    and group.stage == self.stage[op]
                    and group.axes is None
                    and same_shape(group.shape, shape)
                    and self._refusal(group, op, shape, axes) is None
                ):
                    return group
        return None

    def _would_cycle(self, group: Group, op: Op) -> bool:
        """Whether a path leaves the group and comes back through another operand of `op`."""
        pending = [v.op for v in op.operands if v.op is not None]
        pending = [p for p in pending if self.group_of.get(p) is not group]
        return self._reaches(pending, group)

    def _reaches(self, pending: list[Op], group: Group) -> bool:
        """Whether any of the ops depends on the group, looking inside the group's stage only."""
        seen: set[Op] = set()
        while pending:
            op = pending.pop()
            if op in seen or self.stage[op] < group.stage:
                continue
            seen.add(op)
            own = self.group_of.get(op)
            if own is group:
                return True
            for member in own.ops if own is not None else (op,):
                seen.add(member)
                pending.extend(v.op for v in member.operands if v.op is not None)
        return False

    def _join(self, group: Group, op: Op, axes: tuple[int, ...] | None, shape: Shape) -> None:
        group.ops.append(op)
        self.group_of[op] = group
        if axes is not None and group.axes is None:
            group.axes, group.shape = axes, shape
        elif group.axes is None:
            group.shape = shape  # a cat or pad takes the group into its own space
        group.reads.update(v for v in op.operands if self._producer_group(v) is not group)

    def _merge_producers(self, op: Op, group: Group) -> None:
        """Joins the groups of the other producers, where both are one space and no cycle forms."""
        for value in op.operands:
            other = self._producer_group(value)
            if other is None or other is group or other.stage != group.stage:
                continue
            if len(other.ops) + len(group.ops) > self.max_ops:
                continue
            if len(other.reads | group.reads) > self.max_inputs:
                continue
            indexed = not op.has(Trait.ELEMENTWISE) and other.axes is None and group.axes is None
            if not same_shape(other.shape, group.shape) and not (
                indexed and self._closed(other, op)
            ):
                continue
            if None not in (other.axes, group.axes) and other.axes != group.axes:
                continue
            if group.kind == "reduction" or other.kind == "reduction":
                continue
            if self._between(group, other) or self._between(other, group):
                continue
            if _reads_elsewhere(group, other) or _reads_elsewhere(other, group):
                continue
            if not self.context.rewrite("fuse.merge", op):
                return
            group.ops.extend(other.ops)
            group.ops.sort(key=self.order.__getitem__)
            group.axes = group.axes if group.axes is not None else other.axes
            for member in other.ops:
                self.group_of[member] = group
            group.reads = {
                v for m in group.ops for v in m.operands if self._producer_group(v) is not group
            }

    def _between(self, late: Group, early: Group) -> bool:
        """Whether `late` depends on `early` through some third group or op."""
        pending: list[Op] = []
        for member in late.ops:
            for value in member.operands:
                producer = value.op
                if producer is None or self.group_of.get(producer) in (late, early):
                    continue
                pending.append(producer)
        return self._reaches(pending, early)

    # -- emission --------------------------------------------------------------------------

    def emit(self, made_by: str) -> None:
        """Outlines every group and puts the function's ops in an order that respects them."""
        groups = list({id(g): g for g in self.group_of.values()}.values())
        for group in groups:
            group.ops.sort(key=self.order.__getitem__)
        body = self.function.body
        units: dict[Op, Group] = {op: g for g in groups for op in g.ops}
        for unit in _schedule(body, units, self.order):
            if isinstance(unit, Op):
                _move_to_end(unit, body)
                continue
            views = self._absorbed_views(unit)
            kernel = outline(
                unit.ops,
                "kernel",
                {"backend": self.generator.name, "kind": unit.kind},
                made_by,
                duplicate=views,
                inline=_is_scalar_constant,
            )
            body.append(kernel)
            finish_outline(kernel, unit.ops)

    def _absorbed_views(self, group: Group) -> list[Op]:
        """VIEW ops (and sources without operands) that the kernel reads through."""
        views: dict[Op, None] = {}
        pending = [v for op in group.ops for v in op.operands]
        while pending:
            op = pending.pop().op
            if op is None or op in self.group_of or op in views:
                continue
            free = not op.operands and op.has(Trait.PURE) and op.name != "constant"
            free = free or op in self.recomputed
            if (op.has(Trait.VIEW) or free) and self.generator.supports(op) is None:
                views[op] = None
                pending.extend(op.operands)
        return list(views)


def _kind(shape: Shape, axes: tuple[int, ...] | None) -> str:
    if axes is None:
        return "pointwise"
    return "rowwise" if axes == tuple(range(len(shape) - len(axes), len(shape))) else "reduction"


def _reduced_axes(op: Op) -> tuple[int, ...] | None:
    if not op.has(Trait.REDUCTION):
        return None
    rank = op.operands[0].type.rank
    axes: Any = op.attributes.get("axes")
    if axes is None:
        axes = (op.attribute("axis"),)
    return tuple(sorted(int(a) % rank for a in axes))


def _is_reduced(shape: Shape, group: Group) -> bool:
    """Whether `shape` is the group's space with the reduced axes gone or of size 1."""
    assert group.axes is not None
    kept = tuple(1 if i in group.axes else d for i, d in enumerate(group.shape))
    gone = tuple(d for i, d in enumerate(group.shape) if i not in group.axes)
    return same_shape(shape, kept) or same_shape(shape, gone)


def _reads_elsewhere(reader: Group, source: Group) -> bool:
    """Whether an op of `reader` takes values of `source` from other places than its own."""
    made = {r for op in source.ops for r in op.results}
    row_local = Trait.ELEMENTWISE | Trait.REDUCTION
    indexed = (op for op in reader.ops if not op.has(row_local))
    return any(v in made for op in indexed for v in op.operands)


def _is_counted(value: Value) -> bool:
    """Whether a value is a number, or a range of numbers, through views: nothing is read."""
    op = value.op
    if op is None or op.name == "constant":
        return False
    if op.has(Trait.VIEW):
        return _is_counted(op.operands[0])
    return not op.operands and op.has(Trait.PURE)


def _is_scalar_constant(value: Value) -> bool:
    op = value.op
    return op is not None and op.name == "full"


def _move_to_end(op: Op, body: Region) -> None:
    body._unlink(op)
    body.append(op)


def _schedule(body: Region, units: dict[Op, Group], order: dict[Op, int]) -> list[Op | Group]:
    """A topological order of groups and single ops, close to the original one.

    A unit is visited after everything it reads; iterating in original order and visiting operands
    first (depth-first) keeps neighbours together.
    """
    result: list[Op | Group] = []
    done: set[int] = set()

    def visit(root: Op) -> None:
        stack: list[tuple[Op | Group, bool]] = [(units.get(root, root), False)]
        while stack:
            unit, expanded = stack.pop()
            if id(unit) in done:
                continue
            if expanded:
                done.add(id(unit))
                result.append(unit)
                continue
            stack.append((unit, True))
            members = [unit] if isinstance(unit, Op) else unit.ops
            needs = [v.op for m in members for v in m.operands if v.op is not None]
            for producer in reversed(needs):
                needed = units.get(producer, producer)
                if needed is not unit and id(needed) not in done:
                    stack.append((needed, False))

    for op in list(body.ops):
        # RANDOM and other effects keep their order because the walk is in original order.
        visit(op)
    return result
