"""Types of values: a shape (ints and symbolic expressions) and a dtype, nothing else.

A dimension is a Python int, or a sympy expression over named positive integer symbols for sizes
known only at run time. Dtypes are torch's own, the sub-byte ones (`torch.int4`, `torch.uint4`,
`torch.uint2`...) included: such a value is a tensor with one element per entry in the program, and
packed bytes only in the weight store (see `accel.ir.storage`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TypeAlias

import sympy
import torch

from accel.errors import TypeInferenceError

Dim: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Dim, ...]

# Entries of each cache of work on symbolic sizes: a large model has a few hundred expressions.
_CACHE = 16384

# torch's stubs do not list these dtypes, so they are looked up by name.
SUB_BYTE_BITS: dict[torch.dtype, int] = {
    getattr(torch, f"{kind}{bits}"): bits
    for kind, widths in (("int", (4, 3, 2)), ("uint", (4, 3, 2, 1)))
    for bits in widths
}


def _mlir_integer(dtype: torch.dtype) -> str:
    """torch.uint4 -> ui4."""
    return str(dtype).removeprefix("torch.").replace("uint", "ui").replace("int", "i")


# MLIR spelling of each dtype. Signless MLIR integers are torch's signed ones.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8E4M3FN",
    torch.float8_e5m2: "f8E5M2",
    torch.float8_e8m0fnu: "f8E8M0FNU",
    torch.float8_e4m3fnuz: "f8E4M3FNUZ",
    torch.float8_e5m2fnuz: "f8E5M2FNUZ",
    torch.complex64: "complex<f32>",
    torch.complex128: "complex<f64>",
    torch.complex32: "complex<f16>",
    torch.bool: "i1",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "ui8",
    torch.uint16: "ui16",
    torch.uint32: "ui32",
    torch.uint64: "ui64",
}
DTYPE_NAMES |= {dtype: _mlir_integer(dtype) for dtype in SUB_BYTE_BITS}
DTYPE_BY_NAME: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

# Dtypes that ops compute in, by kind. All others are for storage: cast or decode them first.
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})
COMPLEX = frozenset({torch.complex64, torch.complex128})
BOOL = frozenset({torch.bool})


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of every value. `shape` holds ints and sympy expressions, `dtype` is torch's."""

    shape: Shape
    dtype: torch.dtype
    _hash: int = field(init=False, repr=False, compare=False)  # types are looked up all the time

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple):
            object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "_hash", hash((self.shape, self.dtype)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_static(self) -> bool:
        return all(isinstance(d, int) for d in self.shape)

    def numel(self) -> Dim:
        """Number of elements, symbolic if any dimension is."""
        return product(self.shape)

    def nbytes(self) -> Dim:
        """Storage in bytes; sub-byte dtypes round the last axis up to whole bytes."""
        bits = SUB_BYTE_BITS.get(self.dtype)
        if bits is None:
            return self.numel() * self.dtype.itemsize
        last = self.shape[-1] if self.shape else 1
        return product(self.shape[:-1]) * ((last * bits + 7) // 8)

    def with_shape(self, shape: Iterable[Dim]) -> TensorType:
        return TensorType(tuple(shape), self.dtype)

    def with_dtype(self, dtype: torch.dtype) -> TensorType:
        return TensorType(self.shape, dtype)

    def __str__(self) -> str:
        dims = "".join(f"{d if isinstance(d, int) else '?'}x" for d in self.shape)
        return f"tensor<{dims}{DTYPE_NAMES[self.dtype]}>"


def is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def is_integer(dtype: torch.dtype) -> bool:
    """Integers of any width; bool is not one."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a running program's tensors: int8 or uint8 for sub-byte dtypes, else itself."""
    if dtype not in SUB_BYTE_BITS:
        return dtype
    return torch.uint8 if str(dtype).startswith("torch.uint") else torch.int8


@cache
def symbol(name: str) -> sympy.Symbol:
    """The one positive integer symbol of this name."""
    return sympy.Symbol(name, integer=True, positive=True)


def simplify_dim(dim: Dim) -> Dim:
    """An int if the expression is constant, else the expression, multiplied out.

    sympy takes (2*k + 2)*s/10 to be an integer, and so drops the floor around it; 2*k*s + 2*s is
    not misread.
    """
    if isinstance(dim, int):
        return dim
    if dim.is_Integer:
        return int(dim)
    if dim.is_Mul and any(factor.is_Add for factor in dim.args):
        return simplify_dim(sympy.expand_mul(dim))
    return dim


def numerator(dim: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """(over, under) with dim = over / under, for code that divides integers once, at the end."""
    rational = any(a.as_coeff_Mul()[0].q != 1 for a in sympy.Add.make_args(dim))
    over, under = (sympy.together(dim) if rational else dim).as_numer_denom()
    return over, under


def product(dims: Iterable[Dim]) -> Dim:
    dims = tuple(dims)
    if all(isinstance(d, int) for d in dims):
        return math.prod(dims)
    return _symbolic_product(dims)


@lru_cache(_CACHE)
def _symbolic_product(dims: Shape) -> Dim:
    return simplify_dim(sympy.Mul(*dims))


def same_dim(a: Dim, b: Dim) -> bool:
    """True if both are provably equal (False means: not provably)."""
    if a is b or (isinstance(a, int) and isinstance(b, int)):
        return a == b
    return bool(a == b) or _same_expr(a, b)


@lru_cache(_CACHE)
def _same_expr(a: Dim, b: Dim) -> bool:
    return bool(sympy.expand(a - b) == 0)


def at_least(a: Dim, b: Dim, *, more: bool = False) -> bool:
    """Whether a >= b (a > b with `more`), as far as ints and equal expressions tell."""
    difference = simplify_dim(a - b)
    return isinstance(difference, int) and difference >= int(more)


def same_shape(a: Shape, b: Shape) -> bool:
    return len(a) == len(b) and all(same_dim(x, y) for x, y in zip(a, b))


def same_type(a: TensorType, b: TensorType) -> bool:
    return a.dtype == b.dtype and same_shape(a.shape, b.shape)


def broadcast_shapes(*shapes: Shape) -> Shape:
    """Numpy broadcasting over symbolic shapes.

    Raises TypeInferenceError where two dimensions are neither provably equal nor 1.
    """
    rank = max((len(s) for s in shapes), default=0)
    result: list[Dim] = []
    for axis in range(rank):
        dim: Dim = 1
        for shape in shapes:
            offset = axis - (rank - len(shape))
            if offset < 0 or shape[offset] == 1:
                continue
            if dim == 1:
                dim = shape[offset]
            elif not same_dim(dim, shape[offset]):
                raise TypeInferenceError(
                    f"shapes do not broadcast: {', '.join(map(format_shape, shapes))}",
                    advice=f"axis {axis} has sizes {dim} and {shape[offset]}",
                )
        result.append(dim)
    return tuple(result)


def format_shape(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def substitute(dim: Dim, values: Mapping[str, int]) -> Dim:
    """Replaces symbols by ints; an int comes out when every symbol has a value."""
    if isinstance(dim, int):
        return dim
    if isinstance(dim, sympy.Symbol):
        return values.get(dim.name, dim)
    known = tuple((name, values[name]) for name in symbol_names(dim) if name in values)
    return _substitute(dim, known) if known else dim


@lru_cache(_CACHE)
def _substitute(dim: sympy.Expr, values: tuple[tuple[str, int], ...]) -> Dim:
    by_name = dict(values)
    return simplify_dim(
        dim.subs({s: by_name[s.name] for s in dim.free_symbols if s.name in by_name})
    )


@lru_cache(_CACHE)
def symbol_names(dim: sympy.Expr) -> tuple[str, ...]:
    """Names of the symbols in an expression, sorted."""
    return tuple(sorted(s.name for s in dim.free_symbols))


def normalize_axis(axis: int, rank: int) -> int:
    """A non-negative axis; raises TypeInferenceError outside of [-rank, rank)."""
    if not -rank <= axis < rank:
        raise TypeInferenceError(f"axis {axis} is out of range for rank {rank}")
    return axis % rank if rank else 0
