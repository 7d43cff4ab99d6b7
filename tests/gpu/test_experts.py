"""Products of experts, batched ones, float8, tf32 and routers on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import accel
from accel.backends.triton.product_plan import MatmulTile
from accel.backends.triton.skinny_loop import SkinnyTile
from accel.errors import ExecutionError
from accel.ir import TensorType, WeightStore, interpret
from tests.backends import test_triton_batched as batched
from tests.backends import test_triton_experts as experts
from tests.backends import test_triton_float8 as float8
from tests.backends import test_triton_topk as topk
from tests.backends.kernels import function_of
from tests.backends.test_tvm_kernels import typed
from tests.gpu.device_kernels import DeviceKernels, Kernel
from tests.gpu.test_models import target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BF16 = torch.bfloat16
FEW, MANY = SkinnyTile(16, 16, 4, 3, 3), MatmulTile(16, 16, 32, 4, 2)


def expert_cases() -> list[tuple[experts.Case, int, Any]]:
    """Kernels, how many experts there are, and tiles."""
    found: list[tuple[experts.Case, int, Any]] = []
    found += [(case, experts.COUNTS[n], FEW) for n, case in experts.cases(18).items()]
    found += [(case, experts.COUNTS[n], None) for n, case in experts.cases(40).items()]
    found += [(case, experts.COUNTS[n], MANY) for n, case in experts.cases(150).items()]
    found += [(case, experts.COUNTS[n], None) for n, case in experts.cases(3000).items()]
    return found


def expert_kernels() -> list[Kernel]:
    return [Kernel(function_of(*c), "experts", tile=tile) for c, _, tile in expert_cases()]


def check(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        bound = 4 * torch.finfo(a.dtype).eps * float(b.abs().max())
        assert float((a.double() - b).abs().max()) <= bound


def test_experts() -> None:
    torch.manual_seed(0)
    kernels = DeviceKernels(expert_kernels)
    for number, ((types, _), count, _) in enumerate(expert_cases()):
        inputs = experts.inputs_for(types, count)
        want = interpret(kernels.functions[number], inputs, WeightStore(), oracle=True)
        got = kernels(number, inputs, calls=3)
        check(got, want)
        assert all(torch.equal(a, b) for a, b in zip(got, kernels(number, inputs), strict=True))


def wild_kernels() -> list[Kernel]:
    return [Kernel(function_of(*experts.cases(n)["plain"]), "experts") for n in (4, 150)]


def test_an_expert_that_is_none_is_an_error() -> None:
    kernels = DeviceKernels(wild_kernels)
    for number, rows in enumerate((4, 150)):
        inputs = experts.inputs_for(experts.cases(rows)["plain"][0], 5)
        inputs[2][3] = 5
        with pytest.raises(ExecutionError):
            kernels(number, inputs)


def batched_kernels() -> list[Kernel]:
    plain = [Kernel(function_of(*case), "batched") for case in batched.CASES.values()]
    return plain + [Kernel(function_of(*c), "batched", tile=batched.TILE)
                    for c in batched.CASES.values()]  # fmt: skip


def test_batched_products() -> None:
    torch.manual_seed(1)
    kernels = DeviceKernels(batched_kernels)
    for number, function in enumerate(kernels.functions):
        inputs = [torch.randn([int(d) for d in a.shape]).to(a.dtype) for a in function.args]
        check(kernels(number, inputs), interpret(function, inputs, WeightStore(), oracle=True))


def float8_kernels() -> list[Kernel]:
    sizes = ((9, "skinny"), (64, "skinny"), (70, "matmul"), (300, "matmul"))
    builds: list[Callable[..., Any]] = [float8.scaled, float8.activated]
    return [Kernel(function_of(*float8.case(n, b)), kind, 1) for n, kind in sizes for b in builds]


def test_float8() -> None:
    """Hopper's sums of float8 products keep fewer bits than float32 has."""
    torch.manual_seed(2)
    kernels = DeviceKernels(float8_kernels)
    for number, function in enumerate(kernels.functions):
        inputs = [torch.randn([int(d) for d in a.shape]).to(a.dtype) for a in function.args]
        (got,) = kernels(number, inputs)
        (want,) = interpret(function, inputs, WeightStore(), oracle=True)
        assert float((got.double() - want).abs().max()) <= 2**-6 * float(want.abs().max())


def topk_kernels() -> list[Kernel]:
    return [Kernel(function_of([t], b), "topk") for t, b in topk.CASES.values()]


def test_routers() -> None:
    torch.manual_seed(3)
    kernels = DeviceKernels(topk_kernels)
    for number, function in enumerate(kernels.functions):
        shape = [int(d) for d in function.args[0].shape]
        rows = [
            torch.randperm(shape[-1]) for _ in range(function.args[0].type.numel() // shape[-1])
        ]
        x = (torch.stack(rows).reshape(shape) / 8 - 2).to(function.args[0].dtype)
        got, want = kernels(number, [x]), interpret(function, [x], WeightStore())
        assert torch.equal(got[1], want[1])
        rounding = 4 * torch.finfo(got[0].dtype).eps
        torch.testing.assert_close(got[0], want[0], rtol=rounding, atol=0)


class Activated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1024, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(self.layer(x))


def test_tf32_is_only_used_where_it_is_allowed() -> None:
    torch.manual_seed(4)
    model, x = Activated().cuda().eval(), torch.randn(700, 1024, device="cuda")
    with torch.no_grad():
        want = model.double()(x.double())
    model.float()
    errors = {}
    for setting in ("exact", "tf32"):
        fast = accel.compile(model, inputs=(x,), target=target(), options={"float32": setting})
        errors[setting] = float((fast(x).double() - want).abs().max())
    assert errors["exact"] < 1e-5 < errors["tf32"] < 1e-2


def mixture_types(tokens: int) -> list[TensorType]:
    return [typed(BF16, tokens, 256), typed(BF16, 16, 256, 256), typed(torch.int64, tokens, 2)]


def mixture_kernels() -> list[Kernel]:
    return [Kernel(function_of(mixture_types(n), experts.gate_up), "experts", 1)
            for n in (1, 7, 32, 33, 1024)]  # fmt: skip


def test_gate_times_up_of_tokens() -> None:
    torch.manual_seed(5)
    kernels = DeviceKernels(mixture_kernels)
    for number, function in enumerate(kernels.functions):
        inputs = experts.inputs_for([a.type for a in function.args], 16)
        want = interpret(function, inputs, WeightStore(), oracle=True)
        (got,) = kernels(number, inputs)
        bound = 8 * torch.finfo(got.dtype).eps * float(want[0].abs().max())
        assert float((got.double() - want[0]).abs().max()) <= bound
