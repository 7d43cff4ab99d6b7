"""Code for an artifact whose own host code is not trusted, or is for another CPU."""

from __future__ import annotations

from accel.backends.tvm import TvmBackend
from accel.compiler import gpu
from accel.compiler.lower import lower_function
from accel.compiler.options import Options
from accel.compiler.pipeline import compile_kernels
from accel.compiler.targets import Target, host_target, list_targets
from accel.errors import ArtifactError
from accel.ir.parser import parse_module
from accel.runtime.artifact import Artifact
from accel.runtime.device import device_of, load_code
from accel.runtime.loader import Rebuilt


def rebuild(artifact: Artifact) -> Rebuilt:
    """Plans and kernels made anew from the artifact's kernel-level IR.

    Raises ArtifactError if the artifact has no such IR; IRParseError and VerifyError if the IR is
    damaged.
    """
    if "kernels" not in artifact.stages():
        raise ArtifactError("the artifact has no kernel-level IR to rebuild its code from")
    module = parse_module(artifact.ir("kernels"), f"{artifact.archive.path}:ir/kernels.mlir")
    target = _target(artifact)
    if target.kind == "cuda":
        options = Options()
        generator = gpu.generator(target, options)
        with gpu.processes(target, options) as pool:
            symbols, library, _ = gpu.compile_launches(module, generator, options, pool)
    else:
        symbols, library, _ = compile_kernels(module, TvmBackend(), target, Options())
    plans = {f.name: lower_function(f, module, symbols) for f in module.functions.values()}
    return Rebuilt(plans, load_code(library, device_of(target.kind)) if library else None)


def _target(artifact: Artifact) -> Target:
    """This machine's CPU, or the GPU that the artifact was made for."""
    name = artifact.manifest.target.name
    found = list_targets().get(name)
    return found if found is not None and found.kind == "cuda" else host_target()
