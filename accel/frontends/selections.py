"""Rows that a mask selects, computed for all rows, while a model is captured.

Mixtures of experts are often written so that each expert sees its own tokens only:

    rows, place = torch.where(chosen == expert)
    out[rows] += weight[rows, place, None] * mlp(x[rows])

How many rows there are depends on data, so no program has a size for them. Here `where` (`nonzero`,
`x[mask]`) gives all rows: reading at them copies, and writing at them writes where the mask is
true. So the expert runs for every row, and results count where it was chosen. Sizes read from a
tensor (`counts.tolist()`) cut a sorted text into segments: each segment is all rows, and joining
the segments chooses each row's own. A Python branch on whether anything was selected is taken.

That is the same program only if rows do not look at each other, and if nothing else happens for an
expert without rows: whoever captures so must compare the result with the model
(`accel.compiler.capture_text` does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import DimDynamic

from accel.errors import CaptureError
from accel.frontends.calls import Call, flat_tensors, results_of
from accel.frontends.shape_env import Label, PlainShapeEnv

_MOST_CONSTANTS = 4096  # elements of a mask of fixed size, whose places are numbers
_SOME = 3  # a count that is neither none nor one nor all
_SELECTS = ("aten::nonzero", "aten::nonzero_numpy", "aten::argwhere")
_TRUTHS = ("aten::any", "aten::gt", "aten::ne", "aten::ge")
_VIEWS = ("aten::squeeze", "aten::flatten", "aten::view", "aten::reshape", "aten::select")
_READS = ("aten::is_nonzero", "aten::item", "aten::_local_scalar_dense")


@dataclass(frozen=True)
class _Places:
    """Where a mask is true: an index of `axis`, or of all axes, side by side (None)."""

    mask: Tensor
    axis: int | None


@dataclass(frozen=True)
class _Segment:
    """Rows of a tensor from one running count to the next."""

    counts: Tensor
    number: int


class Selections:
    """Calls that select rows, each as calls over all rows. `again` records what it is given."""

    def __init__(self, again: Callable[[Callable[[], Any]], Any], calls: list[Call]) -> None:
        self._again, self._calls = again, calls
        self._places: dict[int, _Places] = {}
        self._segments: dict[int, _Segment] = {}
        self._truths: set[int] = set()
        self._counted: dict[Any, tuple[Tensor, int]] = {}  # symbol -> an element of a tensor
        self._elements: dict[int, tuple[Tensor, int]] = {}  # an element of a tensor, as a tensor
        self._kept: list[Any] = []  # so that ids stay theirs

    def call(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result of a call that selects; NotImplemented for any other."""
        name = func._schema.name
        if name in _SELECTS:
            return self._nonzero(args[0], tuples=name == "aten::nonzero_numpy")
        if name == "aten::where" and len(args) == 1:
            return self._nonzero(args[0], tuples=True)
        if name == "aten::index" and self._selects(args[1]) and self._fits(args[0], args[1]):
            return self._again(lambda: self._read(args[0], args[1]))
        if name in ("aten::index_put", "aten::index_put_") and self._selects(args[1]):
            new = self._again(lambda: self._written(*args))
            return self._again(lambda: args[0].copy_(new)) if name.endswith("_") else new
        if name in ("aten::index_add", "aten::index_add_") and id(args[2]) in self._places:
            where = [None] * (args[1] % args[0].dim()) + [args[2]]
            source = args[3] if not kwargs.get("alpha") else args[3] * kwargs["alpha"]
            new = self._again(lambda: self._written(args[0], where, source, True))
            return self._again(lambda: args[0].copy_(new)) if name.endswith("_") else new
        if name in _READS:
            return self._number(func, args[0])
        if name in ("aten::split_with_sizes", "aten::split") and not isinstance(args[1], int):
            return self._split(args[0], args[1], *args[2:], **kwargs)
        if name == "aten::slice":
            return self._slice(*args)
        if name == "aten::bincount":
            return self._counts(*args, **kwargs)
        if name == "aten::cat":
            return self._joined(*args, **kwargs)
        return NotImplemented

    def saw(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Any, result: Any
    ) -> None:
        """Notes what is known of a recorded call's results."""
        name = func._schema.name
        if name in _TRUTHS and isinstance(result, Tensor) and result.dim() == 0:
            self._truths.add(id(result))
            self._kept.append(result)
        source = args[0] if args and isinstance(args[0], Tensor) else None
        known = self._places.get(id(source))
        if known is not None and source is not None:
            self._follow(name, args, source, known, result)
        if name == "aten::unbind" and source is not None and source.dim() == 1:
            self._elements.update({id(t): (source, i) for i, t in enumerate(result)})
            self._kept.append(result)
        elif name == "aten::select" and source is not None and source.dim() == 1:
            self._elements[id(result)] = (source, int(args[2]))
            self._kept.append(result)
        self._pass_on(args, kwargs, result)

    @contextmanager
    def spelled(self) -> Iterator[None]:
        """Numbers that are known have names: `self.experts[f"expert_{i}"]`."""
        before = FakeTensor.__dict__.get("__format__")

        def spell(tensor: FakeTensor, form: str) -> str:
            known = tensor.constant if tensor.dim() == 0 else None
            return object.__format__(tensor, form) if known is None else format(known, form)

        FakeTensor.__format__ = spell  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            if before is None:
                del FakeTensor.__format__
            else:
                FakeTensor.__format__ = before  # type: ignore[method-assign]

    # -- places ------------------------------------------------------------------------------

    def _nonzero(self, mask: Tensor, tuples: bool) -> Any:
        if mask.dim() == 0:
            return NotImplemented
        fixed = all(isinstance(n, int) for n in mask.shape)
        if fixed and math.prod(mask.shape) <= _MOST_CONSTANTS:
            columns = self._constant(mask)
        else:
            columns = self._again(lambda: _all_places(mask))
        self._note(columns, _Places(mask, None if mask.dim() > 1 else 0))
        if not tuples:
            return columns
        made = self._again(lambda: columns.unbind(1))
        for axis, column in enumerate(made):
            self._note(column, _Places(mask, axis))
        return made

    def _constant(self, mask: Tensor) -> Tensor:
        """All places of a mask of fixed size, as numbers that Python may read."""
        assert isinstance(mask, FakeTensor)
        from_real = mask.fake_mode.fake_tensor_converter.from_real_tensor
        with torch._C._DisableTorchDispatch():
            real = torch.ones(tuple(mask.shape), dtype=torch.bool).nonzero()
        made = from_real(mask.fake_mode, real, make_constant=True)
        overload = torch.ops.aten.lift_fresh_copy.default
        self._calls.append(Call(overload, (real,), {}, made, None))
        return made

    def _note(self, tensor: Tensor, places: _Places) -> None:
        self._places[id(tensor)] = places
        self._kept.append(tensor)

    def _follow(
        self, name: str, args: tuple[Any, ...], source: Tensor, known: _Places, result: Any
    ) -> None:
        """Places of places: columns, and views of a column."""
        if name == "aten::unbind" and source.dim() == 2 and len(args) > 1 and args[1] in (1, -1):
            for axis, column in enumerate(result):
                self._note(column, _Places(known.mask, axis))
        elif name == "aten::select" and source.dim() == 2 and args[1] in (1, -1):
            self._note(result, _Places(known.mask, int(args[2])))
        elif name in _VIEWS and known.axis is not None and result.dim() == 1:
            self._note(result, known)  # of one column

    def _selects(self, indices: Sequence[Tensor | None]) -> bool:
        given = [t for t in indices if t is not None]
        masks = [t for t in given if t.dtype in (torch.bool, torch.uint8)]
        if masks:
            return len(given) == 1
        known = [self._places.get(id(t)) for t in given]
        first = known[0] if known else None
        if first is None or not all(k is not None and k.mask is first.mask for k in known):
            return False
        return all(t.dim() == 1 for t in given)

    def _fits(self, x: Tensor, indices: Sequence[Tensor | None]) -> bool:
        """Whether indexed axes are side by side, different ones, and as long as the mask's."""
        mask, axes = self._axes(indices)
        adjacent = sorted(axes) == list(range(min(axes), min(axes) + len(axes)))
        distinct = len(set(axes.values())) == len(axes)
        return (
            adjacent and distinct and all(_same(x.shape[a], mask.shape[m]) for a, m in axes.items())
        )

    def _axes(self, indices: Sequence[Tensor | None]) -> tuple[Tensor, dict[int, int]]:
        """The mask, and which of its axes each indexed axis of a tensor is."""
        first = next(i for i, t in enumerate(indices) if t is not None)
        index = indices[first]
        assert index is not None
        if index.dtype in (torch.bool, torch.uint8):
            return index, {first + i: i for i in range(index.dim())}
        axes = {i: self._places[id(t)].axis or 0 for i, t in enumerate(indices) if t is not None}
        return self._places[id(index)].mask, axes

    def _read(self, x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
        """x at every place of the mask, whether it is true there or not."""
        mask, axes = self._axes(indices)
        return _flat(_spread(x, axes, mask.shape), min(axes), mask.dim())

    def _written(
        self, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
    ) -> Tensor:
        """x with `values`, one a place of the mask, written or added where it is true."""
        if not self._fits(x, indices):
            raise CaptureError("rows that a mask selects are written to rows of something else")
        mask, axes = self._axes(indices)
        first, rank = min(axes), mask.dim()
        rest = x.dim() - len(axes) - first
        shape = (*x.shape[:first], *mask.shape, *x.shape[first + len(axes) :])
        if values.dim() > rest and values.shape[values.dim() - rest - 1] != 1:
            lead = values.shape[: values.dim() - rest - 1]
            values = values.reshape(*lead, *mask.shape, *values.shape[values.dim() - rest :])
        elif values.dim() > rest:
            values = values.reshape(*values.shape[: values.dim() - rest - 1], *[1] * rank,
                                    *values.shape[values.dim() - rest :])  # fmt: skip
        values = values.to(x.dtype).expand(shape)
        here = mask.bool().reshape(*mask.shape, *[1] * rest)
        kept = torch.where(here, values, torch.zeros((), dtype=x.dtype))
        others = [first + a for a in range(rank) if a not in axes.values()]
        order = [axes[a] for a in sorted(axes)]
        reached = here
        if others:
            kept = kept.sum(others)
            reached = here.sum([a - first for a in others]) > 0
        left = sorted(order)
        if order != left:  # axes of the mask in another order than those of x
            places = [left.index(a) for a in order]
            kept = kept.permute(*range(first), *(first + p for p in places),
                                *range(first + len(places), kept.dim()))  # fmt: skip
            reached = reached.permute(*places, *range(len(places), reached.dim()))
        if accumulate:
            return x + kept
        return torch.where(reached, kept, x)

    # -- numbers -----------------------------------------------------------------------------

    def _number(self, func: torch._ops.OpOverload, x: Tensor) -> Any:
        """A tensor's element in Python: something was selected, and some rows are."""
        if isinstance(x, FakeTensor) and x.constant is not None:
            return NotImplemented
        if id(x) in self._truths:
            return True
        if x.dtype != torch.int64 or x.numel() != 1 or not isinstance(x, FakeTensor):
            return NotImplemented
        env = x.fake_mode.shape_env
        assert isinstance(env, PlainShapeEnv)
        source = Label(f"__accel_count_{len(self._counted)}")
        expr = env.create_symbol(_SOME, source, DimDynamic.DYNAMIC, None)
        number = env.create_symintnode(expr, hint=_SOME, source=source)
        assert isinstance(number, torch.SymInt)
        env.counts.add(number.node.expr)
        self._calls.append(Call(func, (x,), {}, number, None))
        self._counted[number.node.expr] = self._elements.get(id(x), (x, 0))
        return number

    def _split(self, x: Tensor, sizes: Sequence[Any], dim: int = 0) -> Any:
        """All rows for each segment."""
        found = [self._count_of(n) for n in sizes]
        counts = found[0][0] if found and found[0] is not None else None
        if counts is None or dim % x.dim() != 0:
            return NotImplemented
        if any(f is None or f[0] is not counts or f[1] != i for i, f in enumerate(found)):
            return NotImplemented
        return tuple(self._segment(x, _Segment(counts, i)) for i in range(len(sizes)))

    def _slice(
        self, x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
    ) -> Any:
        """A slice from one running count to the next."""
        if not self._counted or not isinstance(end, torch.SymInt) or step != 1 or dim % x.dim():
            return NotImplemented
        found = self._count_of(end - (start or 0))
        if found is None:
            return NotImplemented
        before = [s for s, (t, i) in self._counted.items() if t is found[0] and i < found[1]]
        first = start.node.expr if isinstance(start, torch.SymInt) else start or 0
        if first != sum(before) or len(before) != found[1]:
            return NotImplemented
        return self._segment(x, _Segment(*found))

    def _count_of(self, size: Any) -> tuple[Tensor, int] | None:
        return self._counted.get(size.node.expr) if isinstance(size, torch.SymInt) else None

    def _segment(self, x: Tensor, segment: _Segment) -> Tensor:
        made: Tensor = self._again(lambda: torch.ops.aten.alias.default(x))
        self._segments[id(made)] = segment
        self._kept.append(made)
        return made

    def _pass_on(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """What is made of a segment's rows are its rows."""
        if not self._segments:
            return
        call = Call(torch.ops.aten.alias.default, args, kwargs, result, None)
        sources = [t for t in flat_tensors(call) if id(t) in self._segments]
        known = {self._segments[id(t)] for t in sources}
        if len(known) != 1:
            return
        rows = sources[0].shape[0]
        for made in results_of(call):
            if isinstance(made, Tensor) and made.dim() and _same(made.shape[0], rows):
                self._segments[id(made)] = next(iter(known))
                self._kept.append(made)

    def _joined(self, tensors: Sequence[Tensor], dim: int = 0) -> Any:
        """All segments in order: each row is that of its own segment."""
        known = [self._segments.get(id(t)) for t in tensors]
        first = known[0] if known else None
        if first is None or dim != 0 or len(tensors) != first.counts.numel():
            return NotImplemented
        if any(k is None or k.counts is not first.counts or k.number != i
               for i, k in enumerate(known)):  # fmt: skip
            return NotImplemented

        def choose() -> Tensor:
            ends = first.counts.cumsum(0)
            row = torch.arange(tensors[0].shape[0])
            made = tensors[-1]
            for i in reversed(range(len(tensors) - 1)):
                mine = (row < ends[i]).reshape(-1, *[1] * (made.dim() - 1))
                made = torch.where(mine, tensors[i], made)
            return made

        return self._again(choose)

    def _counts(self, x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Any:
        """How often each number below `minlength` is there; the model says there are no others."""
        if weights is not None or minlength < 1:
            return NotImplemented
        return self._again(lambda: (x.reshape(-1, 1) == torch.arange(minlength)).sum(0))


def _same(one: Any, other: Any) -> bool:
    """Whether sizes are equal, without asking for a guard."""
    a, b = (n.node.expr if isinstance(n, torch.SymInt) else n for n in (one, other))
    return bool(a == b)


def _all_places(mask: Tensor) -> Tensor:
    """[elements, axes] int64: the indices of all elements."""
    rest = torch.arange(mask.numel())
    columns = []
    for size in reversed(mask.shape[1:]):
        columns.append(rest % size)
        rest = rest // size
    return torch.stack([rest, *reversed(columns)], 1)


def _spread(x: Tensor, axes: Mapping[int, int], shape: Sequence[Any]) -> Tensor:
    """x, whose `axes` are axes of a mask, with all of the mask's axes in their place, in order."""
    first, count = min(axes), len(axes)
    order = sorted(axes, key=axes.__getitem__)
    x = x.permute(*range(first), *order, *range(first + count, x.dim()))
    for axis in range(len(shape)):
        if axis not in axes.values():
            x = x.unsqueeze(first + axis)
    return x.expand(*x.shape[:first], *shape, *x.shape[first + len(shape) :])


def _flat(x: Tensor, first: int, count: int) -> Tensor:
    return x if count == 1 else x.flatten(first, first + count - 1)
