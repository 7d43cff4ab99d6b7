"""How sample operands and attributes of ops are written and drawn (see `tests.ir.samples`).

A builder makes the samples of one op from named sizes and a dtype:

    @samples("softmax")
    def _(d: Sizes, dtype: torch.dtype) -> Iterator[Sample]:
        yield sample([t(dtype, d.b, d.n)], axis=1)

The same builder runs with ints, 0 and 1 among them, and with symbols, so shapes in attributes are
written with the sizes they depend on (`shape=(d.b * d.n,)`). `Sample.tensors(seed)` draws values.
The op sweep runs them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from accel.ir import Builder, Function, TensorType, definitions, symbol
from accel.ir.types import (
    DTYPE_NAMES,
    FLOATS,
    SUB_BYTE_BITS,
    Dim,
    is_integer,
    substitute,
    value_dtype,
)

# Sizes that differ from each other, so that a mixed-up axis shows.
DEFAULT_SIZES = {"b": 2, "n": 5, "m": 3, "k": 7, "h": 4, "w": 6, "s": 9}
OTHER_SIZES = {"b": 3, "n": 8, "m": 2, "k": 4, "h": 6, "w": 5, "s": 12}


class Sizes:
    """Named sizes: ints, or with no values symbols. Remembers which were asked for."""

    def __init__(self, values: Mapping[str, int] | None) -> None:
        self.values = values
        self.used: dict[str, None] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in DEFAULT_SIZES:
            raise AttributeError(name)
        self.used[name] = None
        return symbol(name) if self.values is None else self.values[name]


@dataclass(frozen=True)
class Operand:
    """A type and how its values are drawn: see `draw`."""

    type: TensorType
    kind: str = "normal"


@dataclass(frozen=True)
class Sample:
    """Operands (None: an absent optional one) and attributes of one op.

    `inner` is a dtype to which ATen's kernel rounds in the middle of the computation, where that
    is narrower than what it accumulates in: comparisons allow for it.
    """

    op: str
    operands: tuple[Operand | None, ...]
    attributes: Mapping[str, Any]
    inner: torch.dtype | None = None
    origin: str = ""  # the expression that makes this sample again

    def types(self) -> list[TensorType]:
        return [o.type for o in self.operands if o is not None]

    def tensors(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [draw(o, generator) for o in self.operands if o is not None]

    def function(self) -> Function:
        """@main with this op alone. TypeInferenceError if the operands do not fit."""
        function = Function("main", self.types())
        values = iter(function.args)
        builder = Builder(function.body)
        operands = [None if o is None else next(values) for o in self.operands]
        op = builder.op(self.op, operands, self.attributes)
        builder.op("return", op.results)
        return function

    def __str__(self) -> str:
        operands = ", ".join("none" if o is None else f"{o.type} {o.kind}" for o in self.operands)
        attributes = ", ".join(f"{k}={v!r}" for k, v in self.attributes.items())
        return f"{self.op}({operands}) {{{attributes}}}"


@dataclass
class _Case:
    """What a builder yields: a Sample without the op's name."""

    operands: Sequence[Operand | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    inner: torch.dtype | None = None


SampleBuilder = Callable[[Sizes, torch.dtype], Iterator[_Case]]


@dataclass(frozen=True)
class Entry:
    build: SampleBuilder
    dtypes: frozenset[torch.dtype]


REGISTRY: dict[str, Entry] = {}
ALL_DTYPES = tuple(DTYPE_NAMES)
ANY = frozenset(ALL_DTYPES)


def samples(
    *names: str, dtypes: frozenset[torch.dtype] = FLOATS
) -> Callable[[SampleBuilder], SampleBuilder]:
    """Registers the builder of the ops `names`; `dtypes` must all be accepted by `infer`."""

    def wrap(build: SampleBuilder) -> SampleBuilder:
        for name in names:
            REGISTRY[name] = Entry(build, dtypes)
        return build

    return wrap


def sample(operands: Sequence[Operand | None] = (), inner: Any = None, **attributes: Any) -> _Case:
    return _Case(operands, attributes, inner)


def t(dtype: torch.dtype, *shape: Dim, kind: str = "normal") -> Operand:
    return Operand(TensorType(shape, dtype), kind)


def op_samples(
    name: str, dtype: torch.dtype, values: Mapping[str, int] | None = DEFAULT_SIZES
) -> list[Sample]:
    """The samples of an op; with `values=None` over symbols."""
    entry = REGISTRY[name]
    cases = entry.build(Sizes(values), dtype)
    return [
        Sample(
            name,
            tuple(c.operands),
            c.attributes,
            c.inner,
            f"op_samples({name!r}, {dtype}, {values})[{i}]",
        )
        for i, c in enumerate(cases)
    ]


def size_variants(name: str, dtype: torch.dtype) -> Iterator[dict[str, int]]:
    """The default sizes, others, and each size that the op's samples use as 0 and as 1."""
    sizes = Sizes(DEFAULT_SIZES)
    list(REGISTRY[name].build(sizes, dtype))
    yield DEFAULT_SIZES
    if sizes.used:
        yield OTHER_SIZES
    for used in sizes.used:
        for small in (0, 1):
            yield {**DEFAULT_SIZES, used: small}


def sampled_definitions() -> list[str]:
    """Names of all definitions that compute something: all but terminators and opaque ops."""
    return [d.name for d in definitions() if d.infer is not None and d.name not in _TERMINATORS]


_TERMINATORS = {"return", "yield"}


# -- values ----------------------------------------------------------------------------------

_SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0)


def draw(operand: Operand, generator: torch.Generator) -> Tensor:
    """A tensor of the operand's (static) type.

    Kinds: normal; special (normal with NaN, infinities and zeros); positive; unit (-0.95..0.95);
    above1; probability (0..1); nonzero (integers never 0); small (integers 0..6); index:N (0..N-1);
    signed_index:N (-N..N-1); distinct:N (different indices along the last axis); ascending;
    slots:N:M (N ascending places of M); log_probability; turns:cos:half (cosines, or sin, of rotary
    angles that are quarter turns, for pairs as in that style, or interleaved).
    """
    shape = tuple(int(d) for d in operand.type.shape)
    dtype = value_dtype(operand.type.dtype)
    kind, *numbers = operand.kind.split(":")
    if kind in ("index", "signed_index"):
        high = int(numbers[0])
        low = -high if kind == "signed_index" else 0
        if high == 0:
            return torch.zeros(shape, dtype=dtype)
        return torch.randint(low, high, shape, generator=generator).to(dtype)
    if kind in ("distinct", "slots"):
        return _ordered_indices(kind, shape, [int(n) for n in numbers], generator).to(dtype)
    if kind == "turns":
        return _quarter_turns(shape, *numbers).to(dtype)
    if operand.type.dtype in SUB_BYTE_BITS:
        bits = SUB_BYTE_BITS[operand.type.dtype]
        low = 0 if dtype == torch.uint8 else -(1 << (bits - 1))
        return torch.randint(low, low + (1 << bits), shape, generator=generator).to(dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if is_integer(dtype):
        return _integers(kind, shape, dtype, generator)
    return _floats(kind, shape, dtype, generator)


def _ordered_indices(
    kind: str, shape: tuple[int, ...], numbers: list[int], generator: torch.Generator
) -> Tensor:
    count, high = (shape[-1], numbers[0]) if kind == "distinct" else numbers
    rows = torch.Size(shape).numel() // max(count, 1)
    made = torch.stack(
        [torch.randperm(high, generator=generator)[:count] for _ in range(rows)]
        or [torch.zeros(count, dtype=torch.int64)]
    )[:rows]
    return (made if kind == "distinct" else made.sort(-1).values).reshape(shape)


def _quarter_turns(shape: tuple[int, ...], function: str, style: str) -> Tensor:
    """Cosines or sines [..., positions, pairs * 2], exact in every dtype."""
    half = shape[-1] // 2
    pair = torch.arange(shape[-1]) % half if style == "half" else torch.arange(shape[-1]) // 2
    quarters = torch.arange(shape[-2])[:, None] * (pair + 1)
    values = torch.tensor([1.0, 0.0, -1.0, 0.0])
    return values[(quarters - int(function == "sin")) % 4].expand(shape).clone()


def _integers(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    signed = not str(dtype).startswith("torch.uint")
    if kind == "small":
        return torch.randint(0, 7, shape, generator=generator).to(dtype)
    high = 12
    made = torch.randint(-high if signed else 0, high, shape, generator=generator)
    if kind == "nonzero":
        made = torch.where(made == 0, 1, made)
    if kind in ("positive", "probability"):
        made = made.abs() + 1
    if kind == "ascending":
        made = made.sort(-1).values if made.dim() else made
    return made.to(dtype)


def _floats(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    base = torch.complex128 if dtype.is_complex else torch.float64
    made = torch.randn(shape, dtype=base, generator=generator)
    if kind in ("positive", "nonzero"):
        made = made.abs() + 0.1
    elif kind in ("unit", "probability"):
        uniform = torch.rand(shape, dtype=torch.float64, generator=generator)
        made = uniform if kind == "probability" else (uniform * 2 - 1) * 0.95
    elif kind == "above1":
        made = made.abs() + 1.0
    elif kind == "ascending":
        made = made.sort(-1).values if made.dim() else made
    elif kind == "log_probability" and made.dim():
        made = torch.log_softmax(made, min(1, made.dim() - 1))
    made = made.to(dtype)
    if kind == "special" and not dtype.is_complex and made.numel():
        flat = made.reshape(-1)
        for i, value in enumerate(_SPECIAL[: max(1, flat.numel() // 2)]):
            flat[i] = value
    return made


def resolve(sample_: Sample, values: Mapping[str, int]) -> list[TensorType]:
    """Operand types of a symbolic sample with the sizes put in."""
    return [t_.with_shape(substitute(d, values) for d in t_.shape) for t_ in sample_.types()]


def substitute_attribute(value: Any, values: Mapping[str, int]) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(substitute_attribute(v, values) for v in value)
    return substitute(value, values) if isinstance(value, sympy.Expr) else value
