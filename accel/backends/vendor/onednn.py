"""oneDNN (weights packed once, fused epilogues) and MKL linears, oneDNN convolutions."""

from __future__ import annotations

import torch

from accel.backends.vendor.epilogue import match_epilogue
from accel.ir.capability import LibraryMatch
from accel.ir.module import Op, constant_name
from accel.ir.op import Trait
from accel.ir.types import product


class OneDnnLinear:
    """`onednn.linear`: float32 or bfloat16, bias, add, one activation.

    The weight is packed if it is constant; one computed at run time is taken as it is, if dense.
    """

    name = "onednn.linear"

    def match(self, op: Op) -> LibraryMatch | None:
        if op.name != "linear" or op.result.dtype not in (torch.float32, torch.bfloat16):
            return None
        weight = op.operand("weight")
        if weight is None or op.result.type.rank < 2:
            return None
        if weight.op is not None and weight.op.has(Trait.VIEW):
            return None  # MKL takes a transposed weight without copying it
        epilogue = match_epilogue(op, binary=True, after_binary=frozenset(("relu",)))
        return LibraryMatch(self.name, [op, *epilogue.ops], epilogue.options())


class TorchLinear:
    """`torch.linear`: any linear, as PyTorch itself computes it (MKL for float32)."""

    name = "torch.linear"

    def match(self, op: Op) -> LibraryMatch | None:
        return LibraryMatch(self.name, [op]) if op.name == "linear" else None


class ExpertLinear:
    """`experts.linear`: a mixture's products, one linear an expert that has rows.

    The call reads the experts' numbers on the host, so it is none for a CUDA graph: up to `few`
    rows are left to the op's decomposition, which copies their weights.
    """

    name = "experts.linear"

    def __init__(self, few: int = 0) -> None:
        self.few = few

    def match(self, op: Op) -> LibraryMatch | None:
        if op.name != "expert_linear":
            return None
        rows = product(op.operands[2].shape)
        if isinstance(rows, int) and rows <= self.few:
            return None
        return LibraryMatch(self.name, [op])


class OneDnnConv:
    """`onednn.conv`: 2-d float32 convolution, constant weight, bias, add, one activation."""

    name = "onednn.conv"

    def match(self, op: Op) -> LibraryMatch | None:
        if op.name != "conv" or op.result.dtype != torch.float32 or op.result.type.rank != 4:
            return None
        weight = op.operand("weight")
        if weight is None or constant_name(weight) is None or not op.result.type.is_static:
            return None
        epilogue = match_epilogue(op, binary=True, after_binary=frozenset(("relu",)))
        options = tuple(
            (name, op.attribute(name))
            for name in ("stride", "padding", "dilation", "groups", "layout")
        )
        return LibraryMatch(self.name, [op, *epilogue.ops], (*options, *epilogue.options()))
