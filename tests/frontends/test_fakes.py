"""Remembered results look like PyTorch's own, and never answer for another call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from accel.frontends.calls import storage_key
from accel.frontends.fakes import ResultMemo, fake_weights

aten = torch.ops.aten


def look(result: Any, inputs: list[Tensor]) -> Any:
    """All that a model can see of fake results: metadata, and which input they alias or are."""
    if isinstance(result, (tuple, list)):
        return [type(result), *(look(r, inputs) for r in result)]
    aliased = [storage_key(result) == storage_key(t) for t in inputs]
    same = [result is t for t in inputs]
    layout = (result.shape, result.stride(), result.storage_offset(), result.dtype, result.device)
    return (*layout, aliased, same)


CALLS: list[tuple[str, Any, Callable[[list[Tensor]], tuple[Any, ...]]]] = [
    ("linear", aten.linear.default, lambda t: (t[0], t[1])),
    ("matmul", aten.matmul.default, lambda t: (t[0], t[1].t())),
    ("add", aten.add.Tensor, lambda t: (t[0], 2)),
    ("cast", aten.to.dtype, lambda t: (t[0], torch.float16)),
    ("no cast", aten.to.dtype, lambda t: (t[0], torch.float32)),
    ("contiguous", aten.contiguous.default, lambda t: (t[0],)),
    ("view", aten.view.default, lambda t: (t[0], [6, 4])),
    ("reshape", aten.reshape.default, lambda t: (t[0], [24])),
    ("reshape that copies", aten.reshape.default, lambda t: (t[0].transpose(0, 1), [24])),
    ("permute", aten.permute.default, lambda t: (t[0], [1, 0, 2])),
    ("slice", aten.slice.Tensor, lambda t: (t[0], 1, 1, 3)),
    ("expand", aten.expand.default, lambda t: (t[0], [5, 2, 3, 4])),
    ("unbind", aten.unbind.int, lambda t: (t[0], 1)),
    ("split", aten.split.Tensor, lambda t: (t[0], 2, 1)),
    ("cat", aten.cat.default, lambda t: ([t[0], t[0]], 1)),
    ("topk", aten.topk.default, lambda t: (t[0], 2)),
    ("real", aten.sum.dim_IntList, lambda t: (t[0], [1], True)),
]


@pytest.mark.parametrize("name, op, arguments", CALLS, ids=[c[0] for c in CALLS])
def test_remembered_results_are_like_new_ones(
    name: str, op: Any, arguments: Callable[[list[Tensor]], tuple[Any, ...]]
) -> None:
    memo = ResultMemo()
    with torch.no_grad(), FakeTensorMode():
        looks = []
        for _ in range(3):
            inputs = [torch.empty(2, 3, 4), torch.empty(5, 4)]
            args = arguments(inputs)
            seen = [a for a in args if isinstance(a, Tensor)] + inputs
            looks.append((look(memo.call(op, args, {}), seen), look(op(*args), seen)))
    assert all(remembered == own == looks[0][1] for remembered, own in looks)


SYMBOLIC: dict[str, tuple[Any, Callable[[Tensor], tuple[Any, ...]]]] = {
    "linear": (aten.linear.default, lambda x: (x, torch.empty(5, 4))),
    "add": (aten.add.Tensor, lambda x: (x, x)),
    "view": (aten.view.default, lambda x: (x, [2 * x.shape[1], 2, 2])),
    "transpose": (aten.transpose.int, lambda x: (x, 1, 2)),
    "slice": (aten.slice.Tensor, lambda x: (x, 1, 1, x.shape[1] - 1)),
    "cat": (aten.cat.default, lambda x: ([x, x[:, :2]], 1)),
    "split": (aten.split.Tensor, lambda x: (x, 2, 2)),
    "arange": (aten.arange.start_step, lambda x: (0, x.shape[1], 2)),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_results_of_unknown_sizes_are_like_new_ones(name: str) -> None:
    op, arguments = SYMBOLIC[name]
    memo, mode = ResultMemo(), FakeTensorMode(shape_env=ShapeEnv())
    sizes = [DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)  # type: ignore[var-annotated]
    given = mode.from_tensor(torch.empty(2, 7, 4), symbolic_context=context)
    other = mode.from_tensor(torch.empty(2, 11, 4), symbolic_context=context)
    with torch.no_grad(), mode:
        for x in (given, given + 1, other, given.transpose(0, 2).transpose(0, 2)):
            args = arguments(x)
            seen = [a for a in args if isinstance(a, Tensor)]
            for _ in range(2):
                assert told(memo.call(op, args, {}), seen) == told(op(*args), seen)


def told(result: Any, inputs: list[Tensor]) -> str:
    """`look` as text, with the expressions of sizes, and the size of a result's memory."""
    memory = result.untyped_storage().nbytes() if isinstance(result, Tensor) else ""
    return f"{look(result, inputs)} {memory}"


def remember(op: Any, *calls: tuple[Any, ...]) -> list[Any]:
    memo = ResultMemo()
    return [memo.call(op, args, {}) for args in calls]


def test_equal_numbers_of_other_types_are_other_calls() -> None:
    with FakeTensorMode():
        x = torch.empty(3, dtype=torch.int64)
        a, b, c = remember(aten.mul.Tensor, (x, 2), (x, 2.0), (x, True))
    assert [t.dtype for t in (a, b, c)] == [torch.int64, torch.float32, torch.int64]


def test_the_default_dtype_counts() -> None:
    memo = ResultMemo()
    with FakeTensorMode():
        x = torch.empty(3, dtype=torch.int64)
        memo.call(aten.mul.Tensor, (x, 2.0), {})
        torch.set_default_dtype(torch.float64)
        try:
            assert memo.call(aten.mul.Tensor, (x, 2.0), {}).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_which_argument_is_aliased_counts() -> None:
    """`view_as` shows its first argument, also where both were one tensor in an earlier call."""
    with FakeTensorMode():
        x, y = torch.empty(2, 3), torch.empty(2, 3)
        for first in ((x, x), (x, y)):
            _, second = remember(aten.view_as.default, first, (y, x))
            assert storage_key(second) == storage_key(y)


def test_writes_and_values_are_not_remembered() -> None:
    with torch.no_grad(), FakeTensorMode():
        x, y = torch.empty(3), torch.empty(3)
        assert remember(aten.add_.Tensor, (x, 1), (y, 1))[1] is y
        constant = torch.tensor(3)
        memo = ResultMemo()
        memo.call(aten.detach.default, (torch.empty((), dtype=torch.int64),), {})
        kept = memo.call(aten.detach.default, (constant,), {})
        assert int(kept) == 3


def test_tied_weights_are_one_fake_and_views_share_memory() -> None:
    whole = torch.randn(4, 6)
    weights = {"a": nn.Parameter(whole), "b": torch.randn(3), "c": whole[1:], "d": torch.ones(())}
    weights["tied"] = weights["b"]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made = fake_weights(mode, weights)
    assert made["tied"] is made["b"]
    assert storage_key(made["a"]) == storage_key(made["c"]) != storage_key(made["b"])
    for name, tensor in weights.items():
        fake = made[name]
        assert (fake.shape, fake.stride(), fake.dtype) == (
            tensor.shape, tensor.stride(), tensor.dtype
        )  # fmt: skip
        assert fake.storage_offset() == tensor.storage_offset() and not fake.requires_grad
