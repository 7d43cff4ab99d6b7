"""Sample operands and attributes for every op definition: the op sweep's input, and backends'.

    for sample in op_samples("softmax", torch.float32):
        function = sample.function()
        inputs = sample.tensors(seed=0)

Builders are in `samples_elementwise`, `samples_tensor` and `samples_nn`; `sample_base` explains how
to write one. A definition without samples fails the sweep.
"""

from tests.ir import samples_elementwise, samples_nn, samples_tensor, samples_training
from tests.ir.sample_base import (
    ALL_DTYPES,
    DEFAULT_SIZES,
    OTHER_SIZES,
    REGISTRY,
    Operand,
    Sample,
    draw,
    op_samples,
    resolve,
    sampled_definitions,
    size_variants,
    substitute_attribute,
)

__all__ = [
    "ALL_DTYPES",
    "DEFAULT_SIZES",
    "OTHER_SIZES",
    "REGISTRY",
    "Operand",
    "Sample",
    "draw",
    "op_samples",
    "resolve",
    "sampled_definitions",
    "samples_elementwise",
    "samples_nn",
    "samples_tensor",
    "samples_training",
    "size_variants",
    "substitute_attribute",
]
