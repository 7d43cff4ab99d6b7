"""Moving ops into the region of a new `accel.kernel` or `accel.call`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from accel.ir.capability import KernelGenerator
from accel.ir.module import Op, Region, Value, clone_op
from accel.ir.op import Attribute, Trait, definition
from accel.ir.types import same_shape


def outline(
    ops: Sequence[Op],
    name: str,
    attributes: Mapping[str, Attribute],
    made_by: str,
    *,
    duplicate: Sequence[Op] = (),
    inline: Callable[[Value], bool] = lambda value: False,
) -> Op:
    """Builds `accel.<name>` with copies of `ops` (in order) as its region; not inserted yet.

    Inputs are the values that the ops read from outside, in order of first use; values for which
    `inline` is true (0-d constants, say) are copied into the region instead, with the ops of
    `duplicate`, which stay where they are. Results are the values that others use. The caller
    inserts the op and calls `finish_outline`.
    """
    members = set(ops)
    inside = _Inside(inline, {r: op for op in duplicate for r in op.results})
    region, mapping, inputs = inside.region, inside.mapping, inside.inputs
    for op in ops:
        for operand in op.operands:
            inside.bring(operand)
        region.append(clone_op(op, mapping))
    outputs = escaping(ops, members)
    terminator = Op(definition("yield"), [mapping[v] for v in outputs], {}, ())
    region.append(terminator)
    last = ops[-1]
    return Op(
        definition(name),
        inputs,
        attributes,
        [v.type for v in outputs],
        regions=[region],
        location=last.location,
        made_by=made_by,
    )


class _Inside:
    """A region in the making, and what it reads from outside."""

    def __init__(self, inline: Callable[[Value], bool], copies: Mapping[Value, Op]) -> None:
        self.region = Region()
        self.mapping: dict[Value, Value] = {}
        self.inputs: list[Value] = []
        self._inline, self._copies = inline, copies

    def bring(self, value: Value) -> None:
        """Makes an outer value known inside: as a copy of what makes it, or as an argument."""
        if value in self.mapping:
            return
        source = value.op
        if source is not None and (value in self._copies or self._inline(value)):
            for operand in source.operands:
                self.bring(operand)
            self.region.append(clone_op(source, self.mapping))
            return
        self.inputs.append(value)
        self.mapping[value] = self.region.add_arg(value.type, value.name)


def escaping(ops: Sequence[Op], members: set[Op]) -> list[Value]:
    """Results of `ops` that an op outside of `members` uses."""
    return [r for op in ops for r in op.results if any(user not in members for user, _ in r.uses)]


def finish_outline(new: Op, ops: Sequence[Op]) -> None:
    """Points the users of `ops` to the inserted `new`, and erases the ops."""
    members = set(ops)
    outputs = escaping(ops, members)
    for old, result in zip(outputs, new.results):
        result.name = old.name
        for user, index in list(old.uses):
            if user not in members:
                user.set_operand(index, result)
    for op in reversed(ops):
        op.erase()


def elementwise_epilogue(op: Op, generator: KernelGenerator, most: int) -> list[Op]:
    """Elementwise ops of the same shape after `op`, in order, that leave nothing else to read."""
    found: list[Op] = []
    value = op.result
    while len(found) < most:
        user = value.single_user
        if user is None or not user.has(Trait.ELEMENTWISE) or len(user.results) != 1:
            break
        if not same_shape(user.result.shape, value.shape):
            break
        if generator.supports(user) is not None:
            break
        found.append(user)
        value = user.result
    return found


def prologue(
    ops: Sequence[Op], generator: KernelGenerator, most: int, fits: Callable[[Op], bool]
) -> list[Op]:
    """Ops before `ops` that nothing else reads, that have generated code, and that `fits` takes;
    the nearest first."""
    found: list[Op] = []
    taken = set(ops)
    pending = [v for op in ops for v in op.operands]
    while pending and len(found) < most:
        value = pending.pop()
        made = value.op
        if made is None or made in taken or value.single_user not in taken:
            continue
        if len(made.results) != 1 or not fits(made) or generator.supports(made) is not None:
            continue
        taken.add(made)
        found.append(made)
        pending.extend(made.operands)
    return found


def is_full(value: Value) -> bool:
    """Whether a value is a scalar constant, which belongs inside of a region."""
    return value.op is not None and value.op.name == "full"
