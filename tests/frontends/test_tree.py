"""Descriptions of nested inputs and outputs."""

from __future__ import annotations

import json
import re
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import accel
from accel import tree
from accel.errors import InputError

Point = namedtuple("Point", "x y")


@dataclass
class Box:
    inside: Any
    label: str = "box"


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


A, B = torch.ones(2), torch.zeros(3)

VALUES: list[Any] = [
    A,
    (A, [B, None], {"k": A, 3: (B,)}),
    Point(A, 2),
    OrderedDict(b=A, a=B),
    Box(Box(A)),
    {"dtype": torch.int4, "device": torch.device("cpu"), "z": 1 + 2j, "f": 0.5, "t": True},
    {"format": torch.channels_last, "layout": torch.strided},
    torch.Size([2, 3]),
    [],
    torch.return_types.max([A, B]),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_there_and_back(value: Any) -> None:
    leaves, description = tree.flatten(value)
    again = tree.unflatten(json.loads(json.dumps(description)), leaves)
    assert repr(again) == repr(tuple(value) if type(value) is torch.Size else value)
    assert type(again) is type(value) or type(value) is torch.Size


def test_objects_come_back_with_their_attributes() -> None:
    leaves, description = tree.flatten(Plain([A, 1]))
    again = tree.unflatten(description, leaves)
    assert isinstance(again, Plain) and again.value[0] is A


def test_a_class_that_is_not_loaded_becomes_a_dict() -> None:
    leaves, description = tree.flatten(Box(A))
    assert tree.unflatten(description, leaves, lambda name: None) == {"inside": A, "label": "box"}


def test_classes_can_be_given() -> None:
    leaves, description = tree.flatten(Box(A))
    text = json.dumps(description).replace(Box.__module__, "elsewhere")
    again = tree.unflatten(json.loads(text), leaves, {"elsewhere:Box": Box})
    assert isinstance(again, Box)


def test_leaves_are_numbered_in_order() -> None:
    leaves, description = tree.flatten(({"b": A, "a": B}, A))
    assert [t is x for t, x in zip(leaves, (A, B, A))] == [True] * 3
    assert description == {
        "tuple": [
            {"dict": [[{"value": "b"}, {"tensor": 0}], [{"value": "a"}, {"tensor": 1}]]},
            {"tensor": 2},
        ]
    }


def test_what_is_no_data_is_refused() -> None:
    with pytest.raises(InputError, match="function"):
        tree.flatten([lambda: 0])
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InputError, match="contains itself"):
        tree.flatten(loop)


@pytest.mark.parametrize(
    "node",
    [
        {"tensor": 9},
        {"what": 1},
        {},
        {"dtype": "nn"},
        {"torch": "nn"},
        {"class": "m:C"},
        {"list": 3},
    ],
    ids=str,
)
def test_malformed_descriptions_are_typed_errors(node: Any) -> None:
    with pytest.raises(InputError):
        tree.unflatten(node, [A])


@pytest.mark.parametrize(
    "wanted, got, message",
    [
        ((A, 1), (A, 2), r"\[1\]: expected 1, got 2"),
        ({"x": [A]}, {"x": [None]}, r"x\[0\]: expected a tensor, got None"),
        ([A], [A, A], "a list of 1, got a list of 2"),
        ({"x": A}, {"y": A}, "a dict of 'x', got a dict of 'y'"),
    ],
    ids=str,
)
def test_differences_are_named(wanted: Any, got: Any, message: str) -> None:
    difference = tree.describe_difference(tree.flatten(wanted)[1], tree.flatten(got)[1])
    assert re.search(message, difference), difference
    assert tree.describe_difference(tree.flatten(wanted)[1], tree.flatten(wanted)[1]) == ""


def test_leaves_in_the_order_of_another_description() -> None:
    one = {"a": torch.ones(1), "b": [torch.zeros(2), 3], "c": None}
    other = {"c": None, "b": [torch.ones(2), 3], "a": torch.zeros(1)}
    (leaves, wanted), (given, got) = tree.flatten(one), tree.flatten(other)
    aligned = tree.align(wanted, json.loads(json.dumps(got, sort_keys=True)), given)
    assert aligned is not None and aligned[0] is other["a"] and aligned[1] is other["b"][0]
    for value in (3.0, True, "3", 4):
        _, differs = tree.flatten({**one, "b": [torch.zeros(2), value]})
        assert tree.align(wanted, differs, leaves) is None
        assert ".b[1]: expected 3, got" in tree.describe_difference(wanted, differs, "x")
    _, keys = tree.flatten({"a": torch.ones(1), "d": 1})
    said = tree.describe_difference(wanted, keys, "x")
    assert said == "x: expected a dict of 'a', 'b', 'c', got a dict of 'a', 'd'"


@pytest.mark.parametrize("packaged", [False, True])
def test_calls_of_a_compiled_model(packaged: bool, tmp_path: Path) -> None:
    """A dict in another order is the same call; a number of another type is not."""

    def model(x: dict[str, Tensor], scale: Any = 3) -> Tensor:
        return (x["a"] - x["b"]) * scale

    a, b = torch.tensor([5, 6]), torch.tensor([1, 1])
    made: Any = accel.compile(model, inputs=({"a": a, "b": b},), kwargs={"scale": 3})
    if packaged:
        made.save(tmp_path / "m.accel")
        made = accel.load(tmp_path / "m.accel")
    assert torch.equal(made({"b": b, "a": a}, scale=3), (a - b) * 3)
    with pytest.raises(InputError, match=r"'scale': expected 3, got 3\.0"):
        made({"b": b, "a": a}, scale=3.0)
