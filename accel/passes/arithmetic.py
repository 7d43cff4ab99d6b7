"""Products and polynomials in any association: helpers of the rules that raise composites.

`x * 0.5 * (1 + erf(x / sqrt(2)))` is written in a dozen orders; `factors` flattens a product and
`polynomial` multiplies one out, so that a rule states the mathematics once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from accel.ir.module import Op, Value
from accel.ir.patterns import splat_value
from accel.ir.types import same_shape

_DEEPEST = 12
_HIGHEST_POWER = 4
# Two spellings of a constant (decimal digits in the source) may differ by this much, relatively.
CLOSE = 1e-10


@dataclass
class Product:
    """constant * product of `values`; `values` are in the order they were met."""

    constant: float
    values: list[Value]


def factors(op: Op) -> Product:
    """The factors of a mul, div by a number, or neg: inner products with one user are flattened."""
    found = Product(1.0, [])
    stack = [op.result]
    first = True
    while stack:
        value = stack.pop()
        inner = value.op
        number = _number(value)
        if number is not None:
            found.constant *= number
        elif inner is not None and (first or len(value.uses) == 1) and _keeps_shape(inner):
            if inner.name == "mul":
                stack.extend(reversed(inner.operands))
            elif inner.name == "neg":
                found.constant = -found.constant
                stack.append(inner.operands[0])
            elif inner.name == "div" and (by := _number(inner.operands[1])):
                found.constant /= by
                stack.append(inner.operands[0])
            else:
                found.values.append(value)
        else:
            found.values.append(value)
        first = False
    return found


def _keeps_shape(op: Op) -> bool:
    """Whether all operands that are no numbers have the one result's shape: no broadcast inside."""
    return len(op.results) == 1 and all(
        same_shape(v.shape, op.result.shape) for v in op.operands if _number(v) is None
    )


def _number(value: Value) -> float | None:
    number = splat_value(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return None
    return float(number)


def scaled(value: Value) -> tuple[Value, float]:
    """(base, factor) with value = factor * base: multiplications by numbers are taken off."""
    factor = 1.0
    for _ in range(_DEEPEST):
        op = value.op
        if op is None:
            break
        if op.name == "neg":
            factor, value = -factor, op.operands[0]
            continue
        number = _number(op.operands[1]) if op.name in ("mul", "div") else None
        if number is None or not number or not same_shape(op.operands[0].shape, value.shape):
            break
        factor = factor * number if op.name == "mul" else factor / number
        value = op.operands[0]
    return value, factor


def polynomial(value: Value, x: Value, depth: int = 0) -> dict[int, float] | None:
    """Coefficients by power of x, for sums and products of x and numbers; else None."""
    if value is x:
        return {1: 1.0}
    number = _number(value)
    if number is not None:
        return {0: number}
    op = value.op
    if op is None or depth > _DEEPEST or op.name not in ("add", "sub", "mul", "neg", "div", "pow"):
        return None
    if op.name == "neg":
        inner = polynomial(op.operands[0], x, depth + 1)
        return None if inner is None else {k: -c for k, c in inner.items()}
    if op.name in ("div", "pow"):
        return _with_number(op, x, depth)
    left = polynomial(op.operands[0], x, depth + 1)
    right = polynomial(op.operands[1], x, depth + 1) if left is not None else None
    if left is None or right is None:
        return None
    if op.name == "mul":
        return _times(left, right)
    sign = 1.0 if op.name == "add" else -1.0
    powers = set(left) | set(right)
    return {k: left.get(k, 0.0) + sign * right.get(k, 0.0) for k in powers}


def _with_number(op: Op, x: Value, depth: int) -> dict[int, float] | None:
    number = _number(op.operands[1])
    inner = polynomial(op.operands[0], x, depth + 1)
    if number is None or inner is None or not number:
        return None
    if op.name == "div":
        return {k: c / number for k, c in inner.items()}
    result: dict[int, float] | None = {0: 1.0}
    if number != int(number) or not 0 < number <= _HIGHEST_POWER:
        return None
    for _ in range(int(number)):
        result = None if result is None else _times(result, inner)
    return result


def _times(left: dict[int, float], right: dict[int, float]) -> dict[int, float] | None:
    result: dict[int, float] = {}
    for i, a in left.items():
        for j, b in right.items():
            result[i + j] = result.get(i + j, 0.0) + a * b
    return result if max(result) <= _HIGHEST_POWER else None


def same_polynomial(a: dict[int, float] | None, b: dict[int, float]) -> bool:
    """Equal up to the digits in which constants are written."""
    if a is None:
        return False
    powers = set(a) | set(b)
    return all(close(a.get(k, 0.0), b.get(k, 0.0)) for k in powers)


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=1e-300)
