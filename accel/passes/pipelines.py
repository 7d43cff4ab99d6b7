"""The default pipelines, as lists of pass strings."""

from __future__ import annotations

# Exact clean-up, applied to every program; techniques go between two runs of it.
EXACT_PIPELINE: tuple[str, ...] = (
    "canonicalize",
    "fold_batch_norm",
    "fold",
    "canonicalize",
    "cse",
    "dce",
    "raise_attention",
    "merge_linears",
    "fold_pad",
    "layout",
    "canonicalize",
    "cse",
    "dce",
)
