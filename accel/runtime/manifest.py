"""What `manifest.json` of an artifact holds, as dataclasses (read by `accel.runtime.schema`)."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from typing import Any

from accel.errors import ArtifactError
from accel.runtime.plan import FunctionPlan
from accel.runtime.weights import WeightSpec

FORMAT_VERSION = 1


@dataclass
class TargetSpec:
    """The machine that the artifact was made for.

    `features` are those of its CPU that the host code uses, by the names of /proc/cpuinfo
    ("avx512f"). `description` is the compiler's own record.
    """

    name: str
    machine: str = ""
    features: list[str] = field(default_factory=list)
    description: dict[str, Any] = field(default_factory=dict)


@dataclass
class Blob:
    """A file of the archive."""

    bytes: int
    sha256: str


@dataclass
class Golden:
    """Recorded inputs and outputs of one function, in a safetensors file of the archive.

    `inputs` and `outputs` are stored in this order. `tolerances` has one bound per output: of the
    largest error relative to the largest magnitude; 0 demands equality.
    """

    function: str
    file: str
    inputs: list[WeightSpec]
    outputs: list[WeightSpec]
    tolerances: list[float]


@dataclass
class Manifest:
    """The whole manifest. `functions` are the entry points; the first is the one that is called.

    `host_code` names the file with generated kernels ("" if there are none). `ledger` says what
    each pass did ({"rows": [...], "misses": [...]}), `report` what the compiler wants to tell;
    both are for people.
    """

    format: int
    versions: dict[str, str]
    target: TargetSpec
    functions: dict[str, FunctionPlan]
    weights: dict[str, WeightSpec]
    blobs: dict[str, Blob]
    host_code: str
    golden: list[Golden]
    ledger: dict[str, Any]
    report: dict[str, Any]


def this_machine() -> TargetSpec:
    """The machine that this process runs on, with all features of its CPU."""
    return TargetSpec("this machine", platform.machine(), sorted(cpu_features()))


def cpu_features() -> set[str]:
    """Features of this CPU by the names of /proc/cpuinfo; empty where there is no such file."""
    path = "/proc/cpuinfo"
    if not os.path.exists(path):
        return set()
    with open(path) as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return set(value.split())
    return set()


def check_machine(target: TargetSpec) -> None:
    """Raises ArtifactError if host code for `target` cannot run here."""
    here = this_machine()
    if target.machine and target.machine != here.machine:
        raise ArtifactError(
            f"the artifact's code is for {target.machine}; this machine is {here.machine}",
            advice="package the model for this machine's target",
        )
    missing = sorted(set(target.features) - set(here.features)) if here.features else []
    if missing:
        raise ArtifactError(
            f"the artifact's code needs {', '.join(missing)}, which this CPU does not have",
            advice="package the model for this machine's target",
        )
