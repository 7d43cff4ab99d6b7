"""One linear for queries, keys and values, of whose queries some rows are read, becomes two.

Vision transformers and `nn.MultiheadAttention` compute q, k and v by one linear, whose result views
and slices take apart. The last block of a classifier reads one row of the queries and all rows of
the keys and values: the features that are read at few rows are computed at these rows only. Where
all features are (the gate and the values of a gated MLP), the slices of features and of rows change
places. Part of `hoist_slices`; exact, since rows of weights are only cut apart. Before and after:

    %0 = "accel.linear"(%x, %w) : (tensor<2x197x64xf32>, ...) -> tensor<2x197x192xf32>
    %1 = "accel.slice"(%0) {axis = 2, start = 0, stop = 64} : ... -> tensor<2x197x64xf32>
    %q = "accel.slice"(%1) {axis = 1, start = 0, stop = 1} : ... -> tensor<2x1x64xf32>
    %k = "accel.slice"(%0) {axis = 2, start = 64, stop = 192} : ... -> tensor<2x197x128xf32>

    %0 = "accel.slice"(%x) {axis = 1, start = 0, stop = 1} : ... -> tensor<2x1x64xf32>
    %1 = "accel.slice"(%w) {axis = 0, start = 0, stop = 64} : ... -> tensor<64x64xf32>
    %q = "accel.linear"(%0, %1) : ... -> tensor<2x1x64xf32>
    %2 = "accel.slice"(%w) {axis = 0, start = 64, stop = 192} : ... -> tensor<128x64xf32>
    %k = "accel.linear"(%x, %2) : ... -> tensor<2x197x128xf32>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from accel.ir.builder import Builder
from accel.ir.module import Op, Value
from accel.ir.op import Trait
from accel.ir.types import SUB_BYTE_BITS
from accel.passes.base import Context
from accel.passes.read_ranges import Range, hull, narrow, needs_of, read_of, reread


@dataclass
class Part:
    """A slice of the linear's features, below views of the linear's result.

    `views` lead from the linear to the slice; `features` are the slice's of the linear, `ranges`
    those of each view's result. `rows` are the linear's rows that are read of it; None: all.
    """

    slice: Op
    views: list[Op]
    ranges: list[Range]
    features: Range
    rows: Range | None


@dataclass
class SplitLinear:
    """How a linear is cut: the parts of which some rows are read, and the others."""

    name: ClassVar[str] = "split_linear"

    op: Op
    few: list[Part]
    whole: list[Part]
    rows: Range

    @staticmethod
    def of(op: Op, context: Context) -> SplitLinear | None:
        """The cut that pays, None where there is none."""
        parts = _parts(op)
        few = [p for p in parts or () if p.rows is not None]
        if parts is None or not few:
            return None
        found = [p.rows for p in few if p.rows is not None]
        axis = found[0].axis
        rows = hull(axis, [r.start for r in found], [r.stop for r in found])
        if any(r.axis != axis for r in found) or rows is None:
            context.miss(SplitLinear.name, op, "its parts are read at rows that do not compare")
            return None
        if not rows.is_small(op.result.shape[axis]):
            return None
        whole = [p for p in parts if p.rows is None]
        first, second = _features(few), _features(whole) if whole else None
        if second is not None and first.start < second.stop and second.start < first.stop:
            context.miss(SplitLinear.name, op, "features read at few rows lie among the others")
            return None
        if not all(_may_be_cut(v) for v in op.operands[1:]):
            context.miss(SplitLinear.name, op, "its weight is neither stored nor an argument")
            return None
        return SplitLinear(op, few, whole, rows)

    def apply(self) -> None:
        for part in (*self.few, *self.whole):
            _cut_first(part, self.op.result)
        b = Builder(before=self.op, made_by=self.name)
        x, weight, *bias = self.op.operands
        if self.whole:
            read = _features(self.whole)
            made = b.linear(x, *(_cut(b, v, read) for v in (weight, *bias)))
            _replace(self.whole, made, read)
        read, rows = _features(self.few), self.rows
        narrowed = b.slice(x, axis=rows.axis, start=rows.start, stop=rows.stop)
        made = b.linear(narrowed, *(_cut(b, v, read) for v in (weight, *bias)))
        for part in self.few:
            for user in part.slice.result.users:
                at = Builder(before=user, made_by=self.name)
                cut = reread(at, made, part.slice, read)
                user.replace_with([reread(at, cut, user, rows)])
            part.slice.erase()
        self.op.erase()


def _parts(op: Op) -> list[Part] | None:
    """The slices of features that read the linear; None if something else does."""
    last = len(op.result.shape) - 1
    found: list[Part] = []
    pending: list[tuple[Value, list[Op]]] = [(op.result, [])]
    while pending:
        value, views = pending.pop()
        for user in value.users:
            if user.name in ("reshape", "permute"):
                pending.append((user.result, [*views, user]))
                continue
            part = _part(user, views, last) if user.name == "slice" else None
            if part is None:
                return None
            found.append(part)
    return found


def _part(cut: Op, views: list[Op], last: int) -> Part | None:
    read = read_of(cut.result)
    whole = Range(cut.attribute("axis"), cut.attribute("start"), cut.attribute("stop"))
    above = _above(views, whole)
    if above is None or above[0].axis != last or cut.attribute("step") != 1:
        return None
    if not isinstance(whole.start, int) or not isinstance(whole.stop, int) or whole.size == 0:
        return None
    rows = None
    if read is not None and read.axis != whole.axis:
        found = _above(views, read)
        if found is not None and found[0].axis != last:
            rows = found[0]
    return Part(cut, views, above[1:], above[0], rows)


def _above(views: Sequence[Op], read: Range) -> list[Range] | None:
    """What `read` of the last view is of the first one's operand, then of each view's result."""
    found = [read]
    for view in reversed(views):
        needs = needs_of(view, found[0])
        if needs is None or needs[0] is None:
            return None
        found.insert(0, needs[0])
    return found


def _features(parts: Sequence[Part]) -> Range:
    found = [p.features for p in parts]
    read = hull(found[0].axis, [f.start for f in found], [f.stop for f in found])
    assert read is not None  # they are numbers
    return read


def _may_be_cut(value: Value) -> bool:
    """Whether rows of a weight can be sliced: stored, an argument, or a view of these."""
    while value.op is not None and value.op.has(Trait.VIEW):
        value = value.op.operands[0]
    stored = value.op is None or value.op.name == "constant"
    return stored and value.dtype not in SUB_BYTE_BITS


def _cut(b: Builder, weight: Value, read: Range) -> Value:
    if read.start == 0 and read.stop == weight.shape[0]:
        return weight
    result: Value = b.slice(weight, axis=0, start=read.start, stop=read.stop)
    return result


def _cut_first(part: Part, source: Value) -> None:
    """Puts the slice of features in front of the views, and that of rows behind it."""
    b = Builder(before=part.slice, made_by=SplitLinear.name)
    read = part.features
    value: Value = b.slice(source, axis=read.axis, start=read.start, stop=read.stop)
    cut, made = value.op, []
    assert cut is not None
    for view, below in zip(part.views, part.ranges):
        attributes = dict(view.attributes)
        if view.name == "reshape":
            shape = list(view.result.shape)
            shape[below.axis] = below.size
            attributes["shape"] = tuple(shape)
        made.append(b.op(view.name, [value], attributes))
        value = made[-1].result
    part.slice.replace_with([value])
    for view in reversed(part.views):
        if not view.result.uses:
            view.erase()
    if part.rows is not None:
        for view in reversed(made):
            rows = read_of(view.result)
            needs = needs_of(view, rows) if rows is not None else None
            assert rows is not None and needs is not None
            narrow(view, rows, needs, SplitLinear.name)
    part.slice, part.views = cut, []


def _replace(parts: Sequence[Part], made: Value, read: Range) -> None:
    for part in parts:
        b = Builder(before=part.slice, made_by=SplitLinear.name)
        part.slice.replace_with([reread(b, made, part.slice, read)])
