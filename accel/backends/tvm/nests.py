"""What the loop nests of a phase have in common: its passes, merging of loops, stores.

Three shapes of phase:
    flat   no reductions: all axes that merge are one loop, cut into ranges for the cores (`flat`)
    row    reductions along the contiguous axis: partial results in lanes, one row at a time
    lanes  reductions across it (a sum over rows, say): 64 rows at a time, side by side (`rows`)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from accel.backends.loops.index import Affine, Axis
from accel.backends.loops.merge import merged
from accel.backends.loops.phases import Phase, Reduce, Store
from accel.backends.loops.survey import Survey
from accel.backends.tvm import dtypes, tir
from accel.backends.tvm.code import Emitter
from accel.backends.tvm.tir import Buffer, Expr
from accel.ir.types import Dim, product


@dataclass
class Pass:
    """Stores or reductions that share their innermost loops, and the notes on them."""

    axes: tuple[Axis, ...]
    survey: Survey
    stores: list[Store]
    reduces: list[Reduce]

    @property
    def per_element(self) -> int:
        return 1 + self.survey.work + len(self.survey.reads)

    @property
    def cost(self) -> Dim:
        return product((self.per_element, *(a.extent for a in self.axes)))


class Nest(ABC):
    """Emits one phase.

    `rows` is the number of iterations of the parallel loop and `cost` the work in one of them, in
    element operations; both are known after `emit`.
    """

    def __init__(self, phase: Phase, emitter: Emitter, targets: dict[int, Buffer]) -> None:
        self.phase = phase
        self.emitter = emitter
        self.sizes = emitter.sizes
        self.targets = targets  # by position in phase.stores
        self.stores = self._store_passes()
        self.rows: Dim = 1
        self.cost: Dim = 0

    def emit(self, begin: Expr, end: Expr) -> tir.Block:
        """The code for rows begin <= row < end."""
        self._emit(begin, end)
        return self.emitter.scopes[0].block

    @abstractmethod
    def _emit(self, begin: Expr, end: Expr) -> None: ...

    def _survey(self) -> Survey:
        return Survey(self.emitter.indexer, dict.fromkeys(self.phase.needs))

    def _store_passes(self) -> list[Pass]:
        found: dict[tuple[Axis, ...], Pass] = {}
        for store in self.phase.stores:
            if store.inner not in found:
                found[store.inner] = Pass(store.inner, self._survey(), [], [])
            one = found[store.inner]
            one.stores.append(store)
            one.survey.element(store.value, store.index)
            one.survey.reads.append(self._address(store))
        return list(found.values())

    def _address(self, store: Store) -> Affine:
        return self.emitter.indexer.flatten(store.index, store.value.shape)

    def _merge(self, axes: Sequence[Axis], passes: Sequence[Pass]) -> list[tuple[Axis, ...]]:
        reads = [r for p in passes for r in p.survey.reads]
        fixed: set[Axis] = set().union(*(p.survey.fixed for p in passes))
        return merged(axes, reads, fixed)

    def _store(self, one: Pass) -> None:
        for store in one.stores:
            target = self.targets[self.phase.stores.index(store)]
            value = self.emitter.element(store.value, store.index)
            address = self.emitter.addresses.code(self._address(store))
            block = self.emitter.block
            block.store(target, _stored(value, target, store, block), address)

    def _bind_rows(self, groups: Sequence[tuple[Axis, ...]], row: Expr) -> None:
        """Recovers each row loop's variable from the number of the row."""
        block = self.emitter.block
        for group in reversed(groups[1:]):
            extent = self.sizes.code(group_extent(group) or 1)  # no row runs where one is empty
            variable = block.let(tir.tirx.truncmod(row, extent), group[0].name)
            row = block.let(tir.tirx.truncdiv(row, extent), "row")
            self.emitter.addresses.bind(group, variable)
        if groups:
            self.emitter.addresses.bind(groups[0], row)

    def _cut(self, part: Expr, extent: Dim, width: int) -> tuple[Expr, Expr]:
        """Where part `part` of a loop begins, and how many of its `width` steps there are."""
        block = self.emitter.block
        base = block.let(part * tir.i64(width), "base")
        if isinstance(extent, int) and extent % width == 0:
            return base, tir.i64(width)
        left = self.sizes.code(extent) - base
        return base, block.let(tir.tirx.min(tir.i64(width), left), "steps")


def group_extent(group: Sequence[Axis]) -> Dim:
    return product(a.extent for a in group)


def parts_of(extent: Dim, width: int) -> Dim:
    """How many pieces of `width` cover a loop."""
    if isinstance(extent, int):
        return -(-extent // width)
    return (extent + (width - 1)) // width


def kept_kind(dtype: torch.dtype) -> str | None:
    """What elements are kept as in local arrays; None if they are not."""
    kind = dtypes.compute(dtype)
    return None if kind == "bool" else kind


def _stored(value: Expr, target: Buffer, store: Store, block: tir.Block) -> Expr:
    if store.place.kind == "scratch":
        return tir.cast(value, tir.element_type(target))
    return dtypes.to_storage(value, store.value.dtype, block)
