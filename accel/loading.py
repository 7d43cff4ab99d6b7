"""`accel.load`: runs an artifact. The compiler is only imported to rebuild code not trusted."""

from __future__ import annotations

import importlib
import os

from accel.runtime.artifact import Artifact
from accel.runtime.loader import Rebuilt
from accel.runtime.loader import load as _load
from accel.runtime.model import CompiledModel


def load(
    path: str | os.PathLike[str], trust: bool = False, *, rebuild: bool = True
) -> CompiledModel:
    """Loads an artifact; the result is called as the model was.

    Native code runs only if a key that you trust signed it (your own counts), or with `trust`.
    Otherwise it is compiled again from the IR in the artifact, and the log says so; with
    `rebuild=False`, or where the code generator is not installed, that is an error.

    Raises ArtifactError for a damaged or foreign file, TrustError for untrusted native code.
    """
    return _load(path, trust, rebuild=_rebuild if rebuild else None)


def _rebuild(artifact: Artifact) -> Rebuilt:
    made: Rebuilt = importlib.import_module("accel.compiler.rebuild").rebuild(artifact)
    return made
