"""`accel verify`: is the file whole, can this machine run it, and does it compute the same?

Each question is a check with an answer; what cannot be asked after a failure is left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch

import accel
from accel.errors import AccelError, VerificationFailedError
from accel.runtime import libraries
from accel.runtime.artifact import GENERATE, Artifact, GoldenCase
from accel.runtime.aten import resolve
from accel.runtime.cuda import check_device, require_device
from accel.runtime.cuda_code import unpack
from accel.runtime.device import device_of
from accel.runtime.golden import Deviation, compare, replay
from accel.runtime.interfaces import HostCodeLoader, Libraries
from accel.runtime.loader import Rebuild, is_signed_by_trusted_key, load
from accel.runtime.manifest import Golden, check_machine
from accel.runtime.model import CompiledModel

T = TypeVar("T")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Check:
    """One question: "passed", "failed", or a "note" that does not count. `advice` if it failed."""

    name: str
    result: Literal["passed", "failed", "note"]
    detail: str
    advice: str = ""


@dataclass
class Verification:
    """All checks, and how far each golden output is off."""

    path: str
    checks: list[Check] = field(default_factory=list)
    deviations: list[Deviation] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(c.result != "failed" for c in self.checks)

    def raise_if_failed(self) -> None:
        """Raises VerificationFailedError with the first failure."""
        for check in self.checks:
            if check.result == "failed":
                raise VerificationFailedError(
                    f"{check.name}: {check.detail}", where=self.path, advice=check.advice
                )


def verify_artifact(
    path: str | os.PathLike[str],
    trust: bool = False,
    *,
    rebuild: Rebuild | None = None,
    find_library: Libraries = libraries.get,
    load_host: HostCodeLoader | None = None,
) -> Verification:
    """Checks an artifact on this machine. It never raises for what it finds: see the result."""
    found = _Verifier(path)
    artifact = found.ask("file", lambda: Artifact(path), _describe_file)
    if artifact is None:
        return found.result
    with artifact:
        found.ask("contents", lambda: _check_contents(artifact), str)
        found.ask("machine", lambda: _check_machine(artifact), str)
        found.ask("libraries", lambda: _check_libraries(artifact, find_library), str)
        found.note("versions", _versions(artifact))
        if artifact.manifest.host_code:
            found.note("signature", _signature(artifact))
        model = found.ask(
            "load",
            lambda: load(
                path, trust, rebuild=rebuild, find_library=find_library, load_host=load_host
            ),
            lambda model: f"entry points: {', '.join(model.entry_points)}",
        )
        if model is not None:
            for golden in artifact.manifest.golden:
                found.replay(artifact, model, golden)
        if not artifact.manifest.golden:
            found.note("golden", "the artifact has no golden vectors to replay")
    return found.result


class _Verifier:
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.result = Verification(str(path))

    def note(self, name: str, detail: str) -> None:
        self.result.checks.append(Check(name, "note", detail))

    def ask(self, name: str, question: Callable[[], T], say: Callable[[T], str]) -> T | None:
        """The answer; None, and a failed check, if there is an error instead."""
        try:
            answer = question()
        except AccelError as error:
            detail = f"{error.what} ({error.where})" if error.where else error.what
            self.result.checks.append(Check(name, "failed", detail, error.advice))
            return None
        text = say(answer)
        if text:
            self.result.checks.append(Check(name, "passed", text))
        return answer

    def replay(self, artifact: Artifact, model: CompiledModel, golden: Golden) -> None:
        def run() -> list[Deviation]:
            inputs, outputs = artifact.golden(golden)
            case = GoldenCase(golden.function, inputs, outputs, golden.tolerances)
            first = next(iter(model.entry_points.values()))
            entry = model.entry_points.get(golden.function, first)
            device = entry.function.device
            require_device(device)
            if golden.function == GENERATE:
                results = [model.generator.logits(inputs[0], outputs[0].shape[0])]
            else:
                results = replay(entry.anew().run, inputs, device)
            return compare(golden.function, [r.cpu() for r in results], case)

        name = f"golden {golden.function}"
        deviations = self.ask(name, run, lambda _: "") or []
        self.result.deviations += deviations
        for d in deviations:
            detail = d.note or f"relative error {d.error:.2g}, allowed {d.tolerance:.2g}"
            self.result.checks.append(
                Check(
                    name,
                    "passed" if d.ok else "failed",
                    f"output {d.output}: {detail}",
                    ""
                    if d.ok
                    else "the file is whole, so this machine's code or libraries "
                    "compute something else: package the model for this machine's target, or "
                    "report it with the versions above",
                )
            )


def _describe_file(artifact: Artifact) -> str:
    m = artifact.manifest
    return f"{artifact.archive.size} bytes, {len(m.blobs)} files, target '{m.target.name}'"


def _check_contents(artifact: Artifact) -> str:
    """Hashes every file of the archive, whole."""

    def digest(name: str) -> str:
        entry, hasher = artifact.archive.entries[name], hashlib.sha256()
        for at in range(entry.offset, entry.offset + entry.size, _CHUNK):
            end = min(at + _CHUNK, entry.offset + entry.size)
            hasher.update(artifact.archive.read_at(at, end - at))
        return hasher.hexdigest()

    blobs = artifact.manifest.blobs
    with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), 8))) as pool:
        for (name, blob), found in zip(blobs.items(), pool.map(digest, blobs)):
            if found != blob.sha256:
                raise artifact.archive.fail(f"'{name}' is damaged: its hash does not fit")
    weights = artifact.weights()
    weights.check(list(artifact.manifest.weights))
    return f"{len(blobs)} hashes fit"


def _check_machine(artifact: Artifact) -> str:
    device = device_of(str(artifact.manifest.target.description.get("kind", "cpu")))
    if artifact.manifest.host_code and device.type == "cuda":
        require_device(device)
        check_device(unpack(artifact.read(artifact.manifest.host_code)).arch, device)
        return f"the kernels run on this {torch.cuda.get_device_name(device)}"
    if artifact.manifest.host_code:
        check_machine(artifact.manifest.target)
        return "this CPU has all features that the code uses"
    return "there is no native code"


def _check_libraries(artifact: Artifact, find_library: Libraries) -> str:
    names: set[str] = set()
    operators: set[str] = set()
    for plan in artifact.manifest.functions.values():
        names |= {s.name for s in plan.steps if s.kind == "library"}
        operators |= {s.name for s in plan.steps if s.kind == "aten"}
    for name in sorted(names):
        find_library(name)
    for name in sorted(operators):
        resolve(name)
    return f"{len(names)} library entries, {len(operators)} operators of torch"


def _versions(artifact: Artifact) -> str:
    made = artifact.manifest.versions
    here = {"accel": accel.__version__, "torch": torch.__version__}
    parts = [
        f"{name} {version}"
        + (f" (here {here[name]})" if here.get(name, version) != version else "")
        for name, version in made.items()
    ]
    return ", ".join(parts) or "none recorded"


def _signature(artifact: Artifact) -> str:
    if artifact.signature is None:
        return "not signed"
    trusted = "trusted" if is_signed_by_trusted_key(artifact) else "not among your trusted keys"
    return f"signed by {artifact.signature.key} ({trusted})"
