"""Targets as data: what the roofline, the cost model and the code generators need to know.

`host_target()` describes this machine's CPU. Rates are datasheet or derived figures in FLOP/s and
bytes/s; measured ceilings are the benchmark's business.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

import torch

from accel.errors import OptionError


@dataclass(frozen=True)
class Target:
    """One kind of device.

    Attributes:
        kind: "cpu" or "cuda".
        arch: LLVM CPU name ("znver4") or CUDA architecture ("sm_90"); "" lets the backend ask.
        cores: CPU cores, or streaming multiprocessors.
        vector_bytes: widest SIMD register of a CPU core.
        flops: peak rate by dtype name, FLOP/s.
        bandwidth: memory bandwidth, bytes/s.
        features: instruction sets or hardware features, sorted.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    arch: str = ""
    cores: int = 1
    vector_bytes: int = 16
    flops: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0
    features: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["features"] = list(self.features)
        return data


_CUDA = (
    # name, arch, SMs, bandwidth, bf16, fp8 (dense; datasheets)
    ("a100", "sm_80", 108, 2.0e12, 312e12, 0.0),
    ("h100", "sm_90", 132, 3.35e12, 989e12, 1979e12),
    ("h200", "sm_90", 132, 4.8e12, 989e12, 1979e12),
    ("b200", "sm_100", 148, 8.0e12, 2250e12, 4500e12),
)


@cache
def _flags() -> tuple[str, ...]:
    """SIMD features of this CPU, as Linux names them; empty where the system does not say."""
    wanted = ("sse4_2", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "amx_tile")
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            line = next((row for row in file if row.startswith("flags")), "")
    except OSError:
        return ()
    have = set(line.split())
    return tuple(sorted(w for w in wanted if w in have))


@cache
def host_target() -> Target:
    """This machine's CPU."""
    features = _flags()
    vector = 64 if "avx512f" in features else 32 if "avx2" in features else 16
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    # Two fused multiply-adds of one vector per cycle at 3 GHz: an upper bound, not a measurement.
    peak = cores * 3e9 * 2 * 2 * (vector // 4)
    return Target(
        name="cpu",
        kind="cpu",
        arch=platform.machine(),
        cores=cores,
        vector_bytes=vector,
        flops={"float32": peak, "float64": peak / 2},
        bandwidth=2.5e10,
        features=features,
    )


def list_targets() -> dict[str, Target]:
    """All targets by name; "cpu" is this machine."""
    targets = {"cpu": host_target()}
    for name, arch, cores, bandwidth, bf16, fp8 in _CUDA:
        flops = {"bfloat16": bf16, "float16": bf16, "float8_e4m3fn": fp8}
        features = ("tma", "fp8", "2:4") if arch != "sm_80" else ("2:4",)
        targets[name] = Target(name, "cuda", arch, cores, 128, flops, bandwidth, features)
    return targets


def target_of(device: torch.device) -> Target:
    """The target that runs on a device: the GPU of its name, else the one of its architecture.

    Raises OptionError for a GPU that no target describes.
    """
    if device.type == "cpu":
        return host_target()
    known = list_targets()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        major, _ = torch.cuda.get_device_capability(device)
        alike = [t for t in known.values() if t.arch == f"sm_{major}0"]
        named = [t for t in alike if t.name in name]
        if named or alike:
            return (named or alike)[0]
    raise OptionError(
        f"no target describes the device {device}", advice=f"known targets: {', '.join(known)}"
    )


def get_target(target: str | Target) -> Target:
    """A target by name, or the target itself. Raises OptionError for unknown names."""
    if isinstance(target, Target):
        return target
    found = list_targets().get(target)
    if found is None:
        raise OptionError(
            f"no target named '{target}'", advice=f"known: {', '.join(list_targets())}"
        )
    return found
