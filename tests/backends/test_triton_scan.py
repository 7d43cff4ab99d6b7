"""Running sums and products as Triton kernels: through its interpreter, compiled, selected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.errors import BackendError
from accel.ir import TensorType, WeightStore, interpret
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.passes.registry import load_passes
from tests.backends.kernels import f32, function_of, kernel_of, sym
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import BACKEND, InterpretedKernels
from tests.backends.triton_worker import Worker
from tests.passes.helpers import program

load_passes()
BF16, I64, BOOL = torch.bfloat16, torch.int64, torch.bool


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def positions(b: Any, mask: Any) -> Any:
    """How transformers numbers the tokens of a padded batch."""
    count = b.cumsum(b.cast(mask, dtype=I64), axis=1)
    return b.sub(count, b.scalar(1, I64))


def nucleus(b: Any, p: Any) -> Any:
    """Tokens up to a share of the probability."""
    return b.lt(b.sub(b.cumsum(p, axis=1), p), b.scalar(0.9, torch.float32))


Case = tuple[list[TensorType], Callable[..., Any]]
CASES: dict[str, Case] = {
    "sum": ([f32(5, 300)], lambda b, x: b.cumsum(x, axis=1)),
    "product": ([f32(5, 40)], lambda b, x: b.cumprod(x, axis=-1)),
    "long rows": ([f32(17, 5000)], lambda b, x: b.cumsum(x, axis=1)),
    "first axis": ([f32(70, 9)], lambda b, x: b.cumsum(x, axis=0)),
    "middle axis": ([f32(3, 50, 4)], lambda b, x: b.cumprod(x, axis=1)),
    "one element": ([f32(6, 1)], lambda b, x: b.cumsum(x, axis=1)),
    "a vector": ([f32(200)], lambda b, x: b.cumsum(x, axis=0)),
    "bfloat16": ([typed(BF16, 4, 100)], lambda b, x: b.cumsum(b.exp(x), axis=1)),
    "positions": ([typed(BOOL, 3, 77)], positions),
    "nucleus": ([f32(4, 130)], nucleus),
    "two results": ([f32(4, 60)], lambda b, x: (lambda y: [y, b.tanh(y)])(b.cumsum(x, axis=1))),
    "symbolic": ([f32(sym("s0"), 50)], lambda b, x: b.cumsum(x, axis=1)),
    "symbolic length": ([f32(20, sym("s0"))], lambda b, x: b.cumsum(x, axis=1)),
}  # fmt: skip


def inputs_of(types: Sequence[TensorType]) -> list[Tensor]:
    torch.manual_seed(0)
    made = []
    for t in types:
        shape = [d if isinstance(d, int) else 37 for d in t.shape]
        made.append(torch.rand(shape) < 0.6 if t.dtype == BOOL else torch.randn(shape).to(t.dtype))
    return made


@pytest.mark.parametrize("name", CASES)
def test_scans(worker: Worker, name: str) -> None:
    types, build = CASES[name]
    function, inputs = function_of(types, build), inputs_of(types)
    runner = InterpretedKernels([function], worker, ["scan"])
    exact = interpret(function, inputs, WeightStore(), oracle=True)
    for got, want in zip(runner(0, inputs), exact, strict=True):
        if not got.dtype.is_floating_point:
            assert torch.equal(got, want), runner.source(0)
            continue
        eps = torch.finfo(got.dtype).eps
        # The interpreter adds one element after the other, at worst so many roundings.
        bound = eps * (4 * float(want.abs().max()) + want.numel() ** 0.5)
        assert float((got.double() - want).abs().max()) <= bound, runner.source(0)


def test_refusals_say_why() -> None:
    def why(build: Callable[..., Any], *types: TensorType) -> str:
        op = next(o for o in function_of(types, build).ops if o.name == "cumsum")
        return str(BACKEND.supports_anchor(op, "scan"))

    assert "2 long rows" in why(lambda b, x: b.cumsum(x, axis=1), f32(2, 100_000))
    assert "nothing" in why(lambda b, x: b.cumsum(x, axis=1), f32(2, 0))
    turned = function_of([f32(8, 8)], lambda b, x: b.permute(b.cumsum(x, axis=0), axes=(1, 0)))
    with pytest.raises(BackendError, match="elsewhere"):
        BACKEND.generate([kernel_of(turned, "scan")])


def selected(build: Callable[..., Any], *types: TensorType) -> list[list[str]]:
    module = program(build, *types)
    PassManager(["select_scans"], Context(generator=BACKEND), validate=True).run(module)
    kernels = [o for o in module.main.ops if o.name == "kernel"]
    return [[o.name for o in k.regions[0].ops if o.name != "yield"] for k in kernels]


def test_neighbours_come_along() -> None:
    assert selected(positions, typed(BOOL, 3, 77)) == [["cast", "cumsum", "full", "sub"]]
    # p is read by the subtraction as well: it stays an input, the exponential outside.
    assert selected(lambda b, x: nucleus(b, b.exp(x)), f32(4, 130)) == [
        ["cumsum", "sub", "full", "lt"]
    ]
    assert selected(lambda b, x: b.cumsum(x, axis=1), f32(2, 100_000)) == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["positions", "long rows", "product"])
def test_compiles_without_a_gpu(arch: str, name: str) -> None:
    types, build = CASES[name]
    made = TritonBackend(arch).compile([kernel_of(function_of(types, build), "scan")])
    (launch,) = made.launches[made.names[0]]
    assert launch.binary.cubin
