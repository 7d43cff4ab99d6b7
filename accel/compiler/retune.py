"""`accel tune`: an artifact that was packaged elsewhere, tuned for the GPU of this machine.

Kernels are chosen and compiled anew from the tensor-level IR in the file. The result is written
beside it, replays the golden vectors, and is timed against the old one; it takes the old one's
place at once, or, where it is wrong or no faster, not at all. Since the new file is signed with the
user's own key, the old one has to be one that the user trusts.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel.backends.triton.toolchain import version as triton_version
from accel.compiler import measure
from accel.compiler.assemble import to_contents, versions
from accel.compiler.options import Options
from accel.compiler.pipeline import Program, lower_module, make_context
from accel.compiler.targets import Target, list_targets
from accel.compiler.tune import clock_for, tuning_sizes
from accel.errors import ArtifactError, BackendError, OptionError, TrustError
from accel.ir.module import Module
from accel.ir.parser import parse_module
from accel.ir.types import TensorType
from accel.passes.ledger import Ledger
from accel.passes.registry import load_passes
from accel.runtime.artifact import Artifact, Contents, GoldenCase, write_artifact
from accel.runtime.cuda import require_device
from accel.runtime.device import device_of
from accel.runtime.loader import is_signed_by_trusted_key, load
from accel.runtime.plan import dtype_of
from accel.runtime.verify import verify_artifact

_STAGE = "optimized"
_WORTH = 0.995  # of the old file's time


@dataclass(frozen=True)
class Tuned:
    """What came of it: seconds of a call by entry point, before and after; `tuning` is the
    compiler's report."""

    path: str
    replaced: bool
    reason: str
    before: dict[str, float]
    after: dict[str, float]
    tuning: Mapping[str, Any]


def tune_artifact(path: str | os.PathLike[str], mode: str = "quick", trust: bool = False) -> Tuned:
    """Tunes the artifact at `path` in place.

    Raises ArtifactError for a damaged file or one without IR, TrustError for one that nobody
    vouches for, MissingDependencyError without a GPU or Triton, OptionError for a CPU's artifact,
    BackendError for one of another architecture, VerificationFailedError where the tuned program
    computes something else. In all these cases the file is as it was.
    """
    path = Path(path)
    options = Options.of({"tune": mode})
    if mode == "off":
        raise OptionError("tune = 'off'", advice="quick or full")
    with Artifact(path) as artifact:
        target = _target(artifact)
        triton_version()
        if not (trust or is_signed_by_trusted_key(artifact)):
            raise TrustError(
                "the tuned artifact would be signed with your key, and you have not chosen to "
                "trust the one that it comes from",
                where=str(path),
                advice="tune it with --trust if you know where it comes from",
            )
        module = _module(artifact)
        program = lower_module(module, target, options, make_context(target, options))
        contents = _contents(artifact, program)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        try:
            write_artifact(temporary, contents)
            verify_artifact(temporary, trust=True).raise_if_failed()
            before, after = _times(path, artifact), _times(temporary, artifact)
            faster = sum(after.values()) < _WORTH * sum(before.values())
            if faster:
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    reason = "" if faster else "the tuned program is no faster; the file is as it was"
    return Tuned(str(path), faster, reason, before, after, program.facts["tuning"])


def _target(artifact: Artifact) -> Target:
    """The artifact's target, which must be the GPU here."""
    spec = artifact.manifest.target
    target = list_targets().get(spec.name)
    if target is None or target.kind != "cuda":
        raise OptionError(
            f"the artifact is for '{spec.name}': only kernels of GPUs are tuned",
            where=str(artifact.archive.path),
        )
    require_device(device_of("cuda"))
    clock, reason = clock_for(target)
    if clock is None:
        raise BackendError(
            f"the artifact cannot be tuned here: {reason}",
            where=str(artifact.archive.path),
            advice="tune it on a GPU of its target's architecture",
        )
    return target


def _module(artifact: Artifact) -> Module:
    """The tensor-level program; its weights are read from the file when they are used."""
    load_passes()
    if _STAGE not in artifact.stages():
        raise ArtifactError(
            "the artifact has no tensor-level IR to choose kernels for",
            where=str(artifact.archive.path),
            advice="package the model again",
        )
    module = parse_module(artifact.ir(_STAGE), f"{artifact.archive.path}:ir/{_STAGE}.mlir")
    source = artifact.weights()
    for name, spec in artifact.manifest.weights.items():
        type_ = TensorType(tuple(spec.shape), dtype_of(spec.dtype))
        module.weights.add_lazy(name, type_, lambda name=name: source.tensor(name))  # type: ignore[misc]
    for name, plan in artifact.manifest.functions.items():
        if name not in module.functions:
            raise ArtifactError(f"the IR has no function '{name}'")
        module.functions[name].metadata = {**module.functions[name].metadata, **plan.metadata}
    return module


def _contents(artifact: Artifact, program: Program) -> Contents:
    """The artifact with other plans, kernels and facts."""
    manifest = artifact.manifest
    golden = []
    for case in manifest.golden:
        inputs, outputs = artifact.golden(case)
        golden.append(GoldenCase(case.function, inputs, outputs, case.tolerances))
    kept = ("ir/", "kernels/", "golden/", "weights.")
    files = {n: artifact.read(n) for n in manifest.blobs if not n.startswith(kept)}
    made = to_contents(program, golden, files)
    ledger = Ledger.from_json(dict(manifest.ledger))
    ledger.extend(Ledger([row for row in program.ledger.rows if row.name == "tune"]))
    made.ledger = ledger.to_json()
    made.report = {**manifest.report, **program.facts}
    stages = {stage: artifact.ir(stage) for stage in artifact.stages()}
    made.ir = {**stages, "kernels": program.stages["kernels"]}
    made.versions = {**manifest.versions, **versions()}
    return made


def _times(path: Path, artifact: Artifact) -> dict[str, float]:
    """Device seconds of each entry point's steps, on random inputs of typical sizes."""
    model = load(path, trust=True)
    module = parse_module(artifact.ir(_STAGE))
    found = {}
    with torch.no_grad():
        for name, entry in model.entry_points.items():
            function = module.functions[name]
            device = entry.function.device
            inputs = measure.sample_inputs(function, tuning_sizes(function.symbols), device)
            found[name] = measure.function_seconds(entry.function, inputs)
    return found
