"""Reductions of a tile's columns: starting values, steps, and what is left of each row.

A reduction over columns that fit a tile is one call; over more, partial results are kept in a tile
(one for each lane, so that a sum's rounding error grows slowly) and combined at the end. argmax and
argmin carry pairs (value, position). NaN wins against every number, as in torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from accel.backends.loops.phases import Reduce
from accel.backends.triton import dtypes
from accel.backends.triton.text import Block, Expr, element_type, number, solid
from accel.ir.types import is_float

HELPERS = {
    "_largest": '''@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
''',
    "_smallest": '''@triton.jit
def _smallest(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
''',
    "_product": '''@triton.jit
def _product(a, b):
    return a * b
''',
    "_first_largest": '''@triton.jit
def _first_largest(a, i, b, j):
    tie = (a == b) | ((a != a) & (b != b))
    better = (b > a) | ((b != b) & (a == a)) | (tie & (j < i))
    return tl.where(better, b, a), tl.where(better, j, i)
''',
    "_first_smallest": '''@triton.jit
def _first_smallest(a, i, b, j):
    tie = (a == b) | ((a != a) & (b != b))
    better = (b < a) | ((b != b) & (a == a)) | (tie & (j < i))
    return tl.where(better, b, a), tl.where(better, j, i)
''',
}  # fmt: skip
_LAST = 2**63 - 1


@dataclass(frozen=True)
class Tile:
    """The shape that reductions work on: `shape` as source, the axis to reduce, and whether the
    result keeps it with size 1."""

    shape: str
    axis: int
    keep: bool

    @property
    def arguments(self) -> str:
        return f"axis={self.axis}, keep_dims=True" if self.keep else f"axis={self.axis}"

    @property
    def dims(self) -> frozenset[str]:
        return frozenset(("row", "col")) if self.keep else frozenset(("col",))

    @property
    def kept(self) -> frozenset[str]:
        return frozenset(("row",)) if self.keep else frozenset()


class Reduction:
    """Code of one reduction."""

    def __init__(self, reduce: Reduce, tile: Tile) -> None:
        self.op, self.tile = reduce.op, tile
        self.name = self.op.name
        self.operand: torch.dtype = self.op.operands[0].dtype
        self.kind = self._kind()
        self.helpers: set[str] = set()
        self.totals: list[Expr] = []

    @property
    def has_places(self) -> bool:
        return self.name in ("argmax", "argmin")

    @property
    def kinds(self) -> list[str]:
        """What partial results are kept in."""
        return [self.kind, "int64"] if self.has_places else [self.kind]

    def _kind(self) -> str:
        if self.name in ("any", "all"):
            return "int32"
        kind = dtypes.compute(self.operand if self.has_places else self.op.result.dtype)
        return "int32" if kind == "bool" else kind

    def neutral(self) -> Expr:
        name, dtype = self.name, self.operand
        if name in ("sum", "prod"):
            return number(int(name == "prod"), self.kind)
        if name in ("any", "all"):
            return number(int(name == "all"), self.kind)
        lowest = name in ("amax", "argmax")
        if is_float(dtype):
            return number(-math.inf if lowest else math.inf, self.kind)
        if dtype == torch.bool:
            return number(0 if lowest else 1, self.kind)
        info = torch.iinfo(dtype)
        return number(info.min if lowest else info.max, self.kind)

    def element(self, value: Expr, block: Block) -> Expr:
        """The operand's element as it is reduced."""
        if self.name in ("any", "all") and value.kind != "bool":
            value = block.let(f"{solid(value)} != 0", "bool", value.dims, "truth")
        return dtypes.cast(value, self.kind)

    def _masked(self, value: Expr, mask: str, block: Block) -> Expr:
        """The element in every lane of the tile, neutral where the mask is off."""
        text, dims = str(solid(value)), value.dims
        if mask:
            text, dims = f"tl.where({mask}, {text}, {self.neutral()})", dims | {"col"}
        if dims != self.tile.dims:
            text = f"tl.broadcast_to({text}, {self.tile.shape})"
        return block.let(text, value.kind, self.tile.dims, "lane")

    # -- whole rows ------------------------------------------------------------------------

    def whole(self, value: Expr, place: Expr | None, mask: str, block: Block) -> None:
        """The reduction of one tile that holds whole rows."""
        self.totals = [self._masked(self.element(value, block), mask, block)]
        if self.has_places:
            assert place is not None
            self.totals.append(self._places(place, mask, block))

    def _places(self, place: Expr, mask: str, block: Block) -> Expr:
        text = str(dtypes.cast(place, "int64") if place.dims else solid_place(place))
        if mask:
            # A column is an int32 at first, whatever positions are computed in.
            wide = f"({text}).to(tl.int64)" if place.dims else text
            text = f"tl.where({mask}, {wide}, {_LAST})"
        text = f"tl.broadcast_to({text}, {self.tile.shape})"
        return block.let(text, "int64", self.tile.dims, "place")

    # -- blocks of rows --------------------------------------------------------------------

    def start(self, block: Block) -> None:
        first = self.neutral()
        shape = self.tile.shape
        text = f"tl.full({shape}, {_plain(first)}, {element_type(self.kind)})"
        self.totals = [block.let(text, self.kind, self.tile.dims, self.name)]
        if self.has_places:
            text = f"tl.full({shape}, {_LAST}, tl.int64)"
            self.totals.append(block.let(text, "int64", self.tile.dims, "at"))

    def step(self, value: Expr, place: Expr | None, mask: str, block: Block) -> None:
        """Takes one more block of columns in."""
        new = block.let(str(self.element(value, block)), self.kind, value.dims, "lane")
        total = self.totals[0]
        if self.has_places:
            assert place is not None
            lane = self._masked(new, mask, block)
            at = self._places(place, mask, block)
            helper = self._helper({"argmax": "_first_largest", "argmin": "_first_smallest"})
            known = self.totals[1]
            block.line(f"{total}, {known} = {helper}({total}, {known}, {lane}, {at})")
            return
        combined = self._combine(total, new)
        text = f"tl.where({mask}, {combined}, {total})" if mask else combined
        block.line(f"{total} = {text}")

    def _combine(self, total: Expr, new: Expr) -> str:
        nan = ", propagate_nan=tl.PropagateNan.ALL" if self.kind.startswith("float") else ""
        match self.name:
            case "sum":
                return f"{total} + {new}"
            case "prod":
                return f"{total} * {new}"
            case "amax" | "any":
                return f"tl.maximum({total}, {new}{nan})"
            case _:
                return f"tl.minimum({total}, {new}{nan})"

    def partial(self, block: Block) -> list[Expr]:
        """One partial result for each row: as many values as `kinds`."""
        text = self._total()
        if not self.has_places:
            if self.kind in ("int8", "int16", "uint8"):
                text = f"{text}.to({element_type(self.kind)})"
            return [block.let(text, self.kind, self.tile.kept, self.name)]
        names = [block.names.fresh(self.name), block.names.fresh("at")]
        block.line(f"{names[0]}, {names[1]} = {text}")
        return [Expr(n, k, self.tile.kept) for n, k in zip(names, self.kinds)]

    # -- results ---------------------------------------------------------------------------

    def finish(self, block: Block) -> Expr:
        """The reduction's result, one for each row, in its compute type."""
        text = self._total()
        target = dtypes.compute(self.op.result.dtype)
        if self.has_places:
            names = [block.names.fresh(self.name), block.names.fresh("at")]
            block.line(f"{names[0]}, {names[1]} = {text}")
            return dtypes.cast(Expr(names[1], "int64", self.tile.kept), target)
        if target == "bool":
            text = f"{text} != 0"
        elif self.kind in ("int8", "int16", "uint8"):
            text = f"{text}.to({element_type(self.kind)})"
        return block.let(text, target, self.tile.kept, self.name)

    def _total(self) -> str:
        arguments = self.tile.arguments
        totals = ", ".join(str(t) for t in self.totals)
        whole_numbers = not self.kind.startswith("float")
        match self.name:
            case "sum":
                return f"tl.sum({totals}, {arguments})"
            case "amax" | "any" if whole_numbers:
                return f"tl.max({totals}, {arguments})"
            case "amin" | "all" if whole_numbers:
                return f"tl.min({totals}, {arguments})"
        helper = self._helper(
            {"amax": "_largest", "amin": "_smallest", "prod": "_product",
             "argmax": "_first_largest", "argmin": "_first_smallest"}
        )  # fmt: skip
        value = f"({totals})" if self.has_places else totals
        return f"tl.reduce({value}, {self.tile.axis}, {helper}, keep_dims={self.tile.keep})"

    def _helper(self, names: dict[str, str]) -> str:
        self.helpers.add(names[self.name])
        return names[self.name]


def solid_place(place: Expr) -> Expr:
    """A position that is a literal or a scalar, as int64."""
    if place.text.lstrip("-").isdigit():
        return Expr(f"tl.full([], {place}, tl.int64)", "int64")
    return Expr(f"({place}).to(tl.int64)", "int64", place.dims)


def _plain(value: Expr) -> str:
    """A constant as tl.full's argument."""
    found = value.number
    assert found is not None
    if isinstance(found, float) and math.isinf(found):
        return 'float("inf")' if found > 0 else 'float("-inf")'
    return repr(found)
