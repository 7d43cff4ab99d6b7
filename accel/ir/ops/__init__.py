"""All op definitions, by family. Importing this package fills the registry.

structural   constants, kernels, vendor calls, the visible ATen fallback, terminators
elementwise  one table: unary, binary, comparisons; where, clamp, cast, bitcast
activation   relu, gelu, silu...: elementwise composites
shape        reshape, permute, slice, pad, cat...: ops that move elements and compute none
reduce       sum, mean, amax, argmax, var...
scan         cumsum, sort, topk, searchsorted...
index        gather, scatter, index, slices at run-time positions
contract     matmul, linear, convolutions
experts      products with a weight chosen for each row: mixtures of experts
norm         softmax, layer_norm, rms_norm, group_norm, batch_norm
attention    attention, rope
flash        attention for training, and its gradients
pages        paged caches: tokens found through a table
streaming    attention to the first and the last tokens
pool         pooling, upsampling, grid sampling
training     forward ops that also return what their backward needs, and losses
activation_backward, norm_backward, backward   the backward ops of training graphs
compression  quantize, dequantize, unpack_n_of_m: encoded weights and activations
random       draws from torch's generator, in program order
"""

from accel.ir.ops import (
    activation,
    activation_backward,
    attention,
    backward,
    compression,
    contract,
    elementwise,
    experts,
    flash,
    index,
    norm,
    norm_backward,
    pages,
    pool,
    random,
    reduce,
    scan,
    shape,
    streaming,
    structural,
    training,
)

__all__ = [
    "activation",
    "activation_backward",
    "attention",
    "backward",
    "compression",
    "contract",
    "elementwise",
    "experts",
    "flash",
    "index",
    "norm",
    "norm_backward",
    "pages",
    "pool",
    "random",
    "reduce",
    "scan",
    "shape",
    "streaming",
    "structural",
    "training",
]
