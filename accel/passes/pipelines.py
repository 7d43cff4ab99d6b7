"""The default pipelines, as lists of pass strings."""

from __future__ import annotations

# Exact clean-up, applied to every program; techniques go between two runs of it.
EXACT_PIPELINE: tuple[str, ...] = (
    "canonicalize",
    "fold",
    "fold_batch_norm",
    "canonicalize",
    "cse",
    "dce",
    "raise_composites",
    "raise_attention",
    "fold",
    "merge_linears",
    "fold_pad",
    "layout",
    "canonicalize",
    "cse",
    "dce",
)
