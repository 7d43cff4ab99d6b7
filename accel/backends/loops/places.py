"""Where an op's result ends up in its region's: at the same place, or in a view (heads merged)."""

from __future__ import annotations

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.phases import Planner
from accel.backends.loops.survey import Survey
from accel.backends.loops.trace import Index
from accel.errors import BackendError
from accel.ir.module import Op, Value

_MAX_ROUNDS = 8


def find_place(planner: Planner, op: Op, number: int = 0) -> tuple[tuple[Axis, ...], Index]:
    """Axes of a result of the region, and its place of each (b, h, i, e) of attention."""
    result = planner.region.results[number]
    for _ in range(_MAX_ROUNDS):
        index, axes = planner.index_of(result.shape)
        finder = _Finder(planner, op.result)
        finder.element(result, index)
        if planner.apply_splits():
            continue
        plain = finder.found is not None and not finder.work  # nothing is computed on the way
        if not plain or any(not _is_plain(i) for i in finder.found or ()):
            break
        assert finder.found is not None
        return axes, (*finder.found, planner.indexer.flatten(index, result.shape))
    raise BackendError("the result of an attention kernel is not a view of it")


def read_in_place(
    planner: Planner, op: Op, *operands: Value
) -> tuple[Index, tuple[Axis, ...], Survey]:
    """The place of each element of a region around one op, its axes, and what is read there: all
    results have the op's shape, and read it at their own place. `operands`: of the op, which are
    read there as well. Raises BackendError for another region."""
    region, indexer, shape = planner.region, planner.indexer, op.result.shape
    name = f"a kernel around accel.{op.name}"
    if any(v.shape != shape for v in region.results):
        raise BackendError(f"{name} with results of several shapes")
    for _ in range(_MAX_ROUNDS):
        index, axes = planner.index_of(shape)
        survey, before = Survey(indexer, {op.result: None}), Survey(indexer, {})
        for value in region.results:
            survey.element(value, index)
        if {at for value, at in survey.costly if value is op.result} != {index}:
            raise BackendError(f"{name} that reads its result elsewhere")
        for value in operands:
            before.element(value, index)
        if planner.apply_splits():
            continue
        survey.reads += [*before.reads, indexer.flatten(index, shape)]
        survey.fixed |= before.fixed
        return index, axes, survey
    raise BackendError(f"{name} whose index does not come to rest")


def _is_plain(index: Affine) -> bool:
    return index == Affine() or index.single_axis is not None


class _Finder(Survey):
    """Walks from the result to the attention op and notes the index it arrives with."""

    def __init__(self, planner: Planner, target: Value) -> None:
        super().__init__(planner.indexer, {})
        self.target = target
        self.found: Index | None = None

    def known_element(self, value: Value, index: Index) -> bool:
        if value is self.target:
            self.found = index
            return False
        return super().known_element(value, index)
