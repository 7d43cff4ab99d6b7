"""The normal form of chains of reshapes and permutes.

A chain moves elements without changing them. `ViewMap` factors the source into atoms: runs of the
source in C order that stay together. Reshapes split, merge and regroup atoms, permutes reorder
them. What is left at the end is at most reshape -> permute -> reshape, and often less:

    view = ViewMap(x.shape)           # [2, 6, 4]
    view.reshape((2, 6, 2, 2)); view.permute((0, 2, 1, 3)); ...
    steps = view.steps()              # [("permute", axes), ("reshape", shape)]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import sympy

from accel.ir.types import Dim, Shape, product, same_dim, same_shape, simplify_dim

Step: TypeAlias = tuple[str, tuple[Any, ...]]


class ViewMap:
    """What a chain of reshapes and permutes does to a tensor of shape `source`.

    `reshape` and `permute` return False (and change nothing) where a size does not factor.
    """

    def __init__(self, source: Shape) -> None:
        self.source = source
        # Atoms are numbered; `sizes[i]` is a size, `layout` the atoms in the source's order.
        self.sizes: list[Dim] = []
        self.layout: list[int] = []
        self.groups: list[list[int]] = []  # atoms of each axis of the current shape
        for dim in source:
            self.groups.append([] if _is_one(dim) else [self._atom(dim)])
        self.layout = [a for group in self.groups for a in group]
        self.shape: Shape = source

    def _atom(self, size: Dim) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def permute(self, axes: Sequence[int]) -> bool:
        self.groups = [self.groups[a] for a in axes]
        self.shape = tuple(self.shape[a] for a in axes)
        return True

    def reshape(self, shape: Shape) -> bool:
        saved = (list(self.sizes), list(self.layout))
        order = [a for group in self.groups for a in group]
        groups = self._regroup(order, shape)
        if groups is None:
            self.sizes, self.layout = saved
            return False
        self.groups, self.shape = groups, shape
        return True

    def _regroup(self, order: list[int], shape: Shape) -> list[list[int]] | None:
        groups: list[list[int]] = []
        for dim in shape:
            group: list[int] = []
            left = dim
            while not _is_one(left):
                if not order:
                    return None
                atom = order[0]
                rest = divide(left, self.sizes[atom])
                if rest is not None:
                    group.append(order.pop(0))
                    left = rest
                    continue
                inner = divide(self.sizes[atom], left)
                if inner is not None:
                    order[:1] = self._split(atom, left, inner)
                elif not self._merge(order):
                    return None
            groups.append(group)
        return groups if not order else None

    def _split(self, atom: int, outer: Dim, inner: Dim) -> list[int]:
        pair = [self._atom(outer), self._atom(inner)]
        at = self.layout.index(atom)
        self.layout[at : at + 1] = pair
        return pair

    def _merge(self, order: list[int]) -> bool:
        """Joins the first two atoms of `order` if they are neighbours in the source."""
        if len(order) < 2:
            return False
        first, second = order[:2]
        at = self.layout.index(first)
        if at + 1 >= len(self.layout) or self.layout[at + 1] != second:
            return False
        joined = self._atom(simplify_dim(self.sizes[first] * self.sizes[second]))
        self.layout[at : at + 2] = [joined]
        order[:2] = [joined]
        return True

    def steps(self) -> list[Step]:
        """The fewest ops that do the same: reshapes and permutes, in order; [] for the identity."""
        order = [a for group in self.groups for a in group]
        if order == self.layout:
            same = same_shape(self.source, self.shape)
            return [] if same else [("reshape", self.shape)]
        options = [self._permute_first(order), self._permute_last(order), self._general(order)]
        return min((o for o in options if o is not None), key=len)

    def _general(self, order: list[int]) -> list[Step]:
        runs = _runs(self.layout, order)
        sizes = tuple(product(self.sizes[a] for a in run) for run in runs)
        wanted = _order_of(runs, order)
        permuted = tuple(sizes[i] for i in wanted)
        steps: list[Step] = []
        if not same_shape(self.source, sizes):
            steps.append(("reshape", sizes))
        steps.append(("permute", wanted))
        if not same_shape(permuted, self.shape):
            steps.append(("reshape", self.shape))
        return steps

    def _permute_first(self, order: list[int]) -> list[Step] | None:
        """permute [-> reshape], if no axis of the source is split."""
        runs: list[list[int]] = []
        at = 0
        for dim in self.source:
            run: list[int] = []
            left = dim
            while not _is_one(left):
                if at == len(self.layout):
                    return None
                rest = divide(left, self.sizes[self.layout[at]])
                if rest is None:
                    return None
                run.append(self.layout[at])
                left, at = rest, at + 1
            runs.append(run)
        position = {atom: i for i, atom in enumerate(order)}
        for run in runs:
            places = [position[a] for a in run]
            if places != list(range(places[0], places[0] + len(run))) if run else False:
                return None
        return self._place_units(runs, position)

    def _place_units(self, runs: list[list[int]], position: dict[int, int]) -> list[Step]:
        """Axes of size 1 go where they make the permute alone do, else they stay in place."""
        moving = iter(
            sorted((i for i, r in enumerate(runs) if r), key=lambda i: position[runs[i][0]])
        )
        units = iter(i for i, r in enumerate(runs) if not r)
        if len(self.shape) == len(self.source):
            axes = [next(units if _is_one(d) else moving, -1) for d in self.shape]
            if -1 not in axes and len(set(axes)) == len(axes):
                permuted = tuple(self.source[a] for a in axes)
                if same_shape(permuted, self.shape):
                    return [("permute", tuple(axes))]
        by_place = sorted((i for i, r in enumerate(runs) if r), key=lambda i: position[runs[i][0]])
        rest = iter(by_place)
        axes = [i if not r else next(rest) for i, r in enumerate(runs)]
        return [("permute", tuple(axes)), ("reshape", self.shape)]

    def _permute_last(self, order: list[int]) -> list[Step] | None:
        """reshape -> permute, if each axis of the result is a run of the source."""
        place = {atom: i for i, atom in enumerate(self.layout)}
        for group in self.groups:
            places = [place[a] for a in group]
            if group and places != list(range(places[0], places[0] + len(group))):
                return None
        axes = range(len(self.groups))
        full = sorted((i for i in axes if self.groups[i]), key=lambda i: place[self.groups[i][0]])
        rest = iter(full)
        by_source = [next(rest) if self.groups[i] else i for i in axes]
        before = tuple(self.shape[i] for i in by_source)
        inverse = tuple(by_source.index(i) for i in axes)
        if same_shape(before, self.source):
            return [("permute", inverse)]
        return [("reshape", before), ("permute", inverse)]


def _runs(layout: Sequence[int], order: Sequence[int]) -> list[list[int]]:
    """The source's atoms, joined where they are neighbours in the result too."""
    position = {atom: i for i, atom in enumerate(order)}
    runs: list[list[int]] = []
    for atom in layout:
        if runs and position[runs[-1][-1]] + 1 == position[atom]:
            runs[-1].append(atom)
        else:
            runs.append([atom])
    return runs


def _order_of(runs: list[list[int]], order: Sequence[int]) -> tuple[int, ...]:
    position = {atom: i for i, atom in enumerate(order)}
    return tuple(sorted(range(len(runs)), key=lambda i: position[runs[i][0]]))


def _is_one(dim: Dim) -> bool:
    return isinstance(dim, int) and dim == 1


def divide(a: Dim, b: Dim) -> Dim | None:
    """a / b if that is provably a positive integer."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 and a else None
    if isinstance(a, int):
        return None
    return _divide(a, b)


@lru_cache(4096)
def _divide(a: sympy.Expr, b: Dim) -> Dim | None:
    if same_dim(a, b):
        return 1
    quotient = sympy.expand(sympy.cancel(a / b))
    if quotient.is_integer and not quotient.atoms(sympy.floor):
        return simplify_dim(quotient)
    return None
