"""Matrix products of few rows, with compressed weights, against the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.ir import TensorType
from accel.ir.storage import pack_sub_byte
from tests.backends.kernels import BACKEND, Runner, f32, function_of, kernel_of, reference, sym

N, K = 40, 192


def _integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(high))


def _scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.02


def _typed(dtype: torch.dtype, *shape: int) -> TensorType:
    return TensorType(shape, dtype)


# Weight operands as a program sees them, their types, how they decode to [N, K], and the position
# of an operand that is stored packed.
WEIGHTS: dict[str, tuple[list[TensorType], Callable[..., Any], list[Tensor], torch.dtype | None]] = {  # noqa: E501
    "float32": ([f32(N, K)], lambda b, w: w, [torch.randn(N, K)], None),
    "bfloat16": ([_typed(torch.bfloat16, N, K)], lambda b, w: b.cast(w, dtype=torch.float32),
                 [torch.randn(N, K).bfloat16()], None),
    "int8 rows": ([_typed(torch.int8, N, K), f32(N, 1)],
                  lambda b, q, s: b.dequantize(q, s, axis=1),
                  [_integers(-128, 128, N, K).to(torch.int8), _scales(N, 1)], None),
    "int8 groups": ([_typed(torch.int8, N, K), f32(N, 3), _typed(torch.int8, N, 3)],
                    lambda b, q, s, z: b.dequantize(q, s, z, axis=1, group=64),
                    [_integers(-128, 128, N, K).to(torch.int8), _scales(N, 3),
                     _integers(-9, 9, N, 3).to(torch.int8)], None),
    "uint4 groups": ([_typed(torch.uint4, N, K), f32(N, 6), _typed(torch.uint8, N, 6)],
                     lambda b, q, s, z: b.dequantize(q, s, z, axis=1, group=32),
                     [_integers(0, 16, N, K).to(torch.uint8), _scales(N, 6),
                      _integers(0, 16, N, 6).to(torch.uint8)], torch.uint4),
    "int4 rows": ([_typed(torch.int4, N, K), f32(N, 1)],
                  lambda b, q, s: b.dequantize(q, s, axis=1),
                  [_integers(-8, 8, N, K).to(torch.int8), _scales(N, 1)], torch.int4),
    "uint2 groups": ([_typed(torch.uint2, N, K), f32(N, 3)],
                     lambda b, q, s: b.dequantize(q, s, axis=1, group=64),
                     [_integers(0, 4, N, K).to(torch.uint8), _scales(N, 3)], torch.uint2),
    "codebook": ([f32(16), _typed(torch.uint4, N, K)], lambda b, c, q: b.gather(c, q, axis=0),
                 [torch.randn(16), _integers(0, 16, N, K).to(torch.uint8)], torch.uint4),
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("name", WEIGHTS)
def test_linear_of_few_rows(name: str, rows: int) -> None:
    types, decode, weights, packed = WEIGHTS[name]

    def build(b: Any, x: Any, bias: Any, other: Any, *operands: Any) -> Any:
        y = b.linear(x, decode(b, *operands), bias)
        return b.add(b.silu(y), other)

    head = [f32(1, rows, K), f32(N), f32(1, rows, N)]
    function = function_of([*head, *types], build)
    kernel = kernel_of(function, "gemv")
    runner = Runner([function], kinds=["gemv"])
    inputs = [torch.randn(1, rows, K), torch.randn(N), torch.randn(1, rows, N)]
    stored = [_stored(w, t.dtype, packed) for w, t in zip(weights, types)]
    (got,) = runner(0, [*inputs, *stored])
    (wanted,) = reference(function, [*inputs, *weights])
    scale = float(wanted.abs().max())
    assert float((got - wanted).abs().max()) <= 2e-6 * scale, runner.compiled.sources
    assert kernel.attributes["kind"] == "gemv"
    source = runner.compiled.sources[runner.compiled.symbols[0]]
    nibbles = packed in (torch.uint4, torch.int4)
    assert ("halves" in source) == (nibbles and rows == 1)  # x, its elements as nibbles come


def _stored(weight: Tensor, dtype: torch.dtype, packed: torch.dtype | None) -> Tensor:
    return pack_sub_byte(weight, dtype) if dtype == packed else weight


def test_products_that_are_refused() -> None:
    def reason(*shape: Any, dtype: torch.dtype = torch.float32) -> str | None:
        types = [TensorType(shape, dtype), TensorType((N, shape[-1]), dtype)]
        function = function_of(types, lambda b, x, w: b.linear(x, w))
        return BACKEND.supports_product(next(iter(function.ops)))

    assert reason(1, 64) is None and reason(2, 4, 64) is None
    assert reason(9, 64) == "a linear of 9 rows"
    assert reason(sym("s0"), 64) == "a linear of s0 rows"
    function = function_of([f32(1, 4, 8), f32(1, 8, 4)], lambda b, x, y: b.matmul(x, y))
    assert "matmul" in str(BACKEND.supports_product(next(iter(function.ops))))
    function = function_of([f32(1, 64), f32(N, 64)], lambda b, x, w: b.linear(x, w))
    assert BACKEND.supports(next(iter(function.ops))) is not None  # only in kernels of that kind
