"""Gradients of embedding tables as Triton kernels: through its interpreter, compiled, selected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.backends.triton.embedding_gradient import TableTile
from accel.compiler import gpu
from accel.ir import TensorType, WeightStore, interpret
from accel.passes.base import Context
from accel.passes.manager import PassManager
from accel.passes.registry import load_passes
from tests.backends.kernels import function_of, kernel_of, sym
from tests.backends.test_tvm_kernels import typed
from tests.backends.triton_kernels import BACKEND, IndexFailure, InterpretedKernels
from tests.backends.triton_worker import Worker
from tests.passes.helpers import program

load_passes()
BF16, F16, F32, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64
KIND = "embedding_gradient"


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def alone(rows: int, padding: int = -1) -> Any:
    def build(b: Any, grad: Any, ids: Any) -> Any:
        return b.embedding_backward(grad, ids, rows=rows, padding_index=padding)

    return build


def tied(b: Any, grad: Any, ids: Any, head: Any, loss: Any) -> Any:
    """The head's gradient times the loss's own, and the embedding's, of one table."""
    cut = b.slice(head, axis=0, start=0, stop=70)
    scaled = b.mul(b.cast(cut, dtype=F32), b.cast(loss, dtype=F32))
    return b.add(b.cast(scaled, dtype=BF16), b.embedding_backward(grad, ids, rows=70))


TIED = [typed(BF16, 2, 45, 48), typed(I64, 2, 45), typed(BF16, 72, 48), typed(BF16)]
CASES: dict[str, tuple[list[TensorType], Any, TableTile | None]] = {
    "bfloat16": ([typed(BF16, 90, 256), typed(I64, 90)], alone(37), None),
    "float16, rows of 40": ([typed(F16, 3, 50, 40), typed(I64, 3, 50)], alone(11), None),
    "float32, int32": ([typed(F32, 64, 24), typed(I32, 64)], alone(5), None),
    "a padding token": ([typed(F32, 200, 16), typed(I64, 200)], alone(6, 2), None),
    "one token": ([typed(BF16, 1, 8), typed(I64, 1)], alone(9), None),
    "one row": ([typed(F32, 100, 8), typed(I64, 100)], alone(1), None),
    "one column": ([typed(F32, 40, 1), typed(I64, 40)], alone(12), None),
    "blocks of columns": (
        [typed(BF16, 33, 320), typed(I64, 33)], alone(20), TableTile(4, 128, 2)
    ),
    "a long key": (
        [typed(F32, 1100, 1), typed(I64, 1100)], alone(1 << 21), TableTile(1 << 15, 1, 32)
    ),
    "tied": (TIED, tied, None),
}  # fmt: skip


def fresh(types: list[TensorType], rows: int) -> list[Tensor]:
    made = []
    for one in types:
        shape = [int(d) for d in one.shape]
        if one.dtype in (I32, I64):
            few = torch.randint(0, min(rows, 7), shape)  # runs over several blocks, and rows alone
            any_row = torch.randint(0, rows, shape)
            made.append(torch.where(torch.rand(shape) < 0.5, few, any_row).to(one.dtype))
        else:
            made.append(torch.randn(shape).to(one.dtype))
    return made


@pytest.mark.parametrize("name", CASES)
def test_against_the_interpreter(worker: Worker, name: str) -> None:
    types, build, tile = CASES[name]
    torch.manual_seed(len(name))
    function = function_of(types, build)
    rows = int(function.results[0].shape[0])
    inputs = fresh(types, rows)
    backend = TritonBackend(tile=tile) if tile else BACKEND
    runner = InterpretedKernels([function], worker, [KIND], backend=backend)
    (got,) = runner(0, inputs)
    (wanted,) = interpret(function, inputs, WeightStore(), oracle=True)
    assert got.dtype == function.results[0].dtype and got.shape == wanted.shape
    bound = {BF16: 1.2e-2, F16: 2e-3, F32: 1e-5}[got.dtype]
    assert float((got.double() - wanted).abs().max() / wanted.abs().max()) < bound
    (again,) = runner(0, inputs)
    assert torch.equal(got, again), "sums have one order"


def test_tokens_that_are_all_alike(worker: Worker) -> None:
    """One id everywhere: its sum is that of all blocks of sorted tokens."""
    types = [typed(F32, 300, 8), typed(I64, 300)]
    runner = InterpretedKernels([function_of(types, alone(10))], worker, [KIND])
    grad = torch.randn(300, 8)
    (got,) = runner(0, [grad, torch.full((300,), 3)])
    wanted = torch.zeros(10, 8)
    wanted[3] = grad.double().sum(0).float()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 10])
def test_ids_out_of_range_are_reported(worker: Worker, wrong: int) -> None:
    types = [typed(F32, 40, 8), typed(I64, 40)]
    runner = InterpretedKernels([function_of(types, alone(10))], worker, [KIND])
    ids = torch.arange(40) % 10
    ids[17] = wrong
    with pytest.raises(IndexFailure):
        runner(0, [torch.randn(40, 8), ids])


def test_compiles_for_all_architectures() -> None:
    for name in ("bfloat16", "tied", "a long key"):
        types, build, _ = CASES[name]  # with the chosen tile: some of the others suit interpreters
        for arch in ("sm_80", "sm_90", "sm_100"):
            made = TritonBackend(arch).compile([kernel_of(function_of(types, build), KIND)])
            assert [len(launches) for launches in made.launches.values()] == [3]


def selected(build: Any, types: list[TensorType]) -> list[tuple[str, list[str]]]:
    module = program(build, *types)
    context = Context(generator=TritonBackend())
    PassManager(["select_embedding_gradients"], context, validate=True).run(module)
    return [
        (str(op.attributes["kind"]), [o.name for o in op.regions[0].ops if o.name != "yield"])
        for op in module.main.ops
        if op.name == "kernel"
    ]


def test_the_head_s_gradient_is_added_in_the_kernel() -> None:
    (kernel,) = selected(tied, TIED)
    kind, names = kernel
    assert kind == KIND
    assert sorted(names) == sorted(
        ["slice", "cast", "cast", "mul", "cast", "embedding_backward", "add"]
    )


def test_what_others_read_stays_outside() -> None:
    def build(b: Any, grad: Any, ids: Any, head: Any) -> list[Any]:
        scaled = b.mul(head, head)
        made = b.embedding_backward(grad, ids, rows=10)
        return [b.add(scaled, made), b.exp(scaled)]

    types = [typed(F32, 40, 8), typed(I64, 40), typed(F32, 10, 8)]
    assert selected(build, types) == [(KIND, ["embedding_backward", "add"])]


def test_what_is_left_to_the_library() -> None:
    many = [typed(F32, 1 << 15, 8), typed(I64, 1 << 15)]
    symbolic = [typed(F32, sym("s0"), 8), typed(I64, sym("s0"))]
    wide = [typed(torch.float64, 40, 8), typed(I64, 40)]
    for types in (many, symbolic, wide):
        assert selected(alone(10), types) == []
    assert "select_embedding_gradients" in gpu.KERNEL_PIPELINE
