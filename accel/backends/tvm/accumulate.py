"""Accumulators of reductions: starting values, steps, and what the parts combine to.

A reduction over a contiguous axis keeps 16 or 64 partial results in a local array and takes them
together at the end: LLVM holds the array in vector registers, and a sum's rounding error grows with
n / 64 instead of n. argmax and argmin carry a pair (value, position).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from accel.backends.loops.phases import Reduce
from accel.backends.tvm import dtypes, scalar, tir
from accel.backends.tvm.tir import Block, Buffer, Expr, cast, const, select
from accel.ir.types import is_float

_VECTOR = 16  # lanes that are added up as halves of vectors, not through memory


@dataclass
class Accumulator:
    """Partial results of one reduction in local arrays of one length."""

    reduce: Reduce
    values: Buffer
    places: Buffer | None
    length: int

    @property
    def name(self) -> str:
        return self.reduce.op.name

    @property
    def kind(self) -> str:
        """What partial results are computed in ("bool" is stored as uint8)."""
        return tir.element_type(self.values)

    def start(self, block: Block, lane: Expr) -> None:
        block.store(self.values, _neutral(self.name, self.reduce.op.operands[0].dtype), lane)
        if self.places is not None:
            block.store(self.places, tir.i64((1 << 63) - 1), lane)

    def step(self, block: Block, lane: Expr, element: Expr, place: Expr | None) -> None:
        """Takes in one element. `place` is its position along the axis, for argmax and argmin."""
        if self.name in ("any", "all") and tir.dtype_of(element) != "bool":
            element = tir.ne(element, const(0, tir.dtype_of(element)))
        element = block.let(cast(element, self.kind), "element")
        have = block.let(tir.load(self.values, lane), "have")
        if self.places is None:
            block.store(self.values, _combine(self.name, have, element), lane)
            return
        assert place is not None
        known = block.let(tir.load(self.places, lane), "known")
        better = block.let(_is_better(self.name, have, known, element, place), "better")
        block.store(self.values, select(better, element, have), lane)
        block.store(self.places, select(better, place, known), lane)

    def fold_all(self, block: Block, lanes: int) -> None:
        """Takes all lanes into the first."""
        while lanes > 1:
            if lanes == _VECTOR and self._is_plain:
                whole = tir.vector(self.values, tir.i64(0), lanes)
                block.store(self.values, tir.sum_of_lanes(block, whole, lanes), tir.i64(0))
                return
            lanes //= 2
            self._take_in(block, self, lanes, lanes)

    def join(self, block: Block, other: Accumulator, lanes: int) -> None:
        """Takes in another one, lane by lane."""
        self._take_in(block, other, 0, lanes)

    @property
    def _is_plain(self) -> bool:
        return self.name == "sum" and self.kind == "float32"

    def _take_in(self, block: Block, other: Accumulator, first: int, lanes: int) -> None:
        if self._is_plain and lanes % _VECTOR == 0:
            for start in range(0, lanes, _VECTOR):  # LLVM would choose vectors that overlap
                have, more = (
                    tir.vector(x, tir.i64(at), _VECTOR)
                    for x, at in ((self.values, start), (other.values, first + start))
                )
                block.store(self.values, have + more, tir.lanes_from(tir.i64(start), _VECTOR))
            return
        lane, body = tir.var("lane"), Block()
        place = lane + tir.i64(first)
        at = None if other.places is None else tir.load(other.places, place)
        self.step(body, lane, tir.load(other.values, place), at)
        block.loop(lane, tir.i64(lanes), body)

    def result(self, block: Block, lane: Expr) -> Expr:
        """The reduction's result in its compute type."""
        target = self.reduce.op.result.dtype
        if self.places is not None:
            return block.let(cast(tir.load(self.places, lane), dtypes.compute(target)), self.name)
        value = tir.load(self.values, lane)
        if dtypes.compute(target) == "bool":
            value = tir.ne(value, const(0, "uint8"))
        return block.let(value, self.name)


def accumulator(reduce: Reduce, length: int, block: Block) -> Accumulator:
    """Local arrays of `length` partial results."""
    op = reduce.op
    kind = _kind(op.name, op.operands[0].dtype, op.result.dtype)
    values = tir.local_array(op.name, length, kind)
    block.allocate(values)
    places = None
    if op.name in ("argmax", "argmin"):
        places = tir.local_array(f"{op.name}_place", length, "int64")
        block.allocate(places)
    return Accumulator(reduce, values, places, length)


def _kind(name: str, operand: torch.dtype, result: torch.dtype) -> str:
    if name in ("any", "all"):
        return "uint8"
    kind = dtypes.compute(operand if name in ("argmax", "argmin") else result)
    return "uint8" if kind == "bool" else kind


def _neutral(name: str, dtype: torch.dtype) -> Expr:
    kind = dtypes.compute(dtype)
    if name in ("any", "all"):
        return const(int(name == "all"), "uint8")
    if name in ("sum", "prod"):
        number = int(name == "prod")
        return const(float(number), kind) if is_float(dtype) else const(number, "int64")
    lowest = name in ("amax", "argmax")
    if is_float(dtype):
        return const(-math.inf if lowest else math.inf, kind)
    if dtype == torch.bool:
        return const(0 if lowest else 1, "uint8")
    info = torch.iinfo(dtype)
    return scalar.constant(info.min if lowest else info.max, dtype, Block())


def _combine(name: str, have: Expr, element: Expr) -> Expr:
    kind = tir.dtype_of(have)
    is_integer = not kind.startswith("float")
    match name:
        case "sum":
            if is_integer:
                return scalar.widened(kind, lambda a, b: a + b, (have, element))
            return have + element
        case "prod":
            if is_integer:
                return scalar.widened(kind, lambda a, b: a * b, (have, element))
            return have * element
        case "amax":
            return select(have > element, have, element) if is_integer else scalar.maximum(
                have, element
            )  # fmt: skip
        case "amin":
            return select(have < element, have, element) if is_integer else scalar.minimum(
                have, element
            )  # fmt: skip
        case "any":
            return have | element
        case _:
            return have & element


def _is_better(name: str, have: Expr, known: Expr, element: Expr, place: Expr) -> Expr:
    """Whether the new element wins: larger (or NaN), or as good and earlier."""
    beats = element > have if name == "argmax" else element < have
    ties = tir.eq(element, have)
    if tir.dtype_of(have).startswith("float"):
        both = tir.tirx.And(tir.is_nan(element), tir.is_nan(have))
        beats = tir.tirx.Or(
            beats, tir.tirx.And(tir.is_nan(element), tir.tirx.Not(tir.is_nan(have)))
        )
        ties = tir.tirx.Or(ties, both)
    return tir.tirx.Or(beats, tir.tirx.And(ties, place < known))
