"""Numerics of generated GPU kernels without a GPU: how many were checked, and that all compile.

    python -m benchmarks.gpu_numerics [--seeds 200] [--archs sm_80,sm_90,sm_100] [--minutes 90]
                                      [--triton FOLDER]... [--state FOLDER] [--out FILE]

Runs the tests that put kernels through Triton's interpreter and compare them with the IR's
interpreter in float64: every template, every elementwise op on every dtype that it claims, and as
many random regions as asked for. Then compiles each kernel that was run to machine code for every
architecture, with the installed Triton and with those in the folders given.

One process works at a time (`benchmarks.gpu_numerics_worker`). A test that fails, hangs or ends its
process is counted and named, and so is a kernel that does not compile; the rest goes on. `--state`
keeps what is done: a run that was stopped, or had no minutes left, goes on where it was if the
sources are the same, and compiles only kernels that it has not compiled before. Exit code 1 if
anything failed or was not done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accel.backends.triton import toolchain
from accel.config import cache_dir
from benchmarks.gpu_numerics_worker import HOPPER, compiled_file, lines
from benchmarks.measure import RESULTS, ROOT, machine

TESTS = "tests/backends/test_triton_*.py"
_TESTED = (1, 5)  # pytest's exit codes for tests that failed, and for none that were left
_MOST_STARTS = 20  # of processes for one file of tests, or one Triton


@dataclass
class Run:
    """Processes that work in one folder, until a time.

    Attributes:
        folder: what is done (`benchmarks.gpu_numerics_worker`).
        end: on `time.monotonic`'s clock.
    """

    folder: Path
    end: float

    def left(self) -> float:
        return self.end - time.monotonic()

    def worker(self, command: str, *arguments: str, path: str = "") -> bool:
        """Runs a command of the worker to its end, starting it anew where it dies; whether it got
        there in time."""
        for _ in range(_MOST_STARTS):
            if self.left() <= 0:
                return False
            code = self._start([command, str(self.folder), *arguments], path)
            if code is None:
                return False
            if code == 0 or (command == "check" and code in _TESTED):
                return True
            self._bury(f"its process ended with {code}", path)
        return False

    def _start(self, arguments: Sequence[str], path: str) -> int | None:
        """The exit code; None if time ran out."""
        places = [p for p in (path, str(ROOT), os.environ.get("PYTHONPATH", "")) if p]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
        module = "benchmarks.gpu_numerics_worker"
        command = [sys.executable, "-m", module, *arguments]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        try:
            output, _ = process.communicate(timeout=max(self.left(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
        last = output.strip().splitlines()[-1:]
        print(f"{' '.join(arguments[::2][:2])}: {process.returncode} {''.join(last)}", flush=True)
        return process.returncode

    def _bury(self, why: str, path: str) -> None:
        """Notes that what was begun last has failed."""
        (*_, last) = lines(self.folder / "started.jsonl")
        made: dict[str, Any] = {**last, "error": why, "seconds": 0.0}
        file = self.folder / "tests.jsonl"
        if "launch" in last:
            file = compiled_file(self.folder, triton_version(path))
        else:
            made |= {"outcome": "failed", "runs": {}}
        with file.open("a") as out:
            out.write(json.dumps(made) + "\n")


def triton_version(path: str) -> str:
    """Of the Triton in a folder; "": of the installed one."""
    if not path:
        return version("triton")
    (found,) = Path(path).glob("triton-*.dist-info")
    return found.name.removeprefix("triton-").removesuffix(".dist-info")


def sources() -> str:
    """A hash over what a run depends on."""
    hasher = hashlib.sha256(toolchain.version().encode())
    for folder in (ROOT / "tests" / "backends", ROOT / "accel"):
        for file in sorted(folder.rglob("*.py")):
            hasher.update(file.read_bytes())
    return hasher.hexdigest()[:16]


def summary(folder: Path, archs: Sequence[str], tritons: Sequence[str]) -> dict[str, Any]:
    """Counts of what a folder holds."""
    tests = lines(folder / "tests.jsonl")
    runs: Counter[str] = Counter()
    for test in tests:
        if test["outcome"] == "passed":
            runs.update(test["runs"])
    kernels = [json.loads(p.read_text()) for p in sorted((folder / "kernels").glob("*.json"))]
    checked = [k for k in kernels if k["key"] in runs]
    own = [k for k in checked if not k["random"]]
    fuzz = [k for k in checked if k["random"]]
    return {
        "tests": dict(sorted(Counter(test["outcome"] for test in tests).items())),
        "failed": {t["test"]: t["error"] for t in tests if t["outcome"] == "failed"},
        "templates": by_template(own, runs),
        "random_regions": {"kernels": len(fuzz), "runs": sum(runs[k["key"]] for k in fuzz)},
        "compiled": {
            one: {arch: compiled(folder, one, kernels, arch) for arch in archs} for one in tritons
        },
        "seconds": round(sum(test["seconds"] for test in tests)),
    }


def by_template(kernels: Iterable[dict[str, Any]], runs: Counter[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for kernel in sorted(kernels, key=lambda k: k["template"]):
        row = found.setdefault(kernel["template"], {"kernels": 0, "runs": 0})
        row["kernels"] += 1
        row["runs"] += runs[kernel["key"]]
    return found


def compiled(
    folder: Path, triton: str, kernels: Iterable[dict[str, Any]], arch: str
) -> dict[str, Any]:
    """How many kernels one Triton compiled for one architecture."""
    results = {line["launch"]: line["error"] for line in lines(compiled_file(folder, triton))}
    made: dict[str, Any] = {"compiled": 0, "for_hopper": 0, "not_tried": 0, "failed": {}}
    for kernel in kernels:
        launches = kernel["launches"][arch]
        if launches == HOPPER:
            made["for_hopper"] += 1
        elif isinstance(launches, str):
            made["failed"][kernel["key"]] = launches
        elif any(results.get(one) for one in launches):
            errors = (results.get(one) for one in launches)
            made["failed"][kernel["key"]] = next(e for e in errors if e)
        elif all(one in results for one in launches):
            made["compiled"] += 1
        else:
            made["not_tried"] += 1
    return made


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    print(", ".join(f"{count} tests {outcome}" for outcome, count in result["tests"].items()))
    for name, row in result["templates"].items():
        print(f"  {name:44} {row['kernels']:5} kernels {row['runs']:6} runs")
    fuzz = result["random_regions"]
    print(f"  {'random regions':44} {fuzz['kernels']:5} kernels {fuzz['runs']:6} runs")
    for triton, archs in result["compiled"].items():
        for arch, made in archs.items():
            print(f"  triton {triton} {arch}: {made['compiled']} kernels compile, "
                  f"{made['for_hopper']} are for {HOPPER} alone, {len(made['failed'])} fail, "
                  f"{made['not_tried']} were not tried")  # fmt: skip
    for name, why in result["failed"].items():
        print(f"FAILED {name}\n{why}")
    for archs in result["compiled"].values():
        for arch, made in archs.items():
            for name, why in made["failed"].items():
                print(f"FAILED {arch} {name}\n{why[:600]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="random regions")
    parser.add_argument("--archs", default="sm_80,sm_90,sm_100")
    parser.add_argument("--triton", action="append", default=[], help="folder of another Triton")
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--state", default="", help="folder; default: in the cache folder")
    parser.add_argument("--out", default=str(RESULTS / "gpu_numerics.json"))
    chosen = parser.parse_args()
    archs = chosen.archs.split(",")
    folder = Path(chosen.state or cache_dir() / "numerics") / sources()
    for part in (folder / "kernels", folder.parent / "launches"):
        part.mkdir(parents=True, exist_ok=True)
    run = Run(folder, time.monotonic() + 60 * chosen.minutes)
    files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(TESTS))]
    undone = [f for f in files if not run.worker("check", f, str(chosen.seeds), *archs)]
    places = ["", *chosen.triton]
    for place in places:
        if not run.worker("compile", path=place):
            undone.append(f"compiling with Triton {triton_version(place)}")
    result = {"machine": machine(), "undone": undone,
              **summary(folder, archs, [triton_version(p) for p in places])}  # fmt: skip
    show(result)
    Path(chosen.out).write_text(json.dumps(result, indent=2) + "\n")
    broken = any(made["failed"] for a in result["compiled"].values() for made in a.values())
    if undone or result["failed"] or broken:
        sys.exit(f"not done: {', '.join(undone) or 'nothing'}; see above for what failed")


if __name__ == "__main__":
    main()
