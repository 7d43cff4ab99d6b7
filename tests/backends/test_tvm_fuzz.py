"""Random regions against the interpreter.

Each seed makes one function of random shapes, index maps, elementwise ops and reductions; all are
compiled into one library. A failure prints the seed, the IR and the generated source.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.ir import Builder, Function, TensorType, Value, WeightStore, interpret, print_function
from accel.ir.ops.shape import permutation_inverse
from tests.backends.kernels import BACKEND, Runner, sym

SEEDS = (*range(100), 1223)  # 1223: a materialized value that needs another one
N = sym("s0")
DTYPES = (torch.float32,) * 5 + (torch.int64, torch.int32, torch.float16, torch.bool)
UNARY = ("neg", "abs", "relu", "sigmoid", "tanh", "round", "silu", "sign")
BINARY = ("add", "sub", "mul", "maximum", "minimum")
REDUCE = ("sum", "amax", "amin", "mean")
TARGETS = (torch.float32, torch.int32, torch.int64, torch.float16)
Step = Callable[["Generator"], "Value | None"]


class Generator:
    """Grows a random function op by op; every value stays bounded, so that errors do too."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.symbolic = seed % 3 == 0
        rank = self.random.randint(1, 4)
        shape: list[Any] = [self.random.choice([1, 2, 3, 5, 8, 17]) for _ in range(rank)]
        if self.symbolic:
            shape[self.random.randrange(rank)] = N
        types = [TensorType(tuple(shape), self.random.choice(DTYPES)) for _ in range(2)]
        types.append(TensorType(tuple(shape[1:]), torch.float32))
        self.function = Function("main", types)
        self.builder = Builder(self.function.body)
        self.values: list[Value] = list(self.function.args)

    def pick(self, want: Callable[[Value], bool] = lambda v: True) -> Value | None:
        """A value, the newest ones more often."""
        found = [v for v in self.values if want(v)]
        if not found:
            return None
        return found[max(self.random.randrange(len(found)) for _ in range(2))]

    def run(self) -> Function:
        for _ in range(self.random.randint(3, 14)):
            made = self.random.choice(STEPS)(self)
            if made is not None:
                self.values.append(made)
        made_here = [v for v in self.values if v.op is not None]
        results = self.random.sample(made_here, min(len(made_here), self.random.randint(1, 3)))
        results = results or [self.builder.neg(self.to_float(self.values[0]))]
        self.builder.op("return", results)
        return self.function

    def to_float(self, value: Value) -> Value:
        return self.builder.cast_to(value, torch.float32)


def unary(g: Generator) -> Value | None:
    x = g.pick(lambda v: v.dtype.is_floating_point)
    return None if x is None else getattr(g.builder, g.random.choice(UNARY))(x)


def binary(g: Generator) -> Value | None:
    x = g.pick(lambda v: v.dtype != torch.bool)
    if x is None:
        return None
    y = g.pick(lambda v: v.dtype == x.dtype and _broadcasts(v, x))
    name = g.random.choice(BINARY)
    if name == "mul":  # products are squashed: chains of them would leave the range
        x, y = g.to_float(x), g.to_float(y or x)
        return g.builder.tanh(g.builder.mul(x, y))
    return getattr(g.builder, name)(x, y or x)


def compare(g: Generator) -> Value | None:
    x = g.pick(lambda v: v.dtype.is_floating_point)
    if x is None:
        return None
    bound = g.builder.scalar(0.25, x.dtype)
    chosen = g.builder.where(g.builder.gt(x, bound), x, bound)
    return chosen if g.random.random() < 0.7 else g.builder.le(x, bound)


def cast(g: Generator) -> Value | None:
    x = g.pick()
    assert x is not None
    if x.dtype.is_floating_point:
        x = g.builder.clamp(x, min=-100.0, max=100.0)
    return g.builder.cast_to(x, g.random.choice(TARGETS))


def permute(g: Generator) -> Value | None:
    x = g.pick(lambda v: v.type.rank > 1)
    if x is None:
        return None
    axes = list(range(x.type.rank))
    g.random.shuffle(axes)
    y = g.builder.permute(x, axes=tuple(axes))
    if g.random.random() < 0.3:
        y = g.builder.permute(g.builder.neg(g.to_float(y)), axes=permutation_inverse(axes))
    return y


def reshape(g: Generator) -> Value | None:
    x = g.pick(lambda v: v.type.rank > 0)
    assert x is not None
    shape = list(x.shape)
    if g.random.random() < 0.5 and len(shape) > 1:
        place = g.random.randrange(len(shape) - 1)
        shape[place : place + 2] = [shape[place] * shape[place + 1]]
    else:
        place = g.random.randrange(len(shape))
        extent = shape[place]
        factor = next((f for f in (2, 3, 5, 17) if isinstance(extent, int) and extent % f == 0), 1)
        shape[place : place + 1] = [factor, extent // factor if factor != 1 else extent]
    return g.builder.reshape(x, shape=tuple(shape))


def slice_(g: Generator) -> Value | None:
    x = g.pick(lambda v: any(isinstance(d, int) and d > 2 for d in v.shape))
    if x is None:
        return None
    axis = g.random.choice([i for i, d in enumerate(x.shape) if isinstance(d, int) and d > 2])
    extent = int(x.shape[axis])
    start = g.random.randint(0, extent - 2)
    stop = g.random.randint(start + 1, extent)
    return g.builder.slice(x, axis=axis, start=start, stop=stop, step=g.random.choice([1, 1, 2]))


def cat(g: Generator) -> Value | None:
    x = g.pick(lambda v: v.type.rank > 0)
    if x is None:
        return None
    axis = g.random.randrange(x.type.rank)
    return g.builder.cat(x, g.builder.flip(x, axes=(axis,)), axis=axis)


def pad(g: Generator) -> Value | None:
    x = g.pick(lambda v: v.type.rank > 0 and v.dtype == torch.float32)
    if x is None:
        return None
    amounts = [g.random.choice([0, 0, 1, 2]) for _ in range(2 * x.type.rank)]
    low, high = tuple(amounts[: x.type.rank]), tuple(amounts[x.type.rank :])
    return g.builder.pad(x, low=low, high=high, value=0.5)


def reduce(g: Generator) -> Value | None:
    x = g.pick(lambda v: v.type.rank > 0)
    if x is None:
        return None
    x = g.to_float(x) if x.dtype in (torch.bool, torch.float16) else x
    name = g.random.choice(REDUCE)
    if name == "mean":
        x = g.to_float(x)
    if name == "sum" and x.dtype.is_floating_point:
        x = g.builder.tanh(x)
    count = g.random.randint(1, x.type.rank)
    axes = tuple(sorted(g.random.sample(range(x.type.rank), count)))
    return getattr(g.builder, name)(x, axes=axes, keepdim=g.random.random() < 0.7)


def softmax(g: Generator) -> Value | None:
    x = g.pick(lambda v: v.type.rank > 0 and v.dtype.is_floating_point)
    return None if x is None else g.builder.softmax(x, axis=g.random.randrange(x.type.rank))


STEPS: tuple[Step, ...] = (
    unary, unary, binary, binary, binary, compare, cast, permute, reshape, slice_, cat, pad,
    reduce, reduce, softmax,
)  # fmt: skip


def _broadcasts(a: Value, b: Value) -> bool:
    pairs = zip(reversed(a.shape), reversed(b.shape))
    return all(x == y or x == 1 or y == 1 for x, y in pairs)


def inputs_for(function: Function, seed: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for arg in function.args:
        shape = [d if isinstance(d, int) else size for d in arg.shape]
        x = torch.randn(shape, generator=generator) * 2
        made.append(x > 0 if arg.dtype == torch.bool else x.to(arg.dtype))
    return made


@pytest.fixture(scope="module")
def functions() -> dict[int, Function]:
    return {seed: Generator(seed).run() for seed in SEEDS}


@pytest.fixture(scope="module")
def runner(functions: dict[int, Function]) -> Runner:
    return Runner(list(functions.values()))


@pytest.mark.parametrize("seed", SEEDS)
def test_random_region(functions: dict[int, Function], runner: Runner, seed: int) -> None:
    function = functions[seed]
    number = list(functions).index(seed)
    for size in (1, 7, 33) if Generator(seed).symbolic else (1,):
        inputs = inputs_for(function, seed, size)
        got = runner(number, inputs)
        # The reference keeps more digits: a rounding that a kernel leaves out is no error.
        wide = [t.double() if t.dtype.is_floating_point else t for t in inputs]
        wanted = interpret(function, wide, WeightStore(), oracle=True)
        same = interpret(function, inputs, WeightStore())
        half = any(r.dtype == torch.float16 for op in function.ops for r in op.results)
        tolerance = 4e-3 if half else 2e-5
        for g, w, s in zip(got, wanted, same, strict=True):
            assert g.shape == s.shape and g.dtype == s.dtype
            assert _agree(g, w, s, tolerance), (
                f"seed {seed}, size {size}\n{print_function(function)}\n"
                f"{runner.compiled.sources[runner.compiled.symbols[number]]}"
            )


def _agree(got: Tensor, wanted: Tensor, same: Tensor, tolerance: float) -> bool:
    """Close to either reference; discrete results may flip where their input is at a boundary."""
    if not got.numel():
        return True
    scale = wanted.double().abs().max().clamp(min=1.0)
    g = got.double()
    near = (g - wanted.double()).abs() <= tolerance * scale
    near |= (g - same.double()).abs() <= tolerance * scale
    return float(near.double().mean()) > 0.995


def test_fuzz_covers_reductions_and_symbols(functions: dict[int, Function]) -> None:
    names = [op.name for f in functions.values() for op in f.ops]
    assert {"sum", "softmax", "cat", "pad", "permute", "reshape", "slice"} <= set(names)
    assert sum(bool(BACKEND.dims(_Kernel(f))) for f in functions.values()) > 20


class _Kernel:
    """Just enough of a kernel op for `dims`."""

    def __init__(self, function: Function) -> None:
        self.regions = [function.body]
