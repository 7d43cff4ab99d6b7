"""Errors of the elementary functions against float64, over all magnitudes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from accel.ir import Function, Value
from tests.backends.kernels import Runner, f32, function_of

# Largest error in units in the last place, and what torch computes the truth with.
FUNCTIONS = {
    "exp": 1.5, "exp2": 1.5, "expm1": 2.0, "log": 1.5, "log2": 1.5, "log10": 1.5, "log1p": 1.5,
    "tanh": 2.0, "sigmoid": 3.0, "erf": 1.5, "sin": 1.0, "cos": 1.0, "sqrt": 0.51, "rsqrt": 1.5,
}  # fmt: skip
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45,
           2.0**-126, 3.4028235e38, -3.4028235e38, 88.72283, 88.7229, -87.33655, -103.97, -103.98,
           1.5707964, 3.1415927, 1e5, 2.0**30, 1e10, 1e38, 6.381e37]  # fmt: skip


def every_magnitude() -> Tensor:
    """Evenly spaced bit patterns: all exponents, both signs, denormals; then the usual range."""
    patterns = torch.arange(-(2**31), 2**31 - 1, 4001, dtype=torch.int64).to(torch.int32)
    usual = torch.linspace(-20.0, 20.0, 200_001)
    return torch.cat([patterns.view(torch.float32), usual, torch.tensor(SPECIAL)])


X = every_magnitude()


@pytest.fixture(scope="module")
def results() -> dict[str, Tensor]:
    functions: list[Function] = []
    for name in FUNCTIONS:

        def build(b: Any, x: Value, name: str = name) -> Value:
            return getattr(b, name)(x)

        functions.append(function_of([f32(len(X))], build))
    runner = Runner(functions)
    return {name: runner(i, [X])[0] for i, name in enumerate(FUNCTIONS)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_in_units_of_the_last_place(results: dict[str, Tensor], name: str) -> None:
    got = results[name]
    exact = getattr(torch, name)(X.double())
    rounded = exact.float()
    assert torch.equal(got.isnan(), rounded.isnan())
    finite = rounded.isfinite()
    assert torch.equal(got[~finite].nan_to_num(0), rounded[~finite].nan_to_num(0))
    _, exponent = torch.frexp(rounded[finite].abs().clamp(min=2.0**-126))
    unit = torch.exp2((exponent - 24).double())
    error = (got[finite].double() - exact[finite]).abs() / unit
    worst = int(error.argmax())
    assert float(error[worst]) <= FUNCTIONS[name], f"{name}({X[finite][worst].item()!r})"


@pytest.mark.parametrize("name", ["expm1", "log1p", "tanh", "erf", "sin"])
def test_sign_of_zero(results: dict[str, Tensor], name: str) -> None:
    zeros = X == 0
    assert torch.equal(torch.signbit(results[name][zeros]), torch.signbit(X[zeros]))
