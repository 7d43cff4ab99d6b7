"""`sdpa`: torch's fused attention for the CPU, with the head merge that usually follows it."""

from __future__ import annotations

import torch

from accel.ir.capability import LibraryMatch
from accel.ir.module import Op
from accel.ir.types import same_dim


class ScaledDotProduct:
    """attention without softcap; then permute(0, 2, 1, 3) and reshape to [B, S, H * E], if there.

    The kernel's output is laid out [B, S, H, E] in memory, so taking the head merge into the call
    turns two copies into none.
    """

    name = "sdpa"
    dtypes: frozenset[torch.dtype] = frozenset((torch.float32, torch.float64, torch.bfloat16))

    def match(self, op: Op) -> LibraryMatch | None:
        if op.name != "attention" or op.attribute("softcap") is not None:
            return None
        if op.result.dtype not in self.dtypes:
            return None
        ops = [op]
        user = op.result.single_user
        if user is not None and user.name == "permute" and user.attributes["axes"] == (0, 2, 1, 3):
            ops.append(user)
            reshape = user.result.single_user
            if reshape is not None and reshape.name == "reshape":
                batch, heads, queries, size = op.result.shape
                shape = reshape.result.shape
                merged = (
                    len(shape) == 3
                    and same_dim(shape[0], batch)
                    and same_dim(shape[1], queries)
                    and same_dim(shape[2], heads * size)
                )
                if merged:
                    ops.append(reshape)
        options = tuple(
            (name, op.attribute(name)) for name in ("scale", "causal", "offset", "window")
        )
        merge = ("none", "permute", "merge")[len(ops) - 1]
        return LibraryMatch(self.name, ops, (*options, ("heads", merge)))


class CudaAttention(ScaledDotProduct):
    """The same on GPUs: FlashAttention, cuDNN's or memory-efficient attention, torch chooses."""

    dtypes = ScaledDotProduct.dtypes | {torch.float16}
