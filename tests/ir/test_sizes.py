"""Sizes as code: what sympy makes of them, and what programs compute from them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy

from accel.compiler.sizes import size_expr
from accel.ir import symbol
from accel.ir.expr import parse_expr
from accel.ir.types import Dim, product, simplify_dim
from accel.runtime.plan import evaluate_size

S, K = symbol("s"), symbol("k")
HALF = sympy.floor(K / 2 - sympy.Rational(1, 2))  # (k - 1) // 2
ROWS = product((S, simplify_dim(2 * HALF + 2)))


@pytest.mark.parametrize(
    ("dim", "meaning"),
    [
        (ROWS, lambda s, k: s * (2 * ((k - 1) // 2) + 2)),
        # sympy takes a product with an even sum, divided by 10, to be an integer
        ((ROWS + 9) // 10, lambda s, k: (s * (2 * ((k - 1) // 2) + 2) + 9) // 10),
        (parse_expr("s*(2*k + 2)//10"), lambda s, k: s * (2 * k + 2) // 10),
        (parse_expr("floor(s*(2*k + 2)/10)"), lambda s, k: s * (2 * k + 2) // 10),
        # whole as a sum, with terms that are not
        (sympy.expand(S * (S + 1) / 2), lambda s, k: s * (s + 1) // 2),
    ],
)
def test_sizes_mean_the_same_in_plans(dim: Dim, meaning: Callable[[int, int], int]) -> None:
    expression = size_expr(simplify_dim(dim))
    for s in range(1, 14):
        for k in range(1, 14):
            assert evaluate_size(expression, {"s": s, "k": k}) == meaning(s, k), (dim, s, k)
