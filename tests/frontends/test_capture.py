"""Capture: weights, state, structures, names, dynamic sizes, numbers, and its errors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import accel
from accel.errors import CaptureError, InputError, OptionError
from accel.frontends.export import capture
from accel.ir import parse_module, print_module
from tests.frontends.support import assert_close, captured, check


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.embed(x))
        return result


def test_tied_weights_are_stored_once_and_unused_ones_not_at_all() -> None:
    model, x = Tied(), torch.tensor([[1, 2, 3]])
    program = captured(model, x)
    assert program.module.weights.names() == ["embed.weight"]
    assert program.module.weights.origin("embed.weight") == "embed.weight"
    assert_close(program(x), model(x))


class Counter(nn.Module):
    """State of three kinds: written in place, assigned, and batch norm's own."""

    steps: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        result: Tensor = self.norm(x) + self.mean + self.steps
        return result


def test_buffers_that_the_model_writes_are_state() -> None:
    torch.manual_seed(0)
    model, x = Counter(), torch.randn(5, 4)
    program = captured(model, x)
    assert set(program.state) == {
        "steps", "mean", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip
    assert len(program.main.donates) == 5
    assert int(model.steps) == 0, "capturing must not change the model"
    for _ in range(3):
        x = torch.randn(5, 4)
        assert_close(program(x), model(x))
    buffers = dict(model.named_buffers())
    for name, value in program.state.items():
        assert_close(value, buffers[name])


def test_capturing_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {k: (v, v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    captured(model, torch.randn(4, 3))
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])
        assert type(tensor) is type(before[name][0])


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Result:
    logits: Tensor
    extra: dict[str, Any]
    nothing: None = None


def structured(pair: Pair, options: dict[str, Any], scale: float = 1.0) -> Result:
    total = (pair.first + pair.second) * scale
    return Result(total, {"parts": [total, (options["x"], "label", 3)], "kind": torch.float16})


def test_structures_in_and_out() -> None:
    pair, x = Pair(torch.randn(2), torch.randn(2)), torch.randn(3)
    program = captured(structured, pair, {"x": x}, scale=2.0)
    assert [a["name"] for a in program.arguments] == ["pair.0", "pair.1", "options.x"]
    got = program(pair, {"x": x}, scale=2.0)
    assert isinstance(got, Result)
    assert_close(got, structured(pair, {"x": x}, 2.0))
    json.dumps(program.main.metadata)


def test_metadata_survives_text() -> None:
    program = captured(structured, Pair(torch.randn(2), torch.randn(2)), {"x": torch.randn(3)})
    text = print_module(program.module)
    again = parse_module(text)
    assert again.main.metadata == program.main.metadata
    assert print_module(again) == text


def test_a_model_output_with_a_cache_comes_back_as_its_class() -> None:
    transformers = pytest.importorskip("transformers")
    from tests import zoo

    row = zoo.find("llama")
    model, inputs = row.build(), row.make_inputs()
    program = captured(model, use_cache=True, **inputs)
    got = program(use_cache=True, **inputs)
    wanted = model(use_cache=True, **inputs)
    assert type(got) is type(wanted)
    assert isinstance(got.past_key_values, transformers.DynamicCache)
    assert got.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    assert_close(got.past_key_values.layers[1].keys, wanted.past_key_values.layers[1].keys, 1e-4)


def test_a_cache_that_the_model_makes_goes_on_growing() -> None:
    """A cache without a configuration holds the class of its layers."""
    transformers = pytest.importorskip("transformers")

    def model(x: Tensor) -> Any:
        cache = transformers.DynamicCache()
        cache.update(x, x + 1, 0)
        return cache

    x = torch.ones(1, 2, 3, 4)
    found = accel.compile(model)(x)
    found.update(x, x, 1)
    assert torch.equal(found.layers[0].values, x + 1) and torch.equal(found.layers[1].keys, x)


def test_a_cache_is_an_input_too() -> None:
    pytest.importorskip("transformers")
    from tests import zoo

    row = zoo.find("llama")
    model, ids = row.build(), row.make_inputs()["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        more = model(input_ids=ids, use_cache=True).past_key_values
        step = {"input_ids": ids[:, :1], "use_cache": True}
        program = captured(model, past_key_values=cache, **step)
        got = program(past_key_values=cache, **step)
        wanted = model(past_key_values=more, **step)
    assert_close(got.logits, wanted.logits, 1e-4)
    assert got.past_key_values.get_seq_length() == ids.shape[1] + 1


def test_constants_of_the_code_are_weights_or_fills() -> None:
    table = torch.arange(6.0)

    def function(x: Tensor) -> Tensor:
        return x + table + torch.tensor([1.0, 2, 3, 4, 5, 6]) * torch.tensor(3.0)

    program = check(function, torch.randn(6))
    assert program.ops.count("constant") == 2
    assert program.ops.count("full") == 1


def test_numbers_known_at_run_time() -> None:
    check(lambda x: x * x.sum().item() + x.max().item() ** 2 / 3, torch.rand(4))
    check(lambda x: (x.shape[0], x * 2, x.tolist()), torch.rand(3))


# Dynamic sizes ------------------------------------------------------------------------------------


def test_ranges_come_from_the_user_and_from_the_model() -> None:
    position = nn.Embedding(16, 4)

    def function(x: Tensor) -> Tensor:
        return x + position.weight[: x.shape[1]]

    batch = torch.export.Dim("batch", min=2, max=8)
    program = captured(
        function, torch.randn(2, 5, 4), dynamic_shapes={"x": {0: batch, 1: "length"}}
    )
    assert (program.main.symbols["batch"].min, program.main.symbols["batch"].max) == (2, 8)
    assert program.main.symbols["length"].max == 16
    x = torch.randn(7, 16, 4)
    assert_close(program(x), function(x))


def test_conditions_between_sizes_become_guards() -> None:
    def function(x: Tensor) -> Tensor:
        return x.reshape(-1, 4).sum(0) if x.shape[0] % 4 == 0 else x[:4]

    program = captured(function, torch.randn(8), dynamic_shapes=({0: "n"},))
    assert program.main.metadata["guards"] == [
        {"relation": "==", "left": "Mod(n, 4)", "right": "0"}
    ]
    x = torch.randn(20)
    assert_close(program(x), function(x))


def test_equal_names_are_one_size() -> None:
    program = captured(
        lambda x, y: x + y,
        torch.randn(3, 2),
        torch.randn(3, 2),
        dynamic_shapes=({0: "n"}, {0: "n"}),
    )
    assert list(program.main.symbols) == ["n"]


def test_a_fixed_size_is_an_error_with_the_place() -> None:
    def function(x: Tensor) -> Tensor:
        total = x[0]
        for i in range(x.shape[0]):
            total = total + x[i]
        return total

    with pytest.raises(CaptureError, match="fixes it to 3") as caught:
        captured(function, torch.randn(3, 2), dynamic_shapes=({0: "n"},))
    assert caught.value.where.startswith(f"{__file__}:")
    assert caught.value.advice


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"z": {0: "n"}}, "not passed"),
        (({0: "n"}, {0: "n"}), "2 entries"),
        ({"x": {1: "n"}}, "size 1"),
        ({"x": {5: "n"}}, "axis 5 of 'x', which has 2 axes"),
        ({"x": {-1: "n"}}, "axis -1"),
        ({"x": {0: 2.5}}, r"axis 0 with the size 2\.5"),
        ({"x": 3}, "3 for a tensor"),
    ],
)
def test_bad_dynamic_shapes(spec: Any, message: str) -> None:
    def function(x: Tensor) -> Tensor:
        return x * 2

    with pytest.raises(OptionError, match=message):
        captured(function, torch.randn(3, 1), dynamic_shapes=spec)


# Errors -------------------------------------------------------------------------------------------


def branch(x: Tensor) -> Tensor:
    if x.sum() > 0:  # line of the branch
        return x + 1
    return x


@pytest.mark.parametrize(
    "function, message",
    [
        (branch, "needs the value of a tensor"),
        (lambda x: x[: int(x.sum())], "needs the value of a tensor"),
        (lambda x: torch.nonzero(x) * 2, "size depends"),
        (lambda x: x[x > 0], "size depends"),
        (lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), "control flow"),
        (lambda x: x.to_sparse(), "layout"),
        (lambda x: x.clone().resize_(2), "another size"),
        (lambda x: x @ x, "failed while it was traced"),
        (lambda x: x.clone().unsqueeze(0).expand(3, 4).zero_(), "."),
    ],
)
def test_refusals_say_what_where_and_what_to_do(function: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message) as caught:
        capture(function, (torch.rand(4, 1)[:, 0].clone() if message == "." else torch.rand(4, 3),))
    assert __file__ in caught.value.where
    assert caught.value.id == "ACCEL010"


def test_tensors_that_no_program_holds() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(CaptureError, match="an input of class NestedTensor"):
        capture(lambda x: x * 2, (nested,))
    with pytest.raises(CaptureError, match="'weight' of a lazy module has no size yet"):
        capture(torch.nn.LazyLinear(4), (torch.ones(2, 3),))
    with pytest.raises(CaptureError, match=r"torch\.qint8"):
        capture(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), (torch.ones(2),))


def test_the_line_of_a_branch_is_told() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(branch, (torch.rand(3),))
    line = branch.__code__.co_firstlineno + 1
    assert caught.value.where.startswith(f"{__file__}:{line}")
    assert "torch.where" in caught.value.advice


def test_inputs_that_are_no_data_are_refused() -> None:
    with pytest.raises(InputError, match="function"):
        capture(lambda x, f: f(x), (torch.rand(3), torch.sin))


def test_training_mode_keeps_randomness() -> None:
    torch.manual_seed(0)
    x = torch.ones(100, 100)
    program = captured(nn.Dropout(0.25), x)
    torch.manual_seed(1)
    first = program(x)
    torch.manual_seed(1)
    assert torch.equal(program(x), first)
    torch.manual_seed(1)
    assert torch.equal(F.dropout(x, 0.25), first), "the same draws as eager"
    assert abs(float((first == 0).float().mean()) - 0.25) < 0.02
    assert not torch.equal(program(x), first)
