"""The products of a mixture's experts, however a model routes its rows, become `expert_linear`.

Models sort rows by expert, multiply them in groups and put them back in order, or copy an expert's
weight for each row (Shazeer et al., 2017, and the implementations in `transformers`). Neither order
nor copies are part of what is computed: y[i] = W[e[i]] x[i]. Four rules:

- expert_numbers: groups of sorted rows whose sizes were counted from the experts' numbers: each
  row's expert is the sorted number itself;
- expert_order: rows that were sorted, and are put back after elementwise work and products, row by
  row: all of it on rows as they came. Only if nothing else reads the products in sorted order;
- expert_product: a batched product of gathered weights and single rows;
- expert_bias: the addition of the expert's bias.

Numbers must be known to lie in [0, E), as those of a top-k over E columns do: a gather would count
negative ones from the end, and counting forgets wild ones. Contract: exact. Before and after:

    %s, %p = "accel.sort"(%e) {axis = 0} : (tensor<12xi64>) -> ...
    %r = "accel.gather"(%x, %p) {axis = 0} : ... -> tensor<12x32xf32>
    %y = "accel.expert_linear"(%r, %w, %s) : ... -> tensor<12x96xf32>
    %q = "accel.index_put"(%zeros, %iota, %p) {axes = [0]} : ... -> tensor<12xi64>
    %z = "accel.gather"(%y, %q) {axis = 0} : ... -> tensor<12x96xf32>

    %z = "accel.expert_linear"(%x, %w, %e) : ... -> tensor<12x96xf32>
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from accel.ir.builder import Builder
from accel.ir.module import Module, Op, Value
from accel.ir.op import Trait
from accel.ir.patterns import splat_value
from accel.ir.rewrite import Made, RewriteContext, Rule, RuleSet, rewrite
from accel.ir.types import Dim, is_integer, same_dim, same_shape
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass


@register_pass
@dataclass
class RaiseExperts(Pass):
    """Raises mixtures of experts. Run it on programs as they were imported."""

    name: ClassVar[str] = "raise_experts"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        rules: list[Rule] = [ExpertNumbers(), ExpertOrder(), ExpertProduct(), ExpertBias()]
        rewrite(module, RuleSet(rules), context)


class ExpertNumbers(Rule):
    """Groups of sorted rows: a row's expert is its sorted number."""

    name, roots = "expert_numbers", ("expert_linear",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        x, weight, experts, bias = op.arguments()
        ends = _group_ends(experts)
        if ends is None:
            return None
        counted = _counted(ends, weight.shape[0])
        made = None if counted is None else _sorted_by(counted)
        if counted is None or made is None:
            context.miss(self.name, op, "group sizes that are not counted from sorted numbers")
            return None
        if made.attribute("descending") or not _lies_below(counted, weight.shape[0]):
            context.miss(self.name, op, "numbers that may not name an expert")
            return None
        return b.op("expert_linear", [x, weight, counted, bias]).result


def _sorted_by(value: Value) -> Op | None:
    """The sort whose values these are, or whose operand they are, read in its order."""
    op = value.op
    if op is not None and op.name == "sort":
        return op if value is op.results[0] else None
    sort = None if op is None or op.name != "gather" else op.operands[1].op
    if op is None or sort is None or sort.name != "sort" or op.operands[1] is not sort.results[1]:
        return None
    return sort if op.operands[0] is sort.operands[0] and value.type.rank == 1 else None


def _group_ends(experts: Value) -> Value | None:
    """The ends of groups, where a row's number is how many of them it has passed."""
    op = experts.op
    if op is None or op.name != "minimum" or splat_value(op.operands[1]) is None:
        return None
    total = op.operands[0].op
    if total is None or total.name != "sum" or total.attribute("axes") != (1,):
        return None
    passed = _uncast(total.operands[0]).op
    if passed is None or passed.name != "le" or not _is_iota(passed.operands[1]):
        return None
    ends, place = passed.operands
    return ends if ends.type.rank == 1 and place.shape[1] == 1 else None


def _counted(ends: Value, experts: Dim) -> Value | None:
    """What was counted to make these ends: cumsum(sum(value[:, None] == [0, 1, ...]))."""
    running = _uncast(ends).op
    if running is None or running.name != "cumsum":
        return None
    total = _uncast(running.operands[0]).op
    if total is None or total.name != "sum" or total.attribute("axes") != (0,):
        return None
    equal = _uncast(total.operands[0]).op
    if equal is None or equal.name != "eq":
        return None
    column, numbers = equal.operands
    fits = same_shape(numbers.shape, (experts,)) and column.type.rank == 2
    if not fits or column.shape[1] != 1 or not _is_iota(numbers):
        return None
    while (op := column.op) is not None and (op.name == "reshape" or _keeps_numbers(op)):
        column = op.operands[0]
    return column if column.type.rank == 1 else None


def _keeps_numbers(op: Op) -> bool:
    """Whether this is a conversion between integers with room for every expert's number."""
    types = (op.operands[0].dtype, op.result.dtype) if op.name == "cast" else ()
    return bool(types) and all(is_integer(d) and d.itemsize >= 4 for d in types)


def _uncast(value: Value) -> Value:
    """A count before it was converted; 4 bytes hold it in any dtype."""
    while value.op is not None and value.op.name == "cast" and value.dtype.itemsize >= 4:
        value = value.op.operands[0]
    return value


def _is_iota(value: Value) -> bool:
    """Whether a value counts 0, 1, ... along its first axis."""
    op = value.op
    plain = op is not None and op.name == "iota" and op.attribute("start") == 0
    return plain and op is not None and op.attribute("step") == 1 and op.attribute("axis") == 0


def _lies_below(value: Value, limit: Dim) -> bool:
    """Whether integers are positions of a top-k among at most `limit` columns."""
    while (op := value.op) is not None:
        if op.name == "topk" and value is op.results[1]:
            count = op.operands[0].shape[int(op.attribute("axis"))]
            known = isinstance(count, int) and isinstance(limit, int)
            return (known and count <= limit) or same_dim(count, limit)
        keeps = op.has(Trait.VIEW) or op.name == "sort" or op.name == "gather"
        keeps = keeps or _keeps_numbers(op)
        if not keeps or value is not op.results[0]:
            return False
        value = op.operands[0]
    return False


class ExpertOrder(Rule):
    """Rows that were sorted by expert and are put back: the work on them needs no order."""

    name, roots = "expert_order", ("gather",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        value, inverse = op.operands
        sort = _sort_of_inverse(inverse)
        if sort is None or int(op.attribute("axis")) % max(value.type.rank, 1) != 0:
            return None
        unsorted = _Unsorted(sort, op, b)
        made = unsorted.value(value)
        if made is None:
            context.miss(self.name, op, unsorted.reason)
            return None
        products = [o for o in unsorted.walked if o.name == "expert_linear"]
        if not products:
            return None
        for walked in unsorted.walked:
            users = {u for r in walked.results for u in r.users}
            if unsorted.follows_product(walked) and not users <= {*unsorted.walked, op}:
                context.miss(self.name, op, "something else reads the products in sorted order")
                return None
        return made


def _sort_of_inverse(inverse: Value) -> Op | None:
    """The sort of a vector whose permutation these positions undo."""
    op = inverse.op
    if op is None:
        return None
    permutation: Value | None = None
    if op.name == "index_put" and len(op.operands) == 3 and not op.attribute("accumulate"):
        same = same_shape(op.operands[0].shape, op.operands[1].shape)
        if same and inverse.type.rank == 1 and _is_iota(op.operands[1]):
            permutation = op.operands[2]
    elif op.name == "sort" and inverse is op.results[1] and not op.attribute("descending"):
        permutation = op.operands[0]
    sort = None if permutation is None else permutation.op
    if sort is None or sort.name != "sort" or permutation is not sort.results[1]:
        return None
    return (
        sort
        if inverse.type.rank == 1 and same_shape(inverse.shape, sort.results[0].shape)
        else None
    )


@dataclass
class _Unsorted:
    """Rebuilds values whose rows were sorted on rows as they came. `walked`: what it replaces."""

    sort: Op
    last: Op  # which puts rows back
    b: Builder
    walked: dict[Op, None] = field(default_factory=dict)
    reason: str = ""
    _made: dict[Value, Value | None] = field(default_factory=dict)
    _moved: set[Value] = field(default_factory=set)

    def __post_init__(self) -> None:
        op: Op | None = self.sort
        while op is not None and op is not self.last:
            if op is self.sort or not self._moved.isdisjoint(op.operands):
                self._moved.update(op.results)
            op = op.next

    def value(self, value: Value) -> Value | None:
        if value not in self._made:
            self._made[value] = self._rebuild(value)
        return self._made[value]

    def moves(self, value: Value) -> bool:
        """Whether a value depends on the order."""
        return value in self._moved

    def follows_product(self, op: Op) -> bool:
        inner = [v.op for v in op.operands if v.op in self.walked]
        return op.name == "expert_linear" or any(self.follows_product(o) for o in inner if o)

    def _rebuild(self, value: Value) -> Value | None:
        op = value.op
        if op is None or not self.moves(value):
            self.reason = f"{value!r} has no sorted rows"
            return None
        rows = self.sort.results[0].shape[0]
        if op is self.sort:
            if value is op.results[0]:
                return op.operands[0]
            return self.b.iota(shape=(rows,), axis=0, dtype=value.dtype)
        if not value.shape or not same_dim(value.shape[0], rows) or len(op.results) != 1:
            self.reason = f"accel.{op.name} in sorted order"
            return None
        self.walked[op] = None
        self.b.location = op.location
        if op.name == "gather":
            return self._gather(op)
        if op.name == "expert_linear":
            fixed = [v for v in (op.operands[1], *op.operands[3:]) if self.moves(v)]
            parts = [self.value(op.operands[0]), self.value(op.operands[2])]
            if fixed or None in parts:
                return None
            _, weight, _, bias = op.arguments()
            return self.b.op("expert_linear", [parts[0], weight, parts[1], bias]).result
        return self._row_by_row(op, rows)

    def _gather(self, op: Op) -> Value | None:
        """Rows of something that was not sorted."""
        table, places = op.operands
        if self.moves(table) or places.type.rank != 1 or int(op.attribute("axis")) != 0:
            self.reason = "a gather of what was sorted"
            return None
        count = self.sort.results[0].shape[0]
        if places is self.sort.results[1] and same_dim(table.shape[0], count):
            return table
        repeated = _repeats(places, self.sort.results[1])
        if repeated is not None and same_dim(table.shape[0] * repeated, count):
            apart = self.b.reshape(table, shape=(table.shape[0], 1, *table.shape[1:]))
            wide = (table.shape[0], repeated, *table.shape[1:])
            spread = self.b.broadcast_to(apart, shape=wide)
            return self.b.reshape_to(spread, op.result.shape)
        made = self.value(places)
        return None if made is None else self.b.gather(table, made, axis=0)

    def _row_by_row(self, op: Op, rows: Dim) -> Value | None:
        """An op that treats each row by itself."""
        axes = (op.attribute("axes") if op.has(Trait.REDUCTION) and _has(op, "axes") else
                (op.attribute("axis"),) if _has(op, "axis") else ())  # fmt: skip
        along = [int(a) % op.operands[0].type.rank for a in axes]
        plain = op.has(Trait.ELEMENTWISE) or op.name in ("reshape", "slice")
        if not (plain or op.has(Trait.REDUCTION)) or 0 in along:
            self.reason = f"accel.{op.name} in sorted order"
            return None
        operands: list[Value] = []
        for value in op.operands:
            same = value.type.rank > 0 and same_dim(value.shape[0], rows)
            aligned = value.type.rank == op.result.type.rank or not op.has(Trait.ELEMENTWISE)
            if self.moves(value):
                made = self.value(value) if same and aligned else None
                if made is None:
                    self.reason = self.reason or f"accel.{op.name} in sorted order"
                    return None
                operands.append(made)
            elif value.type.rank == op.result.type.rank and value.shape[0] != 1:
                self.reason = f"accel.{op.name} with rows in another order"
                return None
            else:
                operands.append(value)
        return self.b.op(op.name, operands, op.attributes).result


def _has(op: Op, name: str) -> bool:
    return any(a.name == name for a in op.definition.attributes)


def _repeats(places: Value, permutation: Value) -> int | None:
    """k where places are permutation // k."""
    op = places.op
    if op is None or op.name != "floor_div" or op.operands[0] is not permutation:
        return None
    count = splat_value(op.operands[1])
    return count if isinstance(count, int) and count > 0 else None


class ExpertProduct(Rule):
    """A product of each row and its own copy of an expert's weight."""

    name, roots = "expert_product", ("matmul",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        for side, row in ((0, 1), (1, 0)):
            copies, rows = op.operands[side].op, op.operands[row]
            if copies is None or copies.name != "gather" or int(copies.attribute("axis")) != 0:
                continue
            weight, experts = copies.operands
            single = rows.shape[-1 if side == 0 else -2]
            if weight.type.rank != 3 or experts.type.rank != 1 or rows.type.rank != 3:
                continue
            if single != 1 or rows.dtype not in _FLOATS:
                continue
            if not _lies_below(experts, weight.shape[0]):
                context.miss(self.name, op, "numbers that may not name an expert")
                return None
            if side == 1:
                weight = b.permute(weight, axes=(0, 2, 1))
            x = b.reshape_to(rows, (experts.shape[0], weight.shape[2]))
            return b.reshape_to(b.expert_linear(x, weight, experts), op.result.shape)
        return None


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ExpertBias(Rule):
    """An expert's bias, added to its products."""

    name, roots = "expert_bias", ("add",)

    def apply(self, op: Op, b: Builder, context: RewriteContext) -> Made:
        for value, other in (op.operands, op.operands[::-1]):
            own, product = other.op, value
            while product.op is not None and product.op.name == "reshape":
                if product.single_user is None:
                    return None
                product = product.op.operands[0]
            made = product.op
            if made is None or made.name != "expert_linear" or product.single_user is None:
                continue
            if own is None or own.name != "gather" or int(own.attribute("axis")) != 0:
                continue
            x, weight, experts, bias = made.arguments()
            table, places = own.operands
            fits = same_shape(table.shape, weight.shape[:2]) and places is experts
            whole = same_shape(value.shape, product.shape)
            if bias is None and fits and whole and same_shape(op.result.shape, value.shape):
                return b.op("expert_linear", [x, weight, experts, table]).result
        return None
