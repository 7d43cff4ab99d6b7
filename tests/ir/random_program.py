"""Random well-typed programs, for property tests of passes and backends.

    program = random_program(seed, symbolic=True)
    inputs = program.inputs()
    interpret(program.module.main, inputs, program.module.weights)

A seed always gives the same program. Values stay near 1, so that rounding is what differs between
two ways of running one; tensors hold at most `budget` elements. Programs have multi-use values,
dead ones, constants, broadcasts, views of views, reductions, contractions, norms and casts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.ir import Builder, Function, Module, SymbolInfo, TensorType, Value, symbol
from accel.ir.types import Dim, Shape, product, substitute

SIZES = {"b": 2, "n": 5}
OTHER_SIZES = {"b": 3, "n": 8}

F32, I64, BOOL = torch.float32, torch.int64, torch.bool


@dataclass
class Program:
    """A module with @main, and how its inputs are drawn."""

    module: Module
    seed: int
    sizes: dict[str, int]
    index_bounds: dict[int, int] = field(default_factory=dict)  # argument -> largest index + 1

    def inputs(self, seed: int = 0, sizes: dict[str, int] | None = None) -> list[Tensor]:
        """One tensor for each argument; symbols take `sizes` (the program's own if not given)."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for i, value in enumerate(self.module.main.args):
            shape = concrete(value.type.shape, sizes or self.sizes)
            if i in self.index_bounds:
                made.append(torch.randint(0, self.index_bounds[i], shape, generator=generator))
            elif value.dtype == BOOL:
                made.append(torch.randint(0, 2, shape, generator=generator).bool())
            else:
                draw = torch.randn(shape, dtype=torch.float64, generator=generator)
                made.append(draw.to(value.dtype))
        return made


def random_program(
    seed: int,
    *,
    symbolic: bool = False,
    length: int = 16,
    dtype: torch.dtype = F32,
    budget: int = 2048,
    kinds: Sequence[str] = (),
) -> Program:
    """A program of about `length` steps (some make several ops).

    Args:
        symbolic: leading sizes of the arguments are the symbols b and n.
        dtype: of the arguments and weights; casts go to others and come back.
        kinds: the kinds of steps to use, of `STEPS`; all if empty.
    """
    maker = _Maker(random.Random(seed), symbolic, dtype, budget)
    names = list(kinds) or list(STEPS)
    weights = [STEPS[name][1] for name in names]
    for _ in range(length):
        STEPS[maker.random.choices(names, weights)[0]][0](maker)
    maker.finish()
    return Program(maker.module, seed, dict(SIZES), maker.index_bounds)


def concrete(shape: Shape, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(int(substitute(d, sizes)) for d in shape)


class _Maker:
    def __init__(
        self, generator: random.Random, symbolic: bool, dtype: torch.dtype, budget: int
    ) -> None:
        self.random = generator
        self.dtype = dtype
        self.budget = budget
        self.module = Module()
        function = self.module.add(Function("main"))
        if symbolic:
            function.symbols = {name: SymbolInfo(2, 64) for name in SIZES}
        b, n = (symbol("b"), symbol("n")) if symbolic else (SIZES["b"], SIZES["n"])
        self.leading: tuple[Dim, ...] = (b, n, 1)
        self.index_bounds: dict[int, int] = {}
        self.b = Builder(function.body)
        self.pool: list[Value] = []  # floating values of any shape, in the program's dtype
        width = self.random.choice((4, 6, 8))
        for shape in ((b, n, width), (n, width), (width,), (b, 1, 6)):
            if len(self.pool) < 2 or self.random.random() < 0.5:
                self.pool.append(function.body.add_arg(TensorType(shape, dtype), "x"))

    def finish(self) -> None:
        unused = [v for v in self.pool if not v.uses and v.op is not None]
        results = unused[-3:] or [self.pool[-1]]
        if self.random.random() < 0.3:
            results.append(self.random.choice(self.pool))
        self.b.op("return", results)

    # -- choices ---------------------------------------------------------------------------------

    def value(self, rank: int = 0) -> Value:
        """A value of at least this rank; recent ones are likelier."""
        fits = [v for v in self.pool if len(v.shape) >= rank]
        if not fits:
            shape = (self.leading[0], self.leading[1], 4)
            return self.add(self.weight(shape[2:]) if rank <= 1 else self.fill(shape[-rank:]))
        recent = fits[-6:] if self.random.random() < 0.7 else fits
        return self.random.choice(recent)

    def partner(self, x: Value) -> Value:
        """A value that broadcasts with x: of its shape, or with leading axes gone, or 1s."""
        same = [v for v in self.pool if v.shape == x.shape or v.shape == x.shape[1:]]
        if same and self.random.random() < 0.7:
            return self.random.choice(same)
        shape = tuple(1 if self.random.random() < 0.4 else d for d in x.shape)
        return self.fill(shape[self.random.randint(0, len(shape)) :])

    def axis(self, x: Value) -> int:
        return self.random.randrange(len(x.shape))

    def size(self, x: Value | Shape) -> int:
        shape = x.shape if isinstance(x, Value) else x
        return int(substitute(product(shape), SIZES))

    def static_axes(self, x: Value, least: int = 1) -> list[int]:
        return [i for i, d in enumerate(x.shape) if isinstance(d, int) and d >= least]

    # -- values ----------------------------------------------------------------------------------

    def add(self, x: Value) -> Value:
        """Puts a new value into the pool, if it is not too large."""
        if self.size(x) <= self.budget:
            self.pool.append(x)
        return x

    def scalar(self, value: float) -> Value:
        return self.b.scalar(value, self.dtype)

    def weight(self, shape: tuple[int, ...], scale: float = 1.0) -> Value:
        draw = torch.Generator().manual_seed(self.random.randrange(2**31))
        tensor = torch.randn(shape, dtype=torch.float64, generator=draw) * scale
        name = self.module.weights.add("w", tensor.to(self.dtype))
        return self.b.constant(name, TensorType(shape, self.dtype))

    def fill(self, shape: Shape) -> Value:
        """A weight where the shape is static, else an iota or a full."""
        if all(isinstance(d, int) for d in shape) and self.random.random() < 0.6:
            return self.weight(tuple(int(d) for d in shape))
        if shape and self.random.random() < 0.5:
            axis = self.random.randrange(len(shape))
            line = self.b.iota(shape=shape, axis=axis, dtype=self.dtype)
            return self.b.mul(line, self.scalar(0.125))
        return self.b.full_of(shape, self.random.choice((0.5, -1.0, 2.0)), self.dtype)

    def positive(self, x: Value) -> Value:
        return self.b.add(self.b.abs(x), self.scalar(1.0))


# -- steps ---------------------------------------------------------------------------------------


def _unary(m: _Maker) -> None:
    names = ("neg", "abs", "tanh", "sigmoid", "sin", "cos", "erf", "relu", "gelu", "silu", "atan",
             "hardswish", "softplus", "mish", "floor", "round", "sign")  # fmt: skip
    m.add(getattr(m.b, m.random.choice(names))(m.value()))


def _domain(m: _Maker) -> None:
    """Functions that need a domain, on values that were put into it."""
    name = m.random.choice(("log", "sqrt", "rsqrt", "reciprocal", "exp", "exp2", "log1p"))
    x = m.value()
    x = m.b.clamp(x, min=-4.0, max=2.0) if name.startswith("exp") else m.positive(x)
    m.add(getattr(m.b, name)(x))


def _binary(m: _Maker) -> None:
    x = m.value()
    name = m.random.choice(("add", "sub", "mul", "maximum", "minimum", "atan2"))
    m.add(getattr(m.b, name)(*m.random.sample((x, m.partner(x)), 2)))


def _divide(m: _Maker) -> None:
    x = m.value()
    m.add(m.b.div(x, m.positive(m.partner(x))))


def _select(m: _Maker) -> None:
    x = m.value()
    name = m.random.choice(("lt", "le", "gt", "ge", "eq", "ne"))
    condition = getattr(m.b, name)(x, m.partner(x))
    if m.random.random() < 0.3:
        condition = m.b.logical_not(condition)
    m.add(m.b.where(condition, x, m.partner(x)))


def _clamp(m: _Maker) -> None:
    bounds = m.random.choice(({"min": 0.0}, {"max": 1.0}, {"min": -1.0, "max": 0.5}))
    m.add(m.b.clamp(m.value(), **bounds))


def _reduce(m: _Maker) -> None:
    x = m.value(1)
    axes = tuple(sorted(m.random.sample(range(len(x.shape)), m.random.randint(1, len(x.shape)))))
    name = m.random.choice(("sum", "mean", "amax", "amin", "var", "logsumexp"))
    keepdim = m.random.random() < 0.5
    rest = {"correction": 0} if name == "var" else {}
    made = getattr(m.b, name)(x, axes=axes, keepdim=keepdim, **rest)
    if name == "sum":
        made = m.b.tanh(made)
    m.add(made)
    if keepdim and m.random.random() < 0.7:  # normalize by it: what softmax and norms look like
        m.add(m.b.div(m.b.sub(x, made), m.positive(made)))


def _softmax(m: _Maker) -> None:
    x = m.value(1)
    m.add(getattr(m.b, m.random.choice(("softmax", "log_softmax")))(x, axis=m.axis(x)))


def _norm(m: _Maker) -> None:
    x = m.value(1)
    width = x.shape[-1]
    known = isinstance(width, int) and m.random.random() < 0.7
    weight = m.weight((int(width),)) if known else None
    if m.random.random() < 0.5:
        m.add(m.b.rms_norm(x, weight, eps=1e-5))
    else:
        bias = m.weight((int(width),)) if known and m.random.random() < 0.5 else None
        m.add(m.b.layer_norm(x, weight, bias, rank=1, eps=1e-5))


def _linear(m: _Maker) -> None:
    x = m.value(1)
    width = x.shape[-1]
    if not isinstance(width, int):
        return
    out = m.random.choice((1, 4, 6, 8))
    bias = m.weight((out,)) if m.random.random() < 0.5 else None
    y = m.b.linear(x, m.weight((out, width), width**-0.5), bias)
    m.add(y)
    if m.random.random() < 0.5:  # an epilogue, as vendor calls take
        y = getattr(m.b, m.random.choice(("relu", "gelu", "silu", "tanh")))(y)
        m.add(y)
        if y.shape == x.shape:
            m.add(m.b.add(x, y))


def _matmul(m: _Maker) -> None:
    x = m.value(2)
    axes = (*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2)
    scale = m.scalar(max(m.size(x.shape[-1:]), 1) ** -0.5)
    m.add(m.b.mul(m.b.matmul(x, m.b.permute(x, axes=axes)), scale))


def _attention(m: _Maker) -> None:
    x = m.value(2)
    if len(x.shape) != 3 or not isinstance(x.shape[-1], int) or x.shape[-1] % 2:
        return
    batch, length, width = x.shape
    heads = m.b.reshape(x, shape=(batch, length, 2, width // 2))
    q = m.b.permute(heads, axes=(0, 2, 1, 3))
    y = m.b.attention(q, q, q, scale=0.5, causal=m.random.random() < 0.5)
    m.add(m.b.reshape(m.b.permute(y, axes=(0, 2, 1, 3)), shape=x.shape))


def _permute(m: _Maker) -> None:
    x = m.value(1)
    m.add(m.b.permute(x, axes=tuple(m.random.sample(range(len(x.shape)), len(x.shape)))))


def _reshape(m: _Maker) -> None:
    x = m.value(1)
    at = m.axis(x)
    size = x.shape[at]
    if at and m.random.random() < 0.5:
        shape = (*x.shape[: at - 1], product(x.shape[at - 1 : at + 1]), *x.shape[at + 1 :])
    elif isinstance(size, int) and size % 2 == 0 and size:
        shape = (*x.shape[:at], 2, size // 2, *x.shape[at + 1 :])
    else:
        shape = (*x.shape[:at], 1, *x.shape[at:])
    if len(shape) <= 5:
        m.add(m.b.reshape(x, shape=shape))


def _slice(m: _Maker) -> None:
    x = m.value(1)
    axes = m.static_axes(x, 2)
    if not axes:
        return
    axis = m.random.choice(axes)
    size = int(x.shape[axis])
    start = m.random.randrange(size)
    stop = m.random.randint(start + 1, size)
    m.add(m.b.slice(x, axis=axis, start=start, stop=stop, step=m.random.choice((1, 1, 2))))


def _broadcast(m: _Maker) -> None:
    x = m.value()
    if len(x.shape) < 4:
        m.add(m.b.broadcast_to(x, shape=(m.random.choice(m.leading), *x.shape)))


def _flip(m: _Maker) -> None:
    x = m.value(1)
    m.add(m.b.flip(x, axes=(m.axis(x),)))


def _cat(m: _Maker) -> None:
    x = m.value(1)
    axis = m.axis(x)
    others = [
        v
        for v in m.pool
        if len(v.shape) == len(x.shape)
        and v.shape[:axis] + v.shape[axis + 1 :] == x.shape[:axis] + x.shape[axis + 1 :]
    ]
    m.add(m.b.cat(x, m.random.choice(others), *(m.random.sample(others, 1)), axis=axis))


def _pad(m: _Maker) -> None:
    x = m.value(1)
    axis = m.axis(x)
    low = tuple(int(i == axis) for i in range(len(x.shape)))
    m.add(m.b.pad(x, low=low, high=low[::-1], value=m.random.choice((0.0, 1.0))))


def _cast(m: _Maker) -> None:
    """To another dtype, an op there, and back."""
    x = m.value()
    other = m.random.choice((torch.bfloat16, torch.float16, torch.float64, torch.int32))
    y = m.b.cast(m.b.clamp(x, min=-64.0, max=64.0), dtype=other)
    y = getattr(m.b, m.random.choice(("add", "mul")))(y, m.b.scalar(2, other))
    m.add(m.b.cast(y, dtype=m.dtype))


def _lookup(m: _Maker) -> None:
    """Rows of a table at positions that are an argument or are computed."""
    rows, width = 7, m.random.choice((4, 6))
    table = m.weight((rows, width))
    if m.random.random() < 0.5 and len(m.b.region.args) < 7:
        indices = m.b.region.add_arg(TensorType(m.leading[:2], I64), "i")
        m.index_bounds[indices.index] = rows
    else:
        x = m.value(1)
        indices = m.b.argmax(x, axis=m.axis(x)) if m.random.random() < 0.3 else m.b.cast(
            m.b.mul(m.b.sigmoid(x), m.scalar(6.9)), dtype=I64
        )  # fmt: skip
        indices = m.b.clamp(indices, min=0, max=rows - 1)
    name = m.random.choice(("embedding", "gather"))
    m.add(m.b.embedding(table, indices) if name == "embedding" else m.b.gather(table, indices))


def _mask(m: _Maker) -> None:
    x = m.value(2)
    mask = m.b.tri_mask(rows=x.shape[-2], columns=x.shape[-1])
    m.add(m.b.where(mask, x, m.scalar(0.0)))


def _scan(m: _Maker) -> None:
    x = m.value(1)
    m.add(m.b.tanh(m.b.cumsum(x, axis=m.axis(x))))


Step = Callable[[_Maker], None]

# Kind -> (step, how likely). Kinds are what `random_program(kinds=...)` takes.
STEPS: dict[str, tuple[Step, float]] = {
    "unary": (_unary, 4),
    "domain": (_domain, 2),
    "binary": (_binary, 4),
    "divide": (_divide, 1),
    "select": (_select, 1),
    "clamp": (_clamp, 1),
    "reduce": (_reduce, 2),
    "softmax": (_softmax, 1),
    "norm": (_norm, 1),
    "linear": (_linear, 2),
    "matmul": (_matmul, 1),
    "attention": (_attention, 0.5),
    "permute": (_permute, 1),
    "reshape": (_reshape, 2),
    "slice": (_slice, 1),
    "broadcast": (_broadcast, 1),
    "flip": (_flip, 0.5),
    "cat": (_cat, 1),
    "pad": (_pad, 0.5),
    "cast": (_cast, 1),
    "lookup": (_lookup, 1),
    "mask": (_mask, 0.5),
    "scan": (_scan, 0.3),
}
