"""The one place that reads environment variables.

| variable | meaning | default |
|---|---|---|
| ACCEL_CACHE_DIR | compile cache, tuning records and the user's signing key | ~/.cache/accel |
| ACCEL_LOGS | log level: debug, info, warning, error | warning |
| ACCEL_TRACE | folder for numbered IR dumps of every compile | none |
| ACCEL_CC | C compiler that links generated CPU kernels | cc |
| ACCEL_MALLOC | keep: freed large blocks stay in the process; system: never | keep |
"""

from __future__ import annotations

import logging
import os
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache folder (not created here)."""
    given = os.environ.get("ACCEL_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "accel"


def trace_dir() -> Path | None:
    given = os.environ.get("ACCEL_TRACE")
    return Path(given) if given else None


def c_compiler() -> str:
    return os.environ.get("ACCEL_CC", "cc")


def keeps_memory() -> bool:
    return os.environ.get("ACCEL_MALLOC", "keep") != "system"


def logger(name: str) -> logging.Logger:
    """A logger under "accel", at the level of ACCEL_LOGS."""
    root = logging.getLogger("accel")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
        root.setLevel(os.environ.get("ACCEL_LOGS", "warning").upper())
        root.propagate = False
    return root.getChild(name)
