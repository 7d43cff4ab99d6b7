"""Descriptions of nested inputs and outputs."""

from __future__ import annotations

import json
import re
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

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
        ({"x": A}, {"y": A}, "a dict of 1"),
    ],
    ids=str,
)
def test_differences_are_named(wanted: Any, got: Any, message: str) -> None:
    difference = tree.describe_difference(tree.flatten(wanted)[1], tree.flatten(got)[1])
    assert re.search(message, difference), difference
    assert tree.describe_difference(tree.flatten(wanted)[1], tree.flatten(wanted)[1]) == ""
