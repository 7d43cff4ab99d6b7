"""From a region to loop nests: which loops there are, and what each computes.

A kernel is a list of phases that run one after another. A phase is a parallel loop over *rows*
(the `outer` axes); a row computes its reductions, then stores its elements. softmax is one phase:
row = all but the last axis, three loops over the last one inside. A reduction that several rows
would repeat, or whose rows are too few to share among cores, becomes a phase of its own that writes
to scratch memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from accel.backends.loops.index import Affine, Axis, Indexer, at_least, exact_quotient
from accel.backends.loops.survey import Survey, index_axes
from accel.backends.loops.trace import Index
from accel.errors import BackendError
from accel.ir.module import Op, Region, Value
from accel.ir.types import Dim, product, same_dim, simplify_dim

_FEW_ROWS = 8
_LARGE = 1 << 14  # elements: worth sharing among cores
_MAX_ROUNDS = 16


REDUCTIONS = frozenset(("sum", "prod", "amax", "amin", "any", "all", "argmax", "argmin"))


@dataclass(frozen=True)
class Place:
    """Where a value is stored: a result of the kernel, or scratch memory."""

    kind: str  # "result" or "scratch"
    number: int


@dataclass
class Store:
    """One value to store: loops over `inner`, element at `index`."""

    value: Value
    place: Place
    index: Index
    inner: tuple[Axis, ...]


@dataclass
class Reduce:
    """One reduction of a row: over `axes`, of the operand's element at `source`."""

    op: Op
    index: Index
    source: Index
    axes: tuple[Axis, ...]
    level: int = 0


@dataclass
class Phase:
    """A parallel loop over rows."""

    outer: tuple[Axis, ...]
    stores: list[Store]
    reduces: list[Reduce]
    makes: set[Value] = field(default_factory=set)  # values it leaves in scratch memory
    needs: set[Value] = field(default_factory=set)  # and those it reads from there
    result: int = 0  # where phases around one op store


class Planner:
    """Plans one region. `phases` and `scratch` hold the plan after `run`."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.indexer = Indexer()
        self.phases: list[Phase] = []
        self.scratch: dict[Value, Place] = {}  # values that can be read from there by now
        self.scratch_values: list[Value] = []  # by number
        self._pool: dict[tuple[object, ...], Axis] = {}
        self._parts: dict[Axis, tuple[Axis, Axis, Dim]] = {}

    def run(self) -> None:
        for number, value in enumerate(self.region.results):
            self._plan(value, Place("result", number))

    # -- axes ------------------------------------------------------------------------------

    def _axis(self, from_right: int, extent: Dim, taken: frozenset[Axis] = frozenset()) -> Axis:
        """The axis for a position and size, so that values of one shape share their loops."""
        generation = 0
        while True:
            key = (from_right, extent, generation)
            if key not in self._pool:
                self._pool[key] = self.indexer.axis(f"i{len(self._pool)}", extent)
            if not taken.intersection(self._as_index(self._pool[key])[1]):
                return self._pool[key]
            generation += 1

    def _as_index(self, axis: Axis) -> tuple[Affine, tuple[Axis, ...]]:
        """The axis as an index: in parts, if it was split."""
        if axis not in self._parts:
            return self.indexer.of(axis), (axis,)
        high, low, factor = self._parts[axis]
        above, first = self._as_index(high)
        below, second = self._as_index(low)
        return above.times(factor).plus(below), (*first, *second)

    def index_of(self, shape: tuple[Dim, ...]) -> tuple[Index, tuple[Axis, ...]]:
        """An index over a whole shape, and its axes."""
        index: list[Affine] = []
        axes: list[Axis] = []
        for position, extent in enumerate(shape):
            if extent == 1:
                index.append(Affine())
                continue
            place, parts = self._as_index(self._axis(len(shape) - position, extent))
            index.append(place)
            axes.extend(parts)
        return tuple(index), tuple(axes)

    def apply_splits(self) -> bool:
        """Splits axes that are divided by a constant somewhere; True if any was split."""
        changed = False
        for axis, factors in list(self.indexer.splits.items()):
            if axis in self._parts:
                continue
            factor = min(factors, key=lambda f: (0, f) if isinstance(f, int) else (1, str(f)))
            outer = exact_quotient(axis.extent, factor)
            if outer is None or outer == 1:
                continue
            high = self.indexer.axis(f"{axis.name}a", outer)
            low = self.indexer.axis(f"{axis.name}b", factor)
            self._parts[axis] = (high, low, factor)
            changed = True
        self.indexer.splits.clear()
        return changed

    # -- planning --------------------------------------------------------------------------

    def _plan(self, value: Value, place: Place) -> None:
        """Adds the phases that store `value`."""
        for _ in range(_MAX_ROUNDS):
            index, axes = self.index_of(value.shape)
            survey = Survey(self.indexer, self.scratch)
            survey.element(value, index)
            reduces, surveys, blocked = self._reduces(survey)
            if self.apply_splits():
                continue
            if not blocked:
                blocked = self._unsuited(value, axes, reduces)
            if not blocked:
                self._add(value, place, index, axes, reduces, [survey, *surveys])
                return
            for op in blocked:
                self.materialize(op.result)
        raise BackendError(f"no loop nest found for {value!r}")

    def materialize(self, value: Value) -> None:
        """Plans phases that leave the value in scratch memory."""
        if value not in self.scratch:
            # Numbered before planning, which may materialize other values on its way.
            place = Place("scratch", len(self.scratch_values))
            self.scratch_values.append(value)
            self._plan(value, place)
            self.scratch[value] = place

    def _reduces(self, survey: Survey) -> tuple[list[Reduce], list[Survey], list[Op]]:
        """All reductions below a survey, operands first, and those that need their own phase.

        A reduction inside another one's loop (its index depends on the loop's axes) is blocked.
        """
        found: dict[tuple[Value, Index], Reduce] = {}
        surveys: list[Survey] = []
        blocked: list[Op] = []

        def visit(survey: Survey, loop: frozenset[Axis]) -> int:
            level = 0
            for key, op in survey.reductions.items():
                if index_axes(key[1]) & loop:
                    blocked.append(op)
                    continue
                if key not in found:
                    reduce = self._reduce(op, key[1])
                    inner = Survey(self.indexer, self.scratch)
                    inner.element(op.operands[0], reduce.source)
                    surveys.append(inner)
                    reduce.level = visit(inner, frozenset(reduce.axes))
                    found[key] = reduce
                level = max(level, found[key].level + 1)
            return level

        visit(survey, frozenset())
        return list(found.values()), surveys, blocked

    def _reduce(self, op: Op, index: Index) -> Reduce:
        operand = op.operands[0]
        gone = reduced_axes(op)
        kept = iter(index)
        taken = index_axes(index)
        source: list[Affine] = []
        axes: list[Axis] = []
        keepdim = bool(op.attribute("keepdim"))
        for position, extent in enumerate(operand.shape):
            if position not in gone:
                source.append(next(kept))
                continue
            if keepdim:
                next(kept)
            if extent == 1:
                source.append(Affine())
                continue
            right = operand.type.rank - position
            place, parts = self._as_index(self._axis(right, extent, taken))
            source.append(place)
            axes.extend(parts)
        return Reduce(op, index, tuple(source), tuple(axes))

    def _unsuited(self, value: Value, axes: tuple[Axis, ...], reduces: list[Reduce]) -> list[Op]:
        """Reductions that this loop nest would repeat, or leave to one core."""
        outer: set[Axis] = set().union(*(index_axes(r.index) for r in reduces))
        if not reduces:
            return []
        rows = product(a.extent for a in axes if a in outer)
        inner = product(a.extent for a in axes if a not in outer)
        if _is_few(rows) and not _is_small(inner):
            return [r.op for r in reduces]
        repeated: list[Op] = []
        for reduce in reduces:
            own = [i.single_axis for i in reduce.index if i != Affine()]
            plain = None not in own and len(set(own)) == len(own)
            missing = product(a.extent for a in outer - index_axes(reduce.index))
            own_rows = plain or self._is_split_index(reduce.index)
            inside = reduce.op is value.op or _stays_inside(reduce)
            if not own_rows or missing != 1 or not inside:
                repeated.append(reduce.op)
        return repeated

    def _is_split_index(self, index: Index) -> bool:
        """Whether different rows have different indices, as far as sums of parts go."""
        seen: set[Axis] = set()
        for i in index:
            for atom, _ in i.terms:
                if not isinstance(atom, Axis) or atom in seen:
                    return False
                seen.add(atom)
        return True

    def _add(
        self,
        value: Value,
        place: Place,
        index: Index,
        axes: tuple[Axis, ...],
        reduces: list[Reduce],
        surveys: list[Survey],
    ) -> None:
        rows: set[Axis] = set().union(*(index_axes(r.index) for r in reduces))
        outer = tuple(a for a in axes if a in rows) if reduces else axes
        inner = tuple(a for a in axes if a not in rows) if reduces else ()
        needs = {v for v in self.scratch if _reads(value, v)}
        store = Store(value, place, index, inner)
        phase = self._joinable(outer, bool(reduces), needs)
        if phase is None:
            phase = Phase(outer, [], [])
            self.phases.append(phase)
        have = {(r.op, r.index) for r in phase.reduces}
        phase.reduces += [r for r in reduces if (r.op, r.index) not in have]
        phase.stores.append(store)
        phase.needs |= needs
        if place.kind == "scratch":
            phase.makes.add(value)

    def _joinable(self, outer: tuple[Axis, ...], reduces: bool, needs: set[Value]) -> Phase | None:
        """An earlier phase with the same rows that may do one more store."""
        for position, phase in enumerate(self.phases):
            later = self.phases[position:]
            alike = phase.outer == outer and bool(phase.reduces) == reduces
            if alike and not any(needs & p.makes for p in later):
                return phase
        return None


def reduced_axes(op: Op) -> frozenset[int]:
    rank = op.operands[0].type.rank
    names = {a.name for a in op.definition.attributes}
    given = op.attribute("axes") if "axes" in names else (op.attribute("axis"),)
    return frozenset(int(a) % rank for a in given) if rank else frozenset()


def _reads(value: Value, source: Value) -> bool:
    """Whether `value` is computed from `source`."""
    pending, seen = [value], set()
    while pending:
        v = pending.pop()
        if v is source and v is not value:
            return True
        if v.op is not None and v not in seen:
            seen.add(v)
            pending.extend(v.op.operands)
    return False


def _stays_inside(reduce: Reduce) -> bool:
    """Whether every row of the loops is a row of the reduction: below a pad or a concatenation some
    are not, and a row's loop is not guarded, so that it would read outside of its operand."""
    for place, extent in zip(reduce.index, reduce.op.result.shape, strict=True):
        axis = place.single_axis
        if axis is not None and same_dim(axis.extent, extent):
            continue
        low: Dim = place.constant
        high: Dim = place.constant
        for atom, factor in place.terms:
            if not isinstance(atom, Axis):
                return False
            span = simplify_dim(factor * (atom.extent - 1))
            if at_least(span, 0):
                high = high + span
            elif at_least(0, span):
                low = low + span
            else:
                return False
        if not at_least(low, 0) or not at_least(extent, high + 1):
            return False
    return True


def _is_few(rows: Dim) -> bool:
    return isinstance(rows, int) and rows < _FEW_ROWS


def _is_small(count: Dim) -> bool:
    return isinstance(count, sympy.Expr) or count < _LARGE


def region_symbols(region: Region) -> tuple[str, ...]:
    """Names of the symbolic sizes that a region mentions, sorted."""
    found: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, sympy.Expr):
            found.update(s.name for s in value.free_symbols)
        elif isinstance(value, tuple):
            for v in value:
                collect(v)

    for value in region.args:
        collect(value.shape)
    for op in region.ops:
        for attribute in op.attributes.values():
            collect(attribute)
        for value in op.results:
            collect(value.shape)
    return tuple(sorted(found))
