"""What `benchmarks.gpu_numerics` runs in processes of their own: tests, and the compiler.

    python -m benchmarks.gpu_numerics_worker check FOLDER FILE SEEDS ARCH...
    python -m benchmarks.gpu_numerics_worker compile FOLDER

Both add lines of JSON to files in FOLDER as they go, and skip what is there already: a process may
end at any time, and the next one goes on where it was.

FOLDER is for one state of the sources; what is compiled is kept beside it, for the next ones.

    tests.jsonl             {"test", "outcome", "seconds", "error", "runs": {kernel: runs}}
    started.jsonl           {"test"} or {"launch"}: what was begun
    kernels/KEY.json        {"key", "template", "random", "launches": {arch: [hashes] or why none}}
    ../launches/HASH.json   what Triton is asked to compile: source, types, constants, architecture
    ../compiled-VERSION.jsonl  {"launch", "error", "seconds"}, by version of Triton
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from accel.backends.cubin.compile import Unit, compile_unit
from accel.backends.loops.phases import REDUCTIONS
from accel.backends.triton import TritonBackend
from accel.backends.triton.anchors import ANCHORS
from accel.backends.triton.backend import unit_of
from accel.backends.triton.kernel import KernelCode, LaunchCode
from accel.errors import BackendError
from accel.ir.types import SUB_BYTE_BITS
from benchmarks.bounded import OutOfTime, at_most
from tests.backends import triton_kernels
from tests.backends.triton_kernels import Generated

HOPPER = "sm_90"  # kernels in Gluon use its own instructions
TEST_SECONDS = 600
COMPILE_SECONDS = 120
_FUZZ = "test_triton_fuzz.py"
_LOOKUPS = ("embedding", "gather")
_TOLD = 4000  # characters of a failure


def lines(path: Path) -> list[dict[str, Any]]:
    """What was written to a file of lines; none if there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def compiled_file(folder: Path, triton: str) -> Path:
    return folder.parent / f"compiled-{triton}.jsonl"


def _add(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


# -- tests -----------------------------------------------------------------------------------


class Watcher:
    """A pytest plugin that notes each test's outcome, and saves the kernels that it ran."""

    def __init__(self, folder: Path, archs: Sequence[str]) -> None:
        self.folder, self.archs = folder, archs
        self.done = {line["test"] for line in lines(folder / "tests.jsonl")}
        self.before: Counter[str] = Counter()
        self.failed = ""
        self.start = 0.0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.done]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        _add(self.folder / "started.jsonl", {"test": item.nodeid})
        self.failed, self.before, self.start = "", triton_kernels.RUNS.copy(), time.perf_counter()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self) -> Iterator[None]:
        try:
            with at_most(TEST_SECONDS):
                return (yield)
        except OutOfTime as error:
            raise TimeoutError(str(error)) from error

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed += f"{report.when}: {report.longreprtext[-_TOLD:]}"
        skipped = report.skipped and report.when in ("setup", "call")
        if skipped or report.when == "teardown":
            self._note(report.nodeid, "skipped" if skipped else "")

    def _note(self, test: str, outcome: str) -> None:
        if test in self.done:
            return
        self.done.add(test)
        runs = triton_kernels.RUNS - self.before
        for key in runs:
            self._save(key, _FUZZ in test)
        outcome = outcome or ("failed" if self.failed else "passed")
        seconds = round(time.perf_counter() - self.start, 3)
        made = {"test": test, "outcome": outcome, "seconds": seconds, "error": self.failed}
        _add(self.folder / "tests.jsonl", {**made, "runs": dict(runs)})

    def _save(self, key: str, random: bool) -> None:
        path = self.folder / "kernels" / f"{_hash(key)}.json"
        if path.is_file():
            return
        one = triton_kernels.KERNELS[key]
        own = _generate(one, one.backend.arch)
        assert isinstance(own, KernelCode), own
        by_arch: dict[str, Any] = {}
        for arch in self.archs:
            made = _generate(one, arch)
            by_arch[arch] = made if isinstance(made, str) else [
                self._launch(launch, arch) for launch in made.launches
            ]  # fmt: skip
        about = {"key": key, "template": template(one, own), "random": random}
        path.write_text(json.dumps({**about, "launches": by_arch}))

    def _launch(self, launch: LaunchCode, arch: str) -> str:
        text = json.dumps(asdict(unit_of(launch, arch)))
        name = _hash(text.replace(launch.name, "kernel"))
        path = self.folder.parent / "launches" / f"{name}.json"
        if not path.is_file():
            path.write_text(text)
        return name


def _generate(one: Generated, arch: str) -> KernelCode | str:
    """The kernel for an architecture, or why there is none."""
    was = one.backend
    backend = TritonBackend(arch, was.sms, was.tile, tf32=was.tf32)
    try:
        _, made = backend.generate([one.kernel])
    except BackendError as error:
        return str(error)
    (code,) = made.values()
    if arch != HOPPER and any(launch.gluon for launch in code.launches):
        return HOPPER
    return code


def template(one: Generated, code: KernelCode) -> str:
    """What wrote a kernel, in words."""
    region = one.backend.primitive_region(one.kernel.regions[0], one.kind)
    ops = {op.name for op in region.ops}
    if one.kind not in ANCHORS:
        return _plain(ops, code)
    words = [one.kind.replace("_", " ")]
    if any(launch.gluon for launch in code.launches):
        writer = re.match("[A-Z][a-z]*", type(one.backend.tile).__name__)
        words.append(f"{writer[0].lower()} (Gluon)" if writer and one.backend.tile else "Gluon")
    if one.kind == "cached_attention" and ops & set(_LOOKUPS):
        words.append("paged")
    if "dequantize" in ops:
        codes = {str(a.dtype).rpartition(".")[2] for a in region.args if _is_code(a.dtype)}
        words.append("codes of " + (" and ".join(sorted(codes)) or "a table"))
    if one.backend.tf32:
        words.append("tf32")
    if len(code.launches) > 1 and one.kind in ("attention", "experts", "topk"):
        words.append(f"{len(code.launches)} launches")
    return ", ".join(words)


def _plain(ops: set[str], code: KernelCode) -> str:
    """Of a kernel without an anchor: pointwise, or rows that are reduced."""
    constants = {name for launch in code.launches for name in launch.constants}
    if "SPLIT" in constants:
        return "reduction, rows split"
    if ops & set(REDUCTIONS):
        held = not any(" in range(" in launch.source for launch in code.launches)
        return "rowwise, in registers" if held else "reduction, rows in a loop"
    return "pointwise, transposing" if {"ROWS", "COLS"} <= constants else "pointwise"


def _is_code(dtype: Any) -> bool:
    return dtype in SUB_BYTE_BITS or dtype.itemsize == 1


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def check(folder: Path, file: str, seeds: str, archs: Sequence[str]) -> int:
    """Runs a file's tests, all of them whatever fails; pytest's exit code."""
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=short"]
    watcher = Watcher(folder, archs)
    return int(pytest.main([*arguments, f"--triton-seeds={seeds}", file], plugins=[watcher]))


# -- the compiler ----------------------------------------------------------------------------


def compile_all(folder: Path) -> None:
    """Compiles what the tests ran, for every architecture, with the Triton that is imported."""
    written = compiled_file(folder, version("triton"))
    done = {line["launch"] for line in lines(written)}
    kernels = (json.loads(path.read_text()) for path in (folder / "kernels").glob("*.json"))
    asked = {
        launch
        for kernel in kernels
        for launches in kernel["launches"].values()
        if not isinstance(launches, str)
        for launch in launches
    }
    for name in sorted(asked - done):
        _add(folder / "started.jsonl", {"launch": name})
        start, error = time.perf_counter(), ""
        made = json.loads((folder.parent / "launches" / f"{name}.json").read_text())
        try:
            with at_most(COMPILE_SECONDS):
                compile_unit(Unit(**made))
        except (BackendError, OutOfTime) as failure:
            error = str(failure)[:_TOLD]
        seconds = round(time.perf_counter() - start, 3)
        _add(written, {"launch": name, "error": error, "seconds": seconds})


def main(arguments: Sequence[str]) -> int:
    command, folder, *rest = arguments
    if command == "compile":
        compile_all(Path(folder))
        return 0
    file, seeds, *archs = rest
    return check(Path(folder), file, seeds, archs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
