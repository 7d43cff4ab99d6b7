"""One position for all rows becomes a position for each: texts of unequal length decode together.

`insert_kv_cache` derives @decode for rows that all stand at one `position` (0-d). `give_positions`
makes it `position` [B] and follows it through the function. What depends on the position and on no
row, such as rotary angles or a learned position's row of a table, is computed for each row: such a
value gets the rows as a new first axis (as `vmap` would do it), and loses it where it meets a value
that has rows already. Caches are written, and attention reads them, at each row's own position.

    %cos = "accel.cos"(%angle)                   // [1, 1, D]; every row's own: [B, 1, 1, D]
    %q1 = "accel.rope"(%q, %cos, %sin)           // %q [B, H, 1, D]; then %cos is [B, 1, 1, D]
    %k1 = "accel.dynamic_update"(%keys, %k, %position) {axis = 2}    // []; every row's own: [B]

An op for which no rule is known is a CaptureError with its name and line: the function is no longer
usable then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import sympy
import torch

from accel.errors import CaptureError
from accel.ir.builder import Builder
from accel.ir.module import Function, Op, Region, Value
from accel.ir.op import Trait
from accel.ir.types import Dim, TensorType, same_dim, same_shape, symbol_names

_PASS = "insert_kv_cache"
# Operands that may be a position for each row.
_POSITIONS = {("dynamic_update", 2), ("cached_attention", 3)}


def give_positions(function: Function, position: Value, rows: sympy.Symbol) -> None:
    """Makes the 0-d argument `position` one of [rows], in place.

    Args:
        function: whose rows lie along axes of size `rows`, a symbol that no other size has.

    Raises CaptureError for an op that needs the position in a way no rule covers.
    """
    _Lift(function, position, rows).run()


def fix_rows(function: Function, sizes: dict[str, int]) -> None:
    """Symbols become numbers, in place, in types and attributes."""

    def here(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(here(v) for v in value)
        if isinstance(value, sympy.Expr):
            known = {s: sizes[s.name] for s in value.free_symbols if s.name in sizes}
            made = value.subs(known) if known else value
            return int(made) if made.is_Integer else made
        return value

    def fix(region: Region) -> None:
        for op in region.ops:
            op.attributes = {name: here(value) for name, value in op.attributes.items()}
            for result in op.results:
                result.type = TensorType(here(result.shape), result.dtype)
            for inner in op.regions:
                for argument in inner.args:
                    argument.type = TensorType(here(argument.shape), argument.dtype)
                fix(inner)

    for argument in function.args:
        argument.type = TensorType(here(argument.shape), argument.dtype)
    fix(function.body)
    for name in sizes:
        function.symbols.pop(name, None)


def row_axis(type_: TensorType, rows: sympy.Symbol) -> int:
    """The axis along which the rows of a state lie. Raises CaptureError where none does."""
    if rows not in type_.shape:
        raise CaptureError(
            f"a state {type_} that does not keep the rows apart",
            advice="texts of one length still run together",
        )
    return type_.shape.index(rows)


class _Lift:
    """`lifted` has, for a value that differs by row, the value with the rows in front."""

    def __init__(self, function: Function, position: Value, rows: sympy.Symbol) -> None:
        self.function, self.position, self.rows = function, position, rows
        self.lifted: dict[Value, Value] = {}

    def run(self) -> None:
        old, ops, body = self.position, list(self.function.ops), self.function.body
        each = body.add_arg(TensorType((self.rows,), old.dtype), old.name, old.index + 1)
        self.lifted[old] = each
        dead: list[Op] = []
        for op in ops:
            if not any(v in self.lifted for v in op.operands):
                continue
            if op.has(Trait.TERMINATOR) or op.regions or len(op.results) != 1:
                raise self._refuse(op)
            b = Builder(before=op, made_by=_PASS)
            if self._meets_rows(op):
                self._join(op, b)
                continue
            if op.name == "broadcast_to" and self._axis(op.result.shape) is not None:
                made = self._with_rows(op.operands[0], op.result.shape, b)
                op.result.replace_all_uses(b.broadcast_to(made, shape=op.result.shape))
            else:
                self.lifted[op.result] = self._each(op, b)
            dead.append(op)
        for op in reversed(dead):
            op.erase()
        body.remove_arg(old.index)

    # -- where a value meets rows ----------------------------------------------------------------

    def _axis(self, shape: Sequence[Dim]) -> int | None:
        """The axis along which the rows lie."""
        for axis, dim in enumerate(shape):
            if not isinstance(dim, int) and self.rows.name in symbol_names(dim):
                return axis
        return None

    def _meets_rows(self, op: Op) -> bool:
        others = [v for v in op.operands if v not in self.lifted]
        return any(self._axis(v.shape) is not None for v in others)

    def _join(self, op: Op, b: Builder) -> None:
        """The op stays; the operands that differ by row become its rows."""
        for i, value in enumerate(op.operands):
            if value in self.lifted:
                op.set_operand(i, self._joined(op, i, value, b))

    def _joined(self, op: Op, i: int, value: Value, b: Builder) -> Value:
        if (op.name, i) in _POSITIONS:
            if not same_dim(op.operands[0].shape[0], self.rows):
                raise self._refuse(op)  # rows are not what its first axis has
            return self.lifted[value]
        if op.name in ("attention", "cached_attention") and value is op.operand("mask"):
            return self._with_rows(value, (self.rows, 1, 1, 1), b)
        if op.has(Trait.ELEMENTWISE) or op.name in ("rope", "cat"):
            return self._with_rows(value, op.result.shape, b)
        raise self._refuse(op)

    def _with_rows(self, value: Value, shape: Sequence[Dim], b: Builder) -> Value:
        """A value [B, *s] as rows of something of this shape, to which s broadcasts."""
        made, axis = self.lifted[value], self._axis(shape)
        own = [1] * (len(shape) - len(value.shape)) + list(value.shape)
        if axis is None or own[axis] != 1 or not same_dim(shape[axis], self.rows):
            raise self._refuse(value.op)
        rest = own[:axis] + own[axis + 1 :]
        made = b.reshape_to(made, (self.rows, *rest))
        if axis:
            made = b.permute(made, axes=(*range(1, axis + 1), 0, *range(axis + 1, len(shape))))
        return made

    # -- what is computed for each row -----------------------------------------------------------

    def _each(self, op: Op, b: Builder) -> Value:
        """The op's result with the rows in front."""
        b.location = op.location
        if op.has(Trait.ELEMENTWISE) or op.name in ("rope", "matmul"):
            operands = [
                self._wide(v, max(len(x.shape) for x in op.operands), b) for v in op.operands
            ]
            return b.op(op.name, operands, op.attributes).result
        rule = _RULES.get(op.name)
        made = None if rule is None else rule(self, op, b)
        if made is None:
            raise self._refuse(op)
        if not same_shape(made.shape, (self.rows, *op.result.shape)):
            raise self._refuse(op)
        return made

    def _wide(self, value: Value, rank: int, b: Builder) -> Value:
        """A lifted value with as many axes after the rows as all operands have."""
        made = self.lifted.get(value)
        if made is None:
            return value
        ones = (1,) * (rank - len(value.shape))
        return b.reshape_to(made, (self.rows, *ones, *value.shape))

    def _reshape(self, op: Op, b: Builder) -> Value:
        return b.reshape_to(self.lifted[op.operands[0]], (self.rows, *op.result.shape))

    def _permute(self, op: Op, b: Builder) -> Value:
        rank = len(op.result.shape)
        axes = (0, *(int(a) % rank + 1 for a in op.attribute("axes")))
        made: Value = b.permute(self.lifted[op.operands[0]], axes=axes)
        return made

    def _broadcast(self, op: Op, b: Builder) -> Value:
        shape = op.result.shape
        made: Value = b.broadcast_to(
            self._wide(op.operands[0], len(shape), b), shape=(self.rows, *shape)
        )
        return made

    def _slice(self, op: Op, b: Builder) -> Value:
        axis = op.attribute("axis") % len(op.result.shape) + 1
        attributes = dict(op.attributes) | {"axis": axis}
        return b.op("slice", [self.lifted[op.operands[0]]], attributes).result

    def _cat(self, op: Op, b: Builder) -> Value:
        parts = []
        for v in op.operands:
            parts.append(self.lifted.get(v) or b.broadcast_to(v, shape=(self.rows, *v.shape)))
        made: Value = b.cat(*parts, axis=op.attribute("axis") % len(op.result.shape) + 1)
        return made

    def _linear(self, op: Op, b: Builder) -> Value | None:
        x, *constants = op.operands
        if any(c in self.lifted for c in constants):
            return None
        return b.op("linear", [self.lifted[x], *constants], op.attributes).result

    def _read(self, op: Op, b: Builder) -> Value | None:
        """Rows of a table that is the same for all."""
        table, indices = op.operands
        if table in self.lifted:
            return None
        axis = 0 if op.name == "embedding" else op.attribute("axis") % len(table.shape)
        made = b.op(op.name, [table, self.lifted[indices]], op.attributes).result
        return _to_front(b, made, axis)

    def _index(self, op: Op, b: Builder) -> Value | None:
        x, *indices = op.operands
        axes = op.attribute("axes")
        if x in self.lifted or any(after - a != 1 for a, after in pairwise(axes)):
            return None
        rank = max(len(i.shape) for i in indices)
        given = [self._wide(i, rank, b) for i in indices]
        return _to_front(b, b.op("index", [x, *given], op.attributes).result, int(axes[0]))

    def _cut(self, op: Op, b: Builder) -> Value | None:
        """A slice at a run-time position: rows of a table."""
        x, start = op.operands
        if x in self.lifted:
            return None
        axis, size = op.attribute("axis") % len(x.shape), op.attribute("size")
        at = b.cast_to(b.reshape(self.lifted[start], shape=(self.rows, 1)), torch.int64)
        last = b.sub(b.size_like(x.shape[axis], torch.int64), b.size_like(size, torch.int64))
        at = b.minimum(b.maximum(at, b.scalar(0, torch.int64)), last)
        line = b.iota(shape=(1, size), axis=1, dtype=torch.int64)
        return _to_front(b, b.gather(x, b.add(at, line), axis=axis), axis)

    def _refuse(self, op: Op | None) -> CaptureError:
        name = "the position" if op is None else f"accel.{op.name}"
        return CaptureError(
            f"{name} is used in a way that has no form for texts of unequal length",
            where=str(op.location) if op is not None and op.location else "",
            advice="texts of one length still run together",
        )


def _to_front(b: Builder, x: Value, axis: int) -> Value:
    """x with this axis first."""
    if axis == 0:
        return x
    rest = [a for a in range(len(x.shape)) if a != axis]
    made: Value = b.permute(x, axes=(axis, *rest))
    return made


_RULES: dict[str, Callable[[_Lift, Op, Builder], Value | None]] = {
    "reshape": _Lift._reshape,
    "permute": _Lift._permute,
    "broadcast_to": _Lift._broadcast,
    "slice": _Lift._slice,
    "cat": _Lift._cat,
    "linear": _Lift._linear,
    "embedding": _Lift._read,
    "gather": _Lift._read,
    "index": _Lift._index,
    "dynamic_slice": _Lift._cut,
}
