"""cuDNN convolutions with a constant weight: bias, residual and ReLU ride along."""

from __future__ import annotations

import torch

from accel.backends.vendor.epilogue import match_epilogue
from accel.ir.capability import LibraryMatch
from accel.ir.module import Op, constant_name

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class CudnnConv:
    """`cudnn.conv`: 2-d convolution, then [add other and] ReLU if the convolution has one group."""

    name = "cudnn.conv"

    def match(self, op: Op) -> LibraryMatch | None:
        if op.name != "conv" or op.result.dtype not in _DTYPES or op.result.type.rank != 4:
            return None
        _, weight, bias = op.arguments()
        if weight is None or constant_name(weight) is None:
            return None
        if bias is not None and constant_name(bias) is None:
            return None
        found = match_epilogue(op, binary=True, after_binary=frozenset(("relu",)))
        ops, binary, unary = found.ops, found.binary, found.unary
        if unary != "relu" or op.attribute("groups") != 1:
            ops, binary, unary = [], "none", "none"
        options = tuple(
            (name, op.attribute(name))
            for name in ("stride", "padding", "dilation", "groups", "layout")
        )
        return LibraryMatch(self.name, [op, *ops], (*options, ("binary", binary), ("unary", unary)))
