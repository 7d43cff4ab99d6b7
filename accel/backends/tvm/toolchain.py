"""From TIR to a shared object: TVM's LLVM for the kernels, a C compiler for the shim and the link.

TVM's own lowering is not used, and TVM's runtime is not needed to run the result. Functions have C
signatures and one pass makes them ready for LLVM; the others would rewrite `not (a < b)` to
`a >= b` and the like, which is wrong for NaN.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from accel.backends.tvm.kernel import KernelCode
from accel.backends.tvm.shim import c_source
from accel.backends.tvm.tir import tirx, tvm
from accel.config import c_compiler
from accel.errors import BackendError, MissingDependencyError
from accel.runtime.manifest import cpu_features

_COMPILE_SECONDS = 300


@cache
def llvm_target(cpu: str) -> Any:
    """TVM's target for an LLVM CPU name; "" or a name LLVM does not know: this machine's CPU.

    Kernels are planned for the widest registers. LLVM would cut their vectors in two on Intel's
    CPUs with AVX-512, where it takes 512 bits to cost too much clock: a tile's sums spill then.
    """
    known = tvm.get_global_func("target.llvm_is_valid_cpu")
    triple = tvm.get_global_func("target.llvm_get_system_triple")()
    if not cpu or not known(cpu, triple):
        cpu = tvm.get_global_func("target.llvm_get_system_cpu")()
    wide = {"mattr": ["-prefer-256-bit"]} if "avx512f" in cpu_features() else {}
    return tvm.target.Target({"kind": "llvm", "mcpu": cpu, **wide})


@cache
def version() -> str:
    """What machine code depends on besides the program: TVM (with its LLVM), this generator, the
    meaning of ops, and the CPU."""
    try:
        number = metadata.version("apache-tvm")
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            "generated CPU kernels need apache-tvm", advice="pip install 'accel-compiler[tvm]'"
        ) from error
    features = " ".join(sorted(cpu_features()))
    return f"tvm {number}, generator {_sources()}, {platform.machine()}, {features}"


def _sources() -> str:
    """A hash over the generators and the IR, so that no cache entry outlives a change."""
    package = Path(__file__).parent
    hasher = hashlib.sha256()
    for folder in (package, package.parent / "loops", package.parent.parent / "ir"):
        for file in sorted(folder.rglob("*.py")):
            hasher.update(file.read_bytes())
    return hasher.hexdigest()[:16]


def build(kernels: Sequence[KernelCode], cpu: str = "") -> bytes:
    """The shared object with all kernels. Raises BackendError if a tool fails."""
    target = llvm_target(cpu)
    functions = {
        phase.name: phase.function.with_attr({"target": target})  # type: ignore[attr-defined]
        for kernel in kernels
        for phase in kernel.phases
    }
    module = tvm.IRModule(functions)
    with target:
        module = tirx.transform.LowerIntrin()(module)
    compiled = tvm.get_global_func("target.build.llvm")(module, target)
    with tempfile.TemporaryDirectory(prefix="accel-") as folder:
        objects, shim, library = (Path(folder) / n for n in ("k.o", "shim.c", "kernels.so"))
        compiled.write_to_file(str(objects), "o")
        shim.write_text(c_source(kernels), encoding="utf-8")
        _link(folder, [str(shim), str(objects)], str(library))
        return library.read_bytes()


def _link(folder: str, inputs: list[str], output: str) -> None:
    command = [c_compiler(), "-O2", "-shared", "-fPIC", "-s", "-o", output, *inputs, "-lm"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_COMPILE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(
            f"the C compiler did not run: {error}",
            advice="install one, or name it in ACCEL_CC",
        ) from error
    if done.returncode != 0:
        raise BackendError(f"linking generated kernels failed: {done.stderr.strip()[:500]}")
