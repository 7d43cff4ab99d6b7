"""Inputs and models on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from accel.cli.inputs import (
    Size,
    dynamic_shapes,
    example_inputs,
    make_tensor,
    parse_input,
)
from accel.cli.models import load_model
from accel.errors import CaptureError, InputError, OptionError


class TwoInputs(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return x if mask is None else x * mask


def test_a_spec_with_everything() -> None:
    spec = parse_input("ids:i64[1, len?128:8..2048, ?4]=0..49152")
    assert (spec.name, spec.dtype, spec.shape) == ("ids", torch.int64, (1, 128, 4))
    assert spec.sizes[1] == Size(128, True, "len", 8, 2048)
    assert spec.sizes[2] == Size(4, True) and spec.sizes[0] == Size(1)
    assert parse_input("f32[]").shape == () and parse_input("f32[8]").name == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ids", "cannot read the input"),
        ("ids:i65[1]", "no dtype 'i65'"),
        ("ids:i64[1,x]", "cannot read the size"),
        ("ids:i64[4:2..8]", "fixed size"),
        ("ids:i64[-1]", "cannot read the size"),
    ],
)
def test_wrong_specs_say_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse_input(text)


def test_values_follow_the_spec_and_the_seed(tmp_path: Path) -> None:
    ids = make_tensor(parse_input("i64[1000]=5..9"), 0)
    assert (ids.min(), ids.max(), ids.dtype) == (5, 8, torch.int64)
    floats = make_tensor(parse_input("f16[1000]=-1..1"), 0)
    assert floats.dtype == torch.float16 and floats.abs().max() <= 1
    assert torch.equal(make_tensor(parse_input("f32[8]"), 3), make_tensor(parse_input("f32[8]"), 3))
    assert not torch.equal(
        make_tensor(parse_input("f32[8]"), 3), make_tensor(parse_input("f32[8]"), 4)
    )
    assert make_tensor(parse_input("bool[4]=ones"), 0).all()
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.float32).reshape(2, 3))
    given = make_tensor(parse_input(f"f32[2,3]={tmp_path / 'x.npy'}"), 0)
    assert torch.equal(given, torch.arange(6.0).reshape(2, 3))
    with pytest.raises(InputError, match="the spec says"):
        make_tensor(parse_input(f"f32[3,2]={tmp_path / 'x.npy'}"), 0)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(OptionError, match="cannot read"):
        make_tensor(parse_input(f"f32[1]={tmp_path / 'x.npy'}"), 0)


def test_positional_and_named_inputs() -> None:
    specs = [parse_input("f32[2,4]"), parse_input("mask:f32[2,4]")]
    args, kwargs = example_inputs(specs)
    assert len(args) == 1 and list(kwargs) == ["mask"]


def test_dynamic_sizes() -> None:
    specs = [parse_input("f32[b?2,?4]"), parse_input("mask:f32[b?2,4]")]
    shapes = dynamic_shapes(TwoInputs(), specs)
    assert shapes is not None
    assert shapes["x"][0] is shapes["mask"][0] and shapes["x"][1] is Dim.AUTO
    assert dynamic_shapes(TwoInputs(), [parse_input("f32[2,4]")]) is None
    with pytest.raises(OptionError, match="no argument 'y'"):
        dynamic_shapes(TwoInputs(), [parse_input("y:f32[?2]")])


def test_models_by_name(tmp_path: Path) -> None:
    source = "import torch\ndef build():\n    return torch.nn.Linear(2, 3), torch.ones(1, 2)\n"
    more = "def sized(size): pass\n"
    (tmp_path / "mine.py").write_text(source + "model = torch.nn.ReLU()\nnumber = 3\n" + more)
    built = load_model(f"{tmp_path}/mine.py:build")
    assert isinstance(built.model, nn.Linear) and not built.model.training
    assert built.inputs is not None and built.inputs[0].shape == (1, 2)
    assert isinstance(load_model(f"{tmp_path}/mine.py:model").model, nn.ReLU)
    for spec, said in [
        (f"{tmp_path}/mine.py:number", "gave a int"),
        (f"{tmp_path}/mine.py:absent", "has no 'absent'"),
        (f"{tmp_path}/none.py:build", "there is no file"),
        ("no_such_module:build", "there is no module"),
        ("llm-smollm", "names no model"),
        (f"{tmp_path}/mine.py", "mine.py:NAME"),
        (f"{tmp_path}/mine.py:sized", "without arguments: missing a required argument: 'size'"),
    ]:
        with pytest.raises(OptionError, match=said):
            load_model(spec)


def test_a_users_own_mistake_has_its_place(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def build():\n    raise KeyError('lost')\n")
    (tmp_path / "absent.py").write_text("import no_such_package\n")
    with pytest.raises(CaptureError, match="'build' failed: KeyError: 'lost'") as caught:
        load_model(f"{tmp_path}/wrong.py:build")
    assert caught.value.where.endswith("wrong.py:2")
    with pytest.raises(CaptureError, match="no_such_package"):
        load_model(f"{tmp_path}/absent.py:build")


@pytest.mark.parametrize("text", ["f32[2]=3..1", "i64[2]=5..5", "i64[2]=1.5..3", "f32[2]=1e..3"])
def test_ranges_without_a_value(text: str) -> None:
    with pytest.raises(OptionError, match="is no range"):
        make_tensor(parse_input(text), 0)


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a GGUF file nor a folder"):
        load_model(str(tmp_path))
