"""Attention for training: the forward with its logsumexp, and the gradients (Dao, 2023).

The forward is `attention_loop`'s kernel, which also stores one number a query. The backward is two
launches, both deterministic, since each program owns what it writes:

    queries   walks over keys: the gradient of ROWS queries, and sum(y * gradient) of each, which
              the second launch reads
    keys      walks over queries: the gradients of COLS keys and values, for all query heads that
              share them

Weights are computed again from scores and logsumexp. Masks, windows and caps are as in the forward:
blocks that they hide are not visited, and a mask that is computed has no memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.phases import Planner
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index, broadcast_index
from accel.backends.triton.attention_backward import KeyGradients, QueryGradient
from accel.backends.triton.attention_loop import AttentionWriter
from accel.backends.triton.attention_op import facts_of
from accel.backends.triton.attention_plan import Plan
from accel.backends.triton.attention_tiles import AttentionTile, BackwardTile, choose_loop
from accel.backends.triton.cached_plan import through_views
from accel.backends.triton.kernel import Generator, KernelCode, Slot, kind_of
from accel.backends.triton.operands import StoredOperands
from accel.backends.triton.powers import quick_powers
from accel.backends.triton.program import Program
from accel.errors import BackendError
from accel.ir.module import Op, Region
from accel.ir.types import Dim, product

OPS = ("flash_attention", "flash_attention_backward")
_LN2 = math.log(2)


@dataclass(frozen=True)
class Target:
    """A result of the region: the views between it and the op's result."""

    number: int
    views: tuple[Op, ...]

    @property
    def name(self) -> str:
        return f"y{self.number}"


def targets_of(region: Region, op: Op) -> dict[int, Target]:
    """The region's results by the number of the op's result that each is a view of."""
    found: dict[int, Target] = {}
    for number, value in enumerate(region.results):
        views: list[Op] = []
        while value.op is not None and value.op is not op:
            if value.op.name not in ("permute", "reshape"):
                raise BackendError(f"accel.{value.op.name} after training attention")
            views.insert(0, value.op)
            value = value.op.operands[0]
        if value.op is not op or value.index in found:
            raise BackendError("a training attention kernel has its op's results, each once")
        found[value.index] = Target(number, tuple(views))
    return found


class Sizes:
    """The axes of a launch. An axis of one element is a constant."""

    def __init__(self, planner: Planner, op: Op) -> None:
        self.planner, self.indexer, self.op = planner, planner.indexer, op
        facts = facts_of(op)
        self.q, self.k = facts.q, facts.k
        self.batch = self.axis("b", self.q.shape[0])
        self.share = int(self.q.shape[1]) // int(self.k.shape[1])

    def axis(self, name: str, extent: Dim) -> Affine:
        return Affine() if extent == 1 else self.indexer.of(self.indexer.axis(name, extent))

    def address(self, target: Target, index: Index, shape: Sequence[Dim]) -> Affine:
        """Where an element of the op's result lies in the region's."""
        views = target.views
        shape = views[-1].result.shape if views else shape
        return self.indexer.flatten(through_views(self.planner, views, index), shape)


def _outer(*places: Affine) -> tuple[Axis, ...]:
    axes = {axis for place in places for axis in place.axes}
    return tuple(sorted(axes, key=lambda a: a.order))


def query_plan(sizes: Sizes, target: Target, gradient: bool) -> Plan:
    """Of programs that own queries: the output, or the gradient of queries."""
    op, indexer, facts = sizes.op, sizes.indexer, facts_of(sizes.op)
    head = sizes.axis("h", facts.q.shape[1])
    group = indexer.divide(head, sizes.share)[0]
    row, key, down = (sizes.axis(n, v.shape[2]) for n, v in
                      (("i", facts.q), ("j", facts.k), ("down", facts.k)))  # fmt: skip
    across, depth, column = (sizes.axis(n, facts.q.shape[3]) for n in ("across", "depth", "e"))
    batch = sizes.batch
    last = across if gradient else column
    address = sizes.address(target, (batch, head, row, last), facts.q.shape)
    plan = Plan(op, indexer, _outer(batch, head), (batch, head, row, across),
                (batch, group, key, depth), (batch, group, down, column), (batch, head, row, key),
                column, address, (address,), frozenset())  # fmt: skip
    return _surveyed(plan, ())


def key_plan(sizes: Sizes, target: Target) -> Plan:
    """Of programs that own keys. `query` is down, `place` has queries across and keys down."""
    op, indexer, facts = sizes.op, sizes.indexer, facts_of(sizes.op)
    group, each = sizes.axis("g", facts.k.shape[1]), sizes.axis("r", sizes.share)
    head = group.times(sizes.share).plus(each)
    line, row = (sizes.axis(n, facts.q.shape[2]) for n in ("line", "i"))
    key = sizes.axis("j", facts.k.shape[2])
    across, column = (sizes.axis(n, facts.q.shape[3]) for n in ("across", "e"))
    batch = sizes.batch
    address = sizes.address(target, (batch, group, key, across), facts.k.shape)
    plan = Plan(op, indexer, _outer(batch, group), (batch, head, line, across),
                (batch, group, key, across), (batch, group, key, column),
                (batch, head, row, key), column, address, (address,), frozenset())  # fmt: skip
    return _surveyed(plan, ((batch, head, line, column),))


def _surveyed(plan: Plan, more: Sequence[Index]) -> Plan:
    """The plan with what it reads."""
    facts, survey = facts_of(plan.op), Survey(plan.indexer, {})
    for operand, index in ((facts.q, plan.query), (facts.k, plan.key), (facts.v, plan.value)):
        survey.element(operand, index)
    if facts.mask is not None:
        place = broadcast_index(plan.place, (0, 0, 0, 0), facts.mask.shape)
        survey.element(facts.mask, place)
    plan.indexer.splits.clear()
    return replace(plan, reads=(*survey.reads, plan.address), fixed=frozenset(survey.fixed))


class ForwardWriter(AttentionWriter):
    """The loop's kernel, and the logsumexp of each query."""

    logsumexp: str = ""

    def _may_be_empty(self) -> bool:
        return super()._may_be_empty() or self.mask is not None

    def _finish(self) -> None:
        super()._finish()
        if not self.logsumexp:
            return
        emitter, block = self.emitter, self.emitter.block
        block.line(f"logsum = (best + tl.log2(total)) * {_LN2!r}")
        if self._may_be_empty():
            block.line("logsum = tl.where(total == 0.0, 0.0, logsum)")
        flat = self.plan.indexer.flatten(self.plan.place[:3], self.q.shape[:3])
        self._store_rows("logsum", self.logsumexp, emitter.addresses.code(flat))


class TrainingGenerator(Generator):
    """The kernels of training attention: one launch forward, two backward."""

    tile: AttentionTile | BackwardTile | None = None

    def run(self) -> KernelCode:
        op = next(op for op in self.region.ops if op.name in OPS)
        self.targets = targets_of(self.region, op)
        self.kind = kind_of(self.region, (*self.region.args, *self.region.results))
        if op.name == "flash_attention":
            self._forward(op)
        else:
            self._backward(op)
        return KernelCode(self.name, self.launches, [size for _, size in self.scratch])

    def _emitter(self) -> StoredOperands:  # type: ignore[override]
        pointers = {v: f"x{i}" for i, v in enumerate(self.region.args)}
        return StoredOperands(self.planner.indexer, pointers, set(), self.kind)

    def _forward(self, op: Op) -> None:
        if 0 not in self.targets:
            raise BackendError("training attention whose output is not used")
        made = query_plan(Sizes(self.planner, op), self.targets[0], gradient=False)
        tile = self.tile if isinstance(self.tile, AttentionTile) else choose_loop(op)
        writer = ForwardWriter(made, self._emitter(), self.targets[0].name, tile)
        if 1 in self.targets:
            writer.logsumexp = self.targets[1].name
        self._go(writer.write(), [t.number for t in self.targets.values()], [])

    def _backward(self, op: Op) -> None:
        if sorted(self.targets) != [0, 1, 2]:
            raise BackendError("training attention with gradients that are not used")
        tile = self.tile if isinstance(self.tile, BackwardTile) else choose_backward(op)
        rows = facts_of(op).q.shape[:3]
        self.scratch = [("float32", product((*rows, 4)))]
        sums = Slot("scratch", 0)
        q, k, v = (self.targets[i] for i in range(3))
        sizes = Sizes(self.planner, op)
        plan = query_plan(sizes, q, gradient=True)
        queries = QueryGradient(plan, self._emitter(), q.name, tile.own(), sums.name)
        self._go(queries.write(), [q.number], [], sums)
        sizes = Sizes(self.planner, op)
        plan = key_plan(sizes, k)
        index = (*plan.value[:3], plan.column)
        address = sizes.address(v, index, facts_of(op).v.shape)
        keys = KeyGradients(plan, self._emitter(), k.name, tile.own(), sums.name)
        keys.values_target, keys.values_address = v.name, address
        self._go(keys.write(), [k.number, v.number], [sums])

    def _go(
        self,
        program: Program,
        results: Sequence[int],
        more: Sequence[Slot],
        made: Slot | None = None,
    ) -> None:
        reads = [Slot("input", self.region.args.index(v)) for v in program.reads]
        reads.sort(key=lambda s: s.number)
        writes = [Slot("result", n) for n in sorted(results)] + ([made] if made else [])
        quick_powers(program)
        self._launch(program, [*reads, *more], writes, [])


def reason(op: Op) -> str | None:
    """None if a kernel may be built around this op, else the reason why not."""
    facts = facts_of(op)
    q, k = facts.q, facts.k
    if str(q.dtype) not in ("torch.float32", "torch.bfloat16", "torch.float16"):
        return f"training attention of {q.dtype}"
    if not all(isinstance(d, int) for d in (q.shape[1], k.shape[1], q.shape[3])):
        return "training attention with symbolic heads"
    if int(q.shape[3]) > 256:
        return f"attention heads of size {q.shape[3]}"
    if facts.mask is not None and facts.mask.type.rank > 4:
        return f"attention with a mask of rank {facts.mask.type.rank}"
    wanted = op.results[:1] if op.name == "flash_attention" else op.results
    return None if all(r.uses for r in wanted) else "training attention whose results are not used"


def library_reason(op: Op, capability: int) -> str | None:
    """Why a library computes this faster; None if it does not."""
    facts = facts_of(op)
    if facts.window is not None or facts.softcap is not None:
        return None
    if int(facts.q.shape[1]) != int(facts.k.shape[1]):
        return None
    if facts.q.dtype.itemsize > 2:
        return "a library multiplies float32 on its own path"
    return "cuDNN's kernel takes it" if facts.mask is None else None


def choose_backward(op: Op) -> BackwardTile:
    """The tile of a backward kernel that nobody has measured."""
    q = facts_of(op).q
    size = int(q.shape[3])
    if q.dtype.itemsize > 2:
        return BackwardTile(32, 32, 4, 1) if size <= 64 else BackwardTile(16, 32, 4, 1)
    if size <= 128:
        return BackwardTile(64, 64, 4, 3 if size <= 64 else 2)
    return BackwardTile(64, 32, 8, 1)


def candidates(kernel: Op, sms: int) -> list[AttentionTile | BackwardTile]:
    """Tiles worth timing for a kernel."""
    op = next(op for op in kernel.regions[0].ops if op.name in OPS)
    size = int(facts_of(op).q.shape[3])
    if op.name == "flash_attention":
        return [AttentionTile(*t) for t in _FORWARD if t[0] * (size + t[1]) <= t[2] * 32 * 160]
    return [BackwardTile(*t) for t in _BACKWARD if 2 * t[0] * (size + t[1]) <= t[2] * 32 * 200]


_FORWARD = ((128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 2))
_BACKWARD = (
    (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 4, 3),
    (128, 32, 4, 3), (64, 128, 8, 2), (128, 128, 8, 2), (64, 32, 4, 2), (128, 32, 8, 3),
)  # fmt: skip


def generate(
    name: str, region: Region, comment: str, sms: int, tile: AttentionTile | BackwardTile | None
) -> KernelCode:
    """The source of a region with one training attention. Raises BackendError for what has none."""
    generator = TrainingGenerator(name, region, comment, sms)
    generator.tile = tile
    return generator.run()
