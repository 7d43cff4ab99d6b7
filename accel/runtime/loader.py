"""`accel.load`: from a file to a callable, without the compiler.

Loading reads the manifest and checks it; weights are mapped, and hashed and packed in the first
call of a function (or by `model.prepare()`). Native code is loaded from artifacts that the user
trusts; for others a `rebuild` hook may make plans and code anew from the IR.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from accel.config import logger
from accel.errors import ArtifactError, TrustError
from accel.runtime import libraries
from accel.runtime.artifact import Artifact
from accel.runtime.aten import check_untrusted
from accel.runtime.convention import Convention, classes_of_data
from accel.runtime.device import DeviceWeights, device_of, load_code
from accel.runtime.executor import CompiledFunction
from accel.runtime.interfaces import HostCode, HostCodeLoader, Libraries
from accel.runtime.manifest import check_machine
from accel.runtime.memory import collection_paused
from accel.runtime.model import CompiledModel, EntryPoint, State
from accel.runtime.plan import FunctionPlan
from accel.runtime.prepare import PreparedCalls, WeightSource
from accel.runtime.trust import trusted_keys

_log = logger("runtime")


@dataclass(frozen=True)
class Rebuilt:
    """What a compiler made from an artifact's IR on this machine.

    Plans come with the code: an artifact that nobody vouches for may hold plans that make good
    kernels write where they should not.
    """

    functions: Mapping[str, FunctionPlan]
    host: HostCode | None


Rebuild = Callable[[Artifact], Rebuilt]


def load(
    path: str | os.PathLike[str],
    trust: bool = False,
    *,
    rebuild: Rebuild | None = None,
    find_library: Libraries = libraries.get,
    load_host: HostCodeLoader | None = None,
) -> CompiledModel:
    """Loads an artifact. The result is called as the model was.

    Args:
        trust: load native code although no trusted key signed it.
        rebuild: makes plans and code from the IR, where the artifact's code is not trusted or is
            for another CPU.

    Raises ArtifactError for a damaged or foreign file, TrustError for native code that is not
    trusted, MissingDependencyError if a library entry is missing.
    """
    with collection_paused():
        return _load(Artifact(path), trust, rebuild, find_library, load_host)


def _load(
    artifact: Artifact,
    trust: bool,
    rebuild: Rebuild | None,
    find_library: Libraries,
    load_host: HostCodeLoader | None,
) -> CompiledModel:
    manifest = artifact.manifest
    trusted = trust or is_signed_by_trusted_key(artifact)
    plans: Mapping[str, FunctionPlan] = manifest.functions
    host = None
    if manifest.host_code:
        plans, host = _host_code(artifact, trusted, rebuild, load_host)
    if not trusted:
        for plan in plans.values():
            for step in plan.steps:
                if step.kind == "aten":
                    check_untrusted(step.name)
    return assemble(artifact, plans, host, find_library)


def _device(artifact: Artifact) -> torch.device:
    return device_of(str(artifact.manifest.target.description.get("kind", "cpu")))


def is_signed_by_trusted_key(artifact: Artifact) -> bool:
    """Whether the artifact has a (valid) signature by a key that this user trusts."""
    return artifact.signature is not None and artifact.signature.key in trusted_keys()


def _host_code(
    artifact: Artifact,
    trusted: bool,
    rebuild: Rebuild | None,
    load_host: HostCodeLoader | None,
) -> tuple[Mapping[str, FunctionPlan], HostCode | None]:
    path, manifest = artifact.archive.path, artifact.manifest
    if trusted:
        try:
            check_machine(manifest.target)
            data = artifact.read(manifest.host_code)
            if load_host is None:
                return manifest.functions, load_code(data, _device(artifact))
            return manifest.functions, load_host(data)
        except ArtifactError as error:
            if rebuild is None or isinstance(error, TrustError):
                raise
            _log.warning("%s: %s; its code is rebuilt from the IR", path, error.what)
    elif rebuild is None:
        key = artifact.signature.key if artifact.signature is not None else "nobody"
        raise TrustError(
            f"the artifact holds native code signed by {key}, whom you have not chosen to trust",
            where=str(path),
            advice="load it with trust=True if you know where it comes from, or add the key to "
            "your trusted keys",
        )
    else:
        _log.warning("%s: native code is not trusted; it is rebuilt from the IR", path)
    rebuilt = rebuild(artifact)
    if rebuilt.functions.keys() != manifest.functions.keys():
        raise ArtifactError("the rebuilt program has other functions", where=str(path))
    return rebuilt.functions, rebuilt.host


def assemble(
    artifact: Artifact,
    plans: Mapping[str, FunctionPlan],
    host: HostCode | None,
    find_library: Libraries,
) -> CompiledModel:
    """The model from checked parts; weights stay in the file until they are used."""
    manifest, prepared = artifact.manifest, PreparedCalls()
    device = _device(artifact)
    weights: WeightSource = artifact.weights()
    if device.type != "cpu":
        weights = DeviceWeights(weights, device)
    state = State(weights.tensor)
    entries: dict[str, EntryPoint] = {}
    for name, plan in plans.items():
        plan.metadata = manifest.functions[name].metadata
        convention = Convention(plan, classes_of_data)
        function = CompiledFunction(
            plan,
            weights,
            libraries=find_library,
            host=host,
            prepared=prepared,
            device=device,
        )
        entries[name] = EntryPoint(function, convention, state)
    stages = {s: (lambda s=s: artifact.ir(s)) for s in artifact.stages()}
    report = {
        **manifest.report,
        "target": manifest.target.name,
        "versions": manifest.versions,
        "bytes": {name: blob.bytes for name, blob in manifest.blobs.items()},
    }
    return CompiledModel(
        entries,
        state,
        stages=stages,
        ledger=manifest.ledger,
        report=report,
        files={name: partial(artifact.read, name) for name in manifest.blobs},
    )
