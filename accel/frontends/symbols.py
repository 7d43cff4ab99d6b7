"""Symbolic sizes: from torch's shape environment to the program's dimensions.

PyTorch traces dynamic sizes as `SymInt`s whose expressions use its own symbols (`s27`) and its own
functions (`FloorDiv`, `CleanDiv`...). `Symbols` renames the symbols to stable names and writes the
expressions in plain sympy, which is what types and attributes of the IR hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from accel.errors import CaptureError
from accel.ir.module import SymbolInfo
from accel.ir.types import Dim, symbol

# Above this, an upper bound is torch's way to say "none".
_NO_BOUND = 2**31

SIZED_BY_DATA = (
    "use a fixed size with a mask, or torch.where, in place of nonzero, item, tolist or boolean "
    "indexing"
)

_PLAIN: dict[str, Callable[..., Any]] = {
    "FloorDiv": lambda a, b: sympy.floor(sympy.expand_mul(a / b)),
    "CleanDiv": lambda a, b: a / b,
    "IntTrueDiv": lambda a, b: a / b,
    "FloatTrueDiv": lambda a, b: a / b,
    "CeilToInt": sympy.ceiling,
    "FloorToInt": sympy.floor,
    "TruncToInt": sympy.floor,
    "ToFloat": lambda a: a,
    "Identity": lambda a: a,
    "Mod": sympy.Mod,
    "PythonMod": sympy.Mod,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "PowByNatural": sympy.Pow,
    "FloatPow": sympy.Pow,
    "OpaqueUnaryFn_sqrt": sympy.sqrt,
}


class Symbols:
    """Renames torch's size symbols to `names` (or `s0`, `s1`... in order of appearance)."""

    def __init__(self, shape_env: ShapeEnv | None = None, names: dict[str, str] | None = None):
        self.shape_env = shape_env
        self._names: dict[str, str] = dict(names or {})  # torch's name -> ours
        self._cache: dict[sympy.Expr, Dim] = {}
        self.used: dict[str, sympy.Symbol] = {}  # ours -> torch's symbol

    def dim(self, size: int | torch.SymInt | sympy.Expr) -> Dim:
        """A size as an int or a plain sympy expression.

        Raises CaptureError for sizes that depend on data.
        """
        if isinstance(size, int):
            return size
        expr = size.node.expr if isinstance(size, torch.SymInt) else size
        found = self._cache.get(expr)
        if found is None:
            plain = self.plain(expr)
            found = int(plain) if plain.is_Integer else plain
            self._cache[expr] = found
        return found

    def shape(self, sizes: Any) -> tuple[Dim, ...]:
        return tuple(self.dim(s) for s in sizes)

    def plain(self, expr: sympy.Expr) -> sympy.Expr:
        """The expression over our symbols and sympy's own functions."""
        if isinstance(expr, sympy.Symbol):
            return self._symbol(expr)
        if not expr.args:
            return expr
        args = [self.plain(a) for a in expr.args]
        make = _PLAIN.get(type(expr).__name__)
        return make(*args) if make is not None else expr.func(*args)

    def _symbol(self, s: sympy.Symbol) -> sympy.Symbol:
        name = str(s.name)
        if name.startswith(("u", "zuf")) or s in getattr(self.shape_env, "counts", ()):
            raise CaptureError(
                "a size depends on the values of a tensor",
                advice=SIZED_BY_DATA,
            )
        ours = self._names.get(name)
        if ours is None:
            taken = set(self._names.values())
            ours = next(f"s{i}" for i in range(len(taken) + 1) if f"s{i}" not in taken)
            self._names[name] = ours
        self.used[ours] = s
        return symbol(ours)

    def is_nonnegative(self, size: int | torch.SymInt) -> bool:
        """Whether a size is provably >= 0 within the symbols' ranges."""
        if isinstance(size, int):
            return size >= 0
        expr = size.node.expr
        if expr.is_nonnegative:
            return True
        if self.shape_env is None:
            return False
        return bool(self.shape_env.bound_sympy(expr).lower >= 0)

    def lowest(self, theirs: sympy.Symbol) -> int:
        """The least value of one of torch's symbols; -1 for any negative one."""
        bounds = self.shape_env.var_to_range.get(theirs) if self.shape_env is not None else None
        if bounds is None or not bounds.lower.is_Integer:
            return -1
        return max(int(bounds.lower), -1)

    def infos(self) -> dict[str, SymbolInfo]:
        """Ranges of the symbols met so far."""
        return {name: self._info(s) for name, s in self.used.items()}

    def _info(self, s: sympy.Symbol) -> SymbolInfo:
        bounds = self.shape_env.var_to_range.get(s) if self.shape_env is not None else None
        if bounds is None:
            return SymbolInfo()
        low = int(bounds.lower) if bounds.lower.is_Integer else 2
        high = int(bounds.upper) if bounds.upper.is_Integer else None
        return SymbolInfo(low, None if high is None or high >= _NO_BOUND else high)
