"""A compiled program as something to call, or as the contents of an artifact."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from accel import __version__
from accel.compiler.pipeline import Program
from accel.ir.storage import WeightStore
from accel.runtime import libraries
from accel.runtime.artifact import Contents, GoldenCase
from accel.runtime.convention import Convention
from accel.runtime.device import DeviceWeights, device_of, load_code
from accel.runtime.executor import CompiledFunction
from accel.runtime.interfaces import HostCode
from accel.runtime.manifest import TargetSpec
from accel.runtime.model import CompiledModel, EntryPoint, State
from accel.runtime.prepare import PreparedCalls, TensorWeights, WeightSource
from accel.runtime.weights import StoredWeight
from accel.tree import class_named

HOST_CODE = {"cpu": "kernels.so", "cuda": "kernels.cuda"}


def to_model(
    program: Program, files: Mapping[str, bytes] | None = None, shared: State | None = None
) -> CompiledModel:
    """The program, ready to be called in this process.

    `files`: what its artifact carries along; `shared`: the state of other programs of the model.
    """
    device = device_of(program.target.kind)
    weights = weights_on(device, program.weights)
    host = load_code(program.library, device) if program.library else None
    prepared = PreparedCalls()
    state = State(weights.tensor, shared)
    entries = {
        name: EntryPoint(
            to_function(program, name, weights=weights, host=host, prepared=prepared),
            Convention(plan, class_named),
            state,
        )
        for name, plan in program.plans.items()
    }
    return CompiledModel(
        entries,
        state,
        stages={name: partial(str, text) for name, text in program.stages.items()},
        ledger=program.ledger.to_json(),
        report=report(program),
        files={name: partial(bytes, data) for name, data in (files or {}).items()},
    )


def to_function(
    program: Program,
    name: str,
    *,
    weights: WeightSource | None = None,
    host: HostCode | None = None,
    prepared: PreparedCalls | None = None,
    device: torch.device | None = None,
    graph: bool = True,
    keep: Collection[int] | None = None,
) -> CompiledFunction:
    """One function on flat lists of tensors, on `device` (by default the current one)."""
    device = device or device_of(program.target.kind)
    if host is None and program.library:
        host = load_code(program.library, device)
    return CompiledFunction(
        program.plans[name],
        weights or weights_on(device, program.weights),
        libraries=libraries.get,
        host=host,
        prepared=prepared,
        device=device,
        graph=graph,
        keep=keep,
    )


def weights_on(device: torch.device, store: WeightStore) -> WeightSource:
    """A store's tensors on the device that runs."""
    tensors = TensorWeights(_StoredTensors(store, device))
    return tensors if device.type == "cpu" else DeviceWeights(tensors, device)


def to_contents(
    program: Program,
    golden: Sequence[GoldenCase] = (),
    files: Mapping[str, bytes] | None = None,
) -> Contents:
    """What `accel.runtime.artifact.write_artifact` stores."""
    weights: dict[str, StoredWeight] = {}
    for name in program.weights.names():
        type_ = program.weights.type(name)
        shape = tuple(int(d) for d in type_.shape)
        weights[name] = StoredWeight(type_.dtype, shape, partial(program.weights.stored, name))
    host_code = HOST_CODE[program.target.kind] if program.library else ""
    kernels = {f"{name}.txt": text.encode() for name, text in program.sources.items()}
    native = bool(program.library) and program.target.kind == "cpu"
    if program.library:
        kernels[host_code] = program.library
    return Contents(
        functions=program.plans,
        weights=weights,
        target=TargetSpec(
            name=program.target.name,
            machine=platform.machine() if native else "",
            features=list(program.target.features) if native else [],
            description=program.target.to_json(),
        ),
        versions=versions(),
        ir=program.stages,
        kernels=kernels,
        host_code=host_code,
        golden=golden,
        files=files or {},
        ledger=program.ledger.to_json(),
        report=report(program),
    )


def report(program: Program) -> dict[str, Any]:
    """Facts for people: seconds by phase, kernels, weights."""
    return {
        **program.facts,
        "seconds": program.seconds,
        "kernels": len([name for name in program.sources if not name.endswith(".c")]),
        "weight_bytes": program.weights.nbytes(),
        "capture": program.metadata,
    }


def versions() -> dict[str, str]:
    return {
        "accel": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


class _StoredTensors(Mapping[str, torch.Tensor]):
    """A weight store as a mapping of stored tensors, read when asked for.

    For a program on a GPU they are wherever they are; those on that GPU are not copied.
    """

    def __init__(self, store: WeightStore, device: torch.device) -> None:
        self._store = store
        self._read = store.stored if device.type == "cpu" else store.in_place

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._store:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._store

    def __iter__(self) -> Any:
        return iter(self._store.names())

    def __len__(self) -> int:
        return len(self._store)
