"""The default pipelines, as lists of pass strings."""

from __future__ import annotations

# Exact clean-up. A user's techniques come after it, when the program is in its plainest form.
CLEAN_PIPELINE: tuple[str, ...] = (
    "raise_experts",  # routing, as models write it
    "canonicalize",
    "fold",
    "fold_batch_norm",
    "reparameterize",
    "canonicalize",
    "cse",
    "dce",
    "raise_composites",
    "raise_attention",
    "fold",
    "merge_linears",
    "fold_pad",
)

# Applied to every program: clean-up, then what only makes it faster to run.
EXACT_PIPELINE: tuple[str, ...] = (
    *CLEAN_PIPELINE,
    "layout",
    "canonicalize",
    "cse",
    "dce",
)
