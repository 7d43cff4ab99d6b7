"""Damaged and hostile artifacts: a typed error, or the right answer; never anything else."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from accel.errors import AccelError, ArtifactError
from accel.runtime import trust
from accel.runtime.archive import ArchiveWriter
from accel.runtime.artifact import Artifact, Contents, write_artifact
from accel.runtime.convention import Record, classes_of_data
from accel.runtime.loader import load
from accel.runtime.manifest import TargetSpec
from accel.runtime.schema import dump, parse
from accel.runtime.verify import verify_artifact
from accel.tree import unflatten
from tests.runtime.models import example_inputs, expected, write_small
from tests.runtime.support import Plan, host_code, operand


def _outcome(path: Path, kernels: bool) -> str:
    """ "caught", or "harmless" if the answer is right; fails for everything else."""
    inputs = example_inputs()
    try:
        # The kernels come from the test: damaged code is refused before it is loaded.
        result = load(path, load_host=lambda data: host_code())(inputs["x"], ids=inputs["ids"])
    except AccelError:
        return "caught"
    y, rows = expected(kernels, **inputs)
    assert torch.equal(result["y"], y) or torch.allclose(result["y"], y, rtol=1e-5, atol=1e-6)
    assert torch.equal(result["rows"][0], rows)
    assert result["rows"][1] == "done"
    return "harmless"


def _regions(path: Path) -> dict[str, range]:
    with Artifact(path) as a:
        return {n: range(e.offset, e.offset + e.size) for n, e in a.archive.entries.items()}


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
def test_every_byte_flipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kernels: bool
) -> None:
    """Each byte of a small artifact in turn, by one bit or by all of them."""
    path, copy = tmp_path / "m.accel", tmp_path / "flipped.accel"
    write_small(path, kernels)
    data = bytearray(path.read_bytes())
    copy.write_bytes(data)
    counts = {"caught": 0, "harmless": 0}
    harmless: set[str] = set()
    regions = _regions(path)
    with copy.open("r+b", buffering=0) as file:
        for at in range(len(data)):
            flip = 0xFF if at % 2 else 1 << (at // 2) % 8
            file.seek(at)
            file.write(bytes([data[at] ^ flip]))
            outcome = _outcome(copy, kernels)
            counts[outcome] += 1
            if outcome == "harmless":
                harmless.add(next((n for n, r in regions.items() if at in r), "archive"))
            file.seek(at)
            file.write(bytes([data[at]]))
    with capsys.disabled():
        print(f"\n{len(data)} bytes flipped: {counts}; harmless ones are in {sorted(harmless)}")
    # Only files that running the model does not read.
    unread = {"ir/captured.mlir", "ir/kernels.mlir", "golden/0.safetensors", "kernels/twice.c"}
    assert harmless <= unread
    assert counts["harmless"] == sum(len(regions.get(name, ())) for name in unread)


def test_verify_finds_every_flipped_byte_of_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "m.accel"
    write_small(path)
    data = path.read_bytes()
    for name, region in _regions(path).items():
        for at in (region.start, region.stop - 1):
            path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            assert not verify_artifact(path).ok, f"{name} at {at}"
    path.write_bytes(data)
    assert verify_artifact(path).ok


def test_flipped_native_code_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "m.accel"
    write_small(path, kernels=True)
    data = path.read_bytes()
    regions = _regions(path)
    loaded: list[bytes] = []

    def load_host(code: bytes) -> Any:
        loaded.append(code)
        return host_code()

    load(path, load_host=load_host)
    (good,) = loaded
    for name in ("kernels/host.so", "signature.json", "manifest.json"):
        region = regions[name]
        for at in range(region.start, region.stop, max(1, len(region) // 200)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :])
            with pytest.raises(ArtifactError):
                load(path, trust=True, load_host=load_host)
    assert loaded == [good]


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "m.accel"
    write_small(path)
    data = path.read_bytes()
    for size in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ArtifactError):
            load(path)
    for tail in (b"\0", b"PK", data):
        path.write_bytes(data + tail)
        with pytest.raises(ArtifactError):
            load(path)


def test_truncated_while_open(tmp_path: Path) -> None:
    """What was not hashed yet is not there any more: a typed error, not a signal."""
    path = tmp_path / "m.accel"
    write_small(path)
    model = load(path)
    with path.open("r+b") as file:
        file.truncate(64)
    inputs = example_inputs()
    with pytest.raises(ArtifactError, match="shorter"):
        model(**inputs)


@pytest.mark.parametrize("content", [b"", b"PK", b"\0" * 4096, b"{}", b"not a zip" * 100])
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ArtifactError):
        load(tmp_path / "x")
    with pytest.raises(ArtifactError, match="cannot"):
        load(tmp_path / "missing")
    with pytest.raises(ArtifactError, match="cannot"):
        load(tmp_path)


class TestZips:
    """Zips of other tools, with tricks."""

    def _repacked(self, tmp_path: Path, change: Callable[[zipfile.ZipFile], None]) -> Path:
        path, made = tmp_path / "m.accel", tmp_path / "other.accel"
        write_small(path)
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(made, "w") as target:
            for info in source.infolist():
                target.writestr(info.filename, source.read(info))
            change(target)
        return made

    @pytest.mark.parametrize(
        "change",
        [
            lambda z: None,
            lambda z: z.writestr("../../escaped", "x"),
            lambda z: z.writestr("/etc/x", "x"),
            lambda z: z.writestr("manifest.json", "{}"),
            lambda z: z.writestr(_link("ir/link.mlir"), "/etc/passwd"),
            lambda z: setattr(z, "comment", b"hello"),
        ],
        ids=["plain", "parent", "absolute", "duplicate", "link", "comment"],
    )
    @pytest.mark.filterwarnings("ignore:Duplicate")
    def test_refused(self, tmp_path: Path, change: Callable[[zipfile.ZipFile], None]) -> None:
        with pytest.raises(ArtifactError, match="accel did not write"):
            load(self._repacked(tmp_path, change))
        assert not (tmp_path.parent / "escaped").exists()

    def test_compressed_bomb(self, tmp_path: Path) -> None:
        path = tmp_path / "bomb"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("manifest.json", bytes(50 << 20))
        with pytest.raises(ArtifactError, match="accel did not write"):
            load(path)

    @pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../b", "a\\b", "", "a/", "ä", "-x"])
    def test_bad_names_are_not_written(self, name: str) -> None:
        with pytest.raises(ArtifactError, match="cannot have a file named"):
            ArchiveWriter(io.BytesIO()).add(name, [])

    def test_huge_counts_take_no_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "m.accel"
        write_small(path)
        data = bytearray(path.read_bytes())
        tail = len(data) - 98
        for at in (24, 32, 40, 48):  # counts, size and start of the directory
            for value in (1 << 40, (1 << 64) - 1):
                changed = bytearray(data)
                struct.pack_into("<Q", changed, tail + at, value)
                path.write_bytes(changed)
                with pytest.raises(ArtifactError):
                    load(path)


def _link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def _rewrite(path: Path, edit: Callable[[Any], Any]) -> None:
    """An artifact with another manifest and all checksums right: a hostile author's."""
    with Artifact(path) as a:
        files = {n: a.archive.read(n, 1 << 30) for n in a.archive.entries}
    manifest = parse(files["manifest.json"], "")
    edited = edit(manifest)
    files["manifest.json"] = edited if isinstance(edited, bytes) else dump(manifest)
    with path.open("wb") as file:
        writer = ArchiveWriter(file)
        for name, data in files.items():
            writer.add(name, [data])
        writer.close()


def test_exchanged_native_code(tmp_path: Path) -> None:
    """A signed manifest with other code beside it, checksums of the archive right."""
    path = tmp_path / "m.accel"
    write_small(path, kernels=True)
    with Artifact(path) as a:
        files = {n: a.archive.read(n, 1 << 30) for n in a.archive.entries}
    files["kernels/host.so"] = files["kernels/host.so"][:-1] + b"!"
    with path.open("wb") as file:
        writer = ArchiveWriter(file)
        for name, data in files.items():
            writer.add(name, [data])
        writer.close()

    def never(code: bytes) -> Any:
        raise AssertionError("loaded")

    for trusted in (False, True):
        with pytest.raises(ArtifactError, match=r"'kernels/host\.so' is damaged"):
            load(path, trusted, load_host=never)


def _main(m: Any) -> Any:
    return m["functions"]["main"]


def _set(place: Any, key: Any, value: Any) -> None:
    place[key] = value


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda m: b"[" * 100_000, "nested too deep"),
        (lambda m: b'{"format": 1, "format": 1}', "a key twice"),
        (lambda m: b'{"format": NaN}', "NaN"),
        (lambda m: b'{"format": 1e999}', "format version"),
        (lambda m: b"\xff\xfe", "is not JSON"),
        (lambda m: b"[]", "format version"),
        (lambda m: b"9" * 5000, "is not JSON"),
        (lambda m: _set(m, "format", 2), "has format version 2; this accel reads 1"),
        (lambda m: _set(m, "extra", 1), r"unknown keys \['extra'\]"),
        (lambda m: m.pop("target"), r"no \['target'\]"),
        (lambda m: m.pop("golden"), r"no \['golden'\]"),
        (lambda m: _set(m, "functions", {}), "has no function"),
        (lambda m: _set(m["blobs"], "kernels/x.so", {"bytes": 1, "sha256": ""}), "is missing"),
        (lambda m: m["blobs"].pop("ir/kernels.mlir"), "is not in the manifest"),
        (lambda m: _set(m["blobs"]["ir/kernels.mlir"], "bytes", 1 << 40), "another size"),
        (lambda m: _set(m, "host_code", "ir/kernels.mlir"), "'signature.json' is missing"),
        (lambda m: _set(m, "host_code", "../x"), "is missing"),
        (lambda m: _set(m["golden"][0], "file", "ir/nothing"), "is missing"),
        (lambda m: _set(m["golden"][0], "tolerances", []), "belongs to no function"),
        (lambda m: _set(_main(m)["steps"][0], "kind", "exec"), "expected one of 'kernel'"),
        (lambda m: _set(_main(m)["steps"][0]["inputs"], 0, True), "expected int, got bool"),
        (lambda m: _set(_main(m)["steps"][0]["inputs"], 0, 1 << 70), "more than 64 bits"),
        (lambda m: _set(_main(m)["steps"][0]["inputs"], 0, 1.5), "expected int, got float"),
        (lambda m: _set(_main(m)["values"][0], "shape", {"a": 1}), "expected a list, got dict"),
        (lambda m: _set(_main(m)["values"][0], "shape", [1.5]), "expected int or str or list"),
        (lambda m: _set(_main(m)["values"][0]["shape"], 0, _deep(40)), "too deep"),
        (lambda m: _set(_main(m)["values"][0]["shape"], 1, -8), "got"),
        (lambda m: _set(_main(m)["values"][0], "dtype", "nn"), "unknown dtype"),
        (lambda m: _set(_main(m)["symbols"], "n", [1, 2, 3]), "expected a list of 2"),
        (lambda m: _set(_main(m)["donates"], "x", 0), "expected a number as key"),
        (lambda m: _set(_main(m)["metadata"], "inputs", {"tuple": 3}), "malformed 'inputs'"),
        (lambda m: _set(_main(m)["metadata"], "arguments", []), "no entry for each"),
        (lambda m: _set(_main(m)["metadata"], "parameters", [{"name": "x"}]), "malformed"),
        (lambda m: _set(m["weights"]["table"], "shape", [3, 6]), "the manifest says"),
        (lambda m: _set(m["weights"]["table"], "shape", [5, 3]), "does not fit the manifest"),
        (lambda m: _set(m["weights"]["table"], "shape", [1 << 40, 1 << 40]), "a weight of shape"),
        (lambda m: _set(m["weights"]["table"], "shape", [-3, -5]), "a weight of shape"),
        (lambda m: _set(m["weights"]["table"], "dtype", "int32"), "does not fit the manifest"),
        (lambda m: _set(m["weights"]["table"], "sha256", "0" * 64), "'table' is damaged"),
        (lambda m: _set(_main(m)["values"][3], "name", "other"), "has no weight 'other'"),
        (lambda m: _set(_main(m)["steps"][1], "name", "aten::from_file"), "trusted artifact only"),
        (lambda m: _set(_main(m)["steps"][1], "name", "aten::add_.Tensor"), "writes to its"),
        (lambda m: _set(_main(m)["steps"][1], "name", "os::system"), "has no operator"),
        (lambda m: _set(_main(m)["steps"][1], "name", "aten::__class__"), "has no operator"),
        (lambda m: _set(_main(m)["steps"][1], "name", "aten::topk.__class__"), "has no operator"),
        (lambda m: _set(_main(m)["steps"][1], "name", "load_library::x"), "has no operator"),
        (lambda m: _set(_main(m)["steps"][1], "name", "mkldnn::_linear_pointwise"), "trusted"),
        (lambda m: _set(_main(m)["steps"][0], "name", "cuda.launch"), "no vendor library"),
        (lambda m: _set(_main(m)["steps"][1]["options"], "args", [{"eval": "1"}]), "template"),
        (lambda m: _set(_main(m)["steps"][1]["options"], "args", [{"operand": 9}]), "operand 9"),
        (lambda m: _set(_main(m)["steps"][1]["options"], "args", [_nest(30)]), "template"),
        (lambda m: _set(_main(m)["steps"][1]["options"], "args", []), "missing value"),
    ],
)  # fmt: skip
def test_hostile_manifests(tmp_path: Path, edit: Callable[[Any], Any], says: str) -> None:
    path = tmp_path / "m.accel"
    write_small(path)
    _rewrite(path, edit)
    inputs = example_inputs()
    with pytest.raises(AccelError, match=says):
        load(path)(inputs["x"], ids=inputs["ids"])


def _deep(depth: int) -> Any:
    return 1 if depth == 0 else ["+", _deep(depth - 1)]


def _nest(depth: int) -> Any:
    return 1 if depth == 0 else {"list": [_nest(depth - 1)]}


def test_the_rewriter_of_these_tests_changes_nothing_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.accel"
    write_small(path)
    _rewrite(path, lambda m: None)
    assert _outcome(path, kernels=False) == "harmless"


def test_a_huge_arena_is_a_typed_error(tmp_path: Path) -> None:
    p = Plan()
    x = p.input(1)
    y = p.aten("aten::expand", [x], [1 << 45], operand(0), {"list": [1 << 45]}, meaning=lambda a: a)
    z = p.aten("aten::add.Tensor", [y, x], [1 << 45], operand(0), operand(1), meaning=lambda a: a)
    contents = Contents({"main": p.done(z)}, {}, TargetSpec("cpu"))
    write_artifact(tmp_path / "big.accel", contents)
    with pytest.raises(AccelError, match="memory"):
        load(tmp_path / "big.accel")(torch.zeros(1))


def test_classes_of_data_are_harmless() -> None:
    """A structure from a file makes no instance of a class that does something when it dies."""
    import tempfile

    name = f"{tempfile.__name__}:_TemporaryFileCloser"
    assert hasattr(tempfile, "_TemporaryFileCloser")
    assert classes_of_data(name) is Record
    assert classes_of_data("subprocess:Popen") is Record
    assert classes_of_data("os:stat_result") is Record
    assert classes_of_data("not.loaded:Thing") is Record
    assert classes_of_data("torch.return_types:topk") is torch.return_types.topk


def test_objects_of_classes_that_are_not_loaded() -> None:
    """A model's output without its library: fields by name, attribute and number."""
    leaf = {"tensor": 0}
    for kind, name in (("items", "logits"), ("fields", "logits")):
        node = {"class": "absent.module:Output", kind: [[_key(name, kind), leaf]]}
        made = unflatten(node, ["L"], classes_of_data)
        assert (made.logits, made["logits"], made[0], made[:1]) == ("L", "L", "L", ["L"])
        assert dict(made) == {"logits": "L"}
        with pytest.raises(AttributeError, match="hidden"):
            _ = made.hidden
    node = {"class": "absent.module:Pair", "args": [leaf, leaf]}
    assert unflatten(node, ["L"], classes_of_data) == ("L", "L")


def _key(name: str, kind: str) -> Any:
    return {"value": name} if kind == "items" else name


def test_manifest_text_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "m.accel"
    write_small(path)
    _rewrite(path, lambda m: json.dumps("x" * (65 << 20)).encode())
    with pytest.raises(ArtifactError, match="at most 67108864 are allowed"):
        load(path)


def test_signature_of_another_artifact(tmp_path: Path) -> None:
    """A good signature, moved to a manifest that it was not made for."""
    path = tmp_path / "m.accel"
    write_small(path, kernels=True)
    _rewrite(path, lambda m: _set(m["report"], "name", "another"))
    with pytest.raises(ArtifactError, match="does not fit the manifest"):
        load(path, trust=True)
    assert len(trust.trusted_keys()) == 1
