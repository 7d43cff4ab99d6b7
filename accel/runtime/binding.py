"""The sizes of one call: every value's shape, and where each buffer lies in the arena.

A function with dynamic sizes meets many sets of sizes. Shapes are evaluated for each; memory
layouts are shared: after a few different sets, sizes are rounded up (by at most an eighth) before
memory is planned, so that a text growing token by token does not plan anew for each token.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from accel.errors import ArtifactError
from accel.runtime.analysis import Analysis
from accel.runtime.plan import LARGEST_SIZE, FunctionPlan, SizeExpr, dtype_of, evaluate_size
from accel.runtime.planner import Interval, plan_memory
from accel.runtime.subbyte import is_sub_byte, stored_shape

_EXACT_LAYOUTS = 4  # this many sets of sizes get a layout of their own before rounding starts
_MAX_LAYOUTS = 64


@dataclass(frozen=True)
class Placement:
    """Where the arena's buffers lie: value -> offset and room in bytes.

    `taken_over` maps a buffer that is not in the arena to the owned value whose memory it takes.
    """

    offsets: Mapping[int, int]
    room: Mapping[int, int]
    taken_over: Mapping[int, int]
    total: int
    lower_bound: int


@dataclass(frozen=True)
class Binding:
    """A function's sizes in one call. `shapes` are as stored: packed for sub-byte weights."""

    symbols: Mapping[str, int]
    shapes: list[tuple[int, ...]]
    placement: Placement


class Sizes:
    """Evaluates shapes and plans memory for one function. Used under the function's lock."""

    def __init__(self, plan: FunctionPlan, analysis: Analysis) -> None:
        self.plan, self.analysis = plan, analysis
        self._dtypes = [dtype_of(v.dtype) for v in plan.values]
        unique: dict[str, int] = {}
        self._shape_of = [unique.setdefault(json.dumps(v.shape), len(unique)) for v in plan.values]
        self._shapes: list[list[SizeExpr]] = [json.loads(text) for text in unique]
        self._layouts: OrderedDict[tuple[int, ...], Placement] = OrderedDict()
        self._seen: set[tuple[int, ...]] = set()
        self._taken_over = self._find_taken_over()

    def bind(self, symbols: Mapping[str, int]) -> Binding:
        """Shapes and placement for these sizes. Raises ArtifactError for a negative size."""
        shapes = self._evaluate(symbols)
        return Binding(symbols, self._stored(shapes), self._placement(symbols, shapes))

    def _evaluate(self, symbols: Mapping[str, int]) -> list[tuple[int, ...]]:
        unique = [tuple(evaluate_size(e, symbols) for e in shape) for shape in self._shapes]
        for shape in unique:
            if min(shape, default=0) < 0 or math.prod(shape) > LARGEST_SIZE // 16:
                raise ArtifactError(
                    f"a value of shape {shape}", where=f"function '{self.plan.name}'"
                )
        return [unique[i] for i in self._shape_of]

    def _stored(self, shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [stored_shape(s, d) if is_sub_byte(d) else s for s, d in zip(shapes, self._dtypes)]

    def _bytes(self, shapes: list[tuple[int, ...]]) -> dict[int, int]:
        a = self.analysis
        values = [*a.arena, *a.fresh, *(r for roots in a.in_place.values() for r in roots)]
        return {v: math.prod(shapes[v]) * self._dtypes[v].itemsize for v in values}

    def _placement(self, symbols: Mapping[str, int], shapes: list[tuple[int, ...]]) -> Placement:
        sizes = self._bytes(shapes)
        exact = tuple(symbols.values())
        rounded = {name: self._round(name, v) for name, v in symbols.items()}
        for key in (exact, tuple(rounded.values())):
            found = self._layouts.get(key)
            if found is not None and all(sizes[v] <= room for v, room in found.room.items()):
                self._layouts.move_to_end(key)
                return found
        self._seen.add(exact)
        if len(self._seen) <= _EXACT_LAYOUTS:
            return self._plan(exact, sizes)
        larger = self._bytes(self._evaluate(rounded))
        if any(sizes[v] > larger[v] for v in sizes):  # a size that shrinks as a symbol grows
            return self._plan(exact, sizes)
        return self._plan(tuple(rounded.values()), larger)

    def _round(self, name: str, value: int) -> int:
        step = max(8, 1 << max(value.bit_length() - 4, 0))
        high = self.plan.symbols[name][1] if name in self.plan.symbols else None
        up = (value + step - 1) // step * step
        return up if high is None else max(min(up, high), value)

    def _plan(self, key: tuple[int, ...], sizes: Mapping[int, int]) -> Placement:
        blocks = self._blocks(sizes)
        a = self.analysis
        intervals = [
            Interval(sizes[values[0]], a.first[values[0]], a.last[values[-1]]) for values in blocks
        ]
        layout = plan_memory(intervals)
        offsets = {v: o for values, o in zip(blocks, layout.offsets) for v in values}
        placement = Placement(
            offsets,
            {v: sizes[v] for v in offsets},
            self._taken_over,
            layout.total,
            layout.lower_bound,
        )
        self._layouts[key] = placement
        if len(self._layouts) > _MAX_LAYOUTS:
            self._layouts.popitem(last=False)
        return placement

    def _find_taken_over(self) -> dict[int, int]:
        """Kernel results written over an operand that a library or ATen step allocated.

        Only where the shapes are the same expressions, so that it holds for all sizes.
        """
        found: dict[int, int] = {}
        for value, roots in self.analysis.in_place.items():
            for root in roots:
                same = (
                    self.plan.values[root].kind == "owned"
                    and self._dtypes[root].itemsize == self._dtypes[value].itemsize
                    and self._shape_of[root] == self._shape_of[value]
                )
                if same and value not in self.analysis.donated and root not in found.values():
                    found[value] = root
                    break
        return found

    def _blocks(self, sizes: Mapping[int, int]) -> list[list[int]]:
        """Arena buffers in chains, each written over the one before it."""
        block_of: dict[int, list[int]] = {}
        blocks: list[list[int]] = []
        for value in self.analysis.arena:  # in order of definition
            if value in self._taken_over:
                continue
            for root in self.analysis.in_place.get(value, ()):
                block = block_of.get(root)
                if block is not None and block[-1] == root and sizes[root] == sizes[value]:
                    block.append(value)
                    block_of[value] = block
                    break
            else:
                block_of[value] = [value]
                blocks.append(block_of[value])
        return blocks
