"""Writing and reading artifacts; the file is what other tools expect."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
import torch
from safetensors.torch import load as load_safetensors

from accel.errors import ArtifactError, InputError, OptionError
from accel.ir.storage import pack_sub_byte
from accel.runtime.archive import Archive, ArchiveWriter
from accel.runtime.artifact import Artifact, Contents, write_artifact
from accel.runtime.loader import load
from accel.runtime.manifest import TargetSpec
from accel.runtime.subbyte import unpack
from accel.runtime.weights import StoredWeight, flat_bytes, memory_of
from tests.runtime.models import example_inputs, expected, stored, write_small
from tests.runtime.support import Plan, operand, shared_object


@pytest.mark.parametrize("kernels", [False, True])
def test_round_trip(tmp_path: Path, kernels: bool) -> None:
    path = tmp_path / "m.accel"
    contents = write_small(path, kernels)
    with Artifact(path) as a:
        assert a.manifest.functions == dict(contents.functions)
        assert a.manifest.target == contents.target
        assert a.stages() == ["captured", "kernels"]
        assert a.ir("captured") == contents.ir["captured"]
        assert (a.signature is not None) == kernels
    model = load(path)
    inputs = example_inputs()
    result = model(inputs["x"], ids=inputs["ids"])
    y, rows = expected(kernels, **inputs)
    torch.testing.assert_close(result["y"], y)
    torch.testing.assert_close(result["rows"][0], rows)
    assert result["rows"][1] == "done"


def test_any_zip_tool_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "m.accel"
    contents = write_small(path, kernels=True)
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
        names = z.namelist()
        assert {"manifest.json", "signature.json", "weights.safetensors"} < set(names)
        weights = load_safetensors(z.read("weights.safetensors"))
        assert json.loads(z.read("manifest.json"))["format"] == 1
        offsets = [i.header_offset for i in z.infolist()]
        assert all(i.compress_type == zipfile.ZIP_STORED for i in z.infolist())
    assert offsets == sorted(offsets)
    assert weights.keys() == contents.weights.keys()
    for name, weight in contents.weights.items():
        assert torch.equal(weights[name], weight.load())


def test_weights_are_aligned_and_mapped(tmp_path: Path) -> None:
    """Also odd sizes, all dtypes, scalars and empty tensors."""
    tensors = {
        f"{dtype}".replace("torch.", ""): torch.arange(7).to(dtype)
        for dtype in (
            torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
            torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
            torch.float8_e4m3fn, torch.float8_e5m2,
        )
    }  # fmt: skip
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "big": torch.randn(64, 16)}
    tensors["strided"] = torch.randn(6, 4).t()
    nibbles = torch.arange(-8, 7, dtype=torch.int8).reshape(3, 5)
    weights = stored(tensors)
    packed = pack_sub_byte(nibbles, torch.int4)
    weights["int4"] = StoredWeight(torch.int4, (3, 5), lambda: packed)
    p = Plan()
    p.done(p.input(1))
    write_artifact(tmp_path / "w.accel", Contents({"main": p.done(0)}, weights, TargetSpec("cpu")))
    source = Artifact(tmp_path / "w.accel").weights()
    for name, tensor in tensors.items():
        read = source.tensor(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert bytes(memory_of(flat_bytes(read))) == bytes(memory_of(flat_bytes(tensor)))
        assert read.data_ptr() % 64 == 0 or read.numel() == 0
    assert torch.equal(unpack(source.tensor("int4"), torch.int4, (3, 5)), nibbles)
    big = source.tensor("big")
    source.release("big")
    assert torch.equal(big, tensors["big"])  # read again from the file
    with pytest.raises(ArtifactError, match="no weight 'other'"):
        source.tensor("other")


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_packed_weights_mean_the_same_as_in_the_ir(bits: int) -> None:
    for kind in ("uint", "int") if bits > 1 else ("uint",):
        dtype = getattr(torch, f"{kind}{bits}")
        low, high = (0, 1 << bits) if kind == "uint" else (-(1 << bits - 1), 1 << bits - 1)
        for shape in ((5, 7), (16,), (2, 3, 8), (1, 1)):
            values = torch.randint(low, high, shape, dtype=getattr(torch, f"{kind}8"))
            assert torch.equal(unpack(pack_sub_byte(values, dtype), dtype, shape), values)


def test_packed_weights_run(tmp_path: Path) -> None:
    """An ATen step gets one element per entry."""
    values = torch.randint(-8, 8, (4, 6)).to(torch.int8)
    p = Plan()
    x = p.input(4, 6)
    q = p.value("weight", [4, 6], "int4", name="q")
    wide = p.aten("aten::_to_copy", [q], [4, 6], operand(0), dtype={"dtype": "float32"},
                  result="float32", meaning=lambda a: a)  # fmt: skip
    y = p.aten("aten::mul.Tensor", [x, wide], [4, 6], operand(0), operand(1), meaning=torch.mul)
    packed = pack_sub_byte(values, torch.int4)
    weights = {"q": StoredWeight(torch.int4, (4, 6), lambda: packed)}
    write_artifact(tmp_path / "q.accel", Contents({"main": p.done(y)}, weights, TargetSpec("cpu")))
    given = torch.randn(4, 6)
    assert torch.equal(load(tmp_path / "q.accel")(given)[0], given * values)


def test_equal_contents_make_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_small(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out" / "m.accel"
    path.parent.mkdir()
    contents = write_small(path)
    before = path.read_bytes()

    def fails() -> torch.Tensor:
        raise OSError(28, "No space left on device")

    late = {**contents.weights, "late": StoredWeight(torch.float32, (1,), fails)}
    wrong = {"late": StoredWeight(torch.float32, (2,), lambda: torch.zeros(1))}
    bad = [
        dataclasses.replace(contents, weights=late),
        dataclasses.replace(contents, weights=wrong),
        dataclasses.replace(contents, report={"x": object()}),
        dataclasses.replace(contents, ir={"../x": "text"}),
        dataclasses.replace(contents, functions={}),
        dataclasses.replace(contents, host_code="missing.so"),
    ]
    for c in bad:
        with pytest.raises(ArtifactError):
            write_artifact(path, c)
    with pytest.raises(ArtifactError, match="cannot write"):
        write_artifact(tmp_path / "no" / "m.accel", contents)
    assert os.listdir(path.parent) == ["m.accel"]
    assert path.read_bytes() == before


def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """SIGKILL in the middle: the old artifact still loads."""
    path = tmp_path / "m.accel"
    write_small(path)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from accel.runtime import artifact\n"
        "from tests.runtime.models import write_small\n"
        "artifact._Packer._pack_golden = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_small(Path({str(path)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    inputs = example_inputs()
    torch.testing.assert_close(load(path)(**inputs)["y"], expected(False, **inputs)[0])


class TestSignature:
    """The model's own signature: any way of passing arguments, and errors that name them."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Any:
        write_small(tmp_path / "m.accel")
        return load(tmp_path / "m.accel")

    def test_ways_to_call(self, model: Any) -> None:
        i = example_inputs()
        y, _ = expected(False, **i)
        for result in (
            model(i["x"], i["ids"]),
            model(i["x"], ids=i["ids"]),
            model(ids=i["ids"], x=i["x"]),
            model(i["x"], ids=i["ids"], scale=None),
        ):
            torch.testing.assert_close(result["y"], y)

    @pytest.mark.parametrize(
        ("args", "kwargs", "says"),
        [
            ((), {}, "missing a required argument: 'x'"),
            ((1,), {}, "missing a required argument: 'ids'"),
            ((1, 2, 3), {}, "too many positional arguments"),
            ((), {"x": 1, "ids": 2, "other": 3}, "unexpected keyword argument 'other'"),
            ((), {"x": 1, "ids": 2, "scale": 2.0}, "compiled without a value for 'scale'"),
            ((1.5,), {"ids": 2}, "argument 'x': expected a tensor, got 1.5"),
            (([torch.zeros(2)],), {"ids": 2}, "argument 'x': expected a tensor, got a list of 1"),
        ],
    )
    def test_errors(self, model: Any, args: Any, kwargs: Any, says: str) -> None:
        with pytest.raises(InputError, match=says):
            model(*args, **kwargs)

    def test_report_explain_and_ir(self, model: Any) -> None:
        report = model.report()
        assert report["steps"] == {"main": {"library": 1, "aten": 1}}
        assert report["fallbacks"] == {"aten::embedding": 1}
        assert report["bytes"]["weights.safetensors"] > 0
        assert model.explain().splitlines()[1].split() == [
            "0", "fold", "exact", "2", "9", "->", "7", "250.0",
        ]  # fmt: skip
        assert model.ir() == model.ir("kernels") == "module { func @main }\n"
        with pytest.raises(OptionError, match="no IR stage 'kernel'") as caught:
            model.ir("kernel")
        assert "kernels" in caught.value.advice


def test_state_is_kept_between_calls(tmp_path: Path) -> None:
    """A counter: argument, result and donation; two entry points share it."""
    plans = {}
    for name, symbol in (("add", "add"), ("mul", "mul")):
        p = Plan(name)
        x, total = p.input(4, name="x"), p.input(4, name="total")
        new = p.kernel(symbol, total, x)
        p.donates = {1: 1}
        plans[name] = p.done(p.kernel("twice", new), new)
        plans[name].metadata = {
            "arguments": [
                {"name": "x", "kind": "input"},
                {"name": "total", "kind": "state", "initial": "total"},
            ],
            "results": [{"kind": "output"}, {"kind": "state", "argument": 1}],
        }
    contents = Contents(
        plans, stored({"total": torch.ones(4)}), TargetSpec("cpu"),
        kernels={"k.so": shared_object()}, host_code="k.so",
    )  # fmt: skip
    write_artifact(tmp_path / "s.accel", contents)
    model = load(tmp_path / "s.accel")
    other = load(tmp_path / "s.accel")
    x = torch.full((4,), 3.0)
    assert model(x)[0].tolist() == [8.0] * 4  # total = 4
    assert model.entry_points["mul"](x)[0].tolist() == [24.0] * 4  # total = 12
    assert model.state()["total"].tolist() == [12.0] * 4
    assert other(x)[0].tolist() == [8.0] * 4
    model.reset_state()
    assert model(x)[0].tolist() == [8.0] * 4
    with pytest.raises(InputError, match="takes 1"):
        model(x, x)


def test_inputs_that_the_model_writes(tmp_path: Path) -> None:
    p = Plan()
    x = p.input(4, 4, name="x")
    new = p.kernel("reverse", x)
    p.donates = {1: 0}
    plan = p.done(p.kernel("twice", new), new)
    plan.metadata = {
        "arguments": [{"name": "x", "kind": "input"}],
        "results": [{"kind": "output"}, {"kind": "mutation", "argument": 0}],
    }
    contents = Contents(
        {"main": plan}, {}, TargetSpec("cpu"), kernels={"k.so": shared_object()}, host_code="k.so"
    )
    write_artifact(tmp_path / "i.accel", contents)
    model = load(tmp_path / "i.accel")
    for given in (torch.arange(16.0).reshape(4, 4), torch.arange(16.0).reshape(4, 4).t()):
        wanted = given.reshape(-1).flip(0).reshape(4, 4)
        (doubled,) = model(given)
        assert torch.equal(given, wanted)
        assert torch.equal(doubled, 2 * wanted)


class _Sparse:
    """A file in which zeros take no room."""

    zeros = bytes(64 << 20)

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek = file, file.seek

    def write(self, data: bytes) -> int:
        if data is self.zeros:
            self._file.seek(len(data), os.SEEK_CUR)
            return len(data)
        return self._file.write(data)


def test_files_over_four_gigabytes(tmp_path: Path) -> None:
    """Sizes and offsets beyond 32 bits."""
    path = tmp_path / "big.zip"
    count = (5 << 30) // len(_Sparse.zeros)
    with path.open("wb") as file:
        writer = ArchiveWriter(cast(BinaryIO, _Sparse(file)))
        writer.add("hole", itertools.repeat(_Sparse.zeros, count))
        entry = writer.add("last", [b"after the hole"])
        writer.close()
    assert entry.offset > 5 << 30
    with zipfile.ZipFile(path) as z:
        assert z.read("last") == b"after the hole"
        assert z.getinfo("hole").file_size == 5 << 30
    with Archive(path) as a:
        assert a.read("last", 100) == b"after the hole"
        with pytest.raises(ArtifactError, match="at most 1000 are allowed"):
            a.read("hole", 1000)
