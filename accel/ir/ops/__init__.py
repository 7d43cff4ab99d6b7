"""All op definitions, by family. Importing this package fills the registry.

structural   constants, kernels, vendor calls, the visible ATen fallback, terminators
elementwise  one table: unary, binary, comparisons, activations; where, clamp, cast
shape        reshape, permute, slice, pad, cat...: ops that move elements and compute none
reduce       sum, max, argmax, cumsum, sort, topk...
index        gather, scatter, index, slices at run-time positions
nn           matmul, linear, conv, norms, softmax, attention, embedding, pooling
compression  quantize, dequantize, unpack_n_of_m, codebook: encoded weights and activations
random       draws from torch's generator, in program order
"""

from accel.ir.ops import (
    compression,
    elementwise,
    index,
    nn,
    random,
    reduce,
    shape,
    structural,
)

__all__ = [
    "compression",
    "elementwise",
    "index",
    "nn",
    "random",
    "reduce",
    "shape",
    "structural",
]
