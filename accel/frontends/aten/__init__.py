"""The table of ATen overloads, split by idea. Importing this package fills it.

    elementwise   from the IR's own table, plus promotion, powers, clamps, activations
    reductions    sums, extremes, variances, norms, scans, sorts
    views         reshapes, slices, permutations, cat, pad
    creation      ranges, fills
    indexing      embedding, gather, scatter, index
    contractions  linear, matmul, convolution, attention
    experts       grouped products of mixtures of experts
    scaled        products of float8 with scales
    nn            normalizations, softmax, pooling, upsampling
    random        draws
    training      saved statistics and gradients
    attention     CUDA's attention kernels with their gradients
    checks        overloads that leave no op

An overload that is in none of them is decomposed by PyTorch's rules and imported by parts; what has
no rule is a visible `accel.aten` (see `accel.frontends.importer`).
"""

from accel.frontends.aten import (
    attention,
    checks,
    contractions,
    creation,
    elementwise,
    experts,
    indexing,
    nn,
    random,
    reductions,
    scaled,
    training,
    views,
)
from accel.frontends.importer import LOWERINGS

__all__ = [
    "LOWERINGS",
    "attention",
    "checks",
    "contractions",
    "creation",
    "elementwise",
    "experts",
    "indexing",
    "nn",
    "random",
    "reductions",
    "scaled",
    "training",
    "views",
]
