"""A loop over the tokens that the capture unrolled becomes one `accel.scan`.

A recurrent model written as a plain forward has `for t in range(length)` in it, so that its capture
is as long as the text: equal pieces, each of which reads one token's part of some values and what
the piece before it made. The pass finds such pieces by dataflow. A *token's* value follows from
slices at one index of an axis as long as the text; where the values of all tokens meet again (in a
`cat`, or written side by side into one tensor) there is a loop. Its body is what the token 1 adds;
every other token's must be the same ops over the same constants, the slices one further, and what
comes from the token before must be one and the same value of that token's body: a carry.

Contract: exact. Before and after, three tokens:

    %0 = "accel.slice"(%x) {axis = 1, start = 0, stop = 1} ...
    %1 = "accel.add"(%start, %0) ...                    %5:2 = "accel.scan"(%start, %x) ({
    %2 = "accel.slice"(%x) {axis = 1, start = 1, ...      ^bb0(%h, %xt):
    %3 = "accel.add"(%1, %2) ...                   ->     %1 = "accel.add"(%h, %xt) ...
    ...                                                   "accel.yield"(%1, %1)
    %5 = "accel.cat"(%1, %3, %4) {axis = 1} ...         }) {carries = 1, axes = [1], stacks = [1]}

Models are captured at several lengths, rerolled, and then agree up to the length
(`accel.passes.generalize`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from accel.errors import OptionError
from accel.ir.builder import Builder
from accel.ir.module import Function, Module, Op, Region, Value, clone_op
from accel.ir.op import definition
from accel.ir.types import TensorType, same_dim, same_type
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.dce import removable


@register_pass
@dataclass
class Reroll(Pass):
    """Rolls up loops over the tokens of a text.

    Options:
        tokens: how long the captured text is; at least 4.
    """

    name: ClassVar[str] = "reroll"
    contract: ClassVar[Contract] = EXACT

    tokens: int = 0

    def run(self, module: Module, context: Context) -> None:
        if self.tokens < 4:
            raise OptionError(f"{self.name}: tokens = {self.tokens}, and a loop has at least 4")
        for function in module.functions.values():
            _sweep(function)
            for op in list(function.ops):
                if op.parent is not None and op.name == "slice_update":
                    _join_updates(op, self.tokens, context)
            _reroll(function, self.tokens, context)


def _join_updates(last: Op, tokens: int, context: Context) -> None:
    """Tokens written one after the other into one tensor, from the last of them: a `cat`."""
    axis = last.attribute("axis") % last.result.type.rank
    found: list[Value] = []
    op: Op | None = last
    for token in reversed(range(tokens)):
        if op is None or op.name != "slice_update" or (op is not last and len(op.result.uses) > 1):
            return
        place = tuple(op.attribute(n) for n in ("start", "stop", "step"))
        if op.attribute("axis") % op.result.type.rank != axis or place != (token, token + 1, 1):
            return
        found.append(op.operands[1])
        op = op.operands[0].op
    if same_dim(last.result.shape[axis], tokens) and context.rewrite("join_updates", last):
        b = Builder(before=last, made_by=Reroll.name)
        last.replace_with([b.cat(*reversed(found), axis=axis)])


def _reroll(function: Function, tokens: int, context: Context) -> None:
    """Loop by loop: what follows from one is about all tokens only when it is rolled up."""
    tried: set[Op] = set()
    while True:
        _sweep(function)
        times = _times(function, tokens)
        ends = [op for op in function.ops if op not in tried and _collects(op, tokens, times)]
        if not ends:
            return
        for end in ends:
            tried.add(end)
            loop = _Loop(tokens, times, end)
            if loop.find() and context.rewrite("reroll", end):
                loop.emit(function)
                break


def _sweep(function: Function) -> None:
    for op in function.body.reversed_ops():
        if removable(op) and not any(r.uses for r in op.results):
            op.erase()


def _times(function: Function, tokens: int) -> dict[Value | Op, int]:
    """Which token a value says something about. Values about none, or about all, are left out."""
    slices: dict[tuple[Value, int], set[int]] = {}
    for op in function.ops:
        place = _token_slice(op, tokens)
        if place is not None:
            slices.setdefault(place[:2], set()).add(place[2])
    whole = {key for key, starts in slices.items() if len(starts) == tokens}
    times: dict[Value | Op, int] = {}
    for op in function.ops:
        place = _token_slice(op, tokens)
        if place is not None and place[:2] in whole and place[0] not in times:
            time = place[2]
        elif _collects(op, tokens, times):
            continue
        else:
            known = [times[v] for v in op.operands if v in times]
            if not known:
                continue
            time = max(known)
        times[op] = time
        times.update(dict.fromkeys(op.results, time))
    return times


def _token_slice(op: Op, tokens: int) -> tuple[Value, int, int] | None:
    """(operand, axis, token) of a slice at one index of an axis as long as the text."""
    if op.name != "slice" or op.attribute("step") != 1:
        return None
    x, axis, start = op.operands[0], op.attribute("axis"), op.attribute("start")
    axis %= x.type.rank
    one = isinstance(start, int) and same_dim(op.attribute("stop"), start + 1)
    return (x, axis, start) if one and same_dim(x.shape[axis], tokens) else None


def _collects(op: Op, tokens: int, times: dict[Value | Op, int]) -> bool:
    """Whether the op puts the tokens' values side by side, in order."""
    if op.name != "cat" or len(op.operands) != tokens:
        return False
    axis = op.attribute("axis")
    return all(times.get(v) == i and v.shape[axis] == 1 for i, v in enumerate(op.operands))


@dataclass
class _Loop:
    """The loop whose results meet in `end`. Its template is the body of the token 1.

    Attributes:
        same: by token, the value that stands for each value of the template.
        carries: values of the token 0 that the template reads, and the template's value that the
            next token reads in their place.
        inits: what the token 0 reads there.
        reads: values of which the template reads one token's part, and along which axis.
    """

    tokens: int
    times: dict[Value | Op, int]
    end: Op
    same: list[dict[Value, Value]] = field(default_factory=list)
    carries: dict[Value, Value] = field(default_factory=dict)
    inits: dict[Value, Value] = field(default_factory=dict)
    reads: list[tuple[Value, int]] = field(default_factory=list)

    def find(self) -> bool:
        """Whether the tokens' bodies agree."""
        self.same = [{} for _ in range(self.tokens)]
        wanted = self.end.operands[1]
        order = (1, 2, 0, *range(3, self.tokens))
        found = all(self._match(wanted, self.end.operands[token], token) for token in order)
        return found and all(
            carry in self.inits
            and same_type(carry.type, self.inits[carry].type)
            and same_type(carry.type, after.type)
            for carry, after in self.carries.items()
        )

    def _match(self, wanted: Value, value: Value, token: int) -> bool:
        """Whether `value` is at this token what `wanted` is at token 1."""
        time = self.times.get(wanted)
        if time is None:
            return value is wanted
        if time == 0:
            return self._match_carry(wanted, value, token)
        if wanted in self.same[token]:
            return self.same[token][wanted] is value
        a, b = wanted.op, value.op
        if time != 1 or self.times.get(value) != token or a is None or b is None:
            return False
        self.same[token][wanted] = value
        place = _token_slice(a, self.tokens)
        if place is not None and place[0] not in self.times:
            if place[:2] not in self.reads:
                self.reads.append(place[:2])
            return _token_slice(b, self.tokens) == (*place[:2], token)
        if a.definition is not b.definition or a.attributes != b.attributes or a.regions:
            return False
        if wanted.index != value.index or a.segments != b.segments:
            return False
        if wanted.type != value.type or len(a.operands) != len(b.operands):
            return False
        return all(self._match(x, y, token) for x, y in zip(a.operands, b.operands))

    def _match_carry(self, wanted: Value, value: Value, token: int) -> bool:
        if token == 0:
            return value not in self.times and self.inits.setdefault(wanted, value) is value
        if token == 1:
            return value is wanted
        if wanted not in self.carries:
            if token != 2 or self.times.get(value) != 1:
                return False
            self.carries[wanted] = value
            # What the next token reads is made by the body, and so it is by the bodies before.
            if not self._match(value, value, 1) or not self._match(value, wanted, 0):
                return False
        return self._match(self.carries[wanted], value, token - 1)

    def emit(self, function: Function) -> None:
        """The scan in front of the end, and its results in the end's place."""
        end, template = self.end, self.same[1]
        sunk = self._sink()
        ops: list[Op] = list(sunk)
        slices: dict[Value, tuple[Value, int]] = {}
        for op in function.ops:
            if any(r in template for r in op.results):
                place = _token_slice(op, self.tokens)
                if place is not None and place[:2] in self.reads:
                    slices[op.result] = place[:2]
                else:
                    ops.append(op)
        b = Builder(before=end, made_by=Reroll.name)
        later = self._read_later(function)
        handed = [self.carries[carry] for carry in self.inits]
        left = [value for value in later if value not in handed]
        starts = [b.full_of(t.shape, 0, t.dtype) for t in left]
        outside = [v for op in ops for v in op.operands if v not in self.times]
        fixed = list(dict.fromkeys(outside))
        operands = [*self.inits.values(), *starts, *(x for x, _ in self.reads), *fixed]
        made = [*handed, *left, end.operands[1]]
        region = self._region(ops, slices, operands, made)
        made_in = end.operands[1].op
        attributes = {
            "carries": len(made) - 1,
            "axes": tuple(axis for _, axis in self.reads),
            "stacks": (end.attribute("axis") % end.result.type.rank,),
        }
        b.location = made_in.location if made_in is not None else None
        types = [*(v.type for v in made[:-1]), end.result.type]
        scan = b.op("scan", operands, attributes, types=types, regions=[region])
        end.result.replace_all_uses(scan.results[-1])
        for wanted, users in later.items():
            for user, i in users:
                user.set_operand(i, scan.results[made.index(wanted)])

    def _sink(self) -> list[Op]:
        """Ops that follow from other carries alone are for the next token to compute.

        Drops such carries and returns their ops, in order.
        """
        sunk: dict[Op, None] = {}
        for carry in list(self.inits):
            init = self.inits.pop(carry)
            ops: dict[Op, None] = {}
            if self._follows(carry, init, ops):
                sunk |= ops
            else:
                self.inits[carry] = init
        return list(sunk)

    def _follows(self, value: Value, init: Value, ops: dict[Op, None]) -> bool:
        """Whether `value` follows from carries as `init` does from their first values."""
        if value in self.inits or value not in self.times:
            return self.inits.get(value, value) is init
        a, b = value.op, init.op
        if a is None or b is None or a.definition is not b.definition or a.regions:
            return False
        if a.attributes != b.attributes or a.segments != b.segments or len(a.results) > 1:
            return False
        if _token_slice(a, self.tokens) or len(a.operands) != len(b.operands):
            return False
        if not all(self._follows(x, y, ops) for x, y in zip(a.operands, b.operands)):
            return False
        ops[a] = None
        return True

    def _read_later(self, function: Function) -> dict[Value, list[tuple[Op, int]]]:
        """What the last token leaves, by the template's value, and who reads it after the loop."""
        order = {op: i for i, op in enumerate(function.ops)}
        last = self.tokens - 1  # of this token the loop's end itself needs less than all
        values = [v for v, t in self.times.items() if t == last and isinstance(v, Value)]
        for value in values:
            if any(order[user] > order[self.end] for user in value.users):
                self._match_last(value)
        bodies = {v.op for same in self.same for v in same.values()} | {self.end}
        names = {v: t for t, v in self.same[-1].items()}
        found: dict[Value, list[tuple[Op, int]]] = {}
        for value, wanted in names.items():
            for user, i in value.uses:
                if user not in bodies and order[user] > order[self.end]:
                    found.setdefault(wanted, []).append((user, i))
        return found

    def _match_last(self, value: Value) -> None:
        """Finds what the template calls a value of the last token."""
        for wanted in self.carries.values():
            before = dict(self.same[-1])
            if self._match(wanted, value, self.tokens - 1):
                return
            self.same[-1] = before

    def _region(
        self,
        ops: list[Op],
        slices: dict[Value, tuple[Value, int]],
        operands: list[Value],
        made: list[Value],
    ) -> Region:
        """The template over arguments: carries, one token's parts, what no token changes."""
        types = [v.type for v in operands]
        first = len(made) - 1
        for i, (x, axis) in enumerate(self.reads, first):
            shape = tuple(1 if a == axis else d for a, d in enumerate(x.shape))
            types[i] = TensorType(shape, x.dtype)
        region = Region(types)
        mapping = dict(zip(self.inits, region.args))
        for value, place in slices.items():
            mapping[value] = region.args[first + self.reads.index(place)]
        rest = first + len(self.reads)
        mapping |= dict(zip(operands[rest:], region.args[rest:]))
        for op in ops:
            region.append(clone_op(op, mapping))
        region.append(Op(definition("yield"), [mapping[v] for v in made], {}, ()))
        return region
