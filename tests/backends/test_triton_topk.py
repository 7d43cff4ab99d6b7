"""The k largest of rows as Triton kernels: through its interpreter, and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.ir import TensorType, WeightStore, interpret, symbol
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.passes.registry import load_passes
from tests.backends.kernels import function_of, kernel_of
from tests.backends.test_triton_gemv import BF16
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker
from tests.passes.helpers import program, t

load_passes()
F32 = torch.float32
Case = tuple[TensorType, Callable[..., Any]]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def run(worker: Worker, one: Case, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    type_, build = one
    function = function_of([type_], build)
    runner = InterpretedKernels([function], worker, ["topk"], TritonBackend())
    return runner(0, [x]), interpret(function, [x], WeightStore())


def plain(k: int, largest: bool = True) -> Callable[..., Any]:
    return lambda b, x: b.topk(x, k=k, axis=x.type.rank - 1, largest=largest)


def router(k: int, normalized: bool, dtype: torch.dtype = BF16) -> Callable[..., Any]:
    """As Qwen's: softmax in float32, top-k, the values divided by their sum."""

    def build(b: Any, x: Any) -> Any:
        last = x.type.rank - 1
        scores = b.softmax(b.cast_to(x, F32), axis=last)
        values, places = b.topk(scores, k=k, axis=last, largest=True)
        if normalized:
            values = b.div(values, b.sum(values, axes=(last,), keepdim=True))
        return b.cast_to(values, dtype), places

    return build


CASES: dict[str, Case] = {
    "float32": (typed(F32, 9, 64), plain(8)),
    "an odd number of columns": (typed(torch.float16, 5, 37), plain(3)),
    "the smallest": (typed(F32, 4, 20), plain(5, False)),
    "one": (typed(F32, 6, 12), plain(1)),
    "one row": (typed(F32, 1, 60), plain(6)),
    "more axes": (typed(BF16, 2, 3, 128), plain(8)),
    "a router": (typed(BF16, 7, 64), router(8, False)),
    "a router whose weights add up to 1": (typed(BF16, 7, 60), router(6, True)),
    "one token": (typed(BF16, 1, 8), router(2, True)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels(worker: Worker, name: str) -> None:
    torch.manual_seed(0)
    type_, build = CASES[name]
    shape = [int(d) for d in type_.shape]
    # Different numbers in every row, so that the order is one.
    x = torch.stack([torch.randperm(shape[-1]) for _ in range(type_.numel() // shape[-1])])
    x = (x.reshape(shape) / 8 - 2).to(type_.dtype)
    got, want = run(worker, (type_, build), x)
    assert torch.equal(got[1], want[1])
    rounding = 4 * torch.finfo(got[0].dtype).eps
    torch.testing.assert_close(got[0], want[0], rtol=rounding, atol=0)


def test_numbers_that_are_none_and_equal_ones(worker: Worker) -> None:
    x = torch.tensor([[1.0, float("nan"), 3.0, 3.0, -0.0, float("-inf"), 0.5, float("inf")]] * 2)
    got, _ = run(worker, (typed(F32, 2, 8), plain(5)), x)
    assert got[1][0].tolist() == [1, 7, 2, 3, 0] and got[0][0, 0].isnan()
    got, _ = run(worker, (typed(F32, 2, 8), plain(8, False)), x)
    assert got[1][0].tolist() == [5, 4, 6, 0, 2, 3, 7, 1]


def test_an_unknown_number_of_rows(worker: Worker) -> None:
    one = (TensorType((symbol("n"), 16), BF16), router(4, True))
    for rows in (1, 2, 33):
        x = torch.stack([torch.randperm(16) for _ in range(rows)]).div(4).to(BF16)
        got, want = run(worker, one, x)
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[0], want[0], rtol=2**-6, atol=0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles(arch: str) -> None:
    type_, build = CASES["a router whose weights add up to 1"]
    compiled = TritonBackend(arch).compile([kernel_of(function_of([type_], build), "topk")])
    assert all(one.binary.cubin for one in compiled.launches[compiled.names[0]])


def selected(make: Callable[..., Any], *types: TensorType) -> tuple[list[list[str]], list[str]]:
    misses: list[str] = []
    module = program(make, *types)
    context = Context(generator=TritonBackend(), on_miss=lambda rule, op, why: misses.append(why))
    PassManager(["select_topk", "dce"], context, validate=True).run(module)
    kernels = [op for op in module.main.ops if op.name == "kernel"]
    return [[o.name for o in op.regions[0].ops if o.name != "yield"] for op in kernels], misses


def test_a_router_is_one_kernel() -> None:
    made, _ = selected(router(4, True), t(5, 16, dtype=BF16))
    assert made == [["cast", "softmax", "topk", "sum", "div", "cast"]]


def test_what_is_read_in_between_cuts_the_kernel() -> None:
    def early(b: Any, x: Any) -> Any:
        values, places = b.topk(x, k=2, axis=1, largest=True)
        rows = b.reshape(places, shape=(10,))
        return b.exp(values), rows

    assert selected(early, t(5, 16))[0] == [["topk"]]

    def shared(b: Any, x: Any) -> Any:
        scores = b.softmax(x, axis=1)
        return (*b.topk(scores, k=2, axis=1, largest=True), scores)

    assert selected(shared, t(5, 16))[0] == [["topk"]]


def test_what_stays_with_torch() -> None:
    def across(b: Any, x: Any) -> Any:
        return b.topk(x, k=2, axis=0, largest=True)

    assert selected(across, t(5, 16)) == ([], ["a top-k that is not along the last axis"])
    assert selected(plain(20), t(5, 64)) == ([], ["the 20 largest of 64"])
    assert selected(plain(2), t(5, 4096)) == ([], ["the 2 largest of 4096"])
