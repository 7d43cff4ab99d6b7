"""Passes: one technique a file. Importing this package registers all of them by name.

Start at `accel.passes.base` (what a pass is), then `accel.passes.manager` (what runs them), and
docs/writing_a_pass.md. `accel.passes.pipelines` lists the default pipelines.
"""

from accel.passes import (
    cluster,
    cse,
    dce,
    decompose,
    fuse,
    low_rank,
    quantize,
    reparameterize,
    select_libraries,
    sparsify,
)
from accel.passes.base import all_passes

__all__ = [
    "all_passes",
    "cluster",
    "cse",
    "dce",
    "decompose",
    "fuse",
    "low_rank",
    "quantize",
    "reparameterize",
    "select_libraries",
    "sparsify",
]
