"""Artifacts: `m.accel` files. Writing takes `Contents`; reading gives an `Artifact`.

    manifest.json         plans, weights, sizes and sha256 of every file, ledger (manifest.py)
    signature.json        who vouches for the host code (trust.py); only if there is host code
    weights.safetensors   mapped in place, hashed when used (weights.py)
    ir/*.mlir             the program after each stage that matters
    kernels/*             generated kernels: shared object and sources
    golden/*              inputs and outputs to replay (golden.py)
    text/*                of language models: tokenizer, chat format (text.py)

Reading is data only. What is read is checked first: the archive's form (archive.py), the manifest
(schema.py), and each file's hash when the file is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from accel.errors import ArtifactError
from accel.runtime.analysis import analyze
from accel.runtime.archive import Archive, ArchiveWriter
from accel.runtime.manifest import FORMAT_VERSION, Blob, Golden, Manifest, TargetSpec
from accel.runtime.plan import FunctionPlan, dtype_name
from accel.runtime.prepare import TensorWeights, WeightSource
from accel.runtime.schema import decode, dump, parse
from accel.runtime.trust import Signature, check_signature, sign
from accel.runtime.weights import (
    MappedWeights,
    StoredWeight,
    WeightSpec,
    file_chunks,
    flat_bytes,
    in_file_order,
    layout,
    memory_of,
)

_MANIFEST, _SIGNATURE, _WEIGHTS = "manifest.json", "signature.json", "weights.safetensors"
# The function of golden cases that replay a whole generation: prompt, then token by token.
GENERATE = "generate"
_MAX_MANIFEST = 64 << 20
_MAX_SIGNATURE = 4096
_MAX_FILE = 4 << 30


@dataclass
class GoldenCase:
    """A call of one function to record: see `accel.runtime.golden.record`."""

    function: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    tolerances: Sequence[float]


@dataclass
class Contents:
    """All that goes into an artifact.

    `ir` maps stage names to text, `kernels` file names to bytes (sources and the shared object);
    `host_code` is the name of the shared object among them, "" if there is none. `files` are
    further files by their whole name.
    """

    functions: Mapping[str, FunctionPlan]
    weights: Mapping[str, StoredWeight]
    target: TargetSpec
    versions: Mapping[str, str] = field(default_factory=dict)
    ir: Mapping[str, str] = field(default_factory=dict)
    kernels: Mapping[str, bytes] = field(default_factory=dict)
    host_code: str = ""
    golden: Sequence[GoldenCase] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


def write_artifact(path: str | os.PathLike[str], contents: Contents) -> None:
    """Writes `path` at once and complete, or not at all.

    An artifact with host code is signed with the user's own key. Equal contents make equal files
    (but for the signature's key). Raises ArtifactError where the contents do not fit together.
    """
    for plan in contents.functions.values():
        analyze(plan)
    if not contents.functions:
        raise ArtifactError("an artifact needs at least one function")
    if contents.host_code and contents.host_code not in contents.kernels:
        raise ArtifactError(f"there is no kernel file '{contents.host_code}'")
    with _replacing(Path(path)) as file:
        writer = ArchiveWriter(file)
        _Packer(writer, contents).pack()
        writer.close()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its place when all went well."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(
            f"cannot write '{path}': {error.strerror or error}",
            advice="check that the folder exists and has room",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Packer:
    def __init__(self, writer: ArchiveWriter, contents: Contents) -> None:
        self._writer, self._contents = writer, contents
        self._blobs: dict[str, Blob] = {}

    def pack(self) -> None:
        c = self._contents
        weights = self._pack_weights()
        for stage, text in c.ir.items():
            self._add(f"ir/{stage}.mlir", [text.encode()])
        for name, data in c.kernels.items():
            self._add(f"kernels/{name}", [data])
        for name, data in c.files.items():
            self._add(name, [data])
        golden = [self._pack_golden(i, case) for i, case in enumerate(c.golden)]
        manifest = Manifest(
            FORMAT_VERSION,
            dict(c.versions),
            c.target,
            dict(c.functions),
            weights,
            self._blobs,
            f"kernels/{c.host_code}" if c.host_code else "",
            golden,
            dict(c.ledger),
            dict(c.report),
        )
        data = _dump(manifest)
        decode(Manifest, parse(data, _MANIFEST))  # what cannot be read is not written
        if c.host_code:
            self._writer.add(_SIGNATURE, [dump(sign(data))])
        self._writer.add(_MANIFEST, [data])

    def _add(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        hasher = hashlib.sha256()

        def hashed() -> Iterator[bytes | memoryview]:
            for chunk in chunks:
                hasher.update(chunk)
                yield chunk

        entry = self._writer.add(name, hashed())
        self._blobs[name] = Blob(entry.size, hasher.hexdigest())

    def _pack_weights(self) -> dict[str, WeightSpec]:
        weights = self._contents.weights
        if not weights:
            return {}
        names = in_file_order(weights)
        types = {n: (dtype_name(weights[n].dtype), list(weights[n].shape)) for n in names}
        header, _, _ = layout(types)
        digests = {n: hashlib.sha256() for n in names}

        def chunks(pool: ThreadPoolExecutor) -> Iterator[bytes | memoryview]:
            """Each tensor's own hash is made by a second thread beside the file's."""
            for name, chunk in file_chunks(header, weights, names):
                job = pool.submit(digests[name].update, chunk) if name else None
                yield chunk
                if job is not None:
                    job.result()

        with ThreadPoolExecutor(1) as pool:
            self._add(_WEIGHTS, chunks(pool))
        return {n: WeightSpec(*types[n], digests[n].hexdigest()) for n in names}

    def _pack_golden(self, number: int, case: GoldenCase) -> Golden:
        tensors = [*case.inputs, *case.outputs]
        flats = [flat_bytes(t) for t in tensors]
        specs = [
            WeightSpec(dtype_name(t.dtype), list(t.shape), _sha256(memory_of(flat)))
            for t, flat in zip(tensors, flats)
        ]
        name = f"golden/{number}.safetensors"
        self._add(name, [_golden_layout(specs)[0], *(memory_of(flat) for flat in flats)])
        count = len(case.inputs)
        return Golden(case.function, name, specs[:count], specs[count:], list(case.tolerances))


def _dump(manifest: Manifest) -> bytes:
    try:
        return dump(manifest)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the manifest cannot be written as JSON: {error}") from error


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _golden_layout(specs: Sequence[WeightSpec]) -> tuple[bytes, list[int], int]:
    header, offsets, size = layout({f"{i}": (s.dtype, s.shape) for i, s in enumerate(specs)})
    return header, list(offsets.values()), size


class Artifact:
    """An open artifact. Use it as a context manager, or `close` it; weights stay mapped.

    Raises ArtifactError for a file that is damaged, foreign, or of another format version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.archive = Archive(path)
        try:
            self.manifest_bytes = self.archive.read(_MANIFEST, _MAX_MANIFEST)
            self.manifest = self._read_manifest()
            self.signature = self._read_signature()
        except ArtifactError as error:
            self.close()
            if error.where != str(path):
                error.where = f"{path}: {error.where}" if error.where else str(path)
            raise

    def __enter__(self) -> Artifact:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.archive.close()

    def _read_manifest(self) -> Manifest:
        data = parse(self.manifest_bytes, _MANIFEST)
        version = data.get("format") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise self.archive.fail(
                f"the artifact has format version {str(version)[:20]}; this accel reads "
                f"{FORMAT_VERSION}",
                "use the version of accel that packaged it, or package the model again",
            )
        manifest = decode(Manifest, data)
        listed = {*manifest.blobs, _MANIFEST}
        if manifest.host_code:
            listed.add(_SIGNATURE)
        for name in sorted(listed ^ self.archive.entries.keys()):
            found = "is not in the manifest" if name not in listed else "is missing"
            raise self.archive.fail(f"'{name}' {found}")
        for name, blob in manifest.blobs.items():
            if self.archive.entries[name].size != blob.bytes:
                raise self.archive.fail(f"'{name}' has another size than the manifest says")
        self._check_references(manifest)
        return manifest

    def _check_references(self, manifest: Manifest) -> None:
        if not manifest.functions:
            raise self.archive.fail("the artifact has no function")
        if manifest.weights and _WEIGHTS not in manifest.blobs:
            raise self.archive.fail(f"'{_WEIGHTS}' is missing")
        wanted = [manifest.host_code] if manifest.host_code else []
        wanted += [g.file for g in manifest.golden]
        for name in wanted:
            if name not in manifest.blobs:
                raise self.archive.fail(f"'{name}' is missing")
        for g in manifest.golden:
            known = g.function in manifest.functions
            if g.function == GENERATE:
                known = {"prefill", "decode"} <= manifest.functions.keys()
            if not known or len(g.tolerances) != len(g.outputs):
                raise self.archive.fail(f"'{g.file}' belongs to no function")

    def _read_signature(self) -> Signature | None:
        if _SIGNATURE not in self.archive.entries:
            return None
        raw = parse(self.archive.read(_SIGNATURE, _MAX_SIGNATURE), _SIGNATURE)
        signature = decode(Signature, raw)
        check_signature(self.manifest_bytes, signature)
        return signature

    def read(self, name: str) -> bytes:
        """A file's bytes, its hash checked."""
        blob = self.manifest.blobs.get(name)
        if blob is None:
            raise self.archive.fail(f"the artifact has no '{name}'")
        data = self.archive.read(name, _MAX_FILE)
        if _sha256(data) != blob.sha256:
            raise self.archive.fail(f"'{name}' is damaged: its hash does not fit")
        return data

    def weights(self) -> WeightSource:
        """The weights, mapped; each is hashed when first used."""
        if _WEIGHTS not in self.manifest.blobs:
            return TensorWeights({})
        return MappedWeights(self.archive, _WEIGHTS, self.manifest.weights)

    def stages(self) -> list[str]:
        """Names of the stored IR stages, in the order of the compiler."""
        return [
            n.removeprefix("ir/").removesuffix(".mlir")
            for n in self.manifest.blobs
            if n.startswith("ir/")
        ]

    def ir(self, stage: str) -> str:
        """IR text of a stage. Raises ArtifactError if it is not stored."""
        if stage not in self.stages():
            known = ", ".join(self.stages()) or "none"
            raise self.archive.fail(f"no IR stage '{stage}'", f"stored stages: {known}")
        return self.read(f"ir/{stage}.mlir").decode()

    def golden(self, golden: Golden) -> tuple[list[Tensor], list[Tensor]]:
        """Recorded inputs and outputs."""
        specs = [*golden.inputs, *golden.outputs]
        header, offsets, size = _golden_layout(specs)
        data = bytearray(self.read(golden.file))
        if len(data) != size or not data.startswith(header):
            raise self.archive.fail(f"'{golden.file}' does not fit the manifest")
        tensors = [_tensor_at(data, offset, spec) for offset, spec in zip(offsets, specs)]
        return tensors[: len(golden.inputs)], tensors[len(golden.inputs) :]


def _tensor_at(data: bytearray, offset: int, spec: WeightSpec) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    count = dtype.itemsize
    for size in spec.shape:
        count *= size
    if count == 0:
        return torch.empty(spec.shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8, count=count, offset=offset).clone()
    return flat.view(dtype).view(spec.shape)
