"""The default pipelines, as lists of pass strings."""

from __future__ import annotations

_RAISED: tuple[str, ...] = (
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
)
_JOINED: tuple[str, ...] = ("merge_linears", "fold_pad")

# Exact clean-up of a program that is made into others (a generator's): all rows stay.
CLEAN_PIPELINE: tuple[str, ...] = (*_RAISED, *_JOINED)

# A user's techniques come after it, when the program is in its plainest form.
PLAIN_PIPELINE: tuple[str, ...] = (
    *_RAISED,
    "hoist_slices",  # before queries of one token are merged with keys of all
    "fold",
    *_JOINED,
)

# Applied to every program: clean-up, then what only makes it faster to run.
EXACT_PIPELINE: tuple[str, ...] = (
    *PLAIN_PIPELINE,
    "layout",
    "canonicalize",
    "cse",
    "dce",
)
