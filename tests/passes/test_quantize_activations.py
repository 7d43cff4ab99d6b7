"""quantize_activations: products of float8 codes, within the bound; and torch._scaled_mm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accel.backends.triton import TritonBackend
from accel.ir import Module, interpret
from accel.passes.base import Context
from accel.passes.manager import PassManager, run_pipeline
from accel.passes.registry import load_passes
from tests.frontends.support import captured, fallbacks
from tests.passes.helpers import BF16, F32, compute, program, t

load_passes()
E4M3 = torch.float8_e4m3fn


def layer(b: Any, x: Any) -> Any:
    one = b.linear(
        x, b.weight(torch.randn(24, 64).to(x.dtype), "v"), b.weight(torch.randn(24).to(x.dtype))
    )
    return b.mul(one, b.linear(x, b.weight(torch.randn(24, 64).to(x.dtype), "u")))


@pytest.mark.parametrize("per", ["row", "tensor"])
@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_products_are_of_codes(per: str, weights: str, dtype: torch.dtype) -> None:
    module = program(layer, t(5, 64, dtype=dtype))
    inputs = [torch.randn(5, 64).to(dtype)]
    (want,) = interpret(module.main, inputs, module.weights, oracle=True)
    passes = f"quantize{{format=fp8,per={weights}}},quantize_activations{{per={per}}},cse,dce"
    ledger = run_pipeline(module, passes, Context(), validate=True)
    error = ledger.rows[1].error
    assert error is not None and 0 < error < 0.15
    (got,) = interpret(module.main, inputs, module.weights)
    assert got.dtype == dtype
    assert float((got.double() - want).norm() / want.norm()) < 0.1
    assert compute(module).count("quantize") == 1, "linears over one input share its codes"
    assert "dequantize" not in compute(module)


def test_rows_of_zeros_and_of_infinities() -> None:
    module = program(lambda b, x: b.linear(x, b.weight(torch.randn(8, 16))), t(3, 16))
    run_pipeline(module, "quantize{format=fp8},quantize_activations", Context())
    x = torch.randn(3, 16)
    x[0], x[1, 3] = 0, float("inf")
    (y,) = interpret(module.main, [x], module.weights)
    assert (y[0] == 0).all() and not torch.isfinite(y[1]).any() and torch.isfinite(y[2]).all()


def test_other_weights_stay() -> None:
    misses: list[str] = []
    module = program(layer, t(5, 64))
    context = Context(on_miss=lambda rule, op, why: misses.append(why))
    run_pipeline(module, "quantize{bits=8},quantize_activations", context)
    assert len(misses) == 2 and "quantize" not in compute(module)


def kernels(module: Module) -> list[list[str]]:
    backend = TritonBackend(measures=True)  # whatever a library does faster
    PassManager(["select_products", "dce"], Context(generator=backend)).run(module)
    return [
        [o.name for o in op.regions[0].ops if o.name in ("cast", "linear", "mul", "add")]
        for op in module.main.ops
        if op.name == "kernel"
    ]


def test_a_kernel_takes_codes_and_scales() -> None:
    def make(b: Any, x: Any) -> Any:
        return b.linear(x, b.weight(torch.randn(24, 64).to(x.dtype)))

    module = program(make, t(300, 64, dtype=BF16))
    run_pipeline(module, "quantize{format=fp8},quantize_activations,cse,dce", Context())
    (made,) = kernels(module)
    assert made.count("linear") == 1 and made.count("mul") == 2 and made.count("cast") == 3
    (op,) = [o for o in module.main.ops if o.name == "kernel"]
    assert [v.dtype for v in op.operands].count(E4M3) == 2


class Scaled(nn.Module):
    def __init__(self, rows: int, columns: int, *, each: bool, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.randn(columns, 32).to(E4M3))
        self.scale = nn.Buffer(torch.rand(1, columns) if each else torch.rand(()))
        self.bias = nn.Buffer(torch.randn(columns).bfloat16()) if bias else None
        self.each = each

    def forward(self, x: Tensor) -> Tensor:
        size = x.abs().amax(1, keepdim=True) if self.each else x.abs().amax()
        step = (size / 448).float()
        codes = (x / step).to(E4M3)
        return torch._scaled_mm(
            codes, self.weight.t(), step, self.scale, self.bias, out_dtype=torch.bfloat16
        )


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_mm_is_imported(each: bool, bias: bool) -> None:
    torch.manual_seed(0)
    model = Scaled(20, 16, each=each, bias=bias)
    x = torch.randn(20, 32)
    program_ = captured(model, x)
    assert not fallbacks(program_.module)
    size = x.abs().amax(1, keepdim=True) if each else x.abs().amax()
    codes = (x / (size / 448)).to(E4M3)
    want = codes.double() @ model.weight.double().t() * (size / 448).double() * model.scale.double()
    want = want + (model.bias.double() if model.bias is not None else 0)
    got = program_(x)
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=1e-3)
    run_pipeline(program_.module, "canonicalize,cse,dce", Context(), validate=True)
    assert len(kernels(program_.module)) == 1
