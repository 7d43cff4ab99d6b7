"""The default pipelines, as lists of pass strings."""

from __future__ import annotations

# Exact clean-up, applied to every program; techniques go between two runs of it.
EXACT_PIPELINE: tuple[str, ...] = (
    "canonicalize",
    "fold",
    "canonicalize",
    "cse",
    "dce",
    "raise_attention",
    "canonicalize",
    "cse",
    "dce",
)
