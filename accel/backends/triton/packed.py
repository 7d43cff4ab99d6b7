"""Sums over weights of bytes or nibbles, decoded at two instructions an element.

A word of the weight holds 4 bytes or 8 nibbles. Masked, a code v at bit b is the integer v 2^b;
read as a float's bits (below 2^24, where these are subnormal or as evenly spaced) it is
v 2^(b - 149).
So one AND makes a float of a code, and one multiplication and addition by x 2^(64 - b) sums it up;
codes above bit 23 are shifted down together first. What the powers of two make of |x| > 2^63 is
infinite, and of |x| < 2^-40 beside nothing larger, inexact.

Signed codes have their sign flipped (offset binary). Zero points, that offset and scales are
applied to sums, once for four words or, where a scale holds for a whole row, at the end (so that
an infinite x, of which both sums are infinite, makes the result NaN):

    sum (q - z) s x = s (sum u x - (z + offset) sum x),   q = u - offset
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from accel.backends.loops.index import Affine
from accel.backends.loops.phases import Reduce
from accel.backends.triton import dtypes
from accel.backends.triton.emitter import Emitter
from accel.backends.triton.text import COL, ROW, Block, Expr
from accel.ir.module import Value
from accel.ir.types import SUB_BYTE_BITS

_LEAST_EXPONENT = 149  # 2^-149 is the smallest float
_RAISED = 64  # what x is multiplied by, as a power of two
_VECTOR = 4  # words that a thread loads at once
_TOP = 24  # codes below this bit are floats


@dataclass(frozen=True)
class Packed:
    """A weight [N, K]: codes, a scale and a zero for each row and `group` elements of K."""

    codes: Value
    scale: Value
    zero: Value | None
    group: int

    @property
    def bits(self) -> int:
        return SUB_BYTE_BITS.get(self.codes.dtype, 8)

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def offset(self) -> int:
        """What the stored code is above the value, once its sign is flipped."""
        return 1 << (self.bits - 1) if dtypes.is_signed(self.codes.dtype) else 0


def packed(weight: Value) -> Packed | None:
    """The weight as codes in words, if its sums can be written that way."""
    op = weight.op
    if op is None or op.name != "dequantize" or weight.type.rank != 2:
        return None
    codes, scale, zero = op.arguments()
    bits = SUB_BYTE_BITS.get(codes.dtype, 8 * codes.dtype.itemsize)
    if any(v is not None and v.op is not None for v in (codes, scale, zero)):
        return None
    if codes.dtype.is_floating_point or bits not in (4, 8) or weight.dtype == torch.float64:
        return None
    axis, rows, depth = op.attribute("axis"), *weight.shape
    if axis not in (1, -1) or not isinstance(depth, int) or not isinstance(rows, int):
        return None
    group = int(op.attribute("group")) or depth
    span = _VECTOR * 32 // bits
    if rows < 2 or depth % span or group % span:
        return None
    if any(v is not None and v.dtype in SUB_BYTE_BITS for v in (scale, zero)):
        return None
    return Packed(codes, scale, zero, group)


class PackedSums:
    """Writes the sums of one pass over K: `reduces` with what their operand is a product of.

    Args:
        lefts: for each sum, x's factor.
        rows: the tile's rows, as text; columns: the name of the block size of K.
    """

    def __init__(
        self,
        emitter: Emitter,
        reduces: Sequence[Reduce],
        lefts: Sequence[Value],
        weights: Sequence[Packed],
        columns: str,
    ) -> None:
        self.emitter, self.columns = emitter, columns
        self.sums = list(zip(reduces, lefts, weights, strict=True))
        self.names = emitter.block.names
        self.totals: list[str] = []
        self.bare: dict[tuple[Value, Affine], str] = {}  # sums of x alone, over whole rows

    def start(self, block: Block) -> None:
        """Sums of nothing."""
        for reduce, left, weight in self.sums:
            whole = self._whole(weight)
            count = self._count(weight.per_word if whole else _VECTOR * weight.per_word)
            self.totals.append(self.names.fresh("part"))
            block.line(f"{self.totals[-1]} = tl.zeros([ROWS, {count}], tl.float32)")
            key = (left, reduce.source[0])
            if whole and self._has_bare(weight) and key not in self.bare:
                self.bare[key] = self.names.fresh("bare")
                block.line(f"{self.bare[key]} = tl.zeros([1, {count}], tl.float32)")

    def _whole(self, weight: Packed) -> bool:
        return weight.group == int(weight.codes.shape[1])

    def _has_bare(self, weight: Packed) -> bool:
        return weight.zero is not None or weight.offset != 0

    def _count(self, elements: int) -> str:
        return f"{self.columns} // {elements}"

    def step(self, base: str, mask: str, block: Block) -> None:
        """One block of K, from element `base`; `mask` is on where x has elements."""
        words: dict[tuple[Value, Affine], str] = {}
        planes: dict[tuple[Value, Affine, int], list[str]] = {}
        added: set[tuple[Value, Affine]] = set()
        for total, (reduce, left, weight) in zip(self.totals, self.sums, strict=True):
            line_of = (weight.codes, reduce.index[-1])
            if line_of not in words:
                words[line_of] = self._words(weight, reduce.index[-1], base, block)
            key = (left, reduce.source[0])
            if (*key, weight.bits) not in planes:
                x = self._x(reduce, left, mask, block)
                planes[(*key, weight.bits)] = self._planes(x, weight, block)
            plain = planes[(*key, weight.bits)]
            if not self._whole(weight):
                made = self.names.fresh("sums")
                self._products(made, "", words[line_of], plain[1:], weight, block)
                self._grouped(total, made, plain[0], reduce.index[-1], weight, base, block)
                continue
            self._products(total, total, words[line_of], plain[1:], weight, block)
            if key in self.bare and key not in added:
                added.add(key)
                block.line(f"{self.bare[key]} = {self.bare[key]} + {plain[0]}")

    def _words(self, weight: Packed, row: Affine, base: str, block: Block) -> str:
        """The words of the tile, in offset binary."""
        emitter, per = self.emitter, weight.per_word
        count, depth = weight.codes.shape
        emitter.used.setdefault(weight.codes)
        place = self._place(row, int(count), int(depth) // per)
        unit, name = self.names.fresh("unit"), self.names.fresh("word")
        block.line(f"{unit} = {_over(base, per)}tl.arange(0, {self._count(per)})[None, :]")
        checks = self._checks(row, f"{unit} < {int(depth) // per}", base)
        pointer = emitter.pointers[weight.codes]
        tail = f", mask={checks}, other=0" if checks else ""
        block.line(f'{name} = tl.load({pointer} + {place}{unit}{tail}, '
                   'eviction_policy="evict_first")')  # fmt: skip
        if not weight.offset:
            return name
        flips = sum(weight.offset << at for at in range(0, 32, weight.bits))
        flipped = self.names.fresh("word")
        block.line(f"{flipped} = {name} ^ {flips - (1 << 32)}")
        return flipped

    def _place(self, row: Affine, count: int, width: int) -> str:
        flat = self.emitter.indexer.flatten((row, Affine()), (count, width))
        text = self.emitter.addresses.code(flat).text
        return "" if text == "0" else f"{text} + "

    def _checks(self, row: Affine, inside: str, base: str) -> str:
        """The mask of loads: rows of the weight that exist, and the block's part of K."""
        found = [m for m in (self.emitter.mask(row.axes),) if m]
        if self.overruns:
            found.append(f"({inside})")
        return " & ".join(found)

    overruns = False  # blocks are no divisor of K

    def _x(self, reduce: Reduce, left: Value, mask: str, block: Block) -> str:
        """One row of x as a tile [1, columns], zero beyond K."""
        index = (reduce.source[0], Affine(), reduce.source[2])
        value = self.emitter.element(left, index)
        text = f"tl.where({mask}, {value}, 0.0)" if mask else str(value)
        text = f"tl.broadcast_to({text}, [1, {self.columns}])"
        name = self.names.fresh("row_of_x")
        block.line(f"{name} = {text}")
        return name

    def _planes(self, x: str, weight: Packed, block: Block) -> list[str]:
        """The sum of x's elements of each word, then x at every place of a word, scaled."""
        per = weight.per_word
        levels = per.bit_length() - 1
        shape = ", ".join(["2"] * levels)
        root = self.names.fresh("x")
        block.line(f"{root} = tl.reshape({x}, [{self._count(per)}, {shape}])")
        parts: dict[tuple[int, ...], str] = {(): root}
        for _ in range(levels):  # the last dimension is the lowest bit of the place
            grown: dict[tuple[int, ...], str] = {}
            for bits, name in parts.items():
                low, high = self.names.fresh("x"), self.names.fresh("x")
                block.line(f"{low}, {high} = tl.split({name})")
                grown |= {(*bits, 0): low, (*bits, 1): high}
            parts = grown
        by_place = {sum(bit << i for i, bit in enumerate(key)): n for key, n in parts.items()}
        bare = self.names.fresh("sum_of_x")
        block.line(f"{bare} = ({' + '.join(by_place[i] for i in range(per))})[None, :]")
        scaled = []
        for place in range(per):
            bit = place * weight.bits
            bit -= 0 if bit + weight.bits <= _TOP else _TOP
            name = self.names.fresh("x")
            block.line(f"{name} = ({by_place[place]} * {2.0 ** (_RAISED - bit)!r})[None, :]")
            scaled.append(name)
        return [bare, *scaled]

    def _products(
        self, name: str, first: str, word: str, planes: Sequence[str], weight: Packed, block: Block
    ) -> None:
        """`name`: codes times x, added up in each word (and to `first`), raised as they are."""
        bits, high = weight.bits, self.names.fresh("high")
        block.line(f"{high} = {word}.to(tl.uint32, bitcast=True) >> {_TOP}")
        text = first
        for place, x in enumerate(planes):
            at = place * bits
            source, low = (word, at) if at + bits <= _TOP else (high, at - _TOP)
            alone = source == high and bits == 32 - _TOP
            code = source if alone else f"({source} & {((1 << bits) - 1) << low})"
            term = f"{code}.to(tl.float32, bitcast=True) * {x}"
            text = f"{text} + {term}" if text else term
        block.line(f"{name} = {text}")

    def _grouped(
        self,
        total: str,
        made: str,
        bare: str,
        row: Affine,
        weight: Packed,
        base: str,
        block: Block,
    ) -> None:
        """Adds a block's sums: every four words have one scale and one zero."""
        span = _VECTOR * weight.per_word
        shape = f"[ROWS, {self._count(span)}, {_VECTOR}]"
        four, place = self.names.fresh("four"), self.names.fresh("place")
        block.line(f"{four} = tl.sum(tl.reshape({made}, {shape}), axis=2) * {_lowered()!r}")
        steps = f"tl.arange(0, {self._count(span)})[None, :]"
        block.line(f"{place} = ({_plain(base)}{steps} * {span}) // {weight.group}")
        inside = f"{place} < {int(weight.codes.shape[1]) // weight.group}"
        scale = self._parameter(weight, weight.scale, row, place, inside, block)
        minus = self._zero(weight, row, place, inside, block)
        if minus:
            flat = f"tl.reshape({bare}, [1, {self._count(span)}, {_VECTOR}])"
            block.line(f"{four} = {four} - {minus} * tl.sum({flat}, axis=2)")
        block.line(f"{total} = {total} + {four} * {scale}")

    def _zero(self, weight: Packed, row: Affine, place: str, inside: str, block: Block) -> str:
        """The zero point and the offset of signed codes; "" if both are 0."""
        if weight.zero is None:
            return f"{float(weight.offset)!r}" if weight.offset else ""
        zero = self._parameter(weight, weight.zero, row, place, inside, block)
        return f"({zero} + {float(weight.offset)!r})" if weight.offset else zero

    def _parameter(
        self, weight: Packed, value: Value, row: Affine, place: str, inside: str, block: Block
    ) -> str:
        emitter = self.emitter
        emitter.used.setdefault(value)
        count, groups = (int(d) for d in value.shape)
        address = self._place(row, count, groups)
        checks = self._checks(row, inside, place)
        tail = f", mask={checks}, other=0" if checks else ""
        raw, name = self.names.fresh("raw"), self.names.fresh("parameter")
        block.line(f"{raw} = tl.load({emitter.pointers[value]} + {address}{place}{tail})")
        loaded = Expr(raw, "", frozenset((ROW, COL)))
        made = dtypes.from_storage(loaded, value.dtype, block)
        block.line(f"{name} = {dtypes.cast(made, 'float32')}")
        return name

    def finish(self, block: Block) -> list[Expr]:
        """One sum for each row of the tile, in the order of the reductions."""
        made = []
        for total, (reduce, left, weight) in zip(self.totals, self.sums, strict=True):
            text = f"tl.sum({total}, axis=1, keep_dims=True)"
            name = self.names.fresh("sum")
            block.line(f"{name} = {text}")
            if self._whole(weight):
                block.line(f"{name} = {name} * {_lowered()!r}")
                row = reduce.index[-1]
                overran, self.overruns = self.overruns, False
                zeros = "tl.zeros([1, 1], tl.int32)"
                place = self.names.fresh("place")
                block.line(f"{place} = {zeros}")
                scale = self._parameter(weight, weight.scale, row, place, "", block)
                minus = self._zero(weight, row, place, "", block)
                self.overruns = overran
                if minus:
                    bare = self.bare[left, reduce.source[0]]
                    block.line(
                        f"{name} = {name} - {minus} * tl.sum({bare}, axis=1, keep_dims=True)"
                    )
                block.line(f"{name} = {name} * {scale}")
            made.append(Expr(name, "float32", frozenset((ROW,))))
        return made


def _lowered() -> float:
    return 2.0 ** (_LEAST_EXPONENT - _RAISED)


def _over(base: str, by: int) -> str:
    return "" if base in ("", "0") else f"{base} // {by} + "


def _plain(base: str) -> str:
    return "" if base in ("", "0") else f"{base} + "
