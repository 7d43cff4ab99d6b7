"""What generated machine code depends on besides the program.

`accel.backends.cubin` is the door to Triton itself.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path

from accel.errors import MissingDependencyError


@cache
def version() -> str:
    """What machine code depends on besides the program: Triton, this generator, ops' meaning."""
    try:
        number = metadata.version("triton")
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            "generated GPU kernels need triton", advice="pip install 'accel-compiler[triton]'"
        ) from error
    return f"triton {number}, generator {_sources()}"


@cache
def _sources() -> str:
    """A hash over the generators and the IR, so that no cache entry outlives a change."""
    folder = Path(__file__).parent.parent
    hasher = hashlib.sha256()
    for part in (folder / "triton", folder / "cubin", folder / "loops", folder.parent / "ir"):
        for file in sorted(part.rglob("*.py")):
            hasher.update(file.read_bytes())
    return hasher.hexdigest()[:16]
