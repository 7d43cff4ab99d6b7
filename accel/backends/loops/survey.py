"""Analysis of what a value's elements need, before any code is written.

A `Survey` walks as the emitter will and takes notes: where memory is read, which reductions are
met and with which index, which loop variables occur outside of addresses, and how much arithmetic
there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from accel.backends.loops.index import Affine, Axis, Indexer
from accel.backends.loops.trace import COSTLY, Index, Key, Tracer
from accel.ir.module import Op, Value
from accel.ir.types import SUB_BYTE_BITS, Dim

_COSTLY_OP = 8  # an exponential, compared with an addition


class Survey(Tracer):
    """Notes of one pass over elements.

    Attributes:
        reads: flat positions of all loads from arguments and materialized values.
        reductions: reductions met (not entered), in order.
        fixed: axes that are used as numbers, not only in addresses: their loops stay apart.
        numbers: those of them that are used as numbers, not only compared with bounds.
        bounds: what is compared with 0. Axes that all addresses and all bounds have in the same
            proportion may be one range nevertheless.
        users: for every element met, the elements computed from it.
        work: arithmetic per element: 1 an operation, more for an elementary function.
    """

    def __init__(self, indexer: Indexer, materialized: Mapping[Value, Any]) -> None:
        super().__init__(indexer)
        self.materialized = materialized
        self.reads: list[Affine] = []
        self.reductions: dict[Key, Op] = {}
        self.fixed: set[Axis] = set()
        self.numbers: set[Axis] = set()
        self.bounds: list[Affine] = []
        self.users: dict[Key, set[Key]] = {}
        self.costly: dict[Key, bool] = {}
        self.work = 0
        self._stack: list[Key] = []

    def known_element(self, value: Value, index: Index) -> bool:
        """Whether the element takes an elementary function to compute."""
        key = (value, index)
        users = self.users.setdefault(key, set())
        if self._stack:
            users.add(self._stack[-1])
        if key not in self.costly:
            self._stack.append(key)
            known = value in self.materialized
            self.costly[key] = self.load(value, index) if known else self.compute(value, index)
            self._stack.pop()
        return self.costly[key]

    def load(self, value: Value, index: Index) -> bool:
        if value.dtype in SUB_BYTE_BITS and value.op is None:
            address, inside = packed_address(self.indexer, value, index)
            self._fix(inside)
            self.reads.append(address)
        else:
            self.reads.append(self.indexer.flatten(index, value.shape))
        return False

    def arithmetic(self, op: Op, args: list[bool]) -> bool:
        costly = op.name in COSTLY
        self.work += _COSTLY_OP if costly else 1
        return costly or any(args)

    def number(self, op: Op) -> bool:
        return False

    def position(self, value: Affine, dtype: torch.dtype) -> bool:
        self._fix(value)
        return False

    def _fix(self, value: Affine) -> None:
        self.fixed |= value.axes
        self.numbers |= value.axes

    def condition(self, nonnegative: Sequence[Affine]) -> bool:
        for c in nonnegative:
            self.fixed |= c.axes
            self.bounds.append(c)
        return False

    def choose(
        self,
        nonnegative: Sequence[Affine],
        yes: Callable[[], Any],
        no: Callable[[], Any],
        dtype: torch.dtype,
    ) -> bool:
        self.condition(nonnegative)
        first, second = yes(), no()
        return bool(first or second)

    def lookup(
        self, value: Value, index: Index, low: Dim, high: Dim, *, wrap: Dim, clamp: bool
    ) -> Affine:
        self.element(value, index)
        axes = frozenset(axis for i in index for axis in i.axes)
        return self.indexer.datum(None, axes)

    def reduction(self, op: Op, index: Index) -> bool:
        self.reductions.setdefault((op.result, index), op)
        return False


def packed_address(indexer: Indexer, value: Value, index: Index) -> tuple[Affine, Affine]:
    """The byte of a packed sub-byte tensor that holds an element, and which of the byte's."""
    per_byte = 8 // SUB_BYTE_BITS[value.dtype]
    if not index:
        return Affine(), Affine()
    byte, inside = indexer.divide(index[-1], per_byte)
    last = value.shape[-1]
    row_bytes = (last + (per_byte - 1)) // per_byte
    return indexer.flatten((*index[:-1], byte), (*value.shape[:-1], row_bytes)), inside


def index_axes(index: Index) -> frozenset[Axis]:
    return frozenset(axis for i in index for axis in i.axes)


def shared_costly(passes: Sequence[Survey]) -> list[Key]:
    """Elements that several passes over the same loops compute at some cost: worth keeping.

    Of a chain only the last is kept: what is computed from a kept element needs nothing before it.
    """
    seen: dict[Key, int] = {}
    for survey in passes:
        for key, costly in survey.costly.items():
            if costly and key[0].op is not None:
                seen[key] = seen.get(key, 0) + 1
    common = {key for key, count in seen.items() if count > 1}
    return [
        key
        for key in common
        if not any(
            user in common and seen[user] >= seen[key]
            for survey in passes
            for user in survey.users.get(key, ())
        )
    ]
