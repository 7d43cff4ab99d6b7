"""A row's largest element and the sum of exp(x - largest) in one pass over the row.

Of rows that do not fit a tile, softmax and logsumexp would read everything twice, one time for the
maximum. Instead each lane keeps the largest of what it has seen and a sum that is relative to it,
which it scales when a larger one comes (Milakov and Gimelshein, 2018). A lane takes eight elements
at a time, so that scaling costs an eighth of an exponential for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accel.backends.loops.phases import Reduce
from accel.backends.triton import scalar
from accel.backends.triton.text import Block, Expr
from accel.ir.module import Value
from accel.ir.op import Trait

if TYPE_CHECKING:
    from accel.backends.triton.program import Pass, ProgramWriter
    from accel.backends.triton.tiles import Columns

_TAKEN = 8
_SCALAR: frozenset[str] = frozenset()


def pair_of(first: Pass, second: Pass) -> tuple[Reduce, Reduce] | None:
    """The two reductions, if the second pass adds up exp(x - m) where the first one finds m."""
    if len(first.reduces) != 1 or len(second.reduces) != 1 or first.stores or second.stores:
        return None
    largest, total = first.reduces[0], second.reduces[0]
    if (largest.op.name, total.op.name) != ("amax", "sum") or largest.source != total.source:
        return None
    power = total.op.operands[0].op
    if power is None or power.name != "exp" or str(total.op.result.dtype) != "torch.float32":
        return None
    less = power.operands[0].op
    if less is None or less.name != "sub" or less.operands[0] is not largest.op.operands[0]:
        return None
    return (largest, total) if _through_views(less.operands[1]) is largest.op.result else None


def _through_views(value: Value) -> Value:
    while value.op is not None and value.op.has(Trait.VIEW):
        value = value.op.operands[0]
    return value


def write(writer: ProgramWriter, pair: tuple[Reduce, Reduce], columns: Columns) -> None:
    """One loop for both; a program has one row."""
    largest, total = pair
    emitter, outer = writer.emitter, writer.emitter.block
    names, shape = outer.names, f"[{columns.name} // {_TAKEN}]"
    power = total.op.operands[0].op
    assert power is not None
    exp = scalar.exponential(power)
    top, sums = names.fresh("top"), names.fresh("sum")
    outer.line(f'{top} = tl.full({shape}, float("-inf"), tl.float32)')
    outer.line(f"{sums} = tl.zeros({shape}, tl.float32)")
    start, body = names.fresh("start"), Block(names)
    bound, masks = list(emitter.addresses.groups), dict(emitter.masks)
    with emitter.inside(emitter.column_scope(largest.axes, body)):
        variable = names.fresh("col")
        writer._range(columns, variable, start)
        mask = writer._limit(largest.axes, variable, columns.extent, columns.size)
        text = str(emitter.element(largest.op.operands[0], largest.source))
        if mask:
            text = f'tl.where({mask}, {text}, float("-inf"))'
        body.line(f"lane = tl.broadcast_to({text}, [{columns.name}])")
        body.line(f"lane = tl.reshape(lane, [{columns.name} // {_TAKEN}, {_TAKEN}])")
        body.line(f"new = _largest(tl.reduce(lane, 1, _largest), {top})")
        body.line('base = tl.where(new == float("-inf"), 0.0, new)')
        body.line(f"{sums} = {sums} * {exp}({top} - base) + tl.sum({exp}(lane - base[:, None]), 1)")
        body.line(f"{top} = new")
    emitter.addresses.groups, emitter.masks = bound, masks
    outer.nest(f"for {start} in {writer._steps(columns)}:", body)
    most = outer.let(f"tl.reduce({top}, 0, _largest)", "float32", _SCALAR, "amax")
    added = outer.let(f"tl.sum({sums} * {exp}({top} - {most}), axis=0)", "float32", _SCALAR, "sum")
    emitter.results[(largest.op.result, largest.index)] = Expr(most.text, "float32")
    emitter.results[(total.op.result, total.index)] = Expr(added.text, "float32")
    writer.helpers.add("_largest")
