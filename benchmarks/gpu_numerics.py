"""Numerics of generated GPU kernels without a GPU: how many were checked, and that all compile.

    python -m benchmarks.gpu_numerics [--seeds 200] [--archs sm_80,sm_90,sm_100] [--out FILE]

Runs the tests that put kernels through Triton's interpreter and compare them with the IR's
interpreter in float64: every template, every elementwise op on every dtype that it claims, and as
many random regions as asked for. Then compiles each kernel that was run to machine code for every
architecture. A test that fails, or a kernel that does not compile, fails the command.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from accel.backends.triton import TritonBackend
from accel.errors import BackendError
from accel.ir.module import Op
from benchmarks.measure import RESULTS, ROOT, machine
from tests.backends.triton_kernels import KERNELS, RUNS

HOPPER = "sm_90"  # kernels in Gluon use its own instructions
TESTS = "tests/backends/test_triton_*.py"


def check(seeds: int) -> dict[str, Any]:
    """Runs the interpreter's tests; RuntimeError if one fails."""
    files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(TESTS))]
    counted = _Counted()
    start = time.perf_counter()
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
    code = pytest.main([*arguments, f"--triton-seeds={seeds}", *files], plugins=[counted])
    if code != 0:
        raise RuntimeError(f"the interpreter's tests failed: exit code {int(code)}")
    return {
        "tests": counted.passed,
        "random_regions": seeds,
        "runs": dict(sorted(RUNS.items())),
        "kernels": dict(sorted(Counter(kind for kind, _ in KERNELS.values()).items())),
        "seconds": time.perf_counter() - start,
    }


class _Counted:
    """A pytest plugin that counts tests which passed."""

    passed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed


def _compile(job: tuple[str, str]) -> tuple[str, str, str]:
    """(architecture, kernel, why it does not compile), in a forked worker."""
    arch, name = job
    kernel: Op = KERNELS[name][1]
    backend = TritonBackend(arch)
    try:
        _, made = backend.generate([kernel])
        sources = [launch.source for code in made.values() for launch in code.launches]
        if arch != HOPPER and any("gluon" in source for source in sources):
            return arch, name, HOPPER
        backend.compile([kernel])
    except BackendError as error:
        return arch, name, str(error)
    return arch, name, ""


def compile_all(archs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By architecture: how many kernels compiled, and why others did not."""
    made: dict[str, dict[str, Any]] = {
        a: {"compiled": 0, "for_hopper": 0, "failed": {}} for a in archs
    }
    jobs = [(arch, name) for arch in archs for name in KERNELS]
    with multiprocessing.get_context("fork").Pool(os.cpu_count() or 1) as pool:
        for arch, name, reason in pool.imap_unordered(_compile, jobs, chunksize=8):
            if reason == HOPPER:
                made[arch]["for_hopper"] += 1
            elif reason:
                made[arch]["failed"][name] = reason
            else:
                made[arch]["compiled"] += 1
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--archs", default="sm_80,sm_90,sm_100")
    parser.add_argument("--out", default=str(RESULTS / "gpu_numerics.json"))
    chosen = parser.parse_args()
    checked = check(chosen.seeds)
    compiled = compile_all(chosen.archs.split(","))
    print(f"{checked['tests']} tests, {sum(checked['runs'].values())} runs of "
          f"{len(KERNELS)} kernels, {checked['random_regions']} random regions")  # fmt: skip
    for kind, count in checked["kernels"].items():
        print(f"  {kind:18} {count} kernels, {checked['runs'].get(kind, 0)} runs")
    for arch, made in compiled.items():
        print(f"{arch}: {made['compiled']} of {len(KERNELS)} compile, {made['for_hopper']} are for "
              f"{HOPPER} alone")  # fmt: skip
    result = {"machine": machine(), **checked, "compiled": compiled}
    Path(chosen.out).write_text(json.dumps(result, indent=2) + "\n")
    failed = {name: why for made in compiled.values() for name, why in made["failed"].items()}
    if failed:
        sys.exit("\n".join(f"{name}: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    main()
