"""A compiled program as something to call, or as the contents of an artifact."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from accel import __version__
from accel.compiler.pipeline import Program
from accel.ir.storage import WeightStore
from accel.runtime import libraries
from accel.runtime.artifact import Contents, GoldenCase
from accel.runtime.convention import Convention
from accel.runtime.executor import CompiledFunction
from accel.runtime.host import HostLibrary
from accel.runtime.interfaces import HostCode
from accel.runtime.manifest import TargetSpec
from accel.runtime.model import CompiledModel, EntryPoint, State
from accel.runtime.prepare import PreparedCalls, TensorWeights
from accel.runtime.weights import StoredWeight
from accel.tree import class_named

HOST_CODE = "kernels.so"


def to_model(program: Program) -> CompiledModel:
    """The program, ready to be called in this process."""
    weights = TensorWeights(_StoredTensors(program.weights))
    host = HostLibrary(program.library) if program.library else None
    prepared = PreparedCalls()
    state = State(weights.tensor)
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
    )


def to_function(
    program: Program,
    name: str,
    *,
    weights: TensorWeights | None = None,
    host: HostCode | None = None,
    prepared: PreparedCalls | None = None,
) -> CompiledFunction:
    """One function on flat lists of tensors."""
    if host is None and program.library:
        host = HostLibrary(program.library)
    return CompiledFunction(
        program.plans[name],
        weights or TensorWeights(_StoredTensors(program.weights)),
        libraries=libraries.get,
        host=host,
        prepared=prepared,
    )


def to_contents(program: Program, golden: Sequence[GoldenCase] = ()) -> Contents:
    """What `accel.runtime.artifact.write_artifact` stores."""
    weights: dict[str, StoredWeight] = {}
    for name in program.weights.names():
        type_ = program.weights.type(name)
        shape = tuple(int(d) for d in type_.shape)
        weights[name] = StoredWeight(type_.dtype, shape, partial(program.weights.stored, name))
    kernels = {f"{name}.txt": text.encode() for name, text in program.sources.items()}
    if program.library:
        kernels[HOST_CODE] = program.library
    return Contents(
        functions=program.plans,
        weights=weights,
        target=TargetSpec(
            name=program.target.name,
            machine=platform.machine() if program.library else "",
            features=list(program.target.features) if program.library else [],
            description=program.target.to_json(),
        ),
        versions=versions(),
        ir=program.stages,
        kernels=kernels,
        host_code=HOST_CODE if program.library else "",
        golden=golden,
        ledger=program.ledger.to_json(),
        report=report(program),
    )


def report(program: Program) -> dict[str, Any]:
    """Facts for people: seconds by phase, kernels, weights."""
    return {
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
    """A weight store as a mapping of stored tensors, read when asked for."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._store:
            raise KeyError(name)
        return self._store.stored(name)

    def __iter__(self) -> Any:
        return iter(self._store.names())

    def __len__(self) -> int:
        return len(self._store)
