"""Generated attention against the interpreter in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.ir import Function, TensorType, WeightStore, interpret
from tests.backends.kernels import BACKEND, Runner, f32, function_of, kernel_of, sym

S = sym("s0")
BOOL = torch.bool
# Largest error over the largest value; the weights are at most 1 and sum to 1.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass
class Case:
    """Shapes are [batch, heads, length, depth]; `mask` is a shape, `size` the value of s0."""

    q: tuple[Any, ...]
    k: tuple[Any, ...]
    v: tuple[Any, ...] | None = None
    mask: tuple[Any, ...] | None = None
    mask_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    size: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False

    def types(self) -> list[TensorType]:
        types = [TensorType(s, self.dtype) for s in (self.q, self.k, self.v or self.k)]
        if self.mask is not None:
            dtype = BOOL if self.mask_dtype == BOOL else self.dtype
            types.append(TensorType(self.mask, dtype))
        if self.sinks:
            types.append(TensorType((self.q[1],), self.dtype))
        return types

    def build(self, b: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        attributes = {"scale": self.q[3] ** -0.5, **self.attributes}
        mask = rest[0] if self.mask is not None else None
        return b.attention(q, k, v, mask, rest[-1] if self.sinks else None, **attributes)

    def function(self) -> Function:
        return function_of(self.types(), self.build)


CASES: dict[str, Case] = {
    "plain": Case((2, 3, 64, 32), (2, 3, 64, 32)),
    "odd lengths": Case((1, 2, 37, 64), (1, 2, 101, 64)),
    "one block and a bit": Case((1, 1, 17, 16), (1, 1, 65, 16)),
    "one key": Case((1, 2, 16, 16), (1, 2, 1, 16)),
    "other value size": Case((1, 2, 20, 48), (1, 2, 70, 48), (1, 2, 70, 80)),
    "large head": Case((1, 1, 19, 256), (1, 1, 70, 256)),
    "groups": Case((2, 6, 30, 32), (2, 2, 30, 32), attributes={"causal": True}),
    "one group": Case((1, 9, 130, 64), (1, 1, 130, 64), attributes={"causal": True}),
    "causal, fewer queries": Case(
        (1, 2, 21, 32), (1, 2, 150, 32), attributes={"causal": True, "offset": 129}
    ),
    "causal, rows without keys": Case(
        (1, 2, 90, 32), (1, 2, 80, 32), attributes={"causal": True, "offset": -70}
    ),
    "window": Case((1, 2, 200, 32), (1, 2, 200, 32), attributes={"causal": True, "window": 65}),
    "window on the left only": Case((1, 2, 200, 32), (1, 2, 200, 32), attributes={"window": 3}),
    "softcap": Case((1, 2, 33, 32), (1, 2, 33, 32), attributes={"softcap": 2.0, "causal": True}),
    "bias": Case((2, 2, 33, 32), (2, 2, 70, 32), mask=(2, 1, 1, 70)),
    "bias of heads": Case((2, 2, 33, 32), (2, 2, 70, 32), mask=(1, 2, 33, 70)),
    "boolean mask": Case((2, 2, 33, 32), (2, 2, 70, 32), mask=(2, 1, 33, 70), mask_dtype=BOOL),
    "mask and causal": Case(
        (2, 4, 70, 32), (2, 2, 70, 32), mask=(2, 1, 1, 70), mask_dtype=BOOL,
        attributes={"causal": True},
    ),
    "symbolic": Case((2, 2, S, 32), (2, 2, S, 32), size=75, attributes={"causal": True}),
    "symbolic, few": Case((2, 2, S, 32), (2, 2, S, 32), size=3, attributes={"causal": True}),
    "symbolic batch and mask": Case((S, 2, 20, 32), (S, 2, 70, 32), mask=(S, 1, 1, 70), size=3),
    "bfloat16": Case((1, 2, 40, 64), (1, 2, 90, 64), dtype=torch.bfloat16),
    "float16": Case((1, 2, 40, 64), (1, 2, 90, 64), dtype=torch.float16),
    "sinks": Case((2, 4, 40, 32), (2, 2, 70, 32), sinks=True),
    "sinks, window": Case(
        (1, 4, 150, 64), (1, 2, 150, 64), sinks=True, dtype=torch.bfloat16,
        attributes={"causal": True, "window": 40},
    ),
    "sinks, boolean mask": Case(
        (2, 2, 33, 32), (2, 2, 70, 32), mask=(2, 1, 33, 70), mask_dtype=BOOL, sinks=True
    ),
    "sinks, rows without keys": Case(
        (1, 2, 90, 32), (1, 2, 80, 32), sinks=True, attributes={"causal": True, "offset": -70}
    ),
    "sinks, bias and cap": Case(
        (1, 2, 33, 16), (1, 2, 70, 16), mask=(1, 2, 33, 70), sinks=True,
        attributes={"softcap": 2.0},
    ),
}  # fmt: skip


@cache
def runner() -> Runner:
    return Runner([c.function() for c in CASES.values()], ["attention"] * len(CASES))


def inputs_of(case: Case, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for type_ in case.types():
        shape = [case.size if d is S else int(d) for d in type_.shape]
        x = torch.randn(shape, generator=generator)
        made.append(x > 0.3 if type_.dtype == BOOL else x.to(type_.dtype))
    return made


def wanted_of(case: Case, inputs: list[Tensor]) -> Tensor:
    return interpret(case.function(), inputs, WeightStore(), oracle=True)[0]


@pytest.mark.parametrize("name", CASES)
def test_against_the_interpreter(name: str) -> None:
    case = CASES[name]
    inputs = inputs_of(case)
    (got,) = runner()(list(CASES).index(name), inputs)
    error = float((got.double() - wanted_of(case, inputs).double()).abs().max())
    assert error <= LIMITS[case.dtype] * float(inputs[2].abs().max())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_extreme_inputs_give_what_softmax_gives(value: float) -> None:
    name = "odd lengths"
    inputs = inputs_of(CASES[name])
    inputs[0][0, 0, 5, 3] = value
    inputs[1][0, 1, 70, 0] = value
    (got,) = runner()(list(CASES).index(name), inputs)
    wanted = wanted_of(CASES[name], inputs).float()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert float((got - wanted).nan_to_num().abs().max()) <= 1e-5


def split_heads(b: Any, x: Any, first: int) -> Any:
    """[B, S, 3 H E] -> one of q, k, v as [B, H, S, E]."""
    part = b.slice(x, axis=2, start=first * 64, stop=first * 64 + 64, step=1)
    heads = b.reshape(part, shape=(*x.shape[:2], 2, 32))
    return b.permute(heads, axes=(0, 2, 1, 3))


def fused(b: Any, qkv: Any) -> Any:
    q, k, v = (split_heads(b, qkv, i) for i in range(3))
    y = b.attention(q, k, b.mul(v, v), scale=0.2, causal=True)
    return b.reshape(b.permute(y, axes=(0, 2, 1, 3)), shape=(*qkv.shape[:2], 64))


@pytest.mark.parametrize("length", [50, S])
def test_reads_through_views_and_writes_merged_heads(length: Any) -> None:
    function = function_of([f32(2, length, 192)], fused)
    x = torch.randn(2, 50, 192)
    (got,) = Runner([function], ["attention"])(0, [x])
    (wanted,) = interpret(function, [x], WeightStore(), oracle=True)
    assert got.shape == (2, 50, 64)
    assert float((got - wanted).abs().max()) <= 2e-6 * float(x.square().max())


REFUSED: dict[str, tuple[Case, str]] = {
    "few queries": (Case((1, 2, 4, 32), (1, 2, 64, 32)), "4 queries"),
    "odd head": (Case((1, 2, 32, 20), (1, 2, 64, 20)), "size 20"),
    "float64": (Case((1, 2, 32, 32), (1, 2, 64, 32), dtype=torch.float64), "float64"),
    "rank": (Case((1, 2, 32, 32), (1, 2, 64, 32), mask=(32, 64)), "rank 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_code_says_why(name: str) -> None:
    case, wanted = REFUSED[name]
    op = next(o for o in kernel_of(case.function()).regions[0].ops if o.name == "attention")
    assert wanted in str(BACKEND.supports_anchor(op, "attention"))
