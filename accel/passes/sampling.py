"""Random inputs that a function accepts: sizes within ranges, indices within tables.

Contract checks, bisection and tests run programs on these. An integer argument that is read as an
index (`embedding`, `gather`, `take_along`...), directly or through views and casts, stays below the
size of what it indexes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from accel.errors import InterpretError
from accel.ir.interpret import interpret
from accel.ir.module import Function, Op, Value
from accel.ir.op import Trait
from accel.ir.storage import WeightStore
from accel.ir.types import SUB_BYTE_BITS, Dim, TensorType, substitute

# Sizes to try for symbols, in order; programs often need multiples of a power of two.
_SIZES = ((3, 5, 2, 7), (4, 6, 8, 2), (8,), (16,), (32,), (64,), (128,), (1,))
_DEFAULT_HIGH = 8


def choose_sizes(function: Function, attempt: int = 0) -> dict[str, int]:
    """A size for each symbol, within its range; other sizes for other attempts."""
    row = _SIZES[attempt % len(_SIZES)]
    chosen: dict[str, int] = {}
    for i, (name, info) in enumerate(function.symbols.items()):
        size = max(row[i % len(row)], info.min)
        chosen[name] = size if info.max is None else min(size, info.max)
    return chosen


def random_inputs(
    function: Function,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    *,
    positive: bool = False,
) -> list[Tensor]:
    """One tensor per argument, the same for the same seed.

    Floats are normal, or with `positive` uniform on [0.5, 1.5); bools are fair coins; integers are
    small and not negative. `sizes` fixes symbols; the rest are chosen.
    """
    values = choose_sizes(function) | dict(sizes or {})
    generator = torch.Generator().manual_seed(seed)
    return [
        random_tensor(_static(a.type, values), generator, index_bound(a, values), positive)
        for a in function.args
    ]


def random_tensor(
    type: TensorType, generator: torch.Generator, high: int | None = None, positive: bool = False
) -> Tensor:
    """A tensor of a static type; integers lie in [0, high)."""
    shape = [int(d) for d in type.shape]
    dtype = type.dtype
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype.is_complex:
        pair = torch.randn([*shape, 2], generator=generator, dtype=torch.float64)
        return torch.view_as_complex(pair).to(dtype)
    if dtype.is_floating_point:
        draw = torch.rand if positive else torch.randn
        values = draw(shape, generator=generator, dtype=torch.float64)
        return (values + 0.5 if positive else values).to(dtype)
    limit = _DEFAULT_HIGH if high is None else high
    if dtype in SUB_BYTE_BITS:
        bits = SUB_BYTE_BITS[dtype]
        unsigned = str(dtype).startswith("torch.uint")
        limit = min(limit, 2 ** (bits if unsigned else bits - 1))
        dtype = torch.uint8 if unsigned else torch.int8
    return torch.randint(0, max(limit, 1), shape, generator=generator).to(dtype)


def valid_inputs(
    function: Function, weights: WeightStore, seed: int = 0, *, positive: bool = False
) -> list[Tensor]:
    """Random inputs on which the function runs: sizes are tried until it does.

    Raises InterpretError if it runs on none of them.
    """
    error: InterpretError | None = None
    for attempt in range(len(_SIZES) if function.symbols else 1):
        try:
            inputs = random_inputs(
                function, seed, choose_sizes(function, attempt), positive=positive
            )
            interpret(function, inputs, weights)
            return inputs
        except InterpretError as e:
            error = e
    assert error is not None
    raise error


def _static(type: TensorType, sizes: Mapping[str, int]) -> TensorType:
    return type.with_shape(_size(d, sizes) for d in type.shape)


def _size(dim: Dim, sizes: Mapping[str, int]) -> int:
    value = substitute(dim, sizes)
    if not isinstance(value, int):
        raise InterpretError(f"no value is known for the size {dim}")
    return value


def index_bound(value: Value, sizes: Mapping[str, int]) -> int | None:
    """The smallest size that `value` indexes, or None where it indexes nothing."""
    if value.dtype.is_floating_point or value.dtype == torch.bool:
        return None
    bounds = list(_bounds(value, sizes, set()))
    return min(bounds) if bounds else None


def _bounds(value: Value, sizes: Mapping[str, int], seen: set[Value]) -> Iterator[int]:
    if value in seen:
        return
    seen.add(value)
    for op, operand in value.uses:
        limit = _limit(op, operand, sizes)
        if limit is not None:
            yield limit
        elif op.regions:
            yield from _bounds(op.regions[0].args[operand], sizes, seen)
        elif (op.has(Trait.VIEW) or op.name in ("cast", "cat")) and operand == 0:
            yield from _bounds(op.result, sizes, seen)


def _limit(op: Op, operand: int, sizes: Mapping[str, int]) -> int | None:
    """The size that operand indexes in this op."""
    table = op.operands[0].shape if op.operands else ()
    if op.name == "embedding" and operand == 1:
        return _size(table[0], sizes)
    if op.name == "expert_linear" and operand == 2:
        return _size(op.operands[1].shape[0], sizes)
    if op.name in ("gather", "take_along", "scatter") and operand == 1:
        return _size(table[op.attribute("axis")], sizes)
    if op.name in ("index", "index_put"):
        first = 1 if op.name == "index" else 2
        if operand >= first:
            return _size(table[op.attribute("axes")[operand - first]], sizes)
    if op.name == "dynamic_slice" and operand == 1:
        return _size(table[op.attribute("axis")] - op.attribute("size") + 1, sizes)
    if op.name == "dynamic_update" and operand == 2:
        axis = op.attribute("axis")
        return _size(table[axis] - op.operands[1].shape[axis] + 1, sizes)
    return None
